"""The offsets of the sensor's clock and of the cameras' against the robot's: what was found, and what is taken off.

A positive offset means that a stream's clock is ahead of the robot's. It was never recorded, so
  1. the user's figure is used where one is given (sensor only);
  2. otherwise what the motion tells (see `motion`), pooled over a session, where it tells it to 20 ms or better;
  3. otherwise times stand as recorded, and the report says so.
Where a stream begins never shifts anything: that depends on how the recorder begins. It raises a finding.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass

CLEAR_S = 0.02
CLEAR_CORRELATION = 0.7
CLEAR_LIKELIHOOD = 8.0
"""By this much must the logarithm of the best lag's likelihood lie above that of any lag further than 0.3 s away."""
SMALLEST_S = 0.005
"""Smaller offsets are left alone, and larger ones are rounded to it: a session that grows keeps its shift."""
HALF_FRAME_S = 0.5 / 15
"""As SMALLEST_S, for F4: its times are rebuilt, and frames that came unevenly look like an offset of less."""
ONE_CLOCK_S = 0.04  # estimates of a session that differ by more are not of one clock
SESSION_GAP_S = 4 * 3600.0
GIVEN, FOUND, CONFIRMED, UNKNOWN = "given", "found from motion", "confirmed by motion", "unknown"


@dataclass(frozen=True)
class Estimate:
    """What the motion of one episode says of a clock."""

    offset_s: float
    uncertainty_s: float  # one standard deviation
    correlation: float  # of both curves at the offset
    likelihood: float  # logarithm of the likelihood ratio between the best lag and the best one elsewhere

    @property
    def clear(self) -> bool:
        """Whether the evidence is good enough to shift a clock by it."""
        sure = self.uncertainty_s < CLEAR_S and self.likelihood >= CLEAR_LIKELIHOOD
        return sure and abs(self.correlation) >= CLEAR_CORRELATION


@dataclass(frozen=True)
class Evidence:
    """What one episode's motion says of its clocks; None where it says nothing."""

    start_s: float  # first robot row
    sensor: Estimate | None
    cameras: Estimate | None


@dataclass(frozen=True)
class ClockOffset:
    """How far a stream's clock is ahead of the robot's: what is taken off its times, and why."""

    offset_s: float = 0.0  # taken off
    how: str = UNKNOWN  # `given`, `found from motion`, `confirmed by motion` or `unknown`
    estimate_s: float | None = None  # what the motion says, with
    uncertainty_s: float | None = None  # one standard deviation
    episodes: int = 0  # whose motion told it

    def sentence(self) -> str:
        """What was taken off and why, in words."""
        if self.estimate_s is None or self.uncertainty_s is None:
            why = "given" if self.how == GIVEN else "unknown (no motion tells it); its times stand as recorded"
            return f"{self.offset_s * 1e3:+.0f} ms, {why}"
        told = f"{self.estimate_s * 1e3:+.0f} +- {max(self.uncertainty_s * 1e3, 1):.0f} ms"
        return f"{self.offset_s * 1e3:+.0f} ms, {self.how} ({told}, {self.episodes} episode(s))"


@dataclass(frozen=True)
class Clocks:
    """The clocks of one episode, and the session that they were pooled over."""

    sensor: ClockOffset = ClockOffset()
    cameras: ClockOffset = ClockOffset()
    session: str = ""

    def shifts(self) -> list[float]:
        """What is taken off the sensor's times and the cameras', in ms: all of this that changes data.pkl."""
        return [round(self.sensor.offset_s * 1e3, 3), round(self.cameras.offset_s * 1e3, 3)]

    def rows(self) -> list[dict[str, Any]]:
        """Two rows (sensor, cameras) of the table of sessions; milliseconds."""
        found = []
        for stream, clock in (("sensor", self.sensor), ("cameras", self.cameras)):
            told = [
                None if value is None else round(value * 1e3, 1) for value in (clock.estimate_s, clock.uncertainty_s)
            ]
            shift_ms = round(clock.offset_s * 1e3, 1)
            row = {"session": self.session, "stream": stream, "taken_off_ms": shift_ms, "how": clock.how}
            found.append(row | {"offset_ms": told[0], "uncertainty_ms": told[1], "told_by": clock.episodes})
        return found


def sessions(datasets: Sequence[str], starts_s: Sequence[float]) -> list[list[int]]:
    """Numbers of the episodes of each session: a dataset's episodes that begin within four hours of one another."""
    frame = pd.DataFrame({"dataset": datasets, "start_s": starts_s}).sort_values(["dataset", "start_s"])
    begins = (frame["dataset"] != frame["dataset"].shift()) | (frame["start_s"].diff() >= SESSION_GAP_S)
    return [group.index.tolist() for _, group in frame.groupby(begins.cumsum())]


def session_clocks(
    dataset: str, evidence: Sequence[Evidence], given_ms: float | None = None, rebuilt: bool = False
) -> list[Clocks]:
    """The clocks of each episode of one session. `rebuilt`: its times are."""
    smallest_s = HALF_FRAME_S if rebuilt else SMALLEST_S
    name = f"{dataset} {datetime.fromtimestamp(min(one.start_s for one in evidence), UTC):%Y-%m-%d %H:%M}"
    sensor = _pooled([one.sensor for one in evidence], smallest_s)
    if given_ms is not None:
        sensor = [ClockOffset(given_ms / 1e3, GIVEN)] * len(evidence)
    cameras = _pooled([one.cameras for one in evidence], smallest_s)
    return [Clocks(*pair, name) for pair in zip(sensor, cameras, strict=True)]


def _pooled(estimates: Sequence[Estimate | None], smallest_s: float) -> list[ClockOffset]:
    """The offset of each episode: the weighted mean of all clear estimates that are near their median.

    An episode that clearly says otherwise (a host's clock was set in the middle of a session) keeps its own.
    """
    clear = [one for one in estimates if one is not None and one.clear]
    if not clear:
        return [ClockOffset()] * len(estimates)
    middle = float(np.median([one.offset_s for one in clear]))
    near = [one for one in clear if abs(one.offset_s - middle) <= ONE_CLOCK_S]
    shared = _decided(near, smallest_s) if near else ClockOffset()
    alone = {one: _decided([one], smallest_s) for one in clear if one not in near}
    return [alone.get(one, shared) if one is not None else shared for one in estimates]


def _decided(clear: Sequence[Estimate], smallest_s: float) -> ClockOffset:
    offsets = np.array([one.offset_s for one in clear])
    weights = np.array([1 / max(one.uncertainty_s, 0.001) ** 2 for one in clear])
    mean = float(np.average(offsets, weights=weights))
    spread = float(np.average((offsets - mean) ** 2, weights=weights)) ** 0.5  # where the episodes disagree
    uncertainty_s = max(float(weights.sum()) ** -0.5, spread / len(clear) ** 0.5)
    if abs(mean) < max(smallest_s, uncertainty_s):
        return ClockOffset(0.0, CONFIRMED, mean, uncertainty_s, len(clear))
    shift = round(mean / SMALLEST_S) * SMALLEST_S
    return ClockOffset(shift, FOUND, mean, uncertainty_s, len(clear))
