"""What a person clicks in JupyterLab, and the static twin of each for headless runs and HTML pages: the same plots."""

import base64
import io
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure

from vla_lib.core.errors import UserError
from vla_lib.episodes import Episode, EpisodeFiles, build_steps, find_episodes
from vla_lib.episodes.episode import sensor_image
from vla_lib.episodes.prepared import known_clocks
from vla_lib.workbench import runs
from vla_lib.workbench.markup import Html, Markup, joined, page
from vla_lib.workbench.notebook import dataset_path, interactive, pick, shown
from vla_lib.workbench.plots.episodes import overview
from vla_lib.workbench.triage import episode_table

STEP_S = 0.1
ALL = "all datasets"


def drawn(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a picture file: `png`, or `jpeg` where several stand in one page (a third of the bytes)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, pil_kwargs={"quality": 85} if kind == "jpeg" else None)
    return buffer.getvalue()


def offline_slider(figures: Iterable[Figure], labels: Sequence[str]) -> HTML:
    """A range input over pictures of the figures: it works in a saved page without a kernel and without the network."""
    identifier = f"s{uuid.uuid4().hex[:8]}"
    images = []
    for number, (label, figure) in enumerate(zip(labels, figures, strict=True)):
        data = base64.b64encode(drawn(figure, "jpeg")).decode()
        image = "<img class='{}' alt='{}' style='max-width:100%;display:{}' src='data:image/jpeg;base64,{}'>"
        images.append(Markup(image).format(identifier, label, "none" if number else "block", data))
    script = Markup(
        "document.querySelectorAll('.{0}').forEach((e,n)=>e.style.display=n==this.value?'block':'none');"
        "document.getElementById('{0}').textContent=document.querySelectorAll('.{0}')[this.value].alt"
    )
    control = Markup(
        "<input type='range' min='0' max='{}' value='0' style='width:60%' aria-label='instant' oninput=\"{}\"> "
        "<span id='{}'>{}</span>"
    ).format(len(labels) - 1, script.format(identifier), identifier, labels[0])
    return page(Markup("<div>{}{}</div>").format(control, joined(images)))


# ---- episodes


def best_report(reports: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report of the episode with the most valid steps. Raises UserError where every one is rejected."""
    kept = [report for report in reports if report["verdict"] != "rejected"]
    if not kept:
        raise UserError(
            "Every episode is rejected, so there is nothing to show; the table of verdicts gives the reasons."
        )
    return max(kept, key=lambda report: report["summary"]["valid"])


class EpisodeView:
    """One opened episode with its action steps and thinned A-scans, ready to be drawn at any instant."""

    def __init__(self, files: EpisodeFiles | Episode, action_hz: float = 10.0):
        self.episode = files if isinstance(files, Episode) else Episode.open(files, known_clocks(files.path))
        self.steps = build_steps(self.episode, action_hz)
        self.mmode = sensor_image(self.episode)

    def draw(self, at_s: float) -> Figure:
        """Everything at `at_s` seconds since the first robot row."""
        return overview(self.episode, self.steps, at_s, self.mmode)

    def slider(self, instants: int = 6) -> HTML:
        """The static twin of the time slider: `instants` moments, evenly over the motion."""
        times = [self.episode.duration_s * (k + 0.5) / instants for k in range(instants)]
        return offline_slider((self.draw(t_s) for t_s in times), [f"{t_s:.1f} s" for t_s in times])


class EpisodeBrowser:
    """A root, dropdowns for dataset and episode with a text filter, a time slider with play, the drawn instant."""

    def __init__(self, root: Path, action_hz: float = 10.0):
        self.action_hz = action_hz
        self._files: list[EpisodeFiles] = []
        self._label: dict[Path, str] = {}
        self._view: EpisodeView | None = None
        wide, late = {"width": "640px"}, {"continuous_update": False}
        self.root = ipywidgets.Text(value=str(root), description="root", layout=wide, **late)
        self.dataset = ipywidgets.Dropdown(options=[ALL], description="dataset")
        self.filter = ipywidgets.Text(placeholder="part of a name or verdict", description="filter", **late)
        self.chosen = ipywidgets.Dropdown(description="episode", layout=wide)
        self.time = ipywidgets.IntSlider(description="time (0.1 s)", layout=wide, **late)
        self.play = ipywidgets.Play(interval=700, step=5)
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "1100px"})
        self.message = Html()
        ipywidgets.jslink((self.play, "value"), (self.time, "value"))
        self.root.observe(self._read, "value")
        self.dataset.observe(self._list, "value")
        self.filter.observe(self._list, "value")
        self.chosen.observe(self._open, "value")
        self.time.observe(self._draw, "value")
        self._read()
        which, when = ipywidgets.HBox([self.dataset, self.filter]), ipywidgets.HBox([self.play, self.time])
        self.widget = ipywidgets.VBox([self.root, which, self.chosen, when, self.message, self.picture])

    def _ipython_display_(self) -> None:
        display(self.widget)

    def _read(self, _change: Any = None) -> None:
        root = dataset_path(self.root.value)
        try:
            self._files = find_episodes(root)
        except UserError as error:
            self._files, self.message.value = [], str(error)
        table = episode_table(root) if self._files else pd.DataFrame(columns=["episode", "verdict"])
        verdicts = zip(self._files, table["verdict"], strict=True)
        self._label = {files.path: f"{files.name}  [{verdict}]" for files, verdict in verdicts}
        self.dataset.options = [ALL, *sorted({files.dataset for files in self._files})]
        self._list()

    def _list(self, _change: Any = None) -> None:
        fits = [files for files in self._files if self.dataset.value in (ALL, files.dataset)]
        fits = [files for files in fits if self.filter.value.lower() in self._label[files.path].lower()]
        self.chosen.options = [(self._label[files.path], files) for files in fits]
        self.chosen.index = 0 if fits else None
        if not self._files:
            self.message.value = f"There is no recorded episode below {self.root.value}."
        elif not fits:
            self.message.value = "No episode fits the filter."

    def _open(self, _change: Any = None) -> None:
        if self.chosen.value is None:
            return
        try:
            self._view = EpisodeView(self.chosen.value, self.action_hz)
        except UserError as error:
            self._view, self.picture.value, self.message.value = None, b"", str(error)
            return
        self.message.value = ""
        last = int(self._view.episode.duration_s / STEP_S)
        self.play.max = self.time.max = last
        if self.time.value == last // 2:
            self._draw()
        self.time.value = last // 2

    def _draw(self, _change: Any = None) -> None:
        if self._view is not None:
            self.picture.value = drawn(self._view.draw(self.time.value * STEP_S))


# ---- checkpoints


class CheckpointPicker:
    """The checkpoint in question and those to compare it with, by parameters or, in JupyterLab, from two lists.

    checkpoint: a path, or empty for the newest run's best one; compare_with: PATH or NAME=PATH each, None where one is
    all that is wanted. `chosen` is what the lists hold when it is read; headless it is what was given.
    """

    def __init__(self, checkpoint: str = "", compare_with: Sequence[str] | None = None):
        first = checkpoint or str(runs.newest_checkpoint("*_best.pt"))
        self._pairs = list(dict.fromkeys(_named(text) for text in (first, *(compare_with or ()))))
        on_disk = [(runs.name_of(path), path) for path in runs.find_checkpoints()] if interactive() else []
        options = [(f"{name}   ({shown(path)})", (name, path)) for name, path in dict.fromkeys(self._pairs + on_disk)]
        wide = {"layout": {"width": "900px"}, "style": {"description_width": "100px"}, "options": options}
        rest = tuple(self._pairs[1:])
        self._first = ipywidgets.Dropdown(value=self._pairs[0], description="checkpoint", **wide)
        self._others = ipywidgets.SelectMultiple(value=rest, rows=6, description="compare with", **wide)
        lists = [self._first] if compare_with is None else [self._first, self._others]
        for each in lists:
            each.observe(self._picked, "value")
        self.widget = ipywidgets.VBox([*lists, Html("Run the cells below again after choosing.")])

    @property
    def chosen(self) -> tuple[str, ...]:
        """NAME=PATH of each, the one in question first."""
        return tuple(f"{name}={path}" for name, path in dict.fromkeys([self._first.value, *self._others.value]))

    @property
    def first(self) -> Path:
        """The one in question."""
        return Path(self._first.value[1])

    def _picked(self, _change: Any) -> None:
        first, *others = self.chosen
        pick(checkpoint=first, compare_with=others)

    def _ipython_display_(self) -> None:
        if interactive():
            display(self.widget)
        else:
            print("\n".join(f"{name}: {shown(path)}" for name, path in self._pairs))


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if equals and not dataset_path(text).exists():
        return name, dataset_path(path)
    return runs.name_of(dataset_path(text)), dataset_path(text)
