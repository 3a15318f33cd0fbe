"""The training process's surroundings: signals turned into one flag, orphans prevented, the device and precision chosen."""

import ctypes
import os
import signal
import sys
from types import FrameType


class StopRequest:
    """SIGTERM and SIGINT set `asked`; the loop looks at it once a step. Handlers are put back at the end."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
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


def die_with_parent() -> None:
    """Under torchrun on Linux: be killed when the launcher dies, so that no rank is left behind holding a GPU."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)
