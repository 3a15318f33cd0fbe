"""The table of runs to choose from: filter, sort, tick several; name, star, note, remove. Views follow the ticks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import runs_root
from vla_lib.workbench import comparison, runs, tables
from vla_lib.workbench.markup import Html, Markup, joined
from vla_lib.workbench.notebook import interactive
from vla_lib.workbench.plots.style import drawn

ROWS = 30  # shown at a time; the filter finds the others
LONGEST = 36  # letters of a cell; the rest is seen when it is pointed at
TICKED = 4  # at first, where none are named
WHOLE = {"min_width": "max-content", "overflow": "visible"}  # the table scrolls, not each row
Draw = Callable[[list[Path]], Figure | HTML]


class RunBrowser:
    """All runs, those of one notebook, or a sweep's entries; `chosen` are the ticked ones, in the table's order.

    compare: names of the runs that are ticked at first; none: the first rows of the table. sort: a column.
    """

    def __init__(
        self, sweep: str = "", notebook: str = "", words: str = "", sort: str = "", compare: Sequence[str] = ()
    ):
        self._of = (sweep, notebook)
        self.frame = comparison.overview(sweep, notebook)
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
        self.frame = comparison.overview(*self._of)
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
