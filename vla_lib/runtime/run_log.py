"""The log of a run: every tick and every event, and what they come to in counts and percentiles."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.files import append_jsonl


@dataclass
class Tick:
    """One action period."""

    step: int
    t_s: float  # when the tick began, on the run's clock
    lateness_ms: float  # how much later than its due time
    mode: str = "act"  # wait, act, hold, retreat or stop
    reason: str = ""  # why it did not act
    action: tuple[float, ...] = (0.0,) * 7  # (7,) sent: mm, degrees, gripper
    limited: tuple[str, ...] = ()  # limits that changed the action
    vl_age_s: float | None = None
    vl_busy: bool = False  # whether the VLM was working when the expert was asked
    sensor_age_s: float | None = None
    force_mN: float | None = None  # greatest size of the force since the last tick, mean of 20 ms
    expert_ms: float | None = None  # how long the expert took; None where it was not asked
    pose: tuple[float, ...] = ()  # (6,) measured, mm and degrees
    commanded: tuple[float, ...] = ()  # (6,) commanded after the action, mm and degrees


@dataclass
class RunLog:
    """What a run did. `ended`: the reason of its end; `stopped`: whether safety or the operator ended it."""

    ticks: list[Tick] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    vlm_ms: list[float] = field(default_factory=list)  # how long each VLM tick took
    ended: str = ""
    stopped: bool = False
    period_s: float = 0.1  # seconds of one action; the deadline of each
    real_time: bool = False  # whether the loop went before the machine's other work

    def event(self, t_s: float, kind: str, reason: str) -> None:
        """Note that something began: hold, resume, retreat, stop, warning, end; or that the robot did not take a stop
        ("stop failed")."""
        self.events.append(
            {"t_s": round(t_s, 4), "step": self.ticks[-1].step if self.ticks else 0, "kind": kind, "reason": reason}
        )

    def column(self, name: str) -> np.ndarray:
        """A field of every tick as an array; None becomes NaN."""
        values = [getattr(tick, name) for tick in self.ticks]
        return np.array([np.nan if value is None else value for value in values])

    def summary(self) -> dict[str, Any]:
        """Counts and percentiles, JSON-able."""
        asked = [tick for tick in self.ticks if tick.expert_ms is not None]
        return {
            "ended": self.ended,
            "stopped": self.stopped,
            "real_time": self.real_time,
            "ticks": len(self.ticks),
            "modes": dict(Counter(tick.mode for tick in self.ticks)),
            "reasons": dict(Counter(tick.reason for tick in self.ticks if tick.reason)),
            "limited": dict(Counter(name for tick in self.ticks for name in tick.limited)),
            "failed_stops": sum(event["kind"] == "stop failed" for event in self.events),
            "missed_deadlines": sum(tick.reason == "missed deadline" for tick in self.ticks),
            "skipped_ticks": max(0, self.ticks[-1].step + 1 - len(self.ticks)) if self.ticks else 0,
            "lateness_ms": distribution(self.column("lateness_ms"), 99),
            "expert_ms": distribution(self.column("expert_ms"), 99),
            "vlm_ms": distribution(self.vlm_ms, 99),
            "vl_age_s": distribution(self.column("vl_age_s"), 99),
            "expert_while_vlm_busy": sum(tick.vl_busy for tick in asked),
            "expert_calls": len(asked),
        }

    def write(self, path: str | Path) -> None:
        """Append all ticks, then all events, then the summary, as JSON lines."""
        ticks, events = [{"tick": asdict(tick)} for tick in self.ticks], [{"event": event} for event in self.events]
        for line in (*ticks, *events, {"summary": self.summary()}):
            append_jsonl(path, line)


def distribution(values: Sequence[float] | np.ndarray, upper: int) -> dict[str, float] | None:
    """`median`, the `upper` percentile (`p99` where it is 99) and `max` of what is not NaN; None where nothing is."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    if not len(known):
        return None
    median, high, most = np.percentile(known, (50, upper, 100)).tolist()
    return {"median": median, f"p{upper}": high, "max": most}
