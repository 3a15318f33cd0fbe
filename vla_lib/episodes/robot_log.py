"""What the arm did, and what a policy ordered: rising times in seconds, poses in mm and degrees, joints in degrees.

A robot log is a CSV of any layout, or the .npz file that is left of one. The columns decide, not the file's name (see
`layouts`): a clock, six pose columns, and six joints where present.

`inference_results_*.json` of a rollout lists predictions, each with `timestamp` (UNIX seconds of the recorder) and
`actions`: the chunk of which the first action was sent. Units and frame are the policy's own and are not recorded: a
stream to look at, on which nothing is trained.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.episodes.csv_table import Table, read_table
from vla_lib.episodes.findings import Findings
from vla_lib.episodes.layouts import columns_of, robot_columns
from vla_lib.episodes.plausibility import plausible
from vla_lib.episodes.sensor_file import NpzFile
from vla_lib.episodes.timeline import Cleaned, Span, clean_times, in_seconds

ACTION_KEYS = ("actions", "action")
POLICY = "policy"
MOST_BYTES = 200_000_000  # an hour at 10 Hz has 20 MB


@dataclass
class RobotLog:
    """All usable rows of one robot log; times strictly increase."""

    path: Path
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
    if table is None and path.suffix.lower() == ".npz":
        table = _npz_table(path)
    columns = robot_columns(path) if table is None else columns_of([str(name) for name in table.frame])
    if columns is None:
        needed = "a clock and six pose columns are needed"
        raise UserError(f"{path} has no robot columns ({needed}); it cannot be used as a robot log.")
    if columns.quaternion:
        named = f"its orientation is a quaternion (columns {', '.join(columns.quaternion)})"
        remedy = "write the Mecademic Euler angles pose_a, pose_b, pose_r (degrees, intrinsic XYZ) in their place"
        raise UserError(f"{path}: {named}, whose order and frame are not known; {remedy}.")
    table = table or read_table(path, columns_of)
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
    motion = plausible(cells[clock].to_numpy(), body[:, :6], body[:, 6:])
    for text in motion.notes:
        findings.note("robot", text)
    for text in motion.excluded:
        findings.exclude("robot", text)
    if motion.keep.sum() < 2:
        raise UserError(f"{path}: no two rows can be true ({'; '.join(motion.excluded)}).")
    cells = cells[motion.keep]
    t_s = cells[clock].to_numpy()
    receive = next((name for name in columns.clock if name.lower() == "recv_timestamp" and name != clock), None)
    lag_s = float((cells[receive] - t_s).median()) if receive else float("nan")
    return RobotLog(
        path=path,
        t_s=t_s,
        pose=motion.pose[motion.keep],
        joints=motion.joints[motion.keep],
        clock=clock,
        clock_lag_s=None if np.isnan(lag_s) else lag_s,
        cleaned=cleaned,
        unknown=motion.spans,
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
