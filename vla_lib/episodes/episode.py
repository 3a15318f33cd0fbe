"""A raw episode folder of any layout in; one `Episode` with its streams, times, units and findings out.

All times are UNIX seconds of the robot's clock; the sensor's are corrected by the clock offset that is used and named.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.clocks import ClockOffset, sensor_clock_offset
from vla_lib.episodes.findings import EXCLUDED, NOTE, Finding
from vla_lib.episodes.layouts import EpisodeFiles, read_layout
from vla_lib.episodes.pictures import EXPECTED_VIEWS, Listing, Pictures, read_pictures
from vla_lib.episodes.robot_log import RobotLog, read_robot_log
from vla_lib.episodes.sensor_log import SensorLog, read_sensor_log

Array = np.ndarray[Any, Any]


@dataclass
class Episode:
    """One raw episode, opened. Pictures and A-scans are read only when asked for."""

    files: EpisodeFiles
    robot: RobotLog
    sensor: SensorLog | None
    pictures: dict[str, Pictures]
    """View key -> pictures, sorted by key."""
    sensor_clock: ClockOffset
    metadata: dict[str, Any]
    """The recorder's own metadata.json, where there is one; never trusted."""
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        where: EpisodeFiles | str | Path,
        sensor_clock_offset_ms: float | None = None,
        views: Sequence[str] = (),
        full_picture_check: bool = False,
        listing: Listing | None = None,
    ) -> "Episode":
        """Open a raw episode. `views` limits the view keys; empty: all. `listing`: the pictures, where they were listed already.

        Raises UserError where there is no usable robot log: without it nothing can be placed.
        """
        files = where if isinstance(where, EpisodeFiles) else read_layout(where)
        if files.robot_log is None:
            raise UserError(
                f"{files.path} holds no robot log (a CSV with a clock and six pose columns); it cannot be used."
            )
        robot = read_robot_log(files.robot_log)
        findings = list(robot.findings)
        for other in files.other_logs:
            findings.append(
                Finding(EXCLUDED, "robot", f"{other.name} is a second robot log and is not used", left_out=True)
            )
        pictures = read_pictures(files.path, findings, full_picture_check, listing)
        pictures = _chosen(pictures, views, findings)
        sensor = read_sensor_log(files.sensor_files, findings)
        clock = sensor_clock_offset(robot, sensor, pictures, sensor_clock_offset_ms)
        if sensor is not None:
            sensor.shift(clock.offset_s)
            if sensor.t_s[-1] < robot.t_s[0] or sensor.t_s[0] > robot.t_s[-1]:
                away = sensor.t_s[0] - robot.t_s[0]
                text = (
                    f"the sensor's time does not overlap the robot's (it starts {away:+.1f} s from it) and is not used"
                )
                findings.append(Finding(EXCLUDED, "sensor", text + "; give --sensor-clock-offset-ms", left_out=True))
                sensor = None
        if files.layout != "F0" and not files.sensor_files:
            findings.append(Finding(EXCLUDED, "sensor", "there is no sensor file", left_out=True))
        return cls(files, robot, sensor, pictures, clock, _read_metadata(files.path, findings), findings)

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def layout(self) -> str:
        return self.files.layout

    @property
    def start_s(self) -> float:
        """First usable row of the robot log."""
        return float(self.robot.t_s[0])

    @property
    def end_s(self) -> float:
        """Last usable row of the robot log."""
        return float(self.robot.t_s[-1])

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def _chosen(pictures: dict[str, Pictures], views: Sequence[str], findings: list[Finding]) -> dict[str, Pictures]:
    expected = views or EXPECTED_VIEWS
    for view in expected:
        if view not in pictures:
            findings.append(Finding(EXCLUDED, view, "the view has no pictures", left_out=True))
    return {view: pictures[view] for view in sorted(pictures) if not views or view in views}


def _read_metadata(path: Path, findings: list[Finding]) -> dict[str, Any]:
    file = path / "metadata.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        findings.append(Finding(NOTE, "episode", "metadata.json cannot be read; nothing depends on it"))
        return {}
    return content if isinstance(content, dict) else {}
