"""Runs a notebook headless through papermill: an executed notebook, an offline HTML page and a true record in a run
folder.

    vla run 04_train_async -p batch_size 4 -p nproc_per_node 4
"""

import contextlib
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import papermill
import psutil
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from vla_lib.core.errors import UserError, in_words
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench import slurm
from vla_lib.workbench.jobs import JobFailed
from vla_lib.workbench.notebook import RUN_DIR_VARIABLE, resumed, shown
from vla_lib.workbench.pages import export_html
from vla_lib.workbench.parameters import notebook_path, resolve
from vla_lib.workbench.runs import data_state

CANCELLED = ("KeyboardInterrupt", "CancelledError", "JobCancelled")
LOG_NAME = "run.log"  # the cells' output as plain lines
SOCKET_BYTES = 104  # at most in a Unix socket's path, 108 with its end on Linux; a batch system's TMPDIR is longer
PATIENCE_S = 5.0  # for a kernel between two cells


class LocalKernelManager(AsyncKernelManager):
    """A kernel on Unix sockets: no TCP ports, so nothing listens on the network and no port can be taken. Only where no
    folder has a short enough name for one (SOCKET_BYTES), TCP ports of this machine alone."""

    made: ClassVar[list["LocalKernelManager"]] = []

    def __init__(self, **keywords: Any):
        # a name of its own: jupyter_client's default is one for all kernels of a folder, so two at a time would meet
        name = f"vla-kernel-{uuid.uuid4().hex[:12]}"
        for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
            if os.access(folder, os.W_OK) and len(os.fsencode(f"{folder}/{name}-0")) < SOCKET_BYTES:
                keywords |= {"transport": "ipc", "ip": f"{folder}/{name}"}
                break
        super().__init__(**keywords)
        self.made.append(self)

    @classmethod
    def close_all(cls) -> None:
        """Close what a run left open. A run that went well left nothing; sockets of a kernel that was never reached
        would be waited for without end, by whichever code the garbage collector comes by in."""
        while cls.made:
            with contextlib.suppress(Exception):  # how the run ended is known by now
                cls.made.pop().context.destroy(linger=0)
        for kernel in _kernels():
            kernel.kill()


@dataclass(frozen=True)
class RunResult:
    """How a headless run ended: its folder, `done`, `failed`, `cancelled` or `lost`, and the error."""

    path: Path
    state: str
    error: str | None = None
    bad_input: bool = False  # a cell refused what it was given (UserError), as against breaking on the way
    cell: int | None = None  # number of the failing cell, as in In [6]; the page begins with a banner that leads there

    @property
    def exit_status(self) -> int:
        """0 done, 2 bad input, 130 cancelled, 1 failed."""
        return 2 if self.bad_input else {"done": 0, "cancelled": 130}.get(self.state, 1)

    @property
    def summary(self) -> str:
        """The state, the failing cell and where to look, in one line."""
        where = f" at In [{self.cell}]" if self.cell is not None else ""
        return f"{self.state}{where}: {shown(self.page if self.page.exists() else self.path)}"

    @property
    def page(self) -> Path:
        """The HTML page of the executed notebook."""
        return self.path / "notebook.html"


def run_notebook(
    name: str | Path,
    given: dict[str, Any],
    text: bool = False,
    log: bool = True,
    run_dir: Path | None = None,
    resume: bool = False,
    **noted: Any,
) -> RunResult:
    """Execute a notebook headless in a run folder of its own (`run_dir`: this one, which must hold no run yet).

    `given`: parameter values, or command-line words with `text`; `resume`: a run that `run_dir` holds is gone on with,
    a training from its checkpoint, all cells run again; `noted`: what the run's record holds besides. Raises UserError
    for an unknown notebook, parameter name or type, before a kernel starts; a failing cell is not raised but returned
    as state `failed`.
    """
    path = notebook_path(name)
    values = resolve(path, given, text)
    noted = {"notebook": str(path), "given": sorted(given), "data": data_state(values), **noted}
    if again := resumed(path.stem, values):
        run_dir, resume, values = again, True, values | {"resume_run": ""}
    if resume and run_dir is None:
        raise UserError("--resume needs --run-dir, the folder of the run to go on with.")
    if resume and run_dir is not None and (run_dir / "run.json").exists():
        run = RunFolder.resume(run_dir.expanduser().absolute(), values)
    else:
        run = RunFolder.create(path.stem, values, path=run_dir, **noted)
    handed = {parameter: values[parameter] for parameter in given}
    if again or (resume and "resume_run" in values and any((run.path / "checkpoints").glob("*.pt"))):
        handed["resume_run"] = str(run.path)
    executed = run.path / "notebook.ipynb"
    plain = PlainLog(run.path / LOG_NAME, log)
    state, error, bad_input, cell = "failed", None, False, None
    with _kernel_environment(run.path), Interrupts() as interrupts:
        try:
            papermill.execute_notebook(
                str(path),
                str(executed),
                parameters=handed,
                kernel_name="python3",
                kernel_manager_class=LocalKernelManager,
                cwd=str(path.parent),
                stdout_file=plain,
                stderr_file=plain,
                progress_bar=False,
                autosave_cell_every=10,
                on_cell_start=interrupts.before_cell,
            )
            state = "done"
        except PapermillExecutionError as failure:
            state = "cancelled" if failure.ename in CANCELLED else "failed"
            bad_input, cell = failure.ename == UserError.__name__, failure.exec_count
            own_words = bad_input or failure.ename == JobFailed.__name__  # a job's error begins with its cause
            error = failure.evalue if own_words else f"{failure.ename}: {failure.evalue}"
        except KeyboardInterrupt:
            state, error = "cancelled", "interrupted"
        except DeadKernelError:
            state, error = "lost", "the kernel died (killed, or out of memory)"
        except Exception as failure:  # a full disk, a broken notebook: recorded, and shown like any other failure
            error = in_words(failure)
        finally:
            if interrupts.caught and state != "done":
                state, error = "cancelled", error or "interrupted"
            LocalKernelManager.close_all()
            run.finish(state, error)
            result = RunResult(run.path, state, error, bad_input, cell)
            _write_page(executed, result.page)
    return result


def run_and_print(name: str | Path, given: dict[str, Any], **how: Any) -> int:
    """Run a notebook as `run_notebook` does, print how it ended and return the exit status."""
    result = run_notebook(name, given, **how)
    if result.error:
        print(f"error: {result.error}", file=sys.stderr)
    print(result.summary)
    return result.exit_status


def submit(batch: slurm.Batch, notebook: str, given: dict[str, str], run_dir: Path | None) -> int:
    """`vla run` on a cluster; torchrun gets one process a GPU unless it is told otherwise."""
    path = notebook_path(notebook)
    values = resolve(path, given, text=True)
    if batch.gpus and "nproc_per_node" in values and "nproc_per_node" not in given:
        given = given | {"nproc_per_node": str(batch.gpus)}
        values = resolve(path, given, text=True)
    noted = {"notebook": str(path), "given": sorted(given), "data": data_state(values)}
    record = RunFolder.create(path.stem, values, path=run_dir, **noted)
    words = [word for name, value in given.items() for word in ("-p", name, value)]
    words = ["run", str(path), *words, "--run-dir", str(record.path), "--resume"]
    return slurm.submit(batch, path.stem, record, words)


@contextmanager
def _kernel_environment(run_dir: Path) -> Iterator[None]:
    before = {RUN_DIR_VARIABLE: os.environ[RUN_DIR_VARIABLE]} if RUN_DIR_VARIABLE in os.environ else {}
    os.environ[RUN_DIR_VARIABLE] = str(run_dir)
    try:
        yield
    finally:
        del os.environ[RUN_DIR_VARIABLE]
        os.environ.update(before)


def _write_page(executed: Path, page: Path) -> None:
    """The page of what was executed; a failure is printed, the run's state is not the page's."""
    try:
        if executed.exists():
            export_html(executed, page)
    except Exception as failure:
        cause = f"{type(failure).__name__}: {failure}"
        print(f"warning: {shown(page)} could not be written: {cause}", file=sys.stderr, flush=True)


class Interrupts:
    """The first Ctrl-C or SIGTERM interrupts the running cell, which records the cancellation, or the run before its
    next cell; a second one ends this process's wait."""

    def __init__(self) -> None:
        self.caught = 0
        self._over = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def before_cell(self, **_: Any) -> None:
        """nbclient's hook: no cell begins after an interrupt."""
        if self.caught:
            raise KeyboardInterrupt

    def _handle(self, _number: int, _frame: Any) -> None:
        self.caught += 1
        kernels = _kernels()
        if self.caught > 1 or not kernels:
            raise KeyboardInterrupt
        threading.Thread(target=self._pass_on, args=(kernels[0],), daemon=True).start()

    def _pass_on(self, kernel: psutil.Process) -> None:
        """Interrupt the kernel once, as soon as it listens: between two cells ipykernel ignores SIGINT. Where it runs
        no cell for seconds, none is coming, or the interrupt has hit the answer of one: then this process, which waits
        for it, is interrupted again."""
        passed_on, deadline = False, time.monotonic() + PATIENCE_S
        with contextlib.suppress(psutil.Error, OSError):
            while not self._over.wait(0.02):
                if not _ignores_interrupts(kernel.pid):
                    deadline = time.monotonic() + PATIENCE_S
                    if not passed_on:
                        kernel.send_signal(signal.SIGINT)
                    passed_on = True
                elif time.monotonic() > deadline:
                    psutil.Process().send_signal(signal.SIGINT)
                    return


def _kernels() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it may end while it is looked at
            found += [child] if "ipykernel_launcher" in " ".join(child.cmdline()) else []
    return found


def _ignores_interrupts(pid: int) -> bool:
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


class PlainLog:
    """What cells print, as plain lines with the time before each, in the file `path`, and on the terminal where
    `show`."""

    def __init__(self, path: Path, show: bool):
        self.path, self.show = path, show

    def write(self, text: str) -> None:
        """Add the lines of one message of the kernel's."""
        lines = "".join(f"{time.strftime('%H:%M:%S')} {line}\n" for line in text.splitlines() if line.strip())
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(lines)
        if self.show:
            print(lines, end="", flush=True)

    def flush(self) -> None:
        """Nothing waits to be written."""
