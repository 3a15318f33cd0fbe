"""Motion that no arm can make: rows and units of a robot log that cannot be true, by limits and usual speeds.

The Meca500 reaches 330 mm from its base, moves its tip by at most 1000 mm/s and its joints by at most 500 deg/s (its
data sheet). One glitched row in twenty episodes raises the spread of all actions eightfold, so such rows must go before
actions are made of them.
"""

from dataclasses import dataclass, field

import numpy as np

from vla_lib.episodes.poses import rotation_angle_deg, wrap_deg
from vla_lib.episodes.timeline import Span

FASTEST = (1000.0, 500.0)  # of the tip (mm/s); of a joint or the tool's turn (deg/s)
LEAST = 100.0  # slower steps (mm/s, deg/s) are never called impossible, however slow the rest of the episode is
TIMES_USUAL = 20.0  # so many times the episode's own usual speed is a jump
GLITCH_S = 0.5  # a jump that comes back within this is a glitch: its rows go; one that stays splits the log
FAR_MM = 1200.0  # from the base: three times the reach with a tool, since a base frame may be moved
FROZEN_S = 0.1  # rows that stand still so long and then leap were frozen while the arm moved on
LEAP = (5.0, 0.1)  # a leap: so many times the usual change between rows, and at least so many mm or degrees
METRES = (0.03, 1.0)  # an arm whose tip never leaves this shell about its base is logged in metres
RADIANS = (3.2, 6.4)  # the tool's angles; the joints (the sixth turns more than once)


@dataclass
class Plausible:
    """What can be true of a log's motion."""

    pose: np.ndarray = field(repr=False)  # (T, 6) mm, deg
    joints: np.ndarray = field(repr=False)  # (T, 6) deg
    keep: np.ndarray = field(repr=False)  # (T,) bool: rows that can be true
    spans: list[Span]  # across which the arm's motion is not known (s): no step may lie across them
    excluded: list[str]  # what is left out and why, in words
    notes: list[str]  # what was converted, or cannot be judged


def plausible(t_s: np.ndarray, pose: np.ndarray, joints: np.ndarray) -> Plausible:
    """Judge all rows. t_s (T,) strictly rising; pose (T, 6); joints (T, 6), zeros where none are logged."""
    answered = np.any(pose[:, :3] != 0, axis=1)
    notes: list[str] = []
    pose, joints = _in_mm_and_degrees(pose, joints, answered, notes)
    far = answered & (np.linalg.norm(pose[:, :3], axis=1) > FAR_MM)
    keep = answered & ~far
    excluded = []
    for bad, why in (
        (~answered, "hold a position of zeros: the controller had not answered"),
        (far, "are out of reach"),
    ):
        if bad.any():
            excluded.append(f"{_rows(bad, t_s)} {why}; they are left out")
    rows = np.flatnonzero(keep)
    parts = np.split(rows, np.flatnonzero(_jumps(t_s[rows], pose[rows], joints[rows])) + 1)
    longest = max(len(part) for part in parts)
    for part in parts:
        if len(part) and t_s[part[-1]] - t_s[part[0]] <= GLITCH_S and longest > 2 * len(part):
            keep[part] = False
    glitch = np.isin(np.arange(len(t_s)), rows) & ~keep
    if glitch.any():
        excluded.append(f"{_rows(glitch, t_s)} jump away, faster than the arm moves; they are left out")
    rows = np.flatnonzero(keep)
    spans = _unknown_spans(t_s[rows], pose[rows], joints[rows])
    if spans:
        most_s, first_s = max(end - begin for begin, end in spans), spans[0][0] - t_s[0]
        text = (
            f"the pose leaps {len(spans)} time(s), after up to {most_s:.2f} s without change (first at {first_s:.2f} s)"
        )
        excluded.append(f"{text}: the log stood still while the arm moved, or was cut")
    return Plausible(pose, joints, keep, spans, excluded, notes)


def _in_mm_and_degrees(
    pose: np.ndarray, joints: np.ndarray, rows: np.ndarray, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Pose and joints with metres and radians converted where that is certain, each said in `notes`."""
    if not rows.any():
        return pose, joints
    pose, joints = pose.copy(), joints.copy()
    from_base = np.linalg.norm(pose[rows, :3], axis=1)
    if METRES[0] < from_base.min() and np.abs(pose[rows, :3]).max() < METRES[1]:
        notes.append("positions are in metres (in mm the tip would be inside the arm's base) and are read as such")
        pose[:, :3] *= 1000.0
    turn, swing = float(np.abs(pose[rows, 3:]).max()), float(np.abs(joints[rows]).max())
    if turn <= RADIANS[0] and 0 < swing <= RADIANS[1]:
        # in degrees all joints would rest at zero, and there the arm's beta is 90
        notes.append("joints and angles are in radians (as degrees they contradict each other) and are read as such")
        pose[:, 3:], joints = np.degrees(pose[:, 3:]), np.degrees(joints)
    elif 0 < turn <= RADIANS[0] or 0 < swing <= RADIANS[1]:
        which = "angles of the tool" if 0 < turn <= RADIANS[0] else "joints"
        notes.append(f"all {which} are small; they are read as degrees (a guess): convert them if they are radians")
    return pose, joints


def _changes(pose: np.ndarray, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What changes from row to row, (T - 1,) each: mm of the tip, degrees of the tool, largest degrees of a joint."""
    swing = np.abs(wrap_deg(np.diff(joints, axis=0))).max(axis=1)
    return np.linalg.norm(np.diff(pose[:, :3], axis=0), axis=1), rotation_angle_deg(pose[:-1], pose[1:]), swing


def _jumps(t_s: np.ndarray, pose: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """(T - 1,) bool: steps between neighbouring rows that are faster than can be."""
    fast = np.zeros(max(len(t_s) - 1, 0), bool)
    if len(t_s) < 3:
        return fast
    took = np.maximum(np.diff(t_s), float(np.median(np.diff(t_s))))  # a stamp's jitter is no speed
    for change, most in zip(_changes(pose, joints), (*FASTEST, FASTEST[1]), strict=True):
        speed = change / took
        usual = float(np.percentile(speed[speed > 0], 90)) if (speed > 0).any() else 0.0
        fast |= speed > min(max(TIMES_USUAL * usual, LEAST), most)
    return fast


def _unknown_spans(t_s: np.ndarray, pose: np.ndarray, joints: np.ndarray) -> list[Span]:
    """Spans (s) that end in a jump, or in a leap out of rows that stood still; each begins where they stood still."""
    if len(t_s) < 3:
        return []
    changes = _changes(pose, joints)
    moves = np.flatnonzero(np.any([change > 0 for change in changes], axis=0))  # row k + 1 differs from row k
    begins = np.concatenate([[0], moves[:-1] + 1])  # first row of the run of equal rows that ends at row k
    stood = t_s[moves] - t_s[begins]
    leaps = np.zeros(len(moves), bool)
    for change in changes:
        usual = float(np.percentile(change[moves], 90)) if len(moves) else 0.0
        leaps |= change[moves] > max(LEAP[0] * usual, LEAP[1])
    leaps &= stood >= max(FROZEN_S, 4 * float(np.median(stood)) if len(moves) else 0.0)
    leaps |= _jumps(t_s, pose, joints)[moves]
    return [(float(t_s[begin]), float(t_s[move + 1])) for begin, move in zip(begins[leaps], moves[leaps], strict=True)]


def _rows(bad: np.ndarray, t_s: np.ndarray) -> str:
    at = np.flatnonzero(bad)
    return f"{len(at)} rows (first at {t_s[at[0]] - t_s[0]:.2f} s)"
