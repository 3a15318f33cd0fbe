"""A job: one supervised subprocess that works in a run folder (torchrun on a front door, or a whole `vla run`), its
log, progress and fate.

Files are the interface (the log, `metrics.jsonl`, `job.json`, `error.json` in the run folder), so any viewer can attach
to a running job.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ValidationError

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, read_jsonl
from vla_lib.core.owner import Owner, living, owner_file
from vla_lib.core.settings import Settings
from vla_lib.workbench import slurm

GRACE_S = 20.0  # longer than a checkpoint takes
LOG_TAIL_LINES = 15
FULL_BYTES = 2**20
# A rank that a signal killed, in torchrun's report; ended by SIGTERM are those that torchrun stops itself.
KILLED = re.compile(r"^ +rank +: (\d+) .*\n.*\n.*\n +traceback : Signal \d+ \((SIG(?!TERM)\w+)\)", re.M)
OFTEN = {"SIGKILL": " (often: out of memory)"}


class JobFailed(Exception):
    """A job ended with an error: the cause first, then the failing rank's traceback, then the last lines of the log."""

    def _render_traceback_(self) -> list[str]:  # IPython's hook: library frames tell nothing here
        return str(self).splitlines()


class JobCancelled(Exception):
    """A job was stopped before its end; what it had saved is kept."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]  # a sentence: nothing is wrong


def flags(settings: Settings) -> list[str]:
    """The command-line flags that make a front door's settings: one of each value that is not its default."""
    words: list[str] = []
    for field in dataclasses.fields(settings):
        flag, value = field.name.replace("_", "-"), getattr(settings, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def thread_variables(processes: int) -> dict[str, str]:
    """OMP_NUM_THREADS for each of so many processes at once, which share the cores that this one may use (of its
    affinity, and of its Slurm job), and threads that sleep while they wait.

    Threads that spin at a barrier, OpenMP's default, collapse beside other work: docs/FIGURES.md has the figures.
    What the user has set stays.
    """
    allowed = len(os.sched_getaffinity(0))
    cores = min(allowed, int(os.environ.get("SLURM_CPUS_ON_NODE") or allowed))
    chosen = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "OMP_WAIT_POLICY": "PASSIVE"}
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


class _Status(BaseModel, strict=True):
    """What is taken from a job.json without asking."""

    command: list[str] = []
    log: str = "train.log"
    log_from: Annotated[int, Ge(0)] = 0
    supervisor_pid: Annotated[int, Gt(0), Le(2**31)]
    state: Literal["running", "ended"]
    returncode: int | None = None
    reason: str | None = None


class Job:
    """One supervised subprocess: started here, or `attach`ed to where it was started elsewhere."""

    def __init__(self, command: list[str], run_dir: Path, log: str = "train.log", grace_s: float = GRACE_S):
        self.command = command
        self.run_dir = Path(run_dir).absolute()
        self.log = self.run_dir / log
        self.grace_s = grace_s
        self.environment: dict[str, str] = {}
        self.held: tuple[int, ...] = ()  # open files that the supervisor holds to its end
        self.attached = False
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0

    @classmethod
    def attach(cls, run_dir: Path) -> "Job":
        """The job of a run folder, running or ended, whoever started it: it can be watched and stopped from its files.

        Raises UserError where no job was started in that folder.
        """
        status = cls([], run_dir).status
        if not status:
            which = "give the folder of a run that trains or caches (`vla runs` lists them)"
            raise UserError(f"No job was started in {run_dir}; {which}.")
        job = cls(status["command"], run_dir, status["log"])
        job.attached = True
        if job.log.exists():
            lines = job.log.read_bytes().splitlines(keepends=True)
            job._read = sum(map(len, lines[:-LOG_TAIL_LINES]))
        return job

    @classmethod
    def torchrun(
        cls,
        module: str,
        settings: Settings,
        run_dir: Path,
        nproc_per_node: int = 1,
        log: str = "train.log",
        resume: bool = False,
    ) -> "Job":
        """`torchrun --nproc_per_node=N -m MODULE FLAGS --run-dir RUN_DIR`, on a free port of this machine, and on all
        machines of a Slurm job; `resume`: with --resume.

        Ranks on the CPU share its cores (see `thread_variables`).
        """
        if nproc_per_node < 1:
            raise UserError(f"nproc_per_node is {nproc_per_node}; give 1 or more processes.")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        if (machines := slurm.nodes()) > 1:
            torchrun = slurm.torchrun_words(machines)
        words = [*flags(settings), "--run-dir", str(run_dir), *(["--resume"] if resume else [])]
        job = cls([*torchrun, f"--nproc_per_node={nproc_per_node}", "-m", module, *words], run_dir, log)
        job.environment = thread_variables(nproc_per_node)
        return job

    @property
    def status(self) -> dict[str, Any]:
        """What the supervisor last wrote: state, returncode, reason ({} before it started). Raises UserError where
        that is damaged."""
        path = self.run_dir / "job.json"
        if not path.exists():
            return {}
        status = read_json(path)
        try:
            return _Status.model_validate(status).model_dump() | status
        except ValidationError as error:
            odd = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()[:3])
            raise UserError(f"{path} is not a job's record ({odd}); remove it where no job runs any more.") from None

    def start(self) -> "Job":
        """Start the job; returns once its supervisor has begun. Raises UserError where one still runs in the same
        folder."""
        status, error = self.run_dir / "job.json", self.run_dir / "error.json"
        taken = f"A job already runs in {self.run_dir}; stop it first, or use another run folder."
        try:
            start = Owner.take(self.run_dir, "start")
        except UserError:  # another one starts at this moment
            raise UserError(taken) from None
        try:
            if self.running:
                raise UserError(taken)
            if who := living(owner_file(self.run_dir)):
                raise UserError(f"{self.run_dir} is in use by {who}; stop it there first, or use another run folder.")
            for stale in (status, error):
                stale.unlink(missing_ok=True)
            self._read = self.log.stat().st_size if self.log.exists() else 0
            words = [str(os.getpid()), str(self.grace_s), str(status), str(self.log), *self.command]
            own = {"TORCHELASTIC_ERROR_FILE": str(error), "PYTHONUNBUFFERED": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vla_lib.workbench.supervisor", *words],
                env={**os.environ, **self.environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=self.held,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then decides
            )
            while not status.exists() and self._process.poll() is None:
                time.sleep(0.02)
        finally:
            start.release()
        return self

    @property
    def running(self) -> bool:
        """Whether the job runs now: its supervisor is alive."""
        if self._process is not None:
            return self._process.poll() is None
        status = self.status
        try:
            words = psutil.Process(status["supervisor_pid"]).cmdline()
        except (psutil.Error, KeyError):
            return False
        return status["state"] == "running" and str(self.run_dir / "job.json") in words  # numbers are used again

    @property
    def done(self) -> bool:
        """Whether this very command ended well in its folder."""
        status = self.status
        ended_well = status.get("state") == "ended" and status["returncode"] == 0 and not status["reason"]
        return ended_well and status["command"] == self.command

    def stop(self) -> None:
        """Ask the supervisor to stop the job; it saves its state first. `watch` then raises JobCancelled."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid if self._process else self.status["supervisor_pid"], signal.SIGTERM)

    async def watch(self, on_tick: Callable[[list[str]], None] | None = None, every_s: float = 0.5) -> dict[str, Any]:
        """Follow the job to its end; `on_tick` gets the new lines of the log (default: print them). Returns the final
        status.

        Await it in a notebook cell: the event loop stays free, so a Stop button works. An interrupted cell stops the
        job that it started; one that it is only attached to runs on. Raises JobFailed where the job ends with an error
        and JobCancelled where it was stopped.
        """
        if self._process is None and not self.attached:
            self.start()
        on_tick = on_tick or _print_lines
        try:
            running = True
            while running:
                running = self.running  # before reading: the last lines are not lost
                on_tick(self._new_lines(final=not running))
                if running:
                    await asyncio.sleep(every_s)
        except (asyncio.CancelledError, KeyboardInterrupt):
            if not self.attached:
                self.stop()
                deadline = time.monotonic() + self.grace_s + 15
                while self.running and time.monotonic() < deadline:
                    time.sleep(0.1)
                on_tick(self._new_lines(final=True))
            if self.attached:
                raise JobCancelled(f"The cell was interrupted; the job goes on, in {self.run_dir}.") from None
            raise JobCancelled(self.stopped("the cell was interrupted; the job stopped")) from None
        return self._conclude()

    def _new_lines(self, final: bool) -> list[str]:
        if not self.log.exists():
            return []
        with open(self.log, "rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = len(data) if final else data.rfind(b"\n") + 1
        self._read += whole
        return data[:whole].decode(errors="replace").splitlines()

    def stopped(self, how: str) -> str:
        """Where a stopped job is, and how to go on, in a sentence. `how`: the reason in its status, or more."""
        how = how.replace("stopped by SIGTERM", "stopped")
        metrics = self.run_dir / "metrics.jsonl"
        steps = [row["step"] for row in read_jsonl(metrics) if "step" in row]
        at = f" at step {max(steps)}" if steps else ""
        checkpoints = [file.stat().st_mtime for file in (self.run_dir / "checkpoints").glob("*.pt")]
        if not checkpoints:
            return f"{how}{at}; what it wrote is in {self.run_dir}. Run the notebook again to go on."
        ways = f'resume_run = "{self.run_dir.name}" in the parameters cell, or -p resume_run {self.run_dir.name}'
        late = bool(steps) and max(checkpoints) < metrics.stat().st_mtime
        return f"{how}{at}; {'its last checkpoint is older' if late else 'saved'}; go on with {ways}."

    def _conclude(self) -> dict[str, Any]:
        status = self.status
        if status.get("state") != "ended":
            raise JobFailed(f"The job's supervisor was killed; what it had logged is in {self.log}.")
        if status["reason"]:
            raise JobCancelled(self.stopped(status["reason"]))
        if status["returncode"] != 0:
            raise JobFailed(explain(self.log, status["returncode"], status["log_from"]))
        return status


def explain(log: Path, returncode: int, log_from: int) -> str:
    """Why a job failed: the ranks that were killed (they leave no error, only the others' that miss them), the first
    failing rank's error and traceback, then the last lines of the log. `log_from`: bytes of the log that earlier starts
    had written."""
    said = log.read_bytes()[log_from:].decode(errors="replace") if log.exists() else ""
    lines = []
    if shutil.disk_usage(log.parent).free < FULL_BYTES:  # whose causes can leave no word in any file
        lines += [f"disk full: nothing more can be written below {log.parent}; make room and go on with --resume."]
    for rank, name in dict(KILLED.findall(said)).items():
        lines += [f"rank {rank} was killed by {name}{OFTEN.get(name, '')}; go on with --resume."]
    error_file = log.parent / "error.json"
    if error_file.exists():
        message = json.loads(error_file.read_text()).get("message", {})
        message = message if isinstance(message, dict) else {"message": message}
        traceback = message.get("extraInfo", {}).get("py_callstack", "")
        lines += ["", str(message.get("message", "")).strip(), "", traceback.strip()]
    if lines:  # torchrun's own report says the same once more
        said = re.split(r"^.*torch/distributed/elastic", said, maxsplit=1, flags=re.M)[0]
    lines = lines or [f"The job ended with exit status {returncode}."]
    if said:
        lines += ["", f"Last lines of {log}:", *said.splitlines()[-LOG_TAIL_LINES:]]
    return "\n".join(lines).strip()


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line, flush=True)
