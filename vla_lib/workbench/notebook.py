"""A notebook's side of its run: `begin` after the parameters cell gives the run; its settings, results and end go
through it."""

import atexit
import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import PROJECT, RunFolder, read_record, write_results
from vla_lib.core.settings import Settings
from vla_lib.workbench import parameters as nb_parameters
from vla_lib.workbench.jobs import JobCancelled
from vla_lib.workbench.runs import data_state, find_run

RUN_DIR_VARIABLE = "VLA_RUN_DIR"
S = TypeVar("S", bound=Settings)


class NotebookRun:
    """The run that a notebook's cells work in.

    Headless under `vla run`, the driver owns the record; in JupyterLab or under plain papermill this kernel does, so
    that the record stays true when a cell fails (state failed) or the kernel ends early (cancelled, or lost after a
    kill).
    """

    def __init__(self, path: Path, values: dict[str, Any], folder: RunFolder | None, notebook: Path):
        self.path = path
        self.parameters = values
        self.notebook = notebook
        self.cell_values = dict(values)  # before what a person picked in a widget
        self._folder = folder

    def settings(self, kind: type[S], **more: Any) -> S:
        """A stage's settings from the notebook's parameters and `more`. Raises UserError where a value is refused, for
        a parameter that is neither a setting nor used by a cell, which would do nothing, and for a setting that the
        parameters cell lacks, whose default would hold in silence."""
        known = {field.name for field in dataclasses.fields(kind)}
        _, used = nb_parameters.names(self.notebook)
        if idle := [name for name in self.parameters if name not in known | used]:
            others = ", ".join(sorted(known - self.parameters.keys()))
            raise UserError(
                f"The parameter {idle[0]} is no setting of {self.notebook.stem} and no cell uses it; correct or remove "
                f"it. Settings that the notebook does not name: {others}."
            )
        if lacking := sorted(known - self.parameters.keys() - more.keys() - set(kind.unnamed.split())):
            raise UserError(
                f"The parameters cell of {self.notebook.stem} lacks {', '.join(lacking)}; write each there, as "
                "`name: type = value  # what it is`: a default would hold in silence."
            )
        return kind.of(self.parameters, **more)

    def pick(self, **values: Any) -> None:
        """What a person picked in a widget becomes the run's parameters: in run.json, repeated by `vla rerun`, and
        kept when the notebook is run again from its top, until the parameters cell says something else."""
        for name, value in values.items():
            if name in self.parameters and value != self.parameters[name]:
                self.parameters[name] = value
                _picks[self.notebook.stem, name] = self.cell_values[name], value
                if self._folder is not None:
                    self._folder.note_parameters(self.parameters)

    def add_results(self, **values: Any) -> dict[str, Any]:
        """Merge `values` into the run's results.json; returns all results."""
        return write_results(self.path, values)

    def finish(self) -> None:
        """Close the record as done (in the last cell), also after a cell that failed and was mended, or a scratch
        cell."""
        if self._folder is not None:
            self._folder.finish("done", mended=True)
        print(f"done: {shown(self.path)}")

    def leave(self, why: str = "the kernel was shut down before the last cell") -> None:
        """Close the record as cancelled where it still runs."""
        if self._folder is not None:
            self._folder.finish("cancelled", why)

    def _cell_ended(self, result: Any) -> None:
        error = result.error_before_exec or result.error_in_exec
        if error is not None and self._folder is not None:
            cancelled = isinstance(error, JobCancelled | KeyboardInterrupt) or type(error).__name__ == "CancelledError"
            self._folder.finish("cancelled" if cancelled else "failed", f"{type(error).__name__}: {error}")


_current: NotebookRun | None = None
_picks: dict[tuple[str, str], tuple[Any, Any]] = {}  # notebook and parameter -> the cell's value, and what was picked


def pick(**values: Any) -> None:
    """`NotebookRun.pick` of the run that this kernel works in; nothing where there is none."""
    if _current is not None:
        _current.pick(**values)


def begin(name: str, namespace: dict[str, Any]) -> NotebookRun:
    """Check the parameters in `namespace` (the notebook's `globals()`) by name and type, and open the run folder, or
    that of the run which `resume_run` names again.

    Raises UserError for a wrong type, for a name that papermill set and the notebook does not have, and for one that
    the notebook has and the parameters cell, as it ran last, does not.
    """
    global _current
    path = nb_parameters.notebook_path(name)
    refused, file = None, {}
    try:
        file = nb_parameters.read_parameters(path)
    except UserError as error:
        refused = error
    known = nb_parameters.run_last(namespace.get("In", []), file)  # a cell counts as it ran, saved or not
    if refused is not None and not known:
        raise refused
    nb_parameters.refuse_unknown(path, nb_parameters.injected_names(namespace.get("In", [])), known)
    if gone := [f"{key} (default {file[key].default!r})" for key in file if key not in known]:
        odd = ", ".join(key for key in known if key not in file) or "nothing"
        raise UserError(f"The parameters cell lacks {', '.join(gone)} and has {odd} in its place; name it so, or save.")
    if missing := [key for key in known if key not in namespace]:
        raise UserError(f"Run the parameters cell first: {', '.join(missing)} not set.")
    values = nb_parameters.resolve(path, {key: namespace[key] for key in known}, known=known)
    shell = _shell()
    if _current is not None and shell is not None:
        shell.events.unregister("post_run_cell", _current._cell_ended)
        atexit.unregister(_current.leave)
        _current.leave("the notebook was run again from its top")
    folder = None
    if RUN_DIR_VARIABLE not in os.environ:
        noted: dict[str, Any] = {"notebook": str(path), "given": sorted(values), "data": data_state(values)}
        again = resumed(path.stem, values)
        if again is not None:
            folder = RunFolder.resume(again, values | {"resume_run": ""})
        else:
            folder = RunFolder.create(path.stem, values, **noted)
    run = NotebookRun(folder.path if folder else Path(os.environ[RUN_DIR_VARIABLE]), values, folder, path)
    for (stem, name), (before, value) in _picks.copy().items():
        if stem == path.stem and name in values and values[name] == before:
            run.pick(**{name: value})
            namespace[name] = value
            print(f"{name} = {value!r}, as picked before; another value in the parameters cell counts more")
        elif stem == path.stem:
            del _picks[stem, name]
    if shell is not None:
        shell.run_line_magic("matplotlib", "inline")  # any Figure that a cell ends with is drawn
        shell.set_custom_exc((NameError, KeyboardInterrupt), _say)
        shell.events.register("post_run_cell", run._cell_ended)
        atexit.register(run.leave)
        _current = run
    print(f"run folder: {shown(run.path)}")
    return run


def resumed(name: str, values: dict[str, Any]) -> Path | None:
    """The folder of the run that `resume_run` names, as `vla runs` shows it; None where it names none.

    Raises UserError where there is no such run, or it is another notebook's.
    """
    text = str(values.get("resume_run") or "")
    if not text:
        return None
    folder = find_run(str(dataset_path(text)) if dataset_path(text).is_dir() else text)
    if (of := read_record(folder)["name"]) != name:
        raise UserError(f"resume_run names {folder.name}, a run of {of}; give one of {name} (`vla runs ls {name}`).")
    return folder


def _say(shell: Any, kind: type[BaseException], error: BaseException, trace: Any, tb_offset: int | None = None) -> None:
    """IPython's hook: an interrupt, and a cell that lacks what an earlier one makes, read as sentences."""
    name = getattr(error, "name", None)
    lines = shell.InteractiveTB.structured_traceback(kind, error, trace)
    if kind is KeyboardInterrupt:
        lines = ["Interrupted. What is on disk stays; run this cell again to go on."]
    elif _current is not None and name in nb_parameters.names(_current.notebook)[0]:
        lines = [f"This cell needs {name}, which a cell above makes; run the cells above first."]
    shell._showtraceback(kind, error, lines)


def interactive() -> bool:
    """Whether a person sits before this kernel (JupyterLab, VS Code), so that widgets can be drawn and clicked."""
    return RUN_DIR_VARIABLE not in os.environ and ("JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ)


def dataset_path(text: str) -> Path:
    """A path parameter as a Path: relative ones are meant from the project's folder, whatever folder the notebook runs
    in."""
    return PROJECT / Path(text).expanduser()


def shown(path: Path) -> str:
    """A path as people read it: relative to the project where it lies inside."""
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def _shell() -> Any:
    from IPython import get_ipython

    return get_ipython()
