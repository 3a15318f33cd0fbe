"""A notebook's side of its run: `begin` after the parameters cell gives the run; its settings, results and end go
through it."""

import atexit
import os
from pathlib import Path
from typing import Any, TypeVar

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import PROJECT, RunFolder, write_results
from vla_lib.core.settings import Settings
from vla_lib.workbench import parameters as nb_parameters
from vla_lib.workbench.jobs import JobCancelled
from vla_lib.workbench.runs import data_state

RUN_DIR_VARIABLE = "VLA_RUN_DIR"
S = TypeVar("S", bound=Settings)


class NotebookRun:
    """The run that a notebook's cells work in.

    Headless under `vla run`, the driver owns the record; in JupyterLab or under plain papermill this kernel does, so
    that the record stays true when a cell fails (state failed) or the kernel ends early (cancelled, or lost after a
    kill).
    """

    def __init__(self, path: Path, values: dict[str, Any], folder: RunFolder | None):
        self.path = path
        self.parameters = values
        self._folder = folder

    def settings(self, kind: type[S], **more: Any) -> S:
        """A stage's settings from the notebook's parameters and `more`. Raises UserError where a value is refused."""
        return kind.of(self.parameters, **more)

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


def begin(name: str, namespace: dict[str, Any]) -> NotebookRun:
    """Check the parameters in `namespace` (the notebook's `globals()`) by name and type, and open the run folder.

    Raises UserError for a wrong type, and for a name that papermill set and the notebook does not have.
    """
    global _current
    path = nb_parameters.notebook_path(name)
    known = nb_parameters.read_parameters(path)
    nb_parameters.refuse_unknown(path, nb_parameters.injected_names(namespace.get("In", [])), known)
    if missing := [key for key in known if key not in namespace]:
        raise UserError(f"Run the parameters cell first: {', '.join(missing)} not set.")
    values = nb_parameters.resolve(path, {key: namespace[key] for key in known})
    shell = _shell()
    if _current is not None and shell is not None:
        shell.events.unregister("post_run_cell", _current._cell_ended)
        atexit.unregister(_current.leave)
        _current.leave("the notebook was run again from its top")
    folder = None
    if RUN_DIR_VARIABLE not in os.environ:
        folder = RunFolder.create(path.stem, values, notebook=str(path), given=sorted(values), data=data_state(values))
    run = NotebookRun(folder.path if folder else Path(os.environ[RUN_DIR_VARIABLE]), values, folder)
    if shell is not None:
        shell.run_line_magic("matplotlib", "inline")  # any Figure that a cell ends with is drawn
        shell.events.register("post_run_cell", run._cell_ended)
        atexit.register(run.leave)
        _current = run
    print(f"run folder: {shown(run.path)}")
    return run


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
