"""One benchmark row: two measured figures of the same quantity and their ratio."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchRow:
    """`ours` and `baseline` in `unit`, measured in the same run; `ratio` > 1 means ours is better by that factor."""

    name: str
    ours: float
    baseline: float
    unit: str
    ratio: float
    target: str = ""
    note: str = ""
