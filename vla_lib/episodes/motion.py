"""What an episode's motion says of its clocks: layers of the A-scan move as the tip moves, and so do the pictures.

Two curves of one motion, each on its own clock, are compared over lags by their correlation. The estimate is repeated
without each part of the episode in turn (the jackknife of Tukey, 1958): a motion that is too slow or too even to tell a
time says so by its uncertainty. The sign of the tool's axis differs between rigs, so only the size of the correlation
counts. All times in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from vla_lib.episodes.clocks import Estimate, Evidence
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.layouts import EXPECTED_VIEWS
from vla_lib.episodes.motion_cues import GROUP_S, layer_speed, picture_change
from vla_lib.episodes.poses import rotation
from vla_lib.episodes.steps import pose_rows

HAND_EYE_VIEW = EXPECTED_VIEWS[-1]
Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> times (each on its own clock) and values

SEARCH_S = 3.0  # lags that are compared, to either side
MOST_S = 60.0  # of the sensor stream are read: more tells little more
SLOWEST_ROW_S = 0.025  # rows that come more slowly tell no offset of a few milliseconds
STEP_S = 0.005  # of the common time axis and of the sensor's lags
SMOOTH_S = 0.03
PART_S = 0.5  # length of the parts that the jackknife leaves out
MOST_VIEWS, MOST_PICTURES = 3, 50
"""So many views are looked at, and pictures of each: decoding is what preparing waits for. On 12 recordings of the rig
five views of 120 told the clock to 20 ms in 6, three of 50 with the hand-eye view among them in 7."""
PICTURE_STEP_S = 0.02
PICTURE_PARTS = 12


@dataclass(frozen=True)
class MotionMatch:
    """Two curves of one motion and how they agree at each lag."""

    estimate: Estimate
    lags_s: np.ndarray  # (L,) the lags that were compared: how far the stream's clock, as recorded, would be ahead
    correlations: np.ndarray  # (L,) the curves' correlation at each
    curves: Curves


def evidence(episode: Episode) -> Evidence:
    """What one episode's motion says of the sensor's clock and of the cameras'."""
    # frames and poses of an HDF5 file are of one instant
    matches = (sensor_match(episode), camera_match(episode) if episode.layout != "F4" else None)
    return Evidence(episode.start_s, *(match.estimate if match else None for match in matches))


def sensor_match(episode: Episode) -> MotionMatch | None:
    """The tip's motion along the tool against the layers of the A-scan; None where either tells nothing."""
    robot, sensor = episode.robot, episode.sensor
    rows = pose_rows(robot)
    # of F4 more than half a frame is asked for, which its rows do tell
    slow = np.median(np.diff(robot.t_s)) > SLOWEST_ROW_S and episode.layout != "F4"
    if sensor is None or len(rows) < 50 or slow:
        return None
    around_s = _around(episode.sensor_start_s)
    end_s = min(episode.end_s, episode.start_s + MOST_S) + SEARCH_S
    last = int(np.searchsorted(sensor.t_s, end_s + around_s))
    layers = layer_speed(sensor.t_s[:last], (block[:, 1:] for block, _ in sensor.blocks()), sensor.hz)
    if layers is None:
        return None
    layer_t_s, bins_s, sound = layers
    # a row repeats the pose of the last refresh, which is half a row older than the first row that shows it
    row_s = float(np.median(np.diff(robot.t_s))) / 2 if robot.changed.mean() < 0.9 else 0.0
    tip_t_s, layer_t_s = robot.t_s[rows] - row_s, layer_t_s - around_s
    begin_s, end_s = min(tip_t_s[0], layer_t_s[0]), max(min(tip_t_s[-1], end_s), layer_t_s[-1])
    axis_s = begin_s + np.arange(int((end_s - begin_s) / STEP_S) + 1) * STEP_S
    tip = tip_speed(tip_t_s, robot.pose[rows], axis_s)
    layer = gaussian_filter1d(np.interp(axis_s, layer_t_s[sound], bins_s[sound]), SMOOTH_S / STEP_S)
    usable_tip = _covered(tip_t_s, axis_s, max(0.06, 3 * float(np.median(np.diff(tip_t_s)))))
    usable_layer = _covered(layer_t_s[sound], axis_s, 3.5 * GROUP_S)
    curves = {"tip along the tool (mm/s)": (axis_s[usable_tip], tip[usable_tip])}
    ahead_s = around_s + sensor.clock_offset_s  # of the clock as recorded
    curves["layers of the A-scan (bins/s)"] = (axis_s[usable_layer] + ahead_s, layer[usable_layer])
    lags = int(round(SEARCH_S / STEP_S))
    sums = _lagged_sums(tip, usable_tip, layer, usable_layer, lags)
    lags_s = ahead_s + np.arange(-lags, lags + 1) * STEP_S
    return _conclude([sums], lags_s, 2 * (SMOOTH_S + GROUP_S) / STEP_S, curves)


def _around(start_s: float | None) -> float:
    """Where a lag is looked for: a clock that is minutes off still begins somewhere."""
    return start_s if start_s is not None and abs(start_s) > SEARCH_S - 1 else 0.0


def camera_match(episode: Episode) -> MotionMatch | None:
    """How far the arm moved from picture to picture against how much they changed; None where too few change.

    One clock for all views. A picture's change grows with the motion, not in proportion: both roots are compared.
    """
    rows = pose_rows(episode.robot)
    t_s, points = episode.robot.t_s[rows], _tool_points(episode.robot.pose[rows])
    around_s, taken_off_s = _around(episode.cameras_start_s), episode.clocks.cameras.offset_s
    lags_s = around_s + taken_off_s + np.arange(-SEARCH_S, SEARCH_S + PICTURE_STEP_S / 2, PICTURE_STEP_S)
    found, curves = [], {}
    # the right camera sees what the left one sees; all that the hand-eye one sees moves
    left = sorted(view for view in episode.pictures if not view.endswith("_right"))
    for view in sorted(left, key=lambda view: view != HAND_EYE_VIEW)[:MOST_VIEWS]:
        pictures = episode.pictures[view]
        first = int(np.searchsorted(pictures.t_s, episode.start_s + around_s - SEARCH_S))
        part = slice(first, first + MOST_PICTURES)
        picture_s = pictures.t_s[part] + taken_off_s  # (n,)
        change = picture_change([episode.path / path for path in pictures.paths[part]])  # (n - 1,)
        seen = np.isfinite(change)
        if seen.sum() < 20 or np.ptp(change[seen]) == 0:
            continue
        noise = np.quantile(change[seen], 0.05)  # the camera's noise is no motion
        root = np.sqrt(np.maximum(np.nan_to_num(change) - noise, 0))
        sums = np.zeros((len(root), len(lags_s), 6))
        for number, lag_s in enumerate(lags_s):
            at_s = picture_s - lag_s
            good = seen & (at_s[:-1] >= t_s[0]) & (at_s[1:] <= t_s[-1])
            place = np.stack([np.interp(at_s, t_s, column) for column in points.T], axis=1)
            moved = np.linalg.norm(np.diff(place, axis=0), axis=1) / np.maximum(np.diff(picture_s), 1e-3)
            columns = np.ones(len(root)), np.sqrt(moved), root, moved, root**2, np.sqrt(moved) * root
            sums[:, number] = good[:, None] * np.stack(columns, axis=1)
        edges = np.linspace(0, len(root), PICTURE_PARTS + 1).astype(int)
        found.append(np.stack([sums[a:b].sum(axis=0) for a, b in zip(edges[:-1], edges[1:], strict=True)]))
        curves[f"{view} (root of grey level)"] = (picture_s[1:], root)
    if not found:
        return None
    speed = np.linalg.norm(np.diff(points, axis=0), axis=1) / np.maximum(np.diff(t_s), 1e-3)
    return _conclude(found, lags_s, 2.0, {"arm (root of mm/s)": (t_s[1:], np.sqrt(speed)), **curves})


def tip_speed(t_s: np.ndarray, pose: np.ndarray, at_s: np.ndarray) -> np.ndarray:
    """Speed of the tip along the tool's z axis (mm/s) at evenly spaced times, smoothed as `layer_speed` is."""
    place = np.stack([np.interp(at_s, t_s, pose[:, k]) for k in range(3)], axis=1)
    tool = rotation(pose[:, 3:]).as_matrix()[:, :, 2]
    tool = np.stack([np.interp(at_s, t_s, tool[:, k]) for k in range(3)], axis=1)
    speed = (np.gradient(place, STEP_S, axis=0) * tool).sum(axis=1)
    box = np.ones(int(round(GROUP_S / STEP_S)))
    window = np.convolve(box, box) / len(box) ** 2  # what a difference of two means sees
    return gaussian_filter1d(np.convolve(speed, window, "same"), SMOOTH_S / STEP_S)


def _tool_points(pose: np.ndarray) -> np.ndarray:
    """(T, 9) mm: the tip and points of the tool 100 mm behind and 30 mm beside it: what a camera sees of a turn."""
    axes = rotation(pose[:, 3:]).as_matrix()
    return np.concatenate([pose[:, :3], pose[:, :3] - 100 * axes[:, :, 2], pose[:, :3] + 30 * axes[:, :, 0]], axis=1)


def _covered(t_s: np.ndarray, at_s: np.ndarray, longest_s: float) -> np.ndarray:
    """(N,) bool: where a smoothed curve stands on measurements alone: not near a gap, nor near an end."""
    margin = 2.5 * SMOOTH_S + GROUP_S
    good = (at_s > t_s[0] + margin) & (at_s < t_s[-1] - margin)
    for hole in np.flatnonzero(np.diff(t_s) > longest_s):
        good &= (at_s < t_s[hole] - margin) | (at_s > t_s[hole + 1] + margin)
    return np.asarray(good)


def _lagged_sums(a: np.ndarray, good_a: np.ndarray, b: np.ndarray, good_b: np.ndarray, lags: int) -> np.ndarray:
    """(parts, 2 * lags + 1, 6): n, sums of a, b, aa, bb, ab over each part of `a`, `b` moved by each lag; by FFT."""
    used = np.flatnonzero(good_a)
    if not len(used):
        return np.zeros((1, 2 * lags + 1, 6))
    parts = int(np.clip((used[-1] - used[0]) * STEP_S / PART_S, 4, 40))
    edges = np.linspace(used[0], used[-1] + 1, parts + 1).astype(int)
    a, b = a - a[good_a].mean(), b - (b[good_b].mean() if good_b.any() else 0.0)
    size = 1 << int(np.ceil(np.log2(len(a) + lags)))
    moved = np.fft.rfft(np.stack([good_b, good_b * b, good_b * b * b]).astype(float), size, axis=1)
    sums = np.zeros((parts, 2 * lags + 1, 6))
    for part in range(parts):
        inside = np.zeros(len(a))
        inside[edges[part] : edges[part + 1]] = good_a[edges[part] : edges[part + 1]]
        still = np.fft.rfft(np.stack([inside, inside * a, inside * a * a]), size, axis=1).conj()
        pairs = np.stack([still[i] * moved[j] for i, j in ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1))])
        lagged = np.fft.irfft(pairs, size, axis=1)
        sums[part] = np.concatenate([lagged[:, -lags:], lagged[:, : lags + 1]], axis=1).T
    return sums


def _conclude(sums: Sequence[np.ndarray], lags_s: np.ndarray, alike: float, curves: Curves) -> MotionMatch | None:
    """`sums`: of each view (parts, L, 6); their correlations are averaged. `alike`: neighbours that say the same."""
    totals = [of.sum(axis=0) for of in sums]
    least = [0.4 * float(total[:, 0].max()) for total in totals]

    def marks_without(part: int | None) -> np.ndarray:
        left = totals if part is None else [total - of[part] for total, of in zip(totals, sums, strict=True)]
        needed = least if part is None else [0.8 * n for n in least]
        return np.mean([_correlations(of, n) for of, n in zip(left, needed, strict=True)], axis=0)

    marks = marks_without(None)
    if not np.any(marks):
        return None
    offset_s, best = _peak(marks, lags_s)
    parts = [part for part in range(len(sums[0])) if any(of[part, :, 0].max() > 0.5 for of in sums)]
    without = np.array([_peak(marks_without(part), lags_s, offset_s)[0] for part in parts])
    uncertainty_s = float("inf")
    if len(without) >= 4:
        uncertainty_s = float(np.sqrt((len(without) - 1) / len(without) * ((without - without.mean()) ** 2).sum()))
    elsewhere = np.abs(marks[np.abs(lags_s - offset_s) > 0.3]).max(initial=0.0)
    unlike = [max(1 - float(mark) ** 2, 1e-6) for mark in (elsewhere, marks[best])]
    likelihood = float(totals[0][best, 0]) / alike / 2 * float(np.log(unlike[0] / unlike[1]))
    return MotionMatch(Estimate(offset_s, uncertainty_s, float(marks[best]), likelihood), lags_s, marks, curves)


def _correlations(sums: np.ndarray, least: float) -> np.ndarray:
    n, a, b, aa, bb, ab = np.moveaxis(sums, -1, 0)
    n = np.maximum(n, 1e-9)
    spread = np.maximum(aa - a * a / n, 1e-9) * np.maximum(bb - b * b / n, 1e-9)
    return np.where(sums[:, 0] >= max(least, 1.0), (ab - a * b / n) / np.sqrt(spread), 0.0)


def _peak(marks: np.ndarray, lags_s: np.ndarray, near_s: float | None = None) -> tuple[float, int]:
    """The lag of the largest mark, between lags by a parabola, and its number."""
    height = np.abs(marks) if near_s is None else np.where(np.abs(lags_s - near_s) < 0.15, np.abs(marks), 0.0)
    best = int(np.clip(height.argmax(), 1, len(marks) - 2))
    left, top, right = height[best - 1 : best + 2]
    curvature = left - 2 * top + right
    between = np.clip((left - right) / (2 * curvature), -1, 1) if curvature < 0 else 0.0
    return float(lags_s[best] + between * (lags_s[1] - lags_s[0])), best
