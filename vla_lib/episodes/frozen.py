"""A robot log that stood still while the arm moved on: the sensor's layers move then, and the pictures change.

A resting arm looks the same in the log, so only what the other streams show tells the two apart. Where they show
nothing, nothing is said.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.episodes.findings import Findings
from vla_lib.episodes.motion_cues import layer_speed, picture_change
from vla_lib.episodes.pictures import Pictures
from vla_lib.episodes.robot_log import RobotLog
from vla_lib.episodes.sensor_log import SensorLog
from vla_lib.episodes.timeline import Span

Array = np.ndarray[Any, Any]

STILL_S = 1.0  # shorter rests are not looked into
MOST_RESTS = 5  # of an episode are looked into: the longest
MOST_S = 4.0  # of a rest are looked at
MOVED_BINS = 60.0  # of the A-scan, about 0.45 mm: tissue that settles moves less (a guess)
NOISE_PART = 0.3  # a view tells rest from motion where its quietest changes are below this part of the usual ones
MOVING_PART = 0.5  # pictures that change by this part of what they do while the log moves show a moving arm
LEAST_PICTURES = 4  # in a rest, before they count
MOST_PICTURES = 40  # of a view's motion are looked at, to know how much pictures usually change


def frozen_spans(
    folder: Path, robot: RobotLog, sensor: SensorLog | None, pictures: dict[str, Pictures], findings: Findings
) -> list[Span]:
    """Spans (s) in which the log stands still while the sensor's layers move or the pictures change; each is said."""
    found = []
    rests = _rests(robot)
    looked = [(begin_s, min(end_s, begin_s + MOST_S)) for begin_s, end_s in rests]
    layers = _layers_move(sensor, looked) if sensor is not None and rests else [None] * len(rests)
    for (begin_s, end_s), span_s, moves in zip(rests, looked, layers, strict=True):
        what = "the layers of the A-scan move"
        if moves is None:  # the sensor tells nothing
            what, moves = "the pictures change", _views_move(folder, robot, pictures, span_s)
        if moves:
            span = f"{begin_s - robot.t_s[0]:.2f} to {end_s - robot.t_s[0]:.2f} s"
            findings.exclude("robot", f"the log stands still from {span} while {what}: it was frozen")
            found.append((begin_s, end_s))
    return found


def _rests(robot: RobotLog) -> list[Span]:
    """Spans (s) of equal rows that last."""
    first = np.flatnonzero(robot.changed)
    last = np.append(first[1:], len(robot.t_s)) - 1
    long = robot.t_s[last] - robot.t_s[first] >= STILL_S
    found = [(float(robot.t_s[a]), float(robot.t_s[b])) for a, b in zip(first[long], last[long], strict=True)]
    return sorted(sorted(found, key=lambda span: span[0] - span[1])[:MOST_RESTS])


def _layers_move(sensor: SensorLog, spans: Sequence[Span]) -> list[bool | None]:
    """Whether layers move in each span; None where the sensor shows none."""
    samples = [np.arange(*np.searchsorted(sensor.t_s, span)) for span in spans]
    if not sum(map(len, samples)):
        return [None] * len(spans)
    scans = sensor.rows(np.concatenate(samples))[:, 1:]  # in one go: a compressed file is streamed through for it
    found: list[bool | None] = []
    for one, part in zip(samples, np.split(scans, np.cumsum([len(one) for one in samples])[:-1]), strict=True):
        layers = layer_speed(sensor.t_s[one], [part], sensor.hz) if len(one) > sensor.hz * STILL_S / 2 else None
        if layers is None:
            found.append(None)
            continue
        t_s, bins_s, sound = layers
        way = np.cumsum(np.where(sound, bins_s, 0.0) * np.gradient(t_s))
        found.append(float(np.ptp(way)) > MOVED_BINS)
    return found


def _views_move(folder: Path, robot: RobotLog, pictures: dict[str, Pictures], span: Span) -> bool:
    """Whether most of the views that tell rest from motion show motion."""
    votes = []
    for view, one in pictures.items():
        inside = np.flatnonzero((one.t_s > span[0] + 0.1) & (one.t_s < span[1] - 0.1))
        if view.endswith("_right") or len(inside) < LEAST_PICTURES:
            continue
        outside = np.flatnonzero((one.t_s < span[0]) & (one.t_s > robot.t_s[0]))[-MOST_PICTURES:]
        usual = _changes(folder, one, outside)
        if len(usual) < LEAST_PICTURES or np.quantile(usual, 0.05) > NOISE_PART * np.median(usual):
            continue
        votes.append(np.median(_changes(folder, one, inside)) > MOVING_PART * np.median(usual))
    return bool(votes) and sum(votes) * 2 > len(votes)


def _changes(folder: Path, pictures: Pictures, numbers: Array) -> Array:
    change = picture_change([folder / pictures.paths[number] for number in numbers.tolist()])
    return change[np.isfinite(change)]
