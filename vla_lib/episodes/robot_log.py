"""A robot log (CSV of any layout, or the .npz file that is left of one): rising times, poses, joints. s, mm, degrees.

The columns decide, not the file's name (see `layouts`): a clock, six pose columns, and six joints where present.
"""

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

Array = np.ndarray[Any, Any]


@dataclass
class RobotLog:
    """All usable rows of one robot log; times strictly increase."""

    path: Path
    t_s: Array  # (T,) float64, UNIX seconds of the robot host: when the row was published
    pose: Array  # (T, 6) float64: x y z in mm, alpha beta gamma in degrees (intrinsic XYZ)
    joints: Array  # (T, 6) float64 degrees; zeros where the log has no joints
    force: Array | None
    """(T,) the log's own force column where it carries a signal (a placeholder of zeros is None)."""
    clock: str  # the column that gave the times
    clock_lag_s: float | None
    """Median of receive time minus robot time, where both are logged: network delay plus clock difference."""
    cleaned: Cleaned = field(repr=False)
    unknown: list[Span] = field(default_factory=list)  # spans (s) across which the arm's motion is not known

    @property
    def changed(self) -> Array:
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
    force = cells[columns.force].to_numpy() if columns.force else None
    receive = next((name for name in columns.clock if name.lower() == "recv_timestamp" and name != clock), None)
    lag_s = float((cells[receive] - t_s).median()) if receive else float("nan")
    return RobotLog(
        path=path,
        t_s=t_s,
        pose=motion.pose[motion.keep],
        joints=motion.joints[motion.keep],
        force=force if force is not None and np.isfinite(force).any() and np.nanstd(force) > 0 else None,
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


def _is_clock(stamps: Array) -> bool:
    good = stamps[np.isfinite(stamps)]
    return len(good) >= 1 and float(np.median(good)) > 1e8 and (len(good) < 3 or float(np.ptp(good)) > 0)
