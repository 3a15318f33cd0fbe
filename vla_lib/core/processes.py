"""Processes that do not outlive who started them (Linux): called in a child, a dying parent takes the child along."""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1
LAUNCHER = "VLA_LAUNCHER_PID"  # of torchrun, for its ranks
FILES = 65_536  # more would slow down what closes every file that could be open


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Get signal `number` when the parent dies: a rank or worker left behind would hold a GPU. Linux only.

    parent: the process id that the parent must have, where it is known: one that died before this call is noticed too.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), number)


def name_launcher() -> None:
    """Called in the process that becomes torchrun: its ranks then know who must be their parent."""
    os.environ[LAUNCHER] = str(os.getpid())


def die_with_launcher() -> None:
    """Called in a rank of torchrun. torchrun may have died while the rank imported torch: then its parent is init.

    Where nobody named torchrun's process id, the parent must at least be a program of Python or torch.
    """
    named = os.environ.pop(LAUNCHER, None)  # not for the processes that this one starts
    die_with_parent(parent=int(named) if named else None)
    with contextlib.suppress(OSError):  # no /proc to look at
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if not named and b"python" not in words and b"torch" not in words:
            os.kill(os.getpid(), signal.SIGKILL)


def follow_parent() -> None:
    """A worker of multiprocessing leaves Ctrl-C to its parent and, on Linux, dies with it, however and whenever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    die_with_parent(parent=parent.pid if parent else None)


def allow_open_files() -> None:
    """Raise this process's limit of open files to what the machine allows: mostly 1,024 become many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def end() -> NoReturn:
    """End this process well without taking its modules apart: with torch that takes two seconds of a core."""
    atexit._run_exitfuncs()  # private, as Python has no public way to run them early; tests/core/test_frontdoor watches
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
