"""The checkpoints on disk in; the one in question and those to compare it with, chosen by parameters or by clicks, out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_lib.workbench import runs
from vla_lib.workbench.notebook import dataset_path, interactive, shown


class CheckpointPicker:
    """`checkpoint`: a path, or empty for the newest run's best one; `compare_with`: PATH or NAME=PATH each, None where one is all that is wanted.

    In JupyterLab two lists choose others; `chosen` is what stands in them when it is read. Headless it is what was given.
    """

    def __init__(self, checkpoint: str = "", compare_with: Sequence[str] | None = None):
        first = checkpoint or str(runs.newest_checkpoint("*_best.pt"))
        pairs = [_named(text) for text in (first, *(compare_with or ()))]
        self._one = compare_with is None
        self._pairs = list(dict.fromkeys(pairs))
        self.widget: Any = None
        if interactive():
            self._build()

    @property
    def chosen(self) -> tuple[str, ...]:
        """NAME=PATH of each, the one in question first."""
        pairs = self._pairs if self.widget is None else list(dict.fromkeys([self._first.value, *self._others.value]))
        return tuple(f"{name}={path}" for name, path in pairs)

    @property
    def first(self) -> Path:
        """The one in question."""
        return Path(self._pairs[0][1] if self.widget is None else self._first.value[1])

    def _build(self) -> None:
        import ipywidgets

        on_disk = [(runs.name_of(path), path) for path in runs.find_checkpoints()]
        options = [(f"{name}   ({shown(path)})", (name, path)) for name, path in dict.fromkeys(self._pairs + on_disk)]
        wide = {"layout": {"width": "900px"}, "style": {"description_width": "100px"}}
        self._first = ipywidgets.Dropdown(options=options, value=self._pairs[0], description="checkpoint", **wide)
        rest = tuple(self._pairs[1:])
        self._others = ipywidgets.SelectMultiple(
            options=options, value=rest, rows=6, description="compare with", **wide
        )
        lists = [self._first] if self._one else [self._first, self._others]
        self.widget = ipywidgets.VBox([*lists, ipywidgets.HTML("Run the cells below again after choosing.")])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if self.widget is not None:
            display(self.widget)
        else:
            print("\n".join(f"{name}: {shown(path)}" for name, path in self._pairs))


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if equals and not dataset_path(text).exists():
        return name, dataset_path(path)
    return runs.name_of(dataset_path(text)), dataset_path(text)
