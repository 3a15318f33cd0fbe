"""An opened episode with its rates and steps in; a verdict with reasons in words out, and one table for all episodes.

good: nothing is left out. usable: some steps, views or streams are excluded, the rest can be trained on. rejected: record again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.episodes.episode import Episode
from vla_lib.episodes.findings import EXCLUDED, FATAL, NOTE, Finding
from vla_lib.episodes.rates import Rates, measure
from vla_lib.episodes.steps import Steps

GOOD, USABLE, REJECTED = "good", "usable with exclusions", "rejected"

LEAST_VALID_S = 0.8
"""One chunk of eight actions at 10 Hz: less cannot be trained on."""
LEAST_VALID_PART = 0.5
STILL_MM = 0.5
FAR_START_S = 2.0
EXPECTED_SENSOR_HZ = (600.0, 700.0)
OLD_POSE_PART = 0.9
CLOCK_OFF_S = 0.02


@dataclass
class Verdict:
    """The judgement of one episode."""

    level: str
    """`good`, `usable with exclusions` or `rejected`."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """Sentences, gravest first; notes last."""
        order = {FATAL: 0, EXCLUDED: 1, NOTE: 2}
        return [f"{f.stream}: {f.text}" for f in sorted(self.findings, key=lambda f: order[f.weight])]

    @property
    def left_out(self) -> list[str]:
        """Whole streams or files that are not used."""
        return [f"{f.stream}: {f.text}" for f in self.findings if f.left_out]


def rejected(text: str) -> Verdict:
    """The verdict of an episode that could not even be opened."""
    return Verdict(REJECTED, [Finding(FATAL, "episode", text)])


def judge(episode: Episode, steps: Steps, rates: Rates | None = None, extra: Iterable[Finding] = ()) -> Verdict:
    """Judge one opened episode by what its streams show, and by `extra` findings."""
    rates = rates or measure(episode, steps.gaps)
    findings = [
        *episode.findings,
        *extra,
        *(_judge_robot(episode, steps, rates)),
        *_judge_sensor(episode, rates),
        *_judge_pictures(episode, rates),
    ]
    invalid = int((~steps.valid).sum())
    if invalid:
        streams = ", ".join(sorted(steps.gaps))
        findings.append(
            Finding(EXCLUDED, "episode", f"{invalid} of {len(steps)} steps are invalid (gaps in {streams})")
        )
    if steps.valid.sum() / steps.hz < LEAST_VALID_S - 1e-9:
        text = f"only {int(steps.valid.sum())} steps are valid: {steps.valid.sum() / steps.hz:.1f} s, {LEAST_VALID_S} s are needed"
        findings.append(Finding(FATAL, "episode", text))
    elif steps.valid.mean() < LEAST_VALID_PART:
        findings.append(Finding(FATAL, "episode", f"{invalid} of {len(steps)} steps lie across gaps: more than half"))
    if any(f.weight == FATAL for f in findings):
        return Verdict(REJECTED, findings)
    return Verdict(USABLE if any(f.weight == EXCLUDED for f in findings) else GOOD, findings)


def _gap_text(gaps: Iterable[tuple[float, float]], origin: float) -> str:
    gaps = list(gaps)
    shown = ", ".join(f"{begin - origin:.2f}-{end - origin:.2f} s" for begin, end in gaps[:3])
    return f"{len(gaps)} gap(s) at {shown}{', ...' if len(gaps) > 3 else ''}"


def _judge_robot(episode: Episode, steps: Steps, rates: Rates) -> list[Finding]:
    found = []
    robot = rates["robot"]
    if robot.gaps:
        found.append(Finding(EXCLUDED, "robot", _gap_text(robot.gaps, episode.start_s)))
    if np.isfinite(robot.distinct_hz) and robot.distinct_hz < OLD_POSE_PART * robot.mean_hz:
        text = f"rows come at {robot.mean_hz:.0f} Hz but poses change at {robot.distinct_hz:.0f} Hz: repeated rows are old poses"
        found.append(Finding(NOTE, "robot", text))
    if robot.hz < steps.hz:
        found.append(
            Finding(
                FATAL,
                "robot",
                f"rows come at {robot.hz:.1f} Hz, fewer than the {steps.hz:g} actions a second asked for",
            )
        )
    travelled = float(np.linalg.norm(steps.action[:, :3], axis=1).sum())
    turned = float(np.linalg.norm(steps.action[:, 3:6], axis=1).sum())
    if travelled < STILL_MM and turned < STILL_MM:
        found.append(Finding(FATAL, "robot", f"the arm stands still ({travelled:.2f} mm, {turned:.2f} degrees in all)"))
    return found


def _judge_sensor(episode: Episode, rates: Rates) -> list[Finding]:
    if "sensor" not in rates:
        return []
    found = []
    sensor = rates["sensor"]
    clock = episode.sensor_clock
    if clock.how.startswith("estimated") and abs(clock.offset_s) > CLOCK_OFF_S:
        found.append(Finding(EXCLUDED, "sensor", f"its clock is off: {clock.sentence()}"))
    if sensor.gaps:
        found.append(Finding(EXCLUDED, "sensor", _gap_text(sensor.gaps, episode.start_s)))
    low, high = EXPECTED_SENSOR_HZ
    if not low <= sensor.hz <= high:
        found.append(
            Finding(EXCLUDED, "sensor", f"samples come at {sensor.hz:.0f} Hz, {low:.0f}-{high:.0f} are expected")
        )
    if abs(sensor.start_s) > FAR_START_S and not clock.how.startswith("estimated"):
        found.append(Finding(EXCLUDED, "sensor", f"it begins {sensor.start_s:+.1f} s from the robot"))
    return found


def _judge_pictures(episode: Episode, rates: Rates) -> list[Finding]:
    found = []
    overlapping = 0
    for view in episode.pictures:
        row = rates[view]
        if row.gaps:
            found.append(Finding(EXCLUDED, view, _gap_text(row.gaps, episode.start_s)))
        if row.start_s > FAR_START_S:
            found.append(
                Finding(EXCLUDED, view, f"its first picture comes {row.start_s:.1f} s after the robot's first row")
            )
        inside = row.start_s < episode.duration_s and row.end_s > -episode.duration_s
        overlapping += inside
        if not inside:
            found.append(Finding(EXCLUDED, view, "no picture was taken while the robot moved"))
    if not overlapping:
        found.append(Finding(FATAL, "episode", "no view has pictures from the time of the motion"))
    return found


def summary_row(
    key: str, layout: str, verdict: Verdict, rates: Rates | None, steps: Steps | None, duration_s: float
) -> dict[str, Any]:
    """One row of the table of all episodes (plain values)."""
    nan = float("nan")
    cameras = [row for row in rates.streams if row.stream.startswith("View")] if rates else []
    has_sensor = rates is not None and "sensor" in rates
    return {
        "episode": key,
        "layout": layout,
        "verdict": verdict.level,
        "seconds": duration_s,
        "steps": len(steps) if steps is not None else 0,
        "valid": int(steps.valid.sum()) if steps is not None else 0,
        "robot_hz": rates["robot"].hz if rates else nan,
        "pose_hz": rates["robot"].distinct_hz if rates else nan,
        "sensor_hz": rates["sensor"].hz if rates and has_sensor else nan,
        "camera_hz": float(np.median([row.hz for row in cameras])) if cameras else nan,
        "views": len(cameras),
        "sensor_offset_ms": rates["sensor"].clock_offset_s * 1e3 if rates and has_sensor else nan,
        "sensor_clock": rates["sensor"].clock if rates and has_sensor else "",
        "reasons": "; ".join(verdict.reasons),
    }


def verdict_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """All episodes in one table: the ones to record again first, then those with exclusions, then the good ones."""
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        return frame
    order = {REJECTED: 0, USABLE: 1, GOOD: 2}
    return frame.sort_values(
        by=["verdict", "episode"], key=lambda c: c.map(order) if c.name == "verdict" else c, ignore_index=True
    )


def rate_table(rates: Rates) -> pd.DataFrame:
    """One episode's streams in one table; gaps as their number and total length."""
    rows = []
    for row in rates.streams:
        plain = row.to_dict()
        gaps = plain.pop("gaps")
        rows.append(plain | {"gaps": len(gaps), "gap_s": float(sum(end - begin for begin, end in gaps))})
    return pd.DataFrame(rows)
