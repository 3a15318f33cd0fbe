"""The action grid of an opened episode: times, states, actions, and which steps can be trusted.

Step k begins at `t_k = start + k / hz`. Its action is the motion of the interpolated pose from t_k to t_k + 1/hz, so
neither uneven rows nor a drifting match enters. Steps exist only where the robot log covers them; idle tails have none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.pictures import Pictures
from vla_lib.episodes.poses import delta_action, interpolate
from vla_lib.episodes.robot_log import RobotLog
from vla_lib.episodes.timeline import Span, find_gaps, grid, newest_at_or_before, overlaps

ROBOT_GAP_S = 0.05
"""Interpolating over 50 ms of the fastest motion (64 mm/s^2) errs by 0.02 mm; a longer hole is a gap."""
PICTURE_GAP_S = 0.5
SENSOR_LATE_S = 0.05
SPAN_PART, SPAN_LEAST_S = 0.25, 0.02  # by so much may the span of a window's samples differ from what it should be
MOST_STEPS = 2_000_000


@dataclass
class Steps:
    """The action grid of one episode (N steps)."""

    hz: float
    t_s: np.ndarray  # (N,) float64 UNIX seconds, exactly start + k / hz
    state: np.ndarray  # (N, 12) float32: joints (deg), pose (mm, deg) at t_k
    action: np.ndarray  # (N, 7) float32: mm, degrees, gripper
    valid: np.ndarray  # (N,) bool: no stream has a gap across the step, and it is not blind
    blind: np.ndarray  # (N,) bool: a view that is used has no picture yet
    gaps: dict[str, list[Span]]  # stream -> spans without data, in seconds

    def __len__(self) -> int:
        return len(self.t_s)


def pose_rows(robot: RobotLog) -> np.ndarray:
    """Numbers of the rows that tell where the arm was: the first of each run of equal rows, and the last of a rest.

    The controller refreshes more slowly than rows are published, so a repeated row is an old pose under a new stamp.
    Runs longer than 2.5 refreshes are a resting arm: their last row counts as well, else rest would become slow motion.
    """
    first = np.flatnonzero(robot.changed)
    last = np.append(first[1:], len(robot.t_s)) - 1
    lengths = robot.t_s[last] - robot.t_s[first]
    between = np.diff(robot.t_s[first])
    refresh = float(np.median(between)) if len(between) else 0.0
    resting = last[(lengths > 2.5 * refresh) & (last > first)]
    return np.union1d(np.union1d(first, resting), [0, len(robot.t_s) - 1])


def stream_gaps(episode: Episode) -> dict[str, list[Span]]:
    """Stream name -> spans (s) without data, for the robot, the sensor and every view; streams without are left out.

    Robot: too long to interpolate across. A view: three missed pictures, half a second at least. Sensor and views also
    where they stop before the robot does.
    """
    robot = episode.robot
    usual = float(np.median(np.diff(robot.t_s)))
    gaps = {"robot": sorted([*find_gaps(robot.t_s, max(3 * usual, ROBOT_GAP_S)), *robot.unknown])}
    if episode.sensor is not None:
        gaps["sensor"] = [*episode.sensor.gaps, *_early_end(episode.sensor.t_s, episode.end_s, SENSOR_LATE_S)]
    for view, pictures in episode.pictures.items():
        usual = float(np.median(np.diff(pictures.t_s))) if len(pictures) > 1 else PICTURE_GAP_S
        longest = max(3 * usual, PICTURE_GAP_S)
        gaps[view] = [*find_gaps(pictures.t_s, longest), *_early_end(pictures.t_s, episode.end_s, longest)]
    return {stream: spans for stream, spans in gaps.items() if spans}


def _early_end(t_s: np.ndarray, end_s: float, longest_s: float) -> list[Span]:
    last = float(t_s[-1])
    return [(last, end_s)] if end_s - last > longest_s else []


def build_steps(
    episode: Episode,
    hz: float = 10.0,
    euler: bool = False,
    gaps: Mapping[str, list[Span]] | None = None,
    trim: Span = (0.0, float("inf")),
) -> Steps:
    """The action grid of an episode. `euler`: wrap-corrected Euler differences instead of rotation vectors; `trim`:
    only steps within these seconds after the first robot row.

    Raises UserError where the robot log, or what the trim leaves of it, covers no step, or implausibly many.
    """
    gaps = dict(stream_gaps(episode) if gaps is None else gaps)
    robot = episode.robot
    t_s = grid(episode.start_s, episode.end_s, hz)
    if not len(t_s):
        lasts = f"lasts {episode.duration_s:.3f} s, less than one step of {1 / hz:g} s"
        raise UserError(f"{episode.path}: the robot log {lasts}.")
    if len(t_s) > MOST_STEPS:
        lasts = f"seems to last {episode.duration_s:.0f} s; its times cannot be right"
        raise UserError(f"{episode.path}: the robot log {lasts}.")
    begin_s, end_s = trim
    inside = (t_s - episode.start_s >= begin_s - 1e-6) & (t_s - episode.start_s + 1 / hz <= end_s + 1e-6)
    if not inside.any():
        raise UserError(f"{episode.path}: no step lies within {begin_s:g} s to {end_s:g} s, to which it is trimmed.")
    used = np.flatnonzero(inside)
    ends = episode.start_s + np.arange(used[0], used[-1] + 2) / hz
    t_s = ends[:-1]
    rows = pose_rows(robot)
    pose, turned = interpolate(robot.t_s[rows], robot.pose[rows], ends)
    action = delta_action(pose[:-1], pose[1:], euler)
    if not euler:  # of the exact rotations: the poses' angles are rounded to the log's branch
        action[:, 3:6] = (turned[1:] * turned[:-1].inv()).as_rotvec(degrees=True)
    joints = np.stack([np.interp(t_s, robot.t_s[rows], robot.joints[rows, k]) for k in range(6)], axis=1)
    valid = np.ones(len(t_s), bool)
    for spans in gaps.values():
        valid &= ~overlaps(t_s, ends[1:], spans)
    blind = np.zeros(len(t_s), bool)
    for pictures in episode.pictures.values():
        blind |= image_index(pictures, t_s) < 0
    return Steps(
        hz=hz,
        t_s=t_s,
        state=np.concatenate([joints, pose[:-1]], axis=1).astype(np.float32),
        action=action.astype(np.float32),
        valid=valid & ~blind,
        blind=blind,
        gaps=gaps,
    )


def image_index(pictures: Pictures, t_s: np.ndarray) -> np.ndarray:
    """(N,) int32: the newest picture taken at or before each step; -1 where there is none."""
    return newest_at_or_before(pictures.t_s, t_s).astype(np.int32)


def sensor_index(sensor_t_s: np.ndarray, t_s: np.ndarray) -> np.ndarray:
    """(N,) int64: one past the newest sample at or before each step: `[index - n : index]` never sees the future."""
    return (newest_at_or_before(sensor_t_s, t_s) + 1).astype(np.int64)


def window_full(
    index: np.ndarray, sensor_t_s: np.ndarray, t_s: np.ndarray, length: int, hz: float, gaps: list[Span]
) -> np.ndarray:
    """(N,) bool: whether `length` samples without a gap end at each step.

    A window is not full where the stream has fewer samples before the step, where its newest sample is older than
    50 ms, where a gap lies inside, or where its samples span another time than so many samples at `hz` should.
    """
    index = np.asarray(index)
    full = index >= length
    if not len(sensor_t_s) or not full.any():
        return np.zeros(len(index), bool)
    newest = sensor_t_s[np.maximum(index - 1, 0)]
    oldest = sensor_t_s[np.clip(index - length, 0, len(sensor_t_s) - 1)]
    full &= t_s - newest <= SENSOR_LATE_S
    expected_s = (length - 1) / max(hz, 1e-9)
    full &= np.abs(newest - oldest - expected_s) <= max(SPAN_PART * expected_s, SPAN_LEAST_S)
    return full & ~overlaps(oldest, newest, gaps)
