"""Processes that do not outlive who started them (Linux): called in a child, a dying parent takes the child along."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Get signal `number` when the parent dies: a rank or worker left behind would hold a GPU. Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), number)


def follow_parent() -> None:
    """A worker of multiprocessing leaves Ctrl-C to its parent and, on Linux, dies with it, however and whenever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before
        os._exit(1)


def end() -> NoReturn:
    """End this process well without taking its modules apart: with torch that takes two seconds of a core."""
    atexit._run_exitfuncs()  # private, as Python has no public way to run them early; tests/core/test_frontdoor watches
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
