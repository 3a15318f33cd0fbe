"""What the arm did, and what a policy ordered: rising times in seconds, poses in mm and degrees, joints in degrees.

A robot log is a CSV of any layout, or the .npz file that is left of one. The columns decide, not the file's name (see
`layouts`): a clock, six pose columns, and six joints where present.

Rows and units that cannot be true are told by limits and usual speeds. The Meca500 reaches 330 mm from its base, moves
its tip by at most 1000 mm/s and its joints by at most 500 deg/s (its data sheet). One glitched row in twenty episodes
raises the spread of all actions eightfold, so such rows must go before actions are made of them.

`inference_results_*.json` of a rollout lists predictions, each with `timestamp` (UNIX seconds of the recorder) and
`actions`: the chunk of which the first action was sent. Units and frame are the policy's own and are not recorded: a
stream to look at, on which nothing is trained.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.episodes.csv_table import Table, read_table
from vla_lib.episodes.findings import Findings
from vla_lib.episodes.layouts import columns_of
from vla_lib.episodes.poses import rotation_angle_deg, wrap_deg
from vla_lib.episodes.sensor_file import NpzFile
from vla_lib.episodes.timeline import Cleaned, Span, clean_times, in_seconds

ACTION_KEYS = ("actions", "action")
POLICY = "policy"
MOST_BYTES = 200_000_000  # an hour at 10 Hz has 20 MB
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
class RobotLog:
    """All usable rows of one robot log; times strictly increase."""

    t_s: np.ndarray  # (T,) float64, UNIX seconds of the robot host: when the row was published
    pose: np.ndarray  # (T, 6) float64: x y z in mm, alpha beta gamma in degrees (intrinsic XYZ)
    joints: np.ndarray  # (T, 6) float64 degrees; zeros where the log has no joints
    clock: str  # the column that gave the times
    clock_lag_s: float | None
    """Median of receive time minus robot time, where both are logged: network delay plus clock difference."""
    cleaned: Cleaned = field(repr=False)
    unknown: list[Span] = field(default_factory=list)  # spans (s) across which the arm's motion is not known

    @property
    def changed(self) -> np.ndarray:
        """(T,) bool: rows whose pose or joints differ from the row before; the first row counts as changed."""
        new = np.ones(len(self.t_s), bool)
        new[1:] = (np.diff(self.pose, axis=0) != 0).any(1) | (np.diff(self.joints, axis=0) != 0).any(1)
        return new


def read_robot_log(path: Path, findings: Findings, table: Table | None = None) -> RobotLog:
    """Read one robot log, whatever is wrong with some of its rows (said in `findings`).

    table: its rows, where it is no CSV.

    Raises UserError where the file holds no robot columns, no row or no usable row.
    """
    if table is None:
        table = _npz_table(path) if path.suffix.lower() == ".npz" else read_table(path, columns_of)
    columns = columns_of([str(name) for name in table.frame])
    assert columns is not None  # of every such table
    if columns.quaternion:
        named = f"its orientation is a quaternion (columns {', '.join(columns.quaternion)})"
        remedy = "write the Mecademic Euler angles pose_a, pose_b, pose_r (degrees, intrinsic XYZ) in their place"
        raise UserError(f"{path}: {named}, whose order and frame are not known; {remedy}.")
    for text in table.notes:
        findings.note("robot", text)
    cells = table.frame
    rows = len(cells)
    if not rows:
        raise UserError(f"{path} has a header but no rows: the robot was never logged; record the episode again.")
    units = {name: Findings() for name in columns.clock}
    for name, notes in units.items():
        cells[name] = in_seconds(cells[name].to_numpy(), "robot", notes)
    clock = next((name for name in columns.clock if _is_clock(cells[name].to_numpy())), None)
    if clock is None:
        tried = f"none of the clock columns {', '.join(columns.clock)} holds UNIX seconds"
        raise UserError(f"{path}: {tried}; the rows cannot be placed in time.")
    if clock != columns.clock[0]:
        findings.exclude("robot", f"{columns.clock[0]} holds no time, so {clock} is used in its place")
    findings.extend(units[clock])
    body = cells[[*columns.pose, *columns.joints]].to_numpy()
    broken = ~np.isfinite(body).all(axis=1)
    if broken.any():
        findings.note("robot", f"{broken.sum()} rows with empty or unreadable cells are left out")
    cleaned = clean_times(np.where(broken, np.nan, cells[clock]))
    cleaned.report("robot", "rows", findings, known=int(broken.sum()))
    if len(cleaned.keep) < 2:
        raise UserError(f"{path} has {len(cleaned.keep)} usable rows of {rows}; record the episode again.")
    cells, body = cells.iloc[cleaned.keep], body[cleaned.keep]
    if not columns.joints:
        findings.note("robot", "the log has no joint columns; the joints of the state are zeros")
        body = np.hstack([body, np.zeros((len(body), 6))])
    judged = Findings()
    pose, joints, keep, unknown = plausible(cells[clock].to_numpy(), body[:, :6], body[:, 6:], judged)
    findings.extend(judged)
    if keep.sum() < 2:
        raise UserError(f"{path}: no two rows can be true ({'; '.join(judged.reasons)}).")
    cells = cells[keep]
    t_s = cells[clock].to_numpy()
    receive = next((name for name in columns.clock if name.lower() == "recv_timestamp" and name != clock), None)
    lag_s = float((cells[receive] - t_s).median()) if receive else float("nan")
    return RobotLog(
        t_s=t_s,
        pose=pose[keep],
        joints=joints[keep],
        clock=clock,
        clock_lag_s=None if np.isnan(lag_s) else lag_s,
        cleaned=cleaned,
        unknown=unknown,
    )


def _npz_table(path: Path) -> Table:
    """The log that was converted to an .npz file: its times are the recorder's."""
    file = NpzFile(path)
    t_s, poses = file.load("timestamps"), file.load("poses")
    joints = file.load("joints") if "joints" in file.members else None
    if poses.shape != (len(t_s), 6) or t_s.ndim != 1 or (joints is not None and joints.shape != poses.shape):
        shown = ", ".join(f"{name} {member.shape}" for name, member in file.members.items())
        raise UserError(f"{path} is no robot log: six values a pose and as many times are needed (found {shown}).")
    columns = {"recv_timestamp": t_s} | {f"pose_{axis}": poses[:, k] for k, axis in enumerate("xyzabr")}
    if joints is not None:
        columns |= {f"joint_{k + 1}": joints[:, k] for k in range(6)}
    note = f"the CSV is gone; {path.name} is used, whose times are the recorder's"
    return Table(pd.DataFrame(columns).astype(np.float64), [note])


def _is_clock(stamps: np.ndarray) -> bool:
    good = stamps[np.isfinite(stamps)]
    return len(good) >= 1 and float(np.median(good)) > 1e8 and (len(good) < 3 or float(np.ptp(good)) > 0)


# ---- motion that no arm can make


def plausible(
    t_s: np.ndarray, pose: np.ndarray, joints: np.ndarray, findings: Findings
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Span]]:
    """Judge all rows; what goes or is converted is said. t_s (T,) strictly rising; joints: zeros where none are logged.

    Returns pose (T, 6) in mm and degrees, joints (T, 6) in degrees, which rows can be true (T,) bool, and the spans (s)
    across which the arm's motion is not known: no step may lie across them.
    """

    def leave_out(bad: np.ndarray, why: str) -> None:
        if bad.any():
            first_s = t_s[bad.argmax()] - t_s[0]
            findings.exclude("robot", f"{bad.sum()} rows (first at {first_s:.2f} s) {why}; they are left out")

    answered = np.any(pose[:, :3] != 0, axis=1)
    pose, joints = _in_mm_and_degrees(pose, joints, answered, partial(findings.note, "robot"))
    far = answered & (np.linalg.norm(pose[:, :3], axis=1) > FAR_MM)
    keep = answered & ~far
    leave_out(~answered, "hold a position of zeros: the controller had not answered")
    leave_out(far, "are out of reach")
    rows = np.flatnonzero(keep)
    parts = np.split(rows, np.flatnonzero(_jumps(t_s[rows], pose[rows], joints[rows])) + 1)
    longest = max(len(part) for part in parts)
    for part in parts:
        if len(part) and t_s[part[-1]] - t_s[part[0]] <= GLITCH_S and longest > 2 * len(part):
            keep[part] = False
    leave_out(answered & ~far & ~keep, "jump away, faster than the arm moves")
    rows = np.flatnonzero(keep)
    spans = _unknown_spans(t_s[rows], pose[rows], joints[rows])
    if spans:
        most_s, first_s = max(end - begin for begin, end in spans), spans[0][0] - t_s[0]
        leaps = f"leaps {len(spans)} time(s), after up to {most_s:.2f} s without change (first at {first_s:.2f} s)"
        findings.exclude("robot", f"the pose {leaps}: the log stood still while the arm moved, or was cut")
    return pose, joints, keep, spans


def _in_mm_and_degrees(
    pose: np.ndarray, joints: np.ndarray, rows: np.ndarray, note: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Pose and joints with metres and radians converted where that is certain, each said in a `note`."""
    if not rows.any():
        return pose, joints
    pose, joints = pose.copy(), joints.copy()
    from_base = np.linalg.norm(pose[rows, :3], axis=1)
    if METRES[0] < from_base.min() and np.abs(pose[rows, :3]).max() < METRES[1]:
        note("positions are in metres (in mm the tip would be inside the arm's base) and are read as such")
        pose[:, :3] *= 1000.0
    turn, swing = float(np.abs(pose[rows, 3:]).max()), float(np.abs(joints[rows]).max())
    if turn <= RADIANS[0] and 0 < swing <= RADIANS[1]:
        # in degrees all joints would rest at zero, and there the arm's beta is 90
        note("joints and angles are in radians (as degrees they contradict each other) and are read as such")
        pose[:, 3:], joints = np.degrees(pose[:, 3:]), np.degrees(joints)
    elif 0 < turn <= RADIANS[0] or 0 < swing <= RADIANS[1]:
        which = "angles of the tool" if 0 < turn <= RADIANS[0] else "joints"
        note(f"all {which} are small; they are read as degrees (a guess): convert them if they are radians")
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


# ---- what a policy ordered


@dataclass(frozen=True)
class Commands:
    """The action that was sent at each prediction."""

    t_s: np.ndarray  # (K,) UNIX seconds of the robot's clock, rising
    action: np.ndarray  # (K, 6) float32: x y z and three angles, in the policy's units


def read_commands(paths: Sequence[Path], ahead_s: float, findings: Findings) -> Commands | None:
    """All predictions of an episode; None where there is none that can be read (said in `findings`).

    ahead_s: how far the recorder's clock is ahead of the robot's.
    """
    found: list[tuple[float, list[float]]] = []
    for path in paths:
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError(f"it has {path.stat().st_size / 1e6:.0f} MB")
            predictions = _predictions(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            findings.note(POLICY, f"{path.name} cannot be read as what a policy ordered ({error})")
            continue
        sent = [one for one in map(_sent, predictions) if one is not None]
        if len(sent) < len(predictions) or not sent:
            kept = f"{len(sent)} of its {len(predictions)} predictions have a time and an action"
            findings.note(POLICY, f"{path.name}: {kept}")
        found += sent
    if not found:
        return None
    t_s = in_seconds(np.array([time for time, _ in found]), POLICY, findings) - ahead_s
    order = np.argsort(t_s, kind="stable")
    return Commands(t_s[order], np.array([action for _, action in found], np.float32)[order])


def _predictions(content: Any) -> list[Any]:
    """The list of predictions: the file's value, or the longest list in it."""
    if isinstance(content, dict):
        content = max((value for value in content.values() if isinstance(value, list)), key=len, default=None)
    if not isinstance(content, list):
        raise ValueError("it holds no list of predictions")
    return content


def _sent(prediction: Any) -> tuple[float, list[float]] | None:
    """Time and first action of one prediction; None where it has none."""
    if not isinstance(prediction, dict):
        return None
    chunk = next((prediction[key] for key in ACTION_KEYS if key in prediction), None)
    try:
        time, first = float(prediction["timestamp"]), np.atleast_2d(np.asarray(chunk, np.float64))[0, :6]
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return (time, first.tolist()) if len(first) == 6 and np.isfinite([time, *first]).all() else None
