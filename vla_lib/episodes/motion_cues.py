"""What moves in the streams beside the robot log (layers of the A-scan, pictures), and a log that stood still then.

A resting arm looks the same in the log as a frozen log, so only what the other streams show tells the two apart. Where
they show nothing, nothing is said. Times in seconds.
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter1d

from vla_lib.episodes.findings import Findings
from vla_lib.episodes.pictures import Pictures
from vla_lib.episodes.robot_log import RobotLog
from vla_lib.episodes.sensor_log import SensorLog
from vla_lib.episodes.timeline import Span

GROUP_S = 0.02  # A-scans are averaged over this span: a layer moves less than a few bins in it
MOST_SHIFT = 60  # depth bins that a layer may move between two groups (22 mm/s); more is a mismatch
SMALL = (80, 45)  # pixels, in which pictures are compared
STILL_S = 1.0  # shorter rests are not looked into
MOST_RESTS = 5  # of an episode are looked into: the longest
MOST_S = 4.0  # of a rest are looked at
MOVED_BINS = 60.0  # of the A-scan, about 0.45 mm: tissue that settles moves less (a guess)
NOISE_PART = 0.3  # a view tells rest from motion where its quietest changes are below this part of the usual ones
MOVING_PART = 0.5  # pictures that change by this part of what they do while the log moves show a moving arm
LEAST_PICTURES = 4  # in a rest, before they count
MOST_PICTURES = 40  # of a view's motion are looked at, to know how much pictures usually change


def picture_change(paths: Sequence[Path]) -> np.ndarray:
    """(n - 1,) mean change of grey level (0..255) from each of n pictures to the next; NaN where one is broken."""
    change, before = np.full(max(len(paths) - 1, 0), np.nan), None
    for number, path in enumerate(paths):
        now = None
        with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(path) as picture:
            picture.draft("L", (SMALL[0] * 2, SMALL[1] * 2))  # the JPEG decoder's own shrinking
            now = np.asarray(picture.convert("L").resize(SMALL, Image.Resampling.BILINEAR), np.float32)
        if before is not None and now is not None:
            change[number - 1] = np.abs(now - before).mean()
        before = now
    return change


def layer_speed(
    t_s: np.ndarray, blocks: Iterable[np.ndarray], hz: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """How fast the layers of the A-scan move: times (M,), depth bins a second (M,), and whether a shift is sound (M,).

    t_s (S,): of the samples that are looked at; blocks: (n, 1025) A-scans in order, at `hz`. The shift between
    successive groups of scans is the peak of their cross-correlation, between bins by a parabola.
    """
    count = max(1, round(GROUP_S * hz))
    groups = len(t_s) // count
    if groups < 20:
        return None
    scans = np.concatenate(list(_means(blocks, count, groups)))[:groups]
    groups = len(scans)
    at_s = t_s[: groups * count].reshape(groups, count)
    edges = np.diff(gaussian_filter1d(scans, 1.5, axis=1), axis=1)  # brightness drifts; edges stay
    edges -= edges.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(edges, 2048, axis=1)
    match = np.fft.irfft(spectrum[1:] * spectrum[:-1].conj(), axis=1)
    match = np.concatenate([match[:, -MOST_SHIFT:], match[:, : MOST_SHIFT + 1]], axis=1)
    rows, best = np.arange(groups - 1), np.clip(match.argmax(axis=1), 1, 2 * MOST_SHIFT - 1)
    left, peak, right = (match[rows, best + k] for k in (-1, 0, 1))
    curvature = left - 2 * peak + right
    shift = best - MOST_SHIFT + np.where(curvature < 0, (left - right) / np.where(curvature < 0, 2 * curvature, 1), 0.0)
    energy = (edges**2).sum(axis=1)
    alike = peak / np.maximum(np.sqrt(energy[1:] * energy[:-1]), 1e-12)
    centre = at_s.mean(axis=1)
    speed = shift / np.maximum(np.diff(centre), 1e-6)
    whole = np.ptp(at_s, axis=1) < 2 * GROUP_S  # no gap of the stream inside
    sound = (alike > 0.5) & whole[1:] & whole[:-1]
    if sound.sum() < 20:
        return None
    middle = np.median(speed[sound])
    sound &= np.abs(speed - middle) < 12 * (np.median(np.abs(speed[sound] - middle)) + 1.0)
    return (centre[1:] + centre[:-1]) / 2, speed, sound


def _means(blocks: Iterable[np.ndarray], count: int, groups: int) -> Iterable[np.ndarray]:
    """Means of every `count` rows, whatever blocks they come in, until there are `groups`."""
    rest: np.ndarray | None = None
    for block in blocks:
        rows = block if rest is None else np.concatenate([rest, block])
        whole = len(rows) // count
        if whole:
            yield rows[: whole * count].reshape(whole, count, -1).mean(axis=1, dtype=np.float32)
        rest = rows[whole * count :].copy()  # a block is only valid until the next
        groups -= whole
        if groups <= 0:
            return


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


def _changes(folder: Path, pictures: Pictures, numbers: np.ndarray) -> np.ndarray:
    change = picture_change([folder / pictures.paths[number] for number in numbers.tolist()])
    return change[np.isfinite(change)]
