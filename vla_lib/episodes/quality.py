"""The quality of an opened episode: what was measured of each stream, and the verdict with its reasons in words."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.episodes.clocks import FOUND, UNKNOWN, ClockOffset
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.findings import GOOD, NOT_JUDGED, REJECTED, USABLE, Finding, Findings
from vla_lib.episodes.robot_log import POLICY, RobotLog
from vla_lib.episodes.steps import Steps, stream_gaps
from vla_lib.episodes.timeline import Span

NAN = float("nan")

LEAST_VALID_S = 0.8  # one chunk of eight actions at 10 Hz: less cannot be trained on
LEAST_VALID_PART = 0.5
STILL_MM = 0.5
FAR_START_S = 2.0
EXPECTED_SENSOR_HZ = (600.0, 710.0)
OLD_POSE_PART = 0.9
SAME_RATE = 0.999  # a log at the very rate of the actions has it but for its stamps' rounding
CLOCK_OFF_S = 0.02
STAGGER_S = 0.5  # streams of one recording may begin this far apart without any clock being wrong


@dataclass(frozen=True, kw_only=True)
class StreamRate:
    """What was measured of one stream; nan where there was nothing to measure."""

    stream: str
    count: int  # usable entries (rows, samples, pictures)
    hz: float  # 1 / median interval
    mean_hz: float  # entries over the whole span, gaps included
    distinct_hz: float = NAN
    """Changes of the content a second while it changes (robot: refreshes of the controller); nan where not measured."""
    jitter_p50_ms: float  # median of |interval - median interval|
    jitter_p99_ms: float
    jitter_max_ms: float
    gaps: tuple[Span, ...]
    repeats: int  # entries that repeat the time of the one before
    backward_steps: int = 0
    start_s: float  # first entry, seconds after the first robot row
    end_s: float  # last entry, seconds after the last robot row (positive: goes on after the motion)
    clock_offset_s: float = 0.0  # taken off this stream's times
    clock: str  # how its times relate to the robot's


Rates = dict[str, StreamRate]
"""Stream name -> what was measured of it: the robot first, then the sensor, then every view."""


def distinct_hz(robot: RobotLog) -> float:
    """Distinct poses a second, rests left out: how often the controller refreshes under the published rows."""
    steps = np.diff(robot.t_s[robot.changed])
    row_s = float(np.median(np.diff(robot.t_s)))
    moving = steps[steps <= max(5 * row_s, 0.1)]
    return float(len(moving) / moving.sum()) if moving.sum() > 0 else NAN


def measure(episode: Episode, gaps: Mapping[str, list[Span]] | None = None) -> Rates:
    """Measure every stream of an opened episode. `gaps`: its gaps, where they are known already."""
    gaps = stream_gaps(episode) if gaps is None else gaps
    robot, sensor = episode.robot, episode.sensor

    def row(stream: str, t_s: np.ndarray, repeats: int, clock: str, **more: Any) -> StreamRate:
        steps = np.diff(t_s)
        steps = steps[steps > 0]
        usual = float(np.median(steps)) if len(steps) else NAN
        away_ms = np.abs(steps - usual) * 1e3 if len(steps) else np.array([NAN])
        return StreamRate(
            stream=stream,
            count=len(t_s),
            hz=1.0 / usual,
            mean_hz=float((len(t_s) - 1) / (t_s[-1] - t_s[0])) if len(steps) else NAN,
            jitter_p50_ms=float(np.median(away_ms)),
            jitter_p99_ms=float(np.percentile(away_ms, 99)),
            jitter_max_ms=float(away_ms.max()),
            gaps=tuple((float(b), float(e)) for b, e in gaps.get(stream, [])),
            repeats=repeats,
            start_s=float(t_s[0] - episode.start_s),
            end_s=float(t_s[-1] - episode.end_s),
            clock=clock,
            **more,
        )

    clean, clock = robot.cleaned, f"reference ({robot.clock})"
    told = {"backward_steps": clean.backward_steps, "distinct_hz": distinct_hz(robot)}
    rows = [row("robot", robot.t_s, clean.repeats, clock, **told)]
    if sensor is not None:
        clean, clock = sensor.cleaned, episode.clocks.sensor.how
        clock += "; sample times are rebuilt from window times" if sensor.reconstructed else ""
        told = {"backward_steps": clean.backward_steps, "clock_offset_s": sensor.clock_offset_s}
        rows.append(row("sensor", sensor.t_s, clean.repeats, clock, **told))
    cameras = episode.clocks.cameras
    for view, pictures in episode.pictures.items():
        repeats = int((np.diff(pictures.t_s) == 0).sum())
        rows.append(row(view, pictures.t_s, repeats, cameras.how, clock_offset_s=cameras.offset_s))
    if episode.commands is not None:
        rows.append(row(POLICY, episode.commands.t_s, 0, "the recorder's"))
    return {row.stream: row for row in rows}


def judge(episode: Episode, steps: Steps, rates: Rates | None = None, extra: Iterable[Finding] = ()) -> Findings:
    """All findings about one opened episode: its own, `extra` ones, and those that its measured streams give."""
    rates = rates or measure(episode, steps.gaps)
    findings = Findings([*episode.findings, *extra])
    _judge_robot(episode, steps, rates["robot"], findings)
    if "sensor" in rates:
        _judge_sensor(episode, rates["sensor"], findings)
    _judge_pictures(episode, rates, findings)
    valid = int(steps.valid.sum())
    invalid = len(steps) - valid
    _judge_blind(episode, steps, rates, findings)
    across = invalid - int((steps.blind & ~steps.valid).sum())
    if across and steps.gaps:
        streams = ", ".join(sorted(steps.gaps))
        findings.exclude("episode", f"{across} of {len(steps)} steps are invalid (gaps in {streams})")
    if valid / steps.hz < LEAST_VALID_S - 1e-9:
        lasts = f"{valid / steps.hz:.1f} s, {LEAST_VALID_S} s are needed"
        findings.reject("episode", f"only {valid} steps are valid: {lasts}")
    elif valid < LEAST_VALID_PART * len(steps):
        findings.reject("episode", f"{invalid} of {len(steps)} steps lie across gaps: more than half")
    return findings


def _judge_blind(episode: Episode, steps: Steps, rates: Rates, findings: Findings) -> None:
    """Steps before the first pictures: a few at the start are a recorder's, more are a loss."""
    blind = int(steps.blind.sum())
    if not blind:
        return
    late = max(episode.pictures, key=lambda view: rates[view].start_s)
    text = f"{blind} of {len(steps)} steps are invalid: a view has no picture yet ({late} begins last)"
    if blind / steps.hz > STAGGER_S + (1 / rates[late].hz if rates[late].hz > 0 else 0.0):
        findings.exclude("episode", text)
    else:
        findings.note("episode", text)


def _gaps(row: StreamRate, episode: Episode, findings: Findings) -> None:
    origin, more = episode.start_s, ", ..." if len(row.gaps) > 3 else ""
    if row.gaps:
        shown = ", ".join(f"{begin - origin:.2f}-{end - origin:.2f} s" for begin, end in row.gaps[:3])
        findings.exclude(row.stream, f"{len(row.gaps)} gap(s) at {shown}{more}")


def _judge_robot(episode: Episode, steps: Steps, robot: StreamRate, findings: Findings) -> None:
    _gaps(robot, episode, findings)
    if robot.distinct_hz < OLD_POSE_PART * robot.mean_hz:
        rates = f"rows come at {robot.mean_hz:.0f} Hz but poses change at {robot.distinct_hz:.0f} Hz"
        findings.note("robot", f"{rates}: repeated rows are old poses")
    if robot.hz < steps.hz * SAME_RATE:
        asked = f"fewer than the {steps.hz:g} actions a second asked for"
        findings.reject("robot", f"rows come at {robot.hz:.1f} Hz, {asked}")
    travelled = float(np.linalg.norm(steps.action[:, :3], axis=1).sum())
    turned = float(np.linalg.norm(steps.action[:, 3:6], axis=1).sum())
    if travelled < STILL_MM and turned < STILL_MM:
        findings.reject("robot", f"the arm stands still ({travelled:.2f} mm, {turned:.2f} degrees in all)")


def _judge_sensor(episode: Episode, sensor: StreamRate, findings: Findings) -> None:
    _judge_clock("sensor", episode.clocks.sensor, episode.sensor_start_s, 0.0, findings)
    _gaps(sensor, episode, findings)
    low, high = EXPECTED_SENSOR_HZ
    if not low <= sensor.hz <= high:
        findings.exclude("sensor", f"samples come at {sensor.hz:.0f} Hz, {low:.0f}-{high:.0f} are expected")


def _judge_clock(stream: str, clock: ClockOffset, start_s: float | None, interval_s: float, findings: Findings) -> None:
    """A clock that was off, and a start that no clock explains. `interval_s`: the stream's own."""
    if clock.how == FOUND and abs(clock.offset_s) > CLOCK_OFF_S:
        findings.exclude(stream, f"the clock was off: {clock.sentence()}")
    if start_s is None or abs(start_s) <= CLOCK_OFF_S + interval_s:
        return
    text = f"the recording begins {start_s * 1e3:+.0f} ms from the robot's"
    if clock.how == UNKNOWN and abs(start_s) > STAGGER_S + interval_s:
        findings.exclude(stream, f"{text}, and no motion tells whether its clock is off; times stand as recorded")
    else:
        findings.note(stream, text)


def _judge_pictures(episode: Episode, rates: Rates, findings: Findings) -> None:
    overlapping = 0
    slowest_s = max((1 / rates[view].hz for view in episode.pictures if rates[view].hz > 0), default=0.0)
    _judge_clock("cameras", episode.clocks.cameras, episode.cameras_start_s, slowest_s, findings)
    for view in episode.pictures:
        row = rates[view]
        _gaps(row, episode, findings)
        if row.start_s > FAR_START_S:
            findings.exclude(view, f"its first picture comes {row.start_s:.1f} s after the robot's first row")
        if row.start_s < episode.duration_s and row.end_s > -episode.duration_s:
            overlapping += 1
        else:
            findings.exclude(view, "no picture was taken while the robot moved")
    if not overlapping:
        findings.reject("episode", "no view has pictures from the time of the motion")


def summary_row(
    key: str, layout: str, findings: Findings, rates: Rates | None, steps: Steps | None, duration_s: float = NAN
) -> dict[str, Any]:
    """One row of the table of all episodes (plain values)."""
    rates = rates or {}
    robot, sensor = rates.get("robot"), rates.get("sensor")
    views = [row for stream, row in rates.items() if stream not in ("robot", "sensor", POLICY)]
    cameras = [row.hz for row in views]
    return {
        "episode": key,
        "layout": layout,
        "verdict": findings.verdict,
        "seconds": duration_s,
        "steps": len(steps) if steps is not None else 0,
        "valid": int(steps.valid.sum()) if steps is not None else 0,
        "robot_hz": robot.hz if robot else NAN,
        "pose_hz": robot.distinct_hz if robot else NAN,
        "sensor_hz": sensor.hz if sensor else NAN,
        "camera_hz": float(np.median(cameras)) if cameras else NAN,
        "views": len(cameras),
        "sensor_offset_ms": sensor.clock_offset_s * 1e3 if sensor else NAN,
        "sensor_clock": sensor.clock if sensor else "",
        "camera_offset_ms": next((row.clock_offset_s * 1e3 for row in views), NAN),
        "camera_clock": next((row.clock for row in views), ""),
        "reasons": "; ".join(findings.reasons),
    }


def verdict_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """All episodes in one table: the ones to record again first, then those with exclusions, then the good ones."""
    frame = pd.DataFrame([dict(row) for row in rows])
    if frame.empty:
        return frame
    rank = frame["verdict"].map({NOT_JUDGED: 0, REJECTED: 0, USABLE: 1, GOOD: 2})
    return frame.assign(rank=rank).sort_values(["rank", "episode"], ignore_index=True).drop(columns="rank")


def rate_table(rates: Rates) -> pd.DataFrame:
    """One episode's streams in one table; gaps as their number and total length."""
    frame = pd.DataFrame([vars(row) for row in rates.values()])
    gaps = frame.pop("gaps")
    return frame.round(4).assign(gaps=gaps.map(len), gap_s=gaps.map(lambda spans: float(sum(e - b for b, e in spans))))
