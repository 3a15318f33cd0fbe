"""A robot log (CSV of any layout) with strictly rising times, poses and joints. Seconds, mm, degrees.

The columns decide, not the file's name (see `layouts`): a clock, six pose columns, and six joints where present.
"""

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.episodes.findings import Findings
from vla_lib.episodes.layouts import robot_columns
from vla_lib.episodes.timeline import Cleaned, clean_times

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

    @property
    def changed(self) -> Array:
        """(T,) bool: rows whose pose or joints differ from the row before; the first row counts as changed."""
        new = np.ones(len(self.t_s), bool)
        new[1:] = (np.diff(self.pose, axis=0) != 0).any(1) | (np.diff(self.joints, axis=0) != 0).any(1)
        return new


def read_robot_log(path: Path, findings: Findings) -> RobotLog:
    """Read one robot log, whatever is wrong with some of its rows (said in `findings`).

    Raises UserError where the file holds no robot columns, no row or no usable row.
    """
    columns = robot_columns(path)
    if columns is None:
        needed = "a clock and six pose columns are needed"
        raise UserError(f"{path} has no robot columns ({needed}); it cannot be used as a robot log.")
    names = [*columns.clock, *columns.pose, *columns.joints, *([columns.force] if columns.force else [])]
    cells = _read_csv(path, names, findings)
    rows = len(cells)
    if not rows:
        raise UserError(f"{path} has a header but no rows: the robot was never logged; record the episode again.")
    clock = next((name for name in columns.clock if _is_clock(cells[name].to_numpy())), None)
    if clock is None:
        tried = f"none of the clock columns {', '.join(columns.clock)} holds UNIX seconds"
        raise UserError(f"{path}: {tried}; the rows cannot be placed in time.")
    if clock != columns.clock[0]:
        findings.exclude("robot", f"{columns.clock[0]} holds no time, so {clock} is used in its place")
    body = cells[[*columns.pose, *columns.joints]].to_numpy()
    broken = ~np.isfinite(body).all(axis=1)
    if broken.any():
        findings.note("robot", f"{broken.sum()} rows with empty or unreadable cells are left out")
    cleaned = clean_times(np.where(broken, np.nan, cells[clock]))
    cleaned.report("robot", "rows", findings, known=int(broken.sum()))
    if len(cleaned.keep) < 2:
        raise UserError(f"{path} has {len(cleaned.keep)} usable rows of {rows}; record the episode again.")
    cells, body = cells.iloc[cleaned.keep], body[cleaned.keep]
    t_s = cells[clock].to_numpy()
    if not columns.joints:
        findings.note("robot", "the log has no joint columns; the joints of the state are zeros")
    force = cells[columns.force].to_numpy() if columns.force else None
    receive = next((name for name in columns.clock if name.lower() == "recv_timestamp" and name != clock), None)
    lag_s = float((cells[receive] - t_s).median()) if receive else float("nan")
    return RobotLog(
        path=path,
        t_s=t_s,
        pose=body[:, :6],
        joints=body[:, 6:] if columns.joints else np.zeros((len(t_s), 6)),
        force=force if force is not None and np.isfinite(force).any() and np.nanstd(force) > 0 else None,
        clock=clock,
        clock_lag_s=None if np.isnan(lag_s) else lag_s,
        cleaned=cleaned,
    )


def _is_clock(stamps: Array) -> bool:
    good = stamps[np.isfinite(stamps)]
    return len(good) >= 1 and float(np.median(good)) > 1e8 and (len(good) < 3 or float(np.ptp(good)) > 0)


def _read_csv(path: Path, names: list[str], findings: Findings) -> pd.DataFrame:
    """The named columns (float64); nan where a cell is empty, infinite or no number."""
    raw = path.read_bytes()
    if raw and not raw.endswith((b"\n", b"\r")):
        findings.note("robot", "the last line is cut off (no line end) and is left out")
        raw = raw[: max(raw.rfind(b"\n"), raw.rfind(b"\r")) + 1]
    options: dict[str, Any] = {
        "usecols": lambda name: name.strip() in names,
        "encoding_errors": "replace",
        "skipinitialspace": True,
    }
    try:
        frame = pd.read_csv(io.BytesIO(raw), dtype=np.float64, **options)
    except ValueError:  # a cell holds text, or a line too many cells
        frame = _read_damaged(raw, path, options, findings)
    return frame.rename(columns=str.strip).replace([np.inf, -np.inf], np.nan)


def _read_damaged(raw: bytes, path: Path, options: dict[str, Any], findings: Findings) -> pd.DataFrame:
    try:
        with warnings.catch_warnings(action="ignore"):
            text = pd.read_csv(io.BytesIO(raw.replace(b"\0", b"")), dtype=str, on_bad_lines="skip", **options)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as CSV ({' '.join(str(error).split())}).") from error
    frame = text.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    broken = int((frame.isna() & text.notna()).any(axis=1).sum())
    skipped = max(raw.count(b"\n") - 1 - len(frame), 0)
    findings.note("robot", f"{broken} rows hold text where numbers belong and {skipped} lines have too many cells")
    return frame
