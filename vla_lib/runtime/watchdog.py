"""Beats of a loop in; calls of `bite` out, until one holds, when they stay away for too long (real clock only)."""

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Watches from a thread of its own between `with` and its end. `limit_s`: longest time between two beats; `bite`: whether it held."""

    def __init__(self, limit_s: float, bite: Callable[[], bool]):
        self.limit_s, self._bite = limit_s, bite
        self._beat_s = time.perf_counter()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """The loop lives."""
        self._beat_s = time.perf_counter()

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        while not self._end.wait(self.limit_s / 5):
            if time.perf_counter() - self._beat_s > self.limit_s and self._bite():
                return
