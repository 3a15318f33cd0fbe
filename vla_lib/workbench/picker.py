"""Which checkpoints a notebook is about, by parameters or by clicks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
from IPython.display import display

from vla_lib.features.binding import model_words
from vla_lib.training.checkpoint import read_checkpoint
from vla_lib.workbench import runs
from vla_lib.workbench.markup import Html
from vla_lib.workbench.notebook import dataset_path, interactive, pick, shown


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

    def vl_models(self) -> str:
        """A line for each: whose VL features it was trained on, and that the model has random weights where it has."""
        found = {name: read_checkpoint(path)["binding"] for name, path in (self._first.value, *self._others.value)}
        return "\n".join(f"{name}: VL features of {model_words(binding)}" for name, binding in found.items())

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
