"""The sensor clock's offset against the robot's, and the evidence for it. Seconds.

A positive offset means that the sensor's clock was ahead; it is taken off the sensor's times. It was never recorded, so
  1. the user's figure is used where one is given;
  2. otherwise, where the robot log holds the measured force (F2), the offset that lines both force traces up;
  3. otherwise sensor and robot begin together: a start difference beyond normal staggering is taken for the offset;
  4. otherwise 0 is assumed, and said to be assumed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_lib.episodes.pictures import Pictures
from vla_lib.episodes.robot_log import RobotLog
from vla_lib.episodes.sensor_log import SensorLog

Array = np.ndarray[Any, Any]

STAGGER_S = 0.5  # streams of one recording may begin this far apart without any clock being wrong
START_UNCERTAINTY_S = 0.2
FORCE_SEARCH_S = 3.0
FORCE_STEP_S = 0.005
CLEAR_CORRELATION = 0.8


@dataclass(frozen=True)
class ClockOffset:
    """The offset that is used, and the evidence."""

    offset_s: float
    how: str  # `given`, `estimated from forces`, `estimated from starts`, `assumed` or `no sensor`
    start_difference_s: float | None  # first sensor sample minus first robot row, before any correction
    camera_start_difference_s: float | None  # earliest picture minus first robot row
    uncertainty_s: float | None
    correlation: float | None = None  # of the two force traces at the best offset, where both were recorded

    def sentence(self) -> str:
        """What was used and why, in words."""
        if self.start_difference_s is None:
            return "no sensor stream, so no offset is needed"
        spread = f" (+-{self.uncertainty_s * 1e3:.0f} ms)" if self.uncertainty_s else ""
        start = f"sensor begins {self.start_difference_s * 1e3:+.0f} ms from the robot"
        return f"{self.offset_s * 1e3:+.0f} ms{spread}, {self.how}; {start}"


def sensor_clock_offset(
    robot: RobotLog, sensor: SensorLog | None, pictures: dict[str, Pictures], given_ms: float | None = None
) -> ClockOffset:
    """Decide the offset of the sensor's clock. See the module's first lines for the order of evidence."""
    robot_start = float(robot.t_s[0])
    cameras = min((float(p.t_s[0]) - robot_start for p in pictures.values()), default=None)
    if sensor is None:
        return ClockOffset(0.0, "no sensor", None, cameras, None)
    start = float(sensor.t_s[0]) - robot_start
    if given_ms is not None:
        return ClockOffset(given_ms / 1e3, "given", start, cameras, None)
    by_force = force_offset(robot, sensor, search_center_s(start))
    if by_force is not None and by_force[1] >= CLEAR_CORRELATION:
        return ClockOffset(by_force[0], "estimated from forces", start, cameras, FORCE_STEP_S * 2, by_force[1])
    if abs(start) > STAGGER_S:
        return ClockOffset(start, "estimated from starts", start, cameras, START_UNCERTAINTY_S)
    return ClockOffset(0.0, "assumed", start, cameras, START_UNCERTAINTY_S)


def search_center_s(start_difference_s: float) -> float:
    """Where an offset is looked for: around the starts' difference where it is more than normal staggering."""
    return start_difference_s if abs(start_difference_s) > STAGGER_S else 0.0


def force_curve(robot: RobotLog, sensor: SensorLog, around_s: float) -> tuple[Array, Array] | None:
    """Offsets (M,) in seconds and both force traces' correlation (M,) at each; None where the log has no force."""
    if robot.force is None or len(sensor) < 100 or float(np.nanstd(sensor.force)) == 0:
        return None
    at = np.arange(robot.t_s[0], robot.t_s[-1], FORCE_STEP_S)
    logged = np.interp(at, robot.t_s, np.nan_to_num(robot.force))
    offsets = around_s + np.arange(-FORCE_SEARCH_S, FORCE_SEARCH_S + FORCE_STEP_S / 2, FORCE_STEP_S)
    axis = np.arange(float(at[0] + offsets[0]), at[-1] + offsets[-1] + FORCE_STEP_S, FORCE_STEP_S)
    measured = np.interp(axis, sensor.t_s, np.nan_to_num(sensor.force.astype(float)))
    inside = (axis >= sensor.t_s[0]) & (axis <= sensor.t_s[-1])
    marks = np.full(len(offsets), -1.0)
    for number in range(len(offsets)):  # both traces lie on one axis: an offset is a shift by whole steps
        part = slice(number, number + len(at))
        there = inside[part]
        a, b = logged[there], measured[part][there]
        if there.mean() >= 0.5 and a.std() > 0 and b.std() > 0:
            marks[number] = float(np.corrcoef(a, b)[0, 1])
    return offsets, marks


def force_offset(robot: RobotLog, sensor: SensorLog, around_s: float) -> tuple[float, float] | None:
    """(offset in seconds, correlation) that lines up the force in robot log and sensor; None where nothing tells it."""
    curve = force_curve(robot, sensor, around_s)
    if curve is None:
        return None
    offsets, marks = curve
    best = int(np.argmax(marks))
    wide = np.abs(offsets - offsets[best]) > 0.5
    if wide.any() and marks[best] - marks[wide].max() < 0.05:  # a flat curve points nowhere
        return None
    return float(offsets[best]), float(marks[best])
