"""Supervisor of one job: a command in; its output in a log file, its fate in a JSON file, and no process left behind.

Started by `vla_lib.workbench.jobs` in a session of its own. It stops the command when it is asked to (SIGTERM, SIGINT) or when the process that
started it is gone (killed kernel, restarted kernel, killed papermill). Rank processes of torchrun live in sessions of their own, so a process
group does not reach them: as child subreaper the supervisor inherits every orphan, and sweeps all descendants in a `finally`. It prints nothing:
a broken pipe would skip the sweep.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil

from vla_lib.core.files import write_json
from vla_lib.core.processes import die_with_parent

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.1
NOT_STARTED = 127  # as a shell says it


def main(arguments: list[str]) -> int:
    """`PARENT_PID GRACE_S STATUS_JSON LOG COMMAND...`: run COMMAND until it ends or must end; returns its exit status."""
    parent_pid, grace_s, status_path, log_path = (
        int(arguments[0]),
        float(arguments[1]),
        Path(arguments[2]),
        Path(arguments[3]),
    )
    command = arguments[4:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    stop_signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda caught, _frame: stop_signals.append(caught))

    status = {
        "command": command,
        "log": log_path.name,
        "log_from": log_path.stat().st_size
        if log_path.exists()
        else 0,  # what stands before is of earlier starts in the same folder
        "supervisor_pid": os.getpid(),
        "state": "running",
        "started": _now(),
        "ended": None,
        "returncode": None,
        "reason": None,
    }
    child = reason = None
    try:
        with open(log_path, "ab") as log:
            outlive_nobody = partial(
                die_with_parent, signal.SIGTERM
            )  # this process may be killed: torchrun then ends its ranks in order
            try:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=outlive_nobody
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                return NOT_STARTED
        status["pid"] = child.pid
        write_json(status_path, status)
        while child.poll() is None and reason is None:
            if stop_signals:
                reason = f"stopped by {signal.Signals(stop_signals[0]).name}"
            elif os.getppid() != parent_pid:
                reason = "the process that started the job is gone"
            else:
                time.sleep(POLL_S)
    finally:
        if child is not None:
            _sweep(child, grace_s)
        returncode = NOT_STARTED if child is None else child.poll()
        status.update(state="ended", ended=_now(), returncode=returncode, reason=reason)
        write_json(status_path, status)
    return returncode or 0


def _sweep(child: subprocess.Popen, grace_s: float) -> None:
    """Terminate the child, give it `grace_s` to save its checkpoint, then kill whatever still descends from this process."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    me = psutil.Process()
    deadline = time.monotonic() + 10
    while (left := me.children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
