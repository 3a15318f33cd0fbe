"""Runs side by side: the table to choose from (filter, sort, tick several; name, star, note, remove), and of the ticked
ones curves, parameters, results with intervals, the same phantoms."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import ipywidgets
import optuna
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl
from vla_lib.core.run_folder import read_record, read_results, runs_root
from vla_lib.workbench import runs, tables
from vla_lib.workbench.markup import Html, Markup, joined
from vla_lib.workbench.notebook import interactive
from vla_lib.workbench.plots.style import drawn
from vla_lib.workbench.queue import entry_rows, open_study

FIRST = ["run", "star", "state", "started", "min"]
LAST = ["data", "cache", "git", "host"]
EVALUATE = "06_evaluate"
ROWS = 30  # shown at a time; the filter finds the others
LONGEST = 36  # letters of a cell; the rest is seen when it is pointed at
TICKED = 4  # at first, where none are named
WHOLE = {"min_width": "max-content", "overflow": "visible"}  # the table scrolls, not each row
Draw = Callable[[list[Path]], Figure | HTML]
NOT_COMPARED = ("sweep", "night", "run-all", "demo", "09_compare_runs")  # runs of runs


def overview(sweep: str = "", notebook: str = "") -> pd.DataFrame:
    """One row a run, newest first, indexed by its folder's name: what a person says of it, state, time, where they
    differ parameters, data, code and machine, key results. `sweep`: its entries alone with their objective, best first.
    """
    entries = {row["run"]: row for row in sweep_rows(sweep) if row["run"]} if sweep else {}
    folders = [runs_root() / name for name in entries] if sweep else runs.find_runs(notebook)
    folders = [path for path in folders if (path / "run.json").exists()]
    folders = [path for path in folders if read_record(path)["name"] not in NOT_COMPARED]
    frame = runs.table(of=folders)
    if not folders:
        return pd.DataFrame(columns=FIRST)
    frame["min"] = (frame["duration_s"].astype(float) / 60).round(1)
    frame["started"] = frame["started"].str.slice(0, 16).str.replace("T", " ")
    said = [runs.about(path) for path in folders]
    frame["star"] = ["★" if one["star"] else "" for one in said]
    shown = runs.short(frame, [*FIRST, *LAST])
    names = list(shown.pop("run"))
    shown.insert(0, "run", [one["label"] or name for one, name in zip(said, names, strict=True)])
    shown["note"] = [one["note"] for one in said]
    if sweep:
        shown.insert(1, "setting", [entries[name]["setting"] for name in names])
        shown["state"] = [entries[name]["state"] for name in names]
        shown["objective"] = [entries[name]["value"] for name in names]
    shown.index = pd.Index(names)
    alike = [name for name in LAST if shown[name].astype(str).nunique() < 2]
    last = [*(name for name in LAST if name not in alike), "note"]
    ordered = [*(name for name in shown.columns if name not in [*LAST, "note"]), *last]
    newest_first = shown[ordered].iloc[::-1]
    if sweep:
        return newest_first.sort_values("objective", ascending=not _large_is_good(sweep), kind="stable")
    return newest_first


class RunBrowser:
    """All runs, those of one notebook, or a sweep's entries; `chosen` are the ticked ones, in the table's order.

    compare: names of the runs that are ticked at first; none: the first rows of the table. sort: a column.
    """

    def __init__(
        self, sweep: str = "", notebook: str = "", words: str = "", sort: str = "", compare: Sequence[str] = ()
    ):
        self._of = (sweep, notebook)
        self.frame = overview(sweep, notebook)
        if sort and sort not in self.frame:
            raise UserError(f"There is no column {sort} to sort by; there are {', '.join(self.frame.columns)}.")
        self._views: list[Callable[[], None]] = []
        box = {"layout": {"width": "330px"}, "style": {"description_width": "60px"}}
        self.filter = ipywidgets.Text(value=words, description="filter", placeholder="words, or column=value", **box)
        self.sort = ipywidgets.Dropdown(options=["", *self.frame.columns], value=sort, description="sort by", **box)
        self.down = ipywidgets.ToggleButton(description="descending", layout={"width": "110px"})
        self.label = ipywidgets.Text(description="name", **box)
        self.note = ipywidgets.Text(description="note", **box)
        self.star, self.save, self.delete, self.really = (
            ipywidgets.Button(description=text, layout={"width": "110px"})
            for text in ("Star", "Save", "Remove", "Yes, remove")
        )
        self.message, self._head = Html(), Html(layout=WHOLE)
        self._rows, self._ticks = ipywidgets.VBox(layout=WHOLE), dict[str, ipywidgets.Checkbox]()
        self._ticked = [runs.find_run(name).name for name in compare] or list(self._shown().index[:TICKED])
        for control in (self.filter, self.sort, self.down):
            control.observe(lambda _change: self._fill(), "value")
        self.save.on_click(lambda _button: self._say(label=self.label.value, note=self.note.value))
        self.star.on_click(lambda _button: self._say(star=not all(runs.about(run)["star"] for run in self.chosen)))
        self.delete.on_click(lambda _button: self._ask())
        self.really.on_click(lambda _button: self._remove())
        self._fill()

    @property
    def chosen(self) -> list[Path]:
        """The ticked runs' folders."""
        return [runs_root() / name for name in self._sorted().index if name in self._ticked]

    def _sorted(self) -> pd.DataFrame:
        column = self.sort.value
        if not column:
            return self.frame.iloc[::-1] if self.down.value else self.frame
        return self.frame.sort_values(
            column, ascending=not self.down.value, key=lambda values: values.map(_rank), kind="stable"
        )

    def _shown(self) -> pd.DataFrame:
        """The rows that hold every word of the filter (`column=value`: in that column), without empty columns."""
        frame = self._sorted()
        for word in self.filter.value.split():
            column, equals, value = word.partition("=")
            of = frame[[column]] if equals and column in frame else frame.assign(folder=frame.index)
            text = of.map(_text).agg(" ".join, axis=1) if len(of) else pd.Series(dtype=str)
            frame = frame[text.str.contains(value if of.shape[1] == 1 else word, case=False, regex=False).astype(bool)]
        says = [name == "run" or frame[name].map(_text).astype(bool).any() for name in frame]
        return frame.loc[:, says]

    def _fill(self) -> None:
        """Draw the table anew."""
        frame = self._shown()
        longest = [max([0, *frame[name].head(ROWS).map(_text).map(len)]) for name in frame]
        letters = zip(map(len, frame.columns), longest, strict=True)  # in bold, and not
        widths = " ".join(f"{max(0.72 * head, 0.66 * min(long, LONGEST)):.1f}em" for head, long in letters)
        grid = f"display:grid;grid-template-columns:{widths};column-gap:1em;font-size:11px"
        self._head.value = _line(frame.columns, grid + ";font-weight:bold;margin-left:28px")
        self._ticks = {}
        lines = []
        for name, *values in frame.head(ROWS).itertuples():
            tick = ipywidgets.Checkbox(value=name in self._ticked, indent=False, layout={"width": "24px"})
            tick.observe(lambda change, name=name: self._tick(name, change["new"]), "value")
            self._ticks[name] = tick
            lines.append(ipywidgets.HBox([tick, Html(_line(values, grid), layout=WHOLE)], layout=WHOLE))
        self._rows.children = lines
        more = (
            f"{ROWS} of {len(frame)} runs; the filter finds the others" if len(frame) > ROWS else f"{len(frame)} runs"
        )
        self.message.value = more if len(frame) else "No run fits the filter."

    def _tick(self, name: str, on: bool) -> None:
        self._ticked = [one for one in self._ticked if one != name] + [name] * on
        if on:
            self.label.value, self.note.value = (runs.about(runs_root() / name)[key] for key in ("label", "note"))
        self.really.layout.visibility = "hidden"
        for redraw in self._views:
            redraw()

    def _say(self, **said: Any) -> None:
        """Write what a person says of the ticked runs; a name or a note is of one run alone."""
        if not self.chosen or ("label" in said and len(self.chosen) > 1):
            self.message.value = f"Tick the {'one run' if 'label' in said else 'runs'} that you mean."
            return
        for run in self.chosen:
            runs.annotate(run, **said)
        self._reload()

    def _ask(self) -> None:
        try:
            paths, size = runs.removable(str(run) for run in self.chosen)
        except UserError as error:
            self.message.value = str(error)
            return
        self.message.value = f"Remove {', '.join(path.name for path in paths)}, {size:.0f} MB, checkpoints included?"
        self.really.layout.visibility = "visible" if paths else "hidden"

    def _remove(self) -> None:
        self.really.layout.visibility = "hidden"
        said = runs.remove(str(run) for run in self.chosen)
        self._ticked = []
        self._reload()
        self.message.value = said

    def _reload(self) -> None:
        self.frame = overview(*self._of)
        self._fill()
        for redraw in self._views:
            redraw()

    def view(self, draw: Draw) -> Any:
        """What `draw` makes of the ticked runs; in JupyterLab a widget that follows the ticks."""
        if not interactive():
            return draw(self.chosen)
        picture, text = ipywidgets.Image(format="png", layout={"max_width": "1000px"}), Html()

        def redraw() -> None:
            try:
                made = draw(self.chosen)
            except UserError as error:
                made = tables.sentence(str(error))
            is_figure = isinstance(made, Figure)
            picture.layout.display, text.layout.display = ("block", "none") if is_figure else ("none", "block")
            if isinstance(made, Figure):
                picture.value = drawn(made)
            else:
                text.value = Markup(made.data)  # escaped by whoever made it: see `markup`

        self._views.append(redraw)
        redraw()
        return ipywidgets.VBox([picture, text])

    def _ipython_display_(self) -> None:
        if not interactive():
            display(tables.fit(self._shown()))
            return
        self.really.layout.visibility = "hidden"
        top = ipywidgets.HBox([self.filter, self.sort, self.down])
        said = ipywidgets.HBox([self.label, self.note, self.save, self.star, self.delete, self.really])
        area = ipywidgets.VBox([self._head, self._rows], layout={"max_height": "420px", "overflow": "auto"})
        display(ipywidgets.VBox([top, area, self.message, said]))


def _line(values: Any, grid: str) -> Markup:
    cell = Markup("<span style='overflow:hidden;text-overflow:ellipsis;white-space:nowrap' title='{0}'>{0}</span>")
    return Markup("<div style='{}'>{}</div>").format(grid, joined(cell.format(_text(value)) for value in values))


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rank(value: Any) -> tuple[int, float, str]:
    """Sorts numbers by value, then text, then what is missing."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return (2, 0.0, "")
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


def sweep_rows(sweep: str) -> list[dict[str, Any]]:
    """The entries of a sweep or night, as its study has them now. Raises UserError where there is none."""
    return list(entry_rows(study_of(sweep)).values())


def study_of(sweep: str) -> optuna.Study:
    """The Optuna study of a sweep or night. Raises UserError where there is none."""
    return open_study(runs.find_run(sweep))


def objective(sweep: str) -> str:
    """The result that a sweep makes small or large."""
    return str(read_record(runs.find_run(sweep))["parameters"].get("objective", "objective"))


def curves(chosen: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each run's metrics.jsonl, by its label; runs without any are left out."""
    found = {runs.label_of(path): read_jsonl(path / "metrics.jsonl") for path in chosen}
    return {label: rows for label, rows in found.items() if rows}


def parameters(chosen: Sequence[Path]) -> pd.DataFrame:
    """The parameters in which the runs differ, a row each, a column a run."""
    known = {runs.label_of(path): read_record(path)["parameters"] for path in chosen}
    names = dict.fromkeys(name for one in known.values() for name in one)
    rows = [{"parameter": name} | {label: _words(one.get(name, "")) for label, one in known.items()} for name in names]
    return pd.DataFrame([row for row in rows if len({*list(row.values())[1:]}) > 1], columns=["parameter", *known])


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def evaluations(chosen: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What newer evaluations found in closed loop, of the runs themselves and of the trainings whose checkpoints they
    name: label -> {"summary", "rollouts", ...}. The newest evaluation of a checkpoint counts."""
    found: dict[str, dict[str, Any]] = {}
    chosen = list(chosen)
    for evaluation in runs.find_runs(EVALUATE):
        known = read_results(evaluation)
        plain = {known.get("name"), *known.get("compared_with", {})}  # without masked or late inputs
        for name, loop in known.get("closed_loop", {}).items():
            of = Path(loop["settings"]["checkpoint"]).parent.parent
            for path in chosen:
                if path == evaluation:
                    found[f"{runs.label_of(path)}: {name}"] = loop
                elif path.resolve() == of.resolve() and name in plain:
                    found[runs.label_of(path)] = loop
    return found


def results(chosen: Sequence[Path]) -> pd.DataFrame:
    """One row a run: its key results, and of its evaluation the successes with their 95 % interval."""
    rows = []
    loops = evaluations(chosen)
    for path in chosen:
        label, plain = runs.label_of(path), runs.plain_results(path)
        row: dict[str, Any] = {"run": label} | {name: plain[name] for name in runs.KEY_RESULTS if name in plain}
        if (loop := loops.get(label)) and loop["summary"]["rollouts"]:
            low, high = (100 * value for value in loop["summary"]["interval_95"])
            row["closed loop"] = f"{loop['summary']['successes']} of {loop['summary']['rollouts']}"
            row["95 % interval"] = f"{low:.0f} to {high:.0f} %"
        rows.append(row)
    return pd.DataFrame(rows)


def pairs(chosen: Sequence[Path]) -> pd.DataFrame:
    """Every two closed loops on the phantoms that both met: who succeeded where, p value of the exact sign test."""
    from vla_lib.evaluation.closed_loop import sign_test

    wins = {
        label: {row["seed"]: bool(row["success"]) for row in loop["rollouts"]}
        for label, loop in evaluations(chosen).items()
    }
    rows = []
    for (first, one), (other, two) in combinations(wins.items(), 2):
        if seeds := sorted(one.keys() & two.keys()):
            counted = sign_test([(one[seed], two[seed]) for seed in seeds])
            rows.append({"first": first, "other": other, "phantoms": len(seeds), **counted})
    return pd.DataFrame(rows).rename(columns=lambda name: str(name).replace("_", " "))


def checkpoints(chosen: Iterable[Path]) -> pd.DataFrame:
    """The best checkpoint of each run that has one, else its newest: for `checkpoint` of notebooks 06 and 07."""
    rows = [(runs.label_of(path), str(file)) for path in chosen for file in runs.checkpoints_of(path)[:1]]
    return pd.DataFrame(rows, columns=["run", "checkpoint"])


def settings(sweep: str) -> pd.DataFrame:
    """One row a setting of a sweep, best first: its repetitions that ended, mean, smallest and largest value of the
    objective."""
    frame = pd.DataFrame(sweep_rows(sweep)).dropna(subset=["value"])
    spread = frame.astype({"value": float}).groupby("setting", sort=False)["value"].agg(["count", "mean", "min", "max"])
    return spread.sort_values("mean", ascending=not _large_is_good(sweep)).reset_index()


def _large_is_good(sweep: str) -> bool:
    return study_of(sweep).direction == optuna.study.StudyDirection.MAXIMIZE
