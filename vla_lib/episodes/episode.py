"""One raw episode of any layout, opened: its streams, times, units and findings, and what each stream held when.

All times are UNIX seconds of the robot's clock; the sensor's and the pictures' are corrected by the offsets given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.clocks import Clocks
from vla_lib.episodes.findings import Findings
from vla_lib.episodes.hdf5 import CAMERAS, picture_file, read_h5
from vla_lib.episodes.layouts import EXPECTED_VIEWS, EpisodeFiles, describe_log, read_layout
from vla_lib.episodes.motion_cues import frozen_spans
from vla_lib.episodes.pictures import Listing, Pictures, read_pictures, sound_pictures
from vla_lib.episodes.robot_log import Commands, RobotLog, read_commands, read_robot_log
from vla_lib.episodes.sensor_log import SensorLog, read_sensor_log
from vla_lib.episodes.timeline import clean_times, newest_at_or_before

AS_RECORDED = Clocks()


@dataclass
class Episode:
    """One raw episode, opened. Pictures and A-scans are read only when asked for."""

    files: EpisodeFiles
    robot: RobotLog
    sensor: SensorLog | None
    pictures: dict[str, Pictures]  # view key -> pictures, sorted by key
    clocks: Clocks  # what was taken off the sensor's times and the pictures'
    findings: Findings
    commands: Commands | None = None  # of a rollout: what the policy ordered

    @classmethod
    def open(
        cls,
        where: EpisodeFiles | str | Path,
        clocks: Clocks = AS_RECORDED,
        views: Sequence[str] = (),
        full_picture_check: bool | None = False,
        listing: Listing | None = None,
    ) -> "Episode":
        """Open a raw episode, its times corrected by `clocks`. `views` limits the view keys; empty: all.

        full_picture_check: decode every picture; None: look at their names alone. listing: where already listed.

        Raises UserError where there is no usable robot log: without it nothing can be placed.
        """
        files = where if isinstance(where, EpisodeFiles) else read_layout(where)
        if files.robot_log is None:
            needed = "a CSV with a clock and six pose columns"
            there = "".join(f"; it {describe_log(log)}" for log in files.unknown_logs)
            raise UserError(f"{files.path} holds no robot log ({needed}){there}; it cannot be used.")
        findings = Findings()
        if files.layout == "F4":
            return cls._open_h5(files, files.robot_log, clocks, views, findings)
        robot = read_robot_log(files.robot_log, findings)
        for other in files.other_logs:
            findings.exclude("robot", f"{other.name} is a second robot log and is not used", left_out=True)
        pictures = read_pictures(files.path, findings, listing)
        for view in views or EXPECTED_VIEWS:
            if view not in pictures:
                findings.exclude(view, "the view has no pictures", left_out=True)
        pictures = {view: pictures[view] for view in sorted(pictures) if not views or view in views}
        for one in pictures.values():
            one.t_s = one.t_s - clocks.cameras.offset_s
        if full_picture_check is not None:
            judged = (sound_pictures(files.path, one, robot, findings, full_picture_check) for one in pictures.values())
            pictures = {one.view: one for one in judged if one is not None}
        ahead_s = clocks.sensor.offset_s
        span = (float(robot.t_s[0]) + ahead_s, float(robot.t_s[-1]) + ahead_s)  # on the sensor's clock
        sensor = read_sensor_log(files.sensor_files, findings, span)
        if sensor is not None:
            sensor.shift(clocks.sensor.offset_s)
            if sensor.t_s[-1] < robot.t_s[0] or sensor.t_s[0] > robot.t_s[-1]:
                away = f"it starts {sensor.t_s[0] - robot.t_s[0]:+.1f} s from it"
                text = f"the sensor's time does not overlap the robot's ({away}) and is not used"
                findings.exclude("sensor", f"{text}; give --sensor-clock-offset-ms", left_out=True)
                sensor = None
        if files.layout != "F0" and not files.sensor_files:
            findings.exclude("sensor", "there is no sensor file", left_out=True)
        if full_picture_check is not None:
            robot.unknown = sorted([*robot.unknown, *frozen_spans(files.path, robot, sensor, pictures, findings)])
        commands = read_commands(files.commands, robot.clock_lag_s or 0.0, findings)
        return cls(files, robot, sensor, pictures, clocks, findings, commands)

    @classmethod
    def _open_h5(
        cls, files: EpisodeFiles, file: Path, clocks: Clocks, views: Sequence[str], findings: Findings
    ) -> "Episode":
        table, samples, times, pictures = read_h5(file, findings)
        robot = read_robot_log(file, findings, table)
        for view in (view for view in views or CAMERAS if view not in pictures):
            findings.exclude(view, "the view has no pictures", left_out=True)
        pictures = {view: pictures[view] for view in sorted(pictures) if not views or view in views}
        sensor = None
        if samples is not None:
            hz = 1 / (times[1] - times[0])
            sensor = SensorLog([samples], times, hz, [], clean_times(times))
            sensor.shift(clocks.sensor.offset_s)
        robot.unknown = sorted([*robot.unknown, *frozen_spans(files.path, robot, sensor, {}, findings)])
        return cls(files, robot, sensor, pictures, clocks, findings)

    def picture(self, name: str) -> Path:
        """The file of a picture, by its relative path; one of an HDF5 file may have to be taken out first."""
        path = self.path / name
        if self.layout == "F4" and self.files.robot_log is not None and not path.is_file():
            return picture_file(self.files.robot_log, name)
        return path

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
    def sensor_start_s(self) -> float | None:
        """When the sensor's recording begins, seconds after the first robot row; None without a sensor."""
        begins = self.sensor.begins_s if self.sensor is not None else ()
        return min((begin_s - self.start_s for begin_s in begins), key=abs, default=None)

    @property
    def cameras_start_s(self) -> float | None:
        """The median of the views' first pictures, seconds after the first robot row; None without pictures."""
        firsts = [float(pictures.t_s[0]) - self.start_s for pictures in self.pictures.values()]
        return float(np.median(firsts)) if firsts else None

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


@dataclass(frozen=True)
class PictureAt:
    """The newest picture of one view at an instant."""

    view: str
    number: int  # of how many pictures of the view; -1: none yet
    path: Path | None
    age_ms: float  # instant minus picture time; nan where there is none


def pictures_at(episode: Episode, at_s: float) -> list[PictureAt]:
    """The newest picture at or before `at_s` (UNIX seconds) of every view, sorted by view."""
    found = []
    for view, pictures in episode.pictures.items():
        number = int(newest_at_or_before(pictures.t_s, np.asarray(at_s)))
        path = episode.picture(pictures.paths[number]) if number >= 0 else None
        age_ms = (at_s - float(pictures.t_s[number])) * 1e3 if number >= 0 else float("nan")
        found.append(PictureAt(view, number, path, age_ms))
    return found


class SensorImage(NamedTuple):
    """A-scans over time, thinned for drawing: t_s (C,) UNIX seconds, values (1025, C) float32, depth x time."""

    t_s: np.ndarray
    values: np.ndarray


def sensor_image(episode: Episode, columns: int = 600) -> SensorImage | None:
    """At most `columns` A-scans, evenly over the stream, as one image (M-mode); None without a sensor."""
    sensor = episode.sensor
    if sensor is None or not len(sensor):
        return None
    wanted = np.unique(np.linspace(0, len(sensor) - 1, min(columns, len(sensor))).astype(np.int64))
    return SensorImage(sensor.t_s[wanted], np.ascontiguousarray(sensor.rows(wanted)[:, 1:].T))
