"""One benchmark row: two measured figures of the same quantity and their ratio; and how they are timed."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BenchRow:
    """`ours` and `baseline` in `unit`, measured in the same run; `less` where the smaller figure is the better one."""

    name: str
    ours: float
    baseline: float
    unit: str
    target: str = ""
    note: str = ""
    less: bool = False

    @property
    def ratio(self) -> float:
        """Above 1 where ours is better, by that factor."""
        return self.baseline / self.ours if self.less else self.ours / self.baseline


def seconds(work: Callable[[], object], times: int = 1, warm: int = 0) -> list[float]:
    """Seconds of each of some calls, after some for warming up; a GPU's work is waited for."""
    torch = sys.modules.get("torch")

    def now() -> float:
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(warm):
        work()
    found = []
    for _ in range(times):
        start = now()
        work()
        found.append(now() - start)
    return found
