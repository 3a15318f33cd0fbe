"""An opened episode in; one measured row per stream out: rate, jitter, gaps, repeats, backward steps, start and end. Hz, ms, s."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_lib.episodes.episode import Episode
from vla_lib.episodes.robot_log import RobotLog
from vla_lib.episodes.steps import stream_gaps
from vla_lib.episodes.timeline import Span

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StreamRate:
    """What was measured of one stream; nan where there was nothing to measure."""

    stream: str
    count: int
    """Usable entries (rows, samples, pictures)."""
    hz: float
    """1 / median interval."""
    mean_hz: float
    """Entries over the whole span, gaps included."""
    distinct_hz: float
    """Changes of the content a second while it changes (robot: refreshes of the controller); nan where not measured."""
    jitter_p50_ms: float
    """Median of |interval - median interval|."""
    jitter_p99_ms: float
    jitter_max_ms: float
    gaps: tuple[Span, ...]
    repeats: int
    """Entries that repeat the time of the one before."""
    backward_steps: int
    start_s: float
    """First entry, seconds after the first robot row."""
    end_s: float
    """Last entry, seconds after the last robot row (positive: goes on after the motion)."""
    clock_offset_s: float
    """Taken off this stream's times."""
    clock: str
    """How its times relate to the robot's."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"gaps": [list(gap) for gap in self.gaps]}


@dataclass
class Rates:
    """All streams of one episode."""

    streams: list[StreamRate] = field(default_factory=list)

    def __getitem__(self, stream: str) -> StreamRate:
        return next(row for row in self.streams if row.stream == stream)

    def __contains__(self, stream: str) -> bool:
        return any(row.stream == stream for row in self.streams)


def intervals_ms(t_s: Array) -> Array:
    """Intervals between neighbouring times in ms."""
    return np.diff(np.asarray(t_s, float)) * 1e3


def distinct_hz(robot: RobotLog) -> float:
    """Distinct poses a second, rests left out: how often the controller refreshes under the published rows."""
    first = robot.t_s[robot.changed]
    steps = np.diff(first)
    if not len(steps):
        return float("nan")
    row = float(np.median(np.diff(robot.t_s)))
    moving = steps[steps <= max(5 * row, 0.1)]
    return float(len(moving) / moving.sum()) if len(moving) and moving.sum() > 0 else float("nan")


def measure(episode: Episode, gaps: Mapping[str, list[Span]] | None = None) -> Rates:
    """Measure every stream of an opened episode. `gaps`: its gaps, where they are known already."""
    gaps = stream_gaps(episode) if gaps is None else gaps
    robot = episode.robot
    origin, end = episode.start_s, episode.end_s
    rows = [
        _row(
            "robot",
            robot.t_s,
            gaps,
            origin,
            end,
            distinct=distinct_hz(robot),
            repeats=robot.cleaned.repeats,
            backward=robot.cleaned.backward_steps,
            clock=f"reference ({robot.clock})",
        )
    ]
    if episode.sensor is not None:
        sensor = episode.sensor
        rows.append(
            _row(
                "sensor",
                sensor.t_s,
                gaps,
                origin,
                end,
                repeats=sensor.cleaned.repeats,
                backward=sensor.cleaned.backward_steps,
                offset=sensor.clock_offset_s,
                clock=episode.sensor_clock.how
                + (", sample times rebuilt from window times" if sensor.reconstructed else ""),
            )
        )
    for view, pictures in episode.pictures.items():
        repeats = int((np.diff(pictures.t_s) == 0).sum())
        rows.append(_row(view, pictures.t_s, gaps, origin, end, repeats=repeats, clock="assumed equal"))
    return Rates(rows)


def _row(
    stream: str,
    t_s: Array,
    gaps: Mapping[str, list[Span]],
    origin: float,
    end: float,
    distinct: float = float("nan"),
    repeats: int = 0,
    backward: int = 0,
    offset: float = 0.0,
    clock: str = "",
) -> StreamRate:
    steps = np.diff(t_s)
    positive = steps[steps > 0]
    usual = float(np.median(positive)) if len(positive) else float("nan")
    away = np.abs(positive - usual) * 1e3
    nan = float("nan")
    return StreamRate(
        stream=stream,
        count=len(t_s),
        hz=1.0 / usual if len(positive) else nan,
        mean_hz=float((len(t_s) - 1) / (t_s[-1] - t_s[0])) if len(positive) else nan,
        distinct_hz=distinct,
        jitter_p50_ms=float(np.median(away)) if len(away) else nan,
        jitter_p99_ms=float(np.percentile(away, 99)) if len(away) else nan,
        jitter_max_ms=float(away.max()) if len(away) else nan,
        gaps=tuple((float(b), float(e)) for b, e in gaps.get(stream, [])),
        repeats=repeats,
        backward_steps=backward,
        start_s=float(t_s[0] - origin) if len(t_s) else nan,
        end_s=float(t_s[-1] - end) if len(t_s) else nan,
        clock_offset_s=offset,
        clock=clock,
    )
