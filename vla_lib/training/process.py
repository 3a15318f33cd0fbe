"""Signals in, one flag out that the training loop looks at once a step; loader workers are out of their reach.

torchrun and a terminal signal a rank's whole process group. A loader worker that died of it would take the rank along before it has saved.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vla_lib.core.processes import die_with_parent

STOPS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """SIGTERM and SIGINT set `asked`; the loop looks at it once a step. Handlers are put back at the end."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOPS:
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread (a notebook cell's helper): the caller stops us otherwise
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name


@contextmanager
def starting_workers() -> Iterator[None]:
    """Loader workers are forked inside: stop signals wait, here until the end of the block, in a worker until `begin_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """First call of a loader worker: it leaves its rank's process group, drops the stop signals that came before, and dies with its rank."""
    os.setpgid(0, 0)
    die_with_parent()
    while signal.sigtimedwait(STOPS, 0):
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
