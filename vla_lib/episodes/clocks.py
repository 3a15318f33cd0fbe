"""Robot log, sensor stream and pictures in; the sensor clock's offset, and how it was found, out. Seconds.

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

STAGGER_S = 0.5
"""Streams of one recording may begin this far apart without any clock being wrong."""
FORCE_SEARCH_S = 3.0
FORCE_STEP_S = 0.005
CLEAR_CORRELATION = 0.8


@dataclass(frozen=True)
class ClockOffset:
    """The offset that is used, and the evidence."""

    offset_s: float
    how: str
    """`given`, `estimated from forces`, `estimated from starts`, `assumed` or `no sensor`."""
    start_difference_s: float | None
    """First sensor sample minus first robot row, before any correction."""
    camera_start_difference_s: float | None
    """Earliest picture minus first robot row."""
    uncertainty_s: float | None
    correlation: float | None = None
    """Of the two force traces at the best offset, where both were recorded."""

    def sentence(self) -> str:
        """What was used and why, in words."""
        if self.how == "no sensor":
            return "no sensor stream, so no offset is needed"
        spread = f" (+-{self.uncertainty_s * 1e3:.0f} ms)" if self.uncertainty_s else ""
        start = (
            f"sensor begins {self.start_difference_s * 1e3:+.0f} ms from the robot"
            if self.start_difference_s is not None
            else ""
        )
        return f"{self.offset_s * 1e3:+.0f} ms{spread}, {self.how}; {start}"


def sensor_clock_offset(
    robot: RobotLog, sensor: SensorLog | None, pictures: dict[str, Pictures], given_ms: float | None = None
) -> ClockOffset:
    """Decide the offset of the sensor's clock. See the module's first lines for the order of evidence."""
    cameras = min((float(p.t_s[0]) for p in pictures.values() if len(p)), default=None)
    camera_start = None if cameras is None else cameras - float(robot.t_s[0])
    if sensor is None:
        return ClockOffset(0.0, "no sensor", None, camera_start, None)
    start = sensor.start_s - float(robot.t_s[0])
    if given_ms is not None:
        return ClockOffset(given_ms / 1e3, "given", start, camera_start, None)
    by_force = force_offset(robot, sensor, start if abs(start) > STAGGER_S else 0.0)
    if by_force is not None and by_force[1] >= CLEAR_CORRELATION:
        return ClockOffset(by_force[0], "estimated from forces", start, camera_start, FORCE_STEP_S * 2, by_force[1])
    if abs(start) > STAGGER_S:
        return ClockOffset(start, "estimated from starts", start, camera_start, 0.2)
    return ClockOffset(0.0, "assumed", start, camera_start, 0.2)


def force_curve(robot: RobotLog, sensor: SensorLog, around_s: float) -> tuple[Array, Array] | None:
    """Offsets (M,) in seconds and the correlation (M,) of both force traces at each; None where the log has no force."""
    if robot.force is None or len(sensor) < 100 or float(np.nanstd(sensor.force)) == 0:
        return None
    at = np.arange(robot.t_s[0], robot.t_s[-1], FORCE_STEP_S)
    logged = np.interp(at, robot.t_s, np.nan_to_num(robot.force))
    force = np.nan_to_num(sensor.force.astype(float))
    offsets = around_s + np.arange(-FORCE_SEARCH_S, FORCE_SEARCH_S + FORCE_STEP_S / 2, FORCE_STEP_S)
    sampled_from = float(at[0] + offsets[0])
    axis = np.arange(sampled_from, at[-1] + offsets[-1] + FORCE_STEP_S, FORCE_STEP_S)
    measured = np.interp(axis, sensor.t_s, force)
    inside = (axis >= sensor.t_s[0]) & (axis <= sensor.t_s[-1])
    marks = np.full(len(offsets), -1.0)
    for number in range(len(offsets)):
        part = slice(number, number + len(at))
        there = inside[part]
        if there.mean() < 0.5:
            continue
        a, b = logged[there], measured[part][there]
        if a.std() > 0 and b.std() > 0:
            marks[number] = float(np.corrcoef(a, b)[0, 1])
    return offsets, marks


def force_offset(robot: RobotLog, sensor: SensorLog, around_s: float) -> tuple[float, float] | None:
    """(offset in seconds, correlation) that lines up the force in the robot log with the sensor's; None without such a log."""
    curve = force_curve(robot, sensor, around_s)
    if curve is None:
        return None
    offsets, marks = curve
    best = int(np.argmax(marks))
    wide = np.abs(offsets - offsets[best]) > 0.5
    if wide.any() and marks[best] - marks[wide].max() < 0.05:  # a flat curve points nowhere
        return None
    return float(offsets[best]), float(marks[best])
