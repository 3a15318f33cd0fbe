"""Supervisor of one job: its command's output goes to a log file, its fate to a JSON file, and no process is left
behind.

Started by `vla_lib.workbench.jobs` in a session of its own. It stops the command when it is asked to (SIGTERM, SIGINT)
or when the process that started it is gone (killed kernel, restarted kernel, killed papermill). Rank processes of
torchrun live in sessions of their own, so a process group does not reach them: as child subreaper the supervisor
inherits every orphan, and sweeps all descendants in a `finally`. It prints nothing: a broken pipe would skip the sweep.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from vla_lib.core.files import reserve, write_json, write_reserved
from vla_lib.core.processes import die_with_parent, name_launcher

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.1
NOT_STARTED = 127  # as a shell says it


def main(arguments: list[str]) -> int:
    """`PARENT_PID GRACE_S STATUS_JSON LOG COMMAND...`: run COMMAND until it ends or must end; returns its exit
    status."""
    parent_pid, grace_s, (status_path, log_path) = int(arguments[0]), float(arguments[1]), map(Path, arguments[2:4])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    caught: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: caught.append(number))
    status: dict[str, Any] = {
        "command": arguments[4:],
        "log": log_path.name,
        "log_from": log_path.stat().st_size if log_path.exists() else 0,  # before it: earlier starts in this folder
        "supervisor_pid": os.getpid(),
        "state": "running",
        "started": _now(),
        "ended": None,
        "returncode": NOT_STARTED,
        "reason": None,
    }
    child = None
    try:
        with open(log_path, "ab") as log:
            # where this process is killed, torchrun still ends its ranks in order
            parent = os.getpid()

            def mortal() -> None:
                die_with_parent(signal.SIGTERM, parent)
                name_launcher()

            try:
                child = subprocess.Popen(
                    status["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=mortal
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                return NOT_STARTED
        write_json(status_path, status | {"returncode": None})
        reserve(status_path)
        while child.poll() is None and status["reason"] is None:
            if caught:
                status["reason"] = f"stopped by {signal.Signals(caught[0]).name}"
            elif os.getppid() != parent_pid:
                status["reason"] = "the process that started the job is gone"
            else:
                time.sleep(POLL_S)
    finally:
        if child is not None:
            _sweep(child, grace_s)
            status["returncode"] = child.poll()
        write_reserved(status_path, status | {"state": "ended", "ended": _now()})
    return status["returncode"] or 0


def _sweep(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Terminate the child, give it `grace_s` to save its checkpoint, then kill whatever still descends from this
    process."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    deadline = time.monotonic() + 10
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
