"""An opened raw episode and a time in; what every stream held at that instant out: for looking at episodes, not for training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.episodes.episode import Episode

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PictureAt:
    """The newest picture of one view at an instant."""

    view: str
    number: int
    """Of how many pictures of the view; -1: none yet."""
    path: Path | None
    age_ms: float
    """Instant minus picture time; nan where there is none."""


@dataclass(frozen=True)
class SensorImage:
    """A-scans over time, thinned for drawing."""

    t_s: Array
    """(C,) UNIX seconds."""
    values: Array = field(repr=False)
    """(1025, C) float32: depth x time."""


def pictures_at(episode: Episode, at_s: float) -> list[PictureAt]:
    """The newest picture at or before `at_s` (UNIX seconds) of every view, sorted by view."""
    found = []
    for view, pictures in episode.pictures.items():
        number = pictures.newest(at_s)
        path = episode.path / pictures.paths[number] if number >= 0 else None
        age_ms = (at_s - float(pictures.t_s[number])) * 1e3 if number >= 0 else float("nan")
        found.append(PictureAt(view, number, path, age_ms))
    return found


def sensor_image(episode: Episode, columns: int = 600) -> SensorImage | None:
    """At most `columns` A-scans, evenly over the stream, as one image (M-mode); None without a sensor."""
    sensor = episode.sensor
    if sensor is None or not len(sensor):
        return None
    wanted = np.unique(np.linspace(0, len(sensor) - 1, min(columns, len(sensor))).astype(np.int64))
    return SensorImage(sensor.t_s[wanted], np.ascontiguousarray(sensor.rows(wanted)[:, 1:].T))
