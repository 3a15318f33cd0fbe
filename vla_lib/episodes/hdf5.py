"""An episode of the gamepad recorder (F4): one HDF5 file, whose times are rebuilt and whose pictures are JPEG bytes.

The file's UNIX seconds are float32: one value for 128 s. Frames come from a sleeping loop of 15 Hz at most, and the
sensor's samples (about 700 Hz) are spread over the same span; where their number gives a frame period near 1/15 s it is
used, else 1/15 s, and the report says how sure that is. The file's own action is the stick's in the tool frame and is
never used. What is written lies in a folder of the file's stem beside it; the file itself is never changed.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.files import make_folder
from vla_lib.episodes.csv_table import Table
from vla_lib.episodes.findings import Findings
from vla_lib.episodes.layouts import CHANNELS
from vla_lib.episodes.pictures import Pictures
from vla_lib.episodes.sensor_file import BLOCK_ROWS

FRAME_HZ = 15.0
SENSOR_HZ = 700.0
SLOWEST = 1.5  # a frame period of more than this times 1/15 s is not believed
FLOAT32_S = 128.0  # resolution of UNIX seconds in float32
POSES, JOINTS, IMAGES = "observations/ee_pose", "observations/qpos", "observations/images"
FORCE, ALINE, STAMPS = (f"observations/sensor/{name}" for name in ("force", "aline", "timestamp"))
CAMERAS = ("camera1", "camera2", "camera3")
"""View keys of their own: which of the lab's views they show was never recorded."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The open file. Raises UserError where it is none or is damaged."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as an HDF5 episode ({said}); copy or record it again.") from error


def is_episode(path: Path) -> bool:
    """Whether the file holds the arm's poses. Raises UserError as `opened` does."""
    with opened(path) as file:
        return isinstance(file.get(POSES), h5py.Dataset)


class H5Samples:
    """The samples of one file, as `SensorFile` gives those of an .npz: float32, force first."""

    window = 0  # samples lie one by one

    def __init__(self, path: Path, count: int):
        self.path, self.count = path, count

    def __len__(self) -> int:
        return self.count

    def blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """((n, 1026) float32, 0), in order."""
        with opened(self.path) as file:
            for start in range(0, self.count, BLOCK_ROWS):
                yield _samples(file, slice(start, min(start + BLOCK_ROWS, self.count))), 0

    def force(self) -> np.ndarray:
        """(S,) float32."""
        with opened(self.path) as file:
            return np.asarray(file[FORCE][: self.count], np.float32).reshape(self.count, -1)[:, 0]

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """(M, 1026) float32: the samples with the given numbers."""
        places, back = np.unique(wanted, return_inverse=True)  # h5py wants rising numbers
        with opened(self.path) as file:
            return _samples(file, places)[back]


def _samples(file: Any, which: Any) -> np.ndarray:
    force, alines = np.asarray(file[FORCE][which], np.float32), np.asarray(file[ALINE][which], np.float32)
    return np.concatenate([force.reshape(len(alines), -1)[:, :1], alines], axis=1)


def read_h5(path: Path, findings: Findings) -> tuple[Table, H5Samples | None, np.ndarray, dict[str, Pictures]]:
    """(robot log as a table, samples, their times (S,), view key -> pictures). All times are UNIX seconds, rebuilt.

    Raises UserError where the file is damaged or holds no poses.
    """
    with opened(path) as file:
        if POSES not in file:
            raise UserError(f"{path} holds no {POSES}: it is no episode of the gamepad recorder.")
        poses = np.asarray(file[POSES], np.float64)
        frames = len(poses)
        samples = _sensor(file, path, frames, findings)
        t_s = _times(file, path, frames, samples, findings)
        columns = {"timestamp": t_s} | {f"pose_{axis}": poses[:, k] for k, axis in enumerate("xyzabr")}
        if JOINTS in file:
            columns |= {f"joint_{k + 1}": np.asarray(file[JOINTS], np.float64)[:, k] for k in range(6)}
        pictures = {}
        for view in file.get(IMAGES, ()):
            jpegs = file[IMAGES][view][:frames]
            whole = [number for number, jpeg in enumerate(jpegs) if _is_jpeg(jpeg)]
            if len(whole) < frames:
                text = f"{frames - len(whole)} of {frames} pictures are missing or cut off and are left out"
                findings.exclude(view, text, left_out=not whole)
            if whole:
                sizes = np.array([np.asarray(jpegs[number]).nbytes for number in whole])
                pictures[view] = Pictures(view, [f"{view}/{number:06d}.jpg" for number in whole], t_s[whole], sizes)
    count = len(samples) if samples is not None else 0
    span_s = t_s[-1] - t_s[0] if frames > 1 else 0.0
    return Table(pd.DataFrame(columns), []), samples, t_s[0] + np.arange(count) * span_s / max(count, 1), pictures


def _sensor(file: Any, path: Path, frames: int, findings: Findings) -> H5Samples | None:
    if FORCE not in file or ALINE not in file:
        findings.exclude("sensor", "the file holds no sensor", left_out=True)
        return None
    count = min(len(file[FORCE]), len(file[ALINE]))
    if file[ALINE].shape[1:] != (CHANNELS - 1,):
        findings.exclude("sensor", f"its A-lines have the shape {file[ALINE].shape} and are not used", left_out=True)
        return None
    if STAMPS not in file or count <= frames:
        text = "force and A-lines were cut by the numbers of frames (a trimmed file), so nobody knows when they were"
        findings.exclude("sensor", f"{text} measured; they are not used", left_out=True)
        return None
    return H5Samples(path, count)


def _times(file: Any, path: Path, frames: int, samples: H5Samples | None, findings: Findings) -> np.ndarray:
    """(N,) UNIX seconds of the frames."""
    stamps = np.asarray(file["timestamp"]) if "timestamp" in file else np.zeros(0)
    if stamps.dtype == np.float64 and len(stamps) == frames > 1 and (np.diff(stamps) > 0).all() and stamps[0] > 1e8:
        return stamps
    about_s = float(stamps[0]) if len(stamps) else 0.0
    period_s, sure = 1 / FRAME_HZ, "the fastest that the recorder can be, so later frames may be later still"
    if samples is not None and frames > 1:
        found_s = len(samples) / SENSOR_HZ / (frames - 1)
        if 0.99 / FRAME_HZ < found_s < SLOWEST / FRAME_HZ:
            period_s, sure = found_s, f"from {len(samples)} sensor samples at about {SENSOR_HZ:.0f} Hz, a guess to 2 %"
    text = f"times are rebuilt, {period_s * 1e3:.1f} ms a frame ({sure}): the file's own have a resolution of 128 s"
    findings.note("robot", text)
    return _start_s(path, about_s) + np.arange(frames) * period_s


def _start_s(path: Path, about_s: float) -> float:
    """The time in the file's name, in whatever time zone brings it to within float32's reach of the time inside."""
    stamp = re.search(r"(\d{8})_(\d{6})", path.name)
    try:
        digits = "".join(stamp.groups()) if stamp else ""
        named_s = datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return about_s or 1e9
    zone_s = round((about_s - named_s) / 900) * 900 if about_s else 0  # zones differ by quarters of an hour
    return named_s + zone_s if not about_s or abs(named_s + zone_s - about_s) <= FLOAT32_S else about_s


def _is_jpeg(jpeg: Any) -> bool:
    data = np.asarray(jpeg, np.uint8).tobytes()
    return data[:2] == b"\xff\xd8" and b"\xff\xd9" in data[-64:]


def write_pictures(path: Path, names: Iterable[str], out: Path) -> None:
    """Write the JPEG bytes of a file below `out`, at the pictures' relative paths; what is there already stays."""
    with opened(path) as file:
        for target in (out / name for name in names):
            jpeg = np.asarray(file[IMAGES][target.parent.name][int(target.stem)], np.uint8).tobytes()
            if not target.is_file() or target.stat().st_size != len(jpeg):
                make_folder(target.parent)
                partial = target.with_name(f".{target.name}.partial")
                partial.write_bytes(jpeg)
                os.replace(partial, target)


@cache
def _looked_at() -> Any:
    return tempfile.TemporaryDirectory(prefix="vla-pictures-")


def picture_file(path: Path, name: str) -> Path:
    """One picture of a file that is not prepared, written into a temporary folder, so that it can be looked at."""
    folder = Path(_looked_at().name) / f"{abs(hash(path))}"
    if not (folder / name).exists():
        write_pictures(path, [name], folder)
    return folder / name
