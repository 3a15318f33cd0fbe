"""A robot log (CSV of any layout) in; rising times, poses and joints with findings out. Seconds, mm, degrees.

The columns decide, not the file's name: six pose columns (`pose_x`.. or `EE_x`..), six joints where present
(`joint_1`.. or `joint_angle_1`..), and the robot host's clock (`origin_timestamp`; older logs: `epoch_s`, `timestamp`).
"""

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.episodes.findings import EXCLUDED, NOTE, Finding
from vla_lib.episodes.timeline import Cleaned, clean_times

Array = np.ndarray[Any, Any]

CLOCKS = ("origin_timestamp", "epoch_s", "timestamp", "recv_timestamp", "send_timestamp")
"""Columns that can be the robot's time, best first."""
FORCES = ("force", "force_mn", "force_n")
_AXES = "xyzabr"


@dataclass(frozen=True)
class RobotColumns:
    """Which columns of a header hold what; `clock` lists all that are there, best first."""

    clock: tuple[str, ...]
    pose: tuple[str, ...]
    joints: tuple[str, ...]
    force: str | None


def robot_columns(header: list[str]) -> RobotColumns | None:
    """The robot's columns among `header` (any case), or None where it is no robot log."""
    by_name = {name.strip().lower().lstrip("\ufeff"): name for name in header}
    clock = tuple(by_name[name] for name in CLOCKS if name in by_name)
    for prefix in ("pose_", "ee_", "tcp_"):
        pose = tuple(by_name[f"{prefix}{axis}"] for axis in _AXES if f"{prefix}{axis}" in by_name)
        if len(pose) == 6 and clock:
            break
    else:
        return None
    joints: tuple[str, ...] = ()
    for prefix in ("joint_", "joint_angle_", "j"):
        joints = tuple(by_name[f"{prefix}{k}"] for k in range(1, 7) if f"{prefix}{k}" in by_name)
        if len(joints) == 6:
            break
        joints = ()
    return RobotColumns(clock, pose, joints, next((by_name[name] for name in FORCES if name in by_name), None))


def read_header(path: Path) -> list[str]:
    """The column names in the first line of a CSV; empty where the file is empty or cannot be read."""
    try:
        with open(path, "rb") as stream:
            line = stream.readline(65536)
    except OSError:
        return []
    return (
        [name.strip().strip('"') for name in line.decode("utf-8-sig", errors="replace").split(",")]
        if line.strip()
        else []
    )


@dataclass
class RobotLog:
    """All usable rows of one robot log; times strictly increase."""

    path: Path
    t_s: Array
    """(T,) float64, UNIX seconds of the robot host: when the row was published."""
    pose: Array
    """(T, 6) float64: x y z in mm, alpha beta gamma in degrees (intrinsic XYZ)."""
    joints: Array
    """(T, 6) float64 degrees; zeros where the log has no joints."""
    force: Array | None
    """(T,) the log's own force column where it carries a signal (a placeholder of zeros is None)."""
    clock: str
    """The column that gave the times."""
    clock_lag_s: float | None
    """Median of receive time minus robot time, where both are logged: network delay plus clock difference."""
    rows: int
    """Rows in the file, usable or not."""
    stamps_s: Array = field(repr=False)
    """(rows,) the stamps as they stand in the file, for the measured rates."""
    cleaned: Cleaned = field(repr=False)
    findings: list[Finding] = field(default_factory=list)
    has_joints: bool = True

    @property
    def changed(self) -> Array:
        """(T,) bool: rows whose pose or joints differ from the row before; the first row counts as changed."""
        new = np.ones(len(self.t_s), bool)
        new[1:] = (np.diff(self.pose, axis=0) != 0).any(1) | (np.diff(self.joints, axis=0) != 0).any(1)
        return new


def read_robot_log(path: Path) -> RobotLog:
    """Read one robot log, whatever is wrong with some of its rows.

    Raises UserError where the file holds no robot columns, no row or no usable row.
    """
    columns = robot_columns(read_header(path))
    if columns is None:
        raise UserError(
            f"{path} has no robot columns (a clock and six pose columns are needed); it cannot be used as a robot log."
        )
    findings: list[Finding] = []
    names = [*columns.clock, *columns.pose, *columns.joints, *([columns.force] if columns.force else [])]
    cells = _read_csv(path, list(dict.fromkeys(names)), findings)
    rows = len(next(iter(cells.values())))
    if not rows:
        raise UserError(f"{path} has a header but no rows: the robot was never logged; record the episode again.")
    clock = next((name for name in columns.clock if _is_clock(cells[name])), None)
    if clock is None:
        raise UserError(
            f"{path}: none of the clock columns {', '.join(columns.clock)} holds UNIX seconds; the rows cannot be placed in time."
        )
    if clock != columns.clock[0]:
        findings.append(
            Finding(EXCLUDED, "robot", f"{columns.clock[0]} holds no time, so {clock} is used in its place")
        )
    stamps = cells[clock]
    body = np.stack([cells[name] for name in (*columns.pose, *columns.joints)], axis=1)
    whole = np.isfinite(body).all(1)
    if (~whole).any():
        findings.append(
            Finding(NOTE, "robot", f"{int((~whole).sum())} rows with empty or unreadable cells are left out")
        )
    cleaned = clean_times(np.where(whole, stamps, np.nan))
    keep = cleaned.keep
    findings += _clock_findings(cleaned, int((~whole).sum()))
    if len(keep) < 2:
        raise UserError(f"{path} has {len(keep)} usable rows of {rows}; record the episode again.")
    joints = body[keep, 6:] if columns.joints else np.zeros((len(keep), 6))
    if not columns.joints:
        findings.append(Finding(NOTE, "robot", "the log has no joint columns; the joints of the state are zeros"))
    force = cells[columns.force][keep] if columns.force else None
    if force is not None and not (np.isfinite(force).any() and np.nanstd(force) > 0):
        force = None
    receive = next((name for name in columns.clock if name.strip().lower() == "recv_timestamp" and name != clock), None)
    lags = cells[receive][keep] - stamps[keep] if receive else np.empty(0)
    lag = float(np.nanmedian(lags)) if np.isfinite(lags).any() else None
    return RobotLog(
        path=path,
        t_s=stamps[keep],
        pose=body[keep, :6],
        joints=joints,
        force=force,
        clock=clock,
        clock_lag_s=lag,
        rows=rows,
        stamps_s=stamps,
        cleaned=cleaned,
        findings=findings,
        has_joints=bool(columns.joints),
    )


def _is_clock(stamps: Array) -> bool:
    good = stamps[np.isfinite(stamps)]
    return len(good) >= 1 and float(np.median(good)) > 1e8 and (len(good) < 3 or float(np.ptp(good)) > 0)


def _read_csv(path: Path, names: list[str], findings: list[Finding]) -> dict[str, Array]:
    """Column name -> (rows,) float64, nan where a cell is empty or no number."""
    raw = path.read_bytes()
    if raw and not raw.endswith((b"\n", b"\r")):
        end = max(raw.rfind(b"\n"), raw.rfind(b"\r"))
        findings.append(Finding(NOTE, "robot", "the last line is cut off (no line end) and is left out"))
        raw = raw[: end + 1]
    options: dict[str, Any] = {
        "usecols": lambda name: name.strip() in names,
        "encoding_errors": "replace",
        "skipinitialspace": True,
    }
    names = [name.strip() for name in names]
    try:
        frame = pd.read_csv(io.BytesIO(raw), dtype=np.float64, engine="c", **options)
    except (ValueError, pd.errors.ParserError):
        frame = _read_damaged(raw, path, names, options, findings)
    frame.columns = [str(name).strip().lstrip("\ufeff") for name in frame.columns]
    values = frame.to_numpy()
    return {
        name: np.where(np.isfinite(column), column, np.nan)
        for name, column in zip(frame.columns, values.T, strict=True)
    }


def _read_damaged(
    raw: bytes, path: Path, names: list[str], options: dict[str, Any], findings: list[Finding]
) -> pd.DataFrame:
    lines_before = raw.count(b"\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = pd.read_csv(
                io.BytesIO(raw.replace(b"\0", b"")), dtype=str, on_bad_lines="skip", engine="c", **options
            )
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path} cannot be read as CSV ({' '.join(str(error).split())}).") from error
    frame = text.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    broken = int((frame.isna() & text.notna()).any(axis=1).sum())
    skipped = max(lines_before - 1 - len(frame), 0)
    findings.append(
        Finding(NOTE, "robot", f"{broken} rows hold text where numbers belong and {skipped} lines have too many cells")
    )
    return frame


def _clock_findings(cleaned: Cleaned, unreadable: int) -> list[Finding]:
    found = []
    stray = cleaned.unusable - unreadable
    if stray > 0:
        found.append(Finding(NOTE, "robot", f"{stray} rows with an impossible time are left out"))
    if cleaned.backward_steps:
        found.append(
            Finding(
                EXCLUDED,
                "robot",
                f"the clock steps back {cleaned.backward_steps} time(s), by up to {cleaned.largest_step_back_s * 1e3:.0f} ms; "
                f"{cleaned.backwards} rows are left out",
            )
        )
    if cleaned.repeats:
        found.append(
            Finding(NOTE, "robot", f"{cleaned.repeats} rows repeat the time of the row before and are left out")
        )
    return found
