"""A job: a front door and its settings in; a supervised torchrun subprocess, its log, progress and fate out.

Files are the interface (the log, `metrics.jsonl`, `job.json`, `error.json` in the run folder), so any viewer can attach to a running job.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json

GRACE_S = 20.0  # longer than a checkpoint takes
LOG_TAIL_LINES = 15


class JobFailed(Exception):
    """A job ended with an error: the cause first, then the failing rank's traceback, then the last lines of the log."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class JobCancelled(Exception):
    """A job was stopped before its end; what it had saved is kept."""

    def _render_traceback_(self) -> list[str]:
        return [f"JobCancelled: {self}"]


def flags(settings: dict[str, Any]) -> list[str]:
    """Command-line flags of a front door from its settings: `{"lr": 1e-4, "resume": False}` -> `--lr 0.0001 --no-resume`; None and empty lists are left out."""
    words: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)] if value else []
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


class Job:
    """One supervised subprocess that works in a run folder: started here, or `attach`ed to where it was started elsewhere."""

    def __init__(
        self, command: list[str], run_dir: Path, environment: dict[str, str] | None = None, log: str = "train.log"
    ):
        self.command = command
        self.run_dir = Path(run_dir).absolute()
        self.log = self.run_dir / log
        self.environment = environment or {}
        self.attached = False
        self._process: subprocess.Popen | None = None
        self._read = 0

    @classmethod
    def attach(cls, run_dir: Path) -> "Job":
        """The job of a run folder, running or ended, whoever started it: it can be watched and stopped from its files.

        Raises UserError where no job was started in that folder.
        """
        path = Path(run_dir) / "job.json"
        if not path.exists():
            raise UserError(
                f"No job was started in {run_dir}; give the folder of a run that trains or caches (`vla runs` lists them)."
            )
        status = read_json(path)
        job = cls(status["command"], run_dir, log=status["log"])
        job.attached = True
        if job.log.exists():
            lines = job.log.read_bytes().splitlines(keepends=True)
            job._read = sum(map(len, lines[:-LOG_TAIL_LINES]))
        return job

    @classmethod
    def torchrun(
        cls, module: str, settings: dict[str, Any], run_dir: Path, nproc_per_node: int = 1, log: str = "train.log"
    ) -> "Job":
        """`torchrun --nproc_per_node=N -m MODULE FLAGS --run-dir RUN_DIR`, on a free port of this machine.

        Ranks on the CPU share its cores: each gets its part as OMP_NUM_THREADS unless the variable is set already.
        """
        if nproc_per_node < 1:
            raise UserError(f"nproc_per_node is {nproc_per_node}; give 1 or more processes.")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={nproc_per_node}",
            "-m",
            module,
        ]
        command += flags({**settings, "run_dir": str(run_dir)})
        threads = max(1, (os.cpu_count() or 1) // nproc_per_node)
        return cls(command, run_dir, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}, log)

    @property
    def status(self) -> dict[str, Any]:
        """What the supervisor last wrote: state, returncode, reason ({} before it started)."""
        path = self.run_dir / "job.json"
        return read_json(path) if path.exists() else {}

    def start(self) -> "Job":
        """Start the job; returns once its supervisor has begun. Raises UserError where one still runs in the same folder."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        status = self.run_dir / "job.json"
        with open(self.run_dir / "job.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two starts at once the second one sees the first one's job.json
            if is_running(self.run_dir):
                raise UserError(f"A job already runs in {self.run_dir}; stop it first, or use another run folder.")
            for stale in (status, self.run_dir / "error.json"):
                stale.unlink(missing_ok=True)
            self._read = self.log.stat().st_size if self.log.exists() else 0
            self._process = self._supervise(status)
            while not status.exists() and self._process.poll() is None:
                time.sleep(0.02)
        return self

    def _supervise(self, status: Path) -> subprocess.Popen:
        supervisor = [
            sys.executable,
            "-m",
            "vla_lib.workbench.supervisor",
            str(os.getpid()),
            str(GRACE_S),
            str(status),
            str(self.log),
        ]
        own = {"TORCHELASTIC_ERROR_FILE": str(self.run_dir / "error.json"), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [*supervisor, *self.command],
            env={**os.environ, **self.environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        """Whether the job runs now."""
        return is_running(self.run_dir) if self._process is None else self._process.poll() is None

    @property
    def done(self) -> bool:
        """Whether this very command ended well in its folder."""
        status = self.status
        return (status.get("command"), status.get("state"), status.get("returncode")) == (
            self.command,
            "ended",
            0,
        ) and not status["reason"]

    def stop(self) -> None:
        """Ask the supervisor to stop the job; it saves its state first. `watch` then raises JobCancelled."""
        if self.running:
            pid = self.status["supervisor_pid"] if self._process is None else self._process.pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    async def watch(self, on_tick: Callable[[list[str]], None] | None = None, every_s: float = 0.5) -> dict[str, Any]:
        """Follow the job to its end; `on_tick` gets the new lines of the log (default: print them). Returns the final status.

        Await it in a notebook cell: the event loop stays free, so a Stop button works. An interrupted cell stops the job that it started;
        one that it is only attached to runs on. Raises JobFailed where the job ends with an error and JobCancelled where it was stopped.
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
            if self.attached:
                raise JobCancelled(
                    f"the cell was interrupted; the job goes on, its files are in {self.run_dir}"
                ) from None
            self.stop()
            self._wait_stopped()
            on_tick(self._new_lines(final=True))
            raise JobCancelled(
                f"the cell was interrupted; the job is stopped, its files are in {self.run_dir}"
            ) from None
        return self._conclude()

    def _wait_stopped(self) -> None:
        deadline = time.monotonic() + GRACE_S + 15
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def _new_lines(self, final: bool) -> list[str]:
        if not self.log.exists():
            return []
        with open(self.log, "rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = len(data) if final else data.rfind(b"\n") + 1
        self._read += whole
        return data[:whole].decode(errors="replace").splitlines()

    def _conclude(self) -> dict[str, Any]:
        status = self.status
        if status.get("state") != "ended":
            raise JobFailed(f"The job's supervisor was killed; what it had logged is in {self.log}.")
        if status["reason"]:
            raise JobCancelled(f"{status['reason']}; its files are in {self.run_dir}")
        if status["returncode"] != 0:
            raise JobFailed(explain(self.log, status["returncode"], status.get("log_from", 0)))
        return status


def is_running(run_dir: Path) -> bool:
    """Whether a supervisor of this folder's job is alive."""
    path = Path(run_dir) / "job.json"
    if not path.exists():
        return False
    status = read_json(path)
    try:
        words = psutil.Process(status["supervisor_pid"]).cmdline()
    except (psutil.Error, KeyError):
        return False
    return status.get("state") == "running" and str(path) in words


def explain(log: Path, returncode: int | None, log_from: int) -> str:
    """Why a job failed: the rank that was killed or the first failing rank's error on top, its traceback, then the last lines of the log.

    `log_from`: bytes of the log that earlier starts had written.
    """
    said = log.read_bytes()[log_from:].decode(errors="replace").splitlines() if log.exists() else []
    lines = killed_ranks(said)
    error_file = log.parent / "error.json"
    if error_file.exists():
        message = json.loads(error_file.read_text()).get("message", {})
        if isinstance(message, dict):
            traceback = message.get("extraInfo", {}).get("py_callstack", "")
            lines += [str(message.get("message", "")).strip(), "", traceback.strip(), ""]
        else:
            lines += [str(message), ""]
    if not lines:
        lines = [f"The job ended with exit status {returncode}.", ""]
    else:  # torchrun's own report tells the same once more
        said = said[: next((number for number, line in enumerate(said) if "torch/distributed/elastic" in line), None)]
    if said:
        lines += [f"Last lines of {log}:", *said[-LOG_TAIL_LINES:]]
    return "\n".join(lines)


def killed_ranks(said: list[str]) -> list[str]:
    """Sentences about the ranks that a signal killed, from torchrun's report: such a rank leaves no error, only the others' that miss it."""
    found = {}
    rank = ""
    for line in said:
        if match := re.match(r"\s+rank\s+: (\d+) ", line):
            rank = match[1]
        elif (match := re.match(r"\s+traceback : Signal \d+ \((SIG\w+)\) received", line)) and match[
            1
        ] != "SIGTERM":  # torchrun's own
            found[rank] = match[1]
    often = {"SIGKILL": " (often: out of memory)"}
    told = [
        f"rank {rank} was killed by {name}{often.get(name, '')}; go on with --resume." for rank, name in found.items()
    ]
    return [*told, ""] if told else []


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line, flush=True)
