"""Time of a run: the simulated clock, which moves only when the loop waits or works, the real one, and its watchdog."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vla_lib.core.errors import UserError

HICCUP_SHARE = 0.05  # of the pieces of work; one in two seconds at 10 Hz (a guess)


@dataclass(frozen=True)
class Latency:
    """Duration of a piece of work: `base_ms` plus an exponentially distributed rest of mean `jitter_ms`; and now and
    then (`HICCUP_SHARE`) a hiccup of the computer, `hiccup_ms`."""

    base_ms: float = 0.0
    jitter_ms: float = 0.0
    hiccup_ms: float = 0.0

    def __post_init__(self) -> None:
        if not (self.base_ms >= 0 and self.jitter_ms >= 0 and self.hiccup_ms >= 0):
            told = f"{self.base_ms:g} ms with {self.jitter_ms:g} ms jitter and hiccups of {self.hiccup_ms:g} ms"
            raise UserError(f"A latency of {told} cannot be; all must be 0 or more.")

    def draw_s(self, rng: np.random.Generator) -> float:
        """One duration in seconds."""
        took_ms = self.base_ms + (float(rng.exponential(self.jitter_ms)) if self.jitter_ms else 0.0)
        hiccup = self.hiccup_ms > 0 and rng.random() < HICCUP_SHARE
        return (took_ms + self.hiccup_ms * hiccup) / 1000.0


class Clock(Protocol):
    """Seconds since the clock was made."""

    simulated: bool

    def now(self) -> float: ...

    def sleep_until(self, t_s: float) -> None: ...

    def spend(self, work: str) -> None:
        """`work` has just been done: simulated time passes by its latency, real time has passed already."""


class SimulatedClock:
    """Deterministic by seed. `latencies`: "vlm" and "expert" -> Latency; work that is not named takes no time."""

    simulated = True

    def __init__(self, latencies: Mapping[str, Latency] | None = None, seed: int = 0):
        self.latencies = dict(latencies or {})
        if unknown := set(self.latencies) - {"vlm", "expert"}:
            raise UserError(f"There is no work named {', '.join(sorted(unknown))}; latencies belong to vlm and expert.")
        self._t_s = 0.0
        self._rng = {work: np.random.default_rng([seed & 0xFFFFFFFF, *work.encode()]) for work in self.latencies}

    def now(self) -> float:
        return self._t_s

    def sleep_until(self, t_s: float) -> None:
        """Jump there; never back."""
        self._t_s = max(self._t_s, t_s)

    def draw_s(self, work: str) -> float:
        """How long `work` takes this time. Each kind of work has a random stream of its own."""
        return self.latencies[work].draw_s(self._rng[work]) if work in self.latencies else 0.0

    def spend(self, work: str) -> None:
        """Let simulated time pass by a drawn latency."""
        self._t_s += self.draw_s(work)


class RealClock:
    """Real time, by the monotonic performance counter."""

    simulated = False

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._zero

    def sleep_until(self, t_s: float) -> None:
        """Sleep; returns at once where the time has passed."""
        while (left := t_s - self.now()) > 0:
            time.sleep(left)

    def spend(self, work: str) -> None:
        """Nothing: the time has passed."""


@contextmanager
def real_time() -> Iterator[bool]:
    """This process goes before every other work of the machine where the system allows that, which is said: to root,
    and on Linux to whom /etc/security/limits.conf gives `rtprio 2`. All its threads, the calling one first: one of
    lesser priority would be kept from running while it holds the interpreter, and the loop would wait for it."""
    given = True
    try:
        _schedule(os.SCHED_FIFO, 1)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
    except (AttributeError, OSError):
        given = False
    try:
        yield given
    finally:
        with suppress(AttributeError, OSError):  # also where only some of them were given it
            _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, priority: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


class Watchdog:
    """Watches a loop from a thread of its own between `with` and its end, in real time only.

    Where no beat comes for `limit_s`, it calls `bite` until that returns True: the robot has taken the stop.
    """

    def __init__(self, limit_s: float, bite: Callable[[], bool]):
        self.limit_s, self._bite = limit_s, bite
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
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
