"""The lab's layouts: what its recorders call columns, keys and folders, and the parts of one episode.

An episode is a folder that holds a robot log. Folders that look like one (by name, pictures or sensor files) but hold
no robot log are episodes too, so that they can be reported and never vanish. `survey` finds all of them.
"""

import contextlib
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_lib.core.errors import UserError
from vla_lib.episodes.csv_table import HEAD_BYTES, sniff
from vla_lib.episodes.datasets import DatasetTable

# Robot logs. Any case; a name in a tuple before another is the better one.
CLOCKS = ("origin_timestamp", "epoch_s", "timestamp", "recv_timestamp", "send_timestamp")
POSES = tuple(tuple(f"{prefix}{axis}" for axis in "xyzabr") for prefix in ("pose_", "ee_", "tcp_"))
JOINTS = tuple(tuple(f"{prefix}{number}" for number in range(1, 7)) for prefix in ("joint_", "joint_angle_", "j"))
QUATERNION = re.compile(r"(^|_)q(uat(ernion)?)?_?[wxyz]$", re.IGNORECASE)
FORCES = ("force", "force_mn", "force_n")
NPZ_LOG = {"timestamps", "poses"}
"""Arrays of a robot log that was converted to an .npz file, joints beside them; at times all that is left of it."""
COMMANDS = re.compile(r"^inference_results.*\.json$", re.IGNORECASE)  # what a policy ordered in a rollout
# Sensor files. Where no key has one of the names, one that contains `time` or `force` will do, or the right shape.
CHANNELS = 1026  # of a sample: force, then 1025 depth bins of the A-scan
TIME_KEYS = ("timestamps", "timestamp", "times", "time", "recv_timestamps", "recv_timestamp", "t")
FORCE_KEYS = ("forces", "force", "force_data", "forces_data")
ALINE_KEYS = ("alines", "aline", "a_lines", "a_line", "ascans", "ascan", "oct", "oct_data", "fpi")
# Folders and cameras.
EPISODE_NAME = re.compile(
    r"^(recv_all_|episode_|data_collection_|async_inference_)\d{8}_\d{6}|^ZED_Captures_\d+|^Captures_?\d+",
    re.IGNORECASE,
)
VIEW_FOLDER = re.compile(r"^view[ _-]?(\d)(?!\d)", re.IGNORECASE)
SERIALS = {"41182735": 1, "49429257": 2, "44377151": 3, "49045152": 4}
HAND_EYE = 5
EXPECTED_VIEWS = ("View1_left", "View2_left", "View3_left", "View4_left", "View5")
H5_SUFFIXES = (".h5", ".hdf5")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class RobotColumns:
    """Which columns of a header hold what; `clock` lists all that are there, best first."""

    clock: tuple[str, ...]
    pose: tuple[str, ...]  # x y z a b r; only x y z where the orientation is a quaternion
    joints: tuple[str, ...]  # six names, or none
    force: str | None
    quaternion: tuple[str, ...] = ()


def robot_columns(path: Path) -> RobotColumns | None:
    """The robot's columns of a CSV, however it is written, or None where it is no robot log."""
    try:
        with open(path, "rb") as stream:
            dialect = sniff(stream.read(HEAD_BYTES), columns_of)
    except OSError:
        return None
    return columns_of(dialect.names) if dialect else None


def columns_of(names: Sequence[str]) -> RobotColumns | None:
    """Which of these column names hold what; None where they are not a robot log's."""
    by_name = {name.lower(): name for name in names}

    def complete(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        return next((tuple(by_name[n] for n in group) for group in groups if by_name.keys() >= set(group)), ())

    clock = tuple(by_name[name] for name in CLOCKS if name in by_name)
    force = next((by_name[name] for name in FORCES if name in by_name), None)
    pose, joints = complete(POSES), complete(JOINTS)
    quaternion = tuple(name for name in names if QUATERNION.search(name))
    if not pose and len(quaternion) == 4:
        return RobotColumns(clock, complete(group[:3] for group in POSES), joints, force, quaternion) if clock else None
    return RobotColumns(clock, pose, joints, force) if clock and pose else None


def is_npz_log(path: Path) -> bool:
    """Whether an .npz file holds a robot log, by the names of its arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in NPZ_LOG} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def describe_log(path: Path) -> str:
    """A CSV that is not known, with its columns."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
        columns = [cell.strip() for cell in stream.readline(2000).split(",")]
        shown = ", ".join(columns[:8]) + (f" and {len(columns) - 8} more" if len(columns) > 8 else "")
        return f"holds {path.name} with the columns {shown}" if shown.strip() else f"holds {path.name}, which is empty"
    return f"holds {path.name}, which cannot be read"


@dataclass(frozen=True)
class EpisodeFiles:
    """Where the parts of one raw episode lie."""

    path: Path
    dataset: str  # the folder that the table of datasets knows, else the top folder below the root
    task: str  # folders between dataset and episode (`Needle_insertion`), or empty
    layout: str  # `F0`..`F4`, judged by columns and folders
    robot_log: Path | None  # in F4 the one file that holds everything
    other_logs: tuple[Path, ...]  # further CSV files with robot columns: reported, not used
    sensor_files: tuple[Path, ...]  # all .npz files of the episode
    unknown_logs: tuple[Path, ...] = ()  # CSV files without robot columns: reported, not used
    pictures: bool = False  # whether a view's folder holds pictures
    commands: tuple[Path, ...] = ()  # JSON files of what a policy ordered

    @property
    def name(self) -> str:
        return self.path.name


def read_layout(path: str | Path) -> EpisodeFiles:
    """The parts of the one episode at `path`. Raises UserError where the folder does not look like an episode."""
    path = Path(path)
    if path.suffix.lower() in H5_SUFFIXES and path.is_file():
        return h5_files(path, path.parent.parent, DatasetTable())
    raw = path.is_dir() and any(name.lower().endswith((".csv", ".npz")) for name in os.listdir(path))
    for suffix in () if raw else H5_SUFFIXES:
        for stem in (path.name, path.name.removesuffix("_h5")):
            if (file := path.with_name(stem + suffix)).is_file():
                return h5_files(file, path.parent.parent, DatasetTable())
    if not path.is_dir():
        raise UserError(f"There is no episode folder {path}.")
    files = examine(path, list(os.scandir(path)), path.parent.parent, DatasetTable())
    if files is None:
        raise UserError(f"{path} is no episode: it holds no robot log, no sensor file and no view folders.")
    return files


def h5_files(file: Path, root: Path, table: DatasetTable) -> EpisodeFiles:
    """The episode that is one HDF5 file. Its folder is of the file's stem beside it, or STEM_h5 where that is taken."""
    folder = file.with_suffix("")
    if folder.is_dir() and any(name.lower().endswith((".csv", ".npz")) for name in os.listdir(folder)):
        folder = folder.with_name(f"{folder.name}_h5")
    dataset, task = table.place_of(folder, root)
    return EpisodeFiles(folder, dataset, task, "F4", file, (), (), pictures=True)


def examine(folder: Path, entries: Iterable[os.DirEntry[str]], root: Path, table: DatasetTable) -> EpisodeFiles | None:
    """The parts of the episode that lie right in `folder` (its `entries`); None where nothing looks like an episode."""
    seen = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    csvs = [folder / entry.name for entry in seen if entry.name.lower().endswith(".csv")]
    sensors = [folder / entry.name for entry in seen if entry.name.lower().endswith(".npz")]
    images = [folder / entry.name for entry in seen if entry.name.lower() == "images" and is_folder(entry)]
    views = [folder / entry.name for entry in seen if VIEW_FOLDER.match(entry.name) and is_folder(entry)]
    columns = {path: found for path in csvs if (found := robot_columns(path))}
    logs = sorted(columns, key=lambda path: (-path.stat().st_size, path.name))
    # beside a CSV, one is a copy of it; only the name is asked then, since a file of thousands costs a look each
    copies = [path for path in sensors if (not logs or "robot" in path.name.lower()) and is_npz_log(path)]
    sensors = [path for path in sensors if path not in copies]
    logs = logs or copies[:1]
    filled = filter(_holds_pictures, views)  # one is looked into at a time: the first mostly tells the layout
    first = next(filled, None)
    # a blank log was never written: an episode to record again, not to pass over
    blank = any(not path.stat().st_size for path in csvs)
    if not (logs or blank or EPISODE_NAME.match(folder.name) or first or (sensors and csvs)):
        return None
    dataset, task = table.place_of(folder, root)
    return EpisodeFiles(
        path=folder,
        dataset=dataset,
        task=task,
        layout=_layout(columns.get(logs[0]) if logs else None, bool(images), first, filled, folder.name.lower()),
        robot_log=logs[0] if logs else None,
        other_logs=tuple(logs[1:]),
        sensor_files=tuple(sensors),
        unknown_logs=tuple(path for path in csvs if path not in columns),
        pictures=bool(first or images),
        commands=tuple(folder / entry.name for entry in seen if COMMANDS.match(entry.name)),
    )


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is none, and no file needs a `stat`."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _holds_pictures(view: str | Path, deeper: bool = True) -> bool:
    """Whether a view's folder, or one right below it (left, right), holds pictures."""
    inner = []
    with os.scandir(view) as entries:
        for entry in entries:
            if entry.name.lower().endswith(PICTURE_SUFFIXES):
                return True
            if deeper and is_folder(entry):
                inner.append(entry.path)
    return any(_holds_pictures(path, deeper=False) for path in inner)


def _layout(columns: RobotColumns | None, images: bool, view: Path | None, more: Iterator[Path], name: str) -> str:
    """By columns, the first `view` that holds pictures and `more` of them, and the folder's name."""
    if columns and columns.pose[0].lower().startswith("ee_"):
        return "F0"
    if images or (columns and columns.force and view is None):
        return "F2"
    while view is not None:
        with os.scandir(view) as entries:
            first = next(entries, None)
        if first and os.path.isdir(first.path):
            return "F1"
        if first and first.name.startswith(("ZED_", "OAK_")) and "CAM_A" not in first.name:
            return "F3"
        view = next(more, None)
    by_name = {"data_collection": "F3", "async_inference": "F3", "episode": "F2"}
    found = next((layout for start, layout in by_name.items() if name.startswith(start)), None)
    return found or ("F0" if "captures" in name else "F1")
