"""The lab's layouts: what its recorders call columns, keys and folders, and the episodes found below a dataset root.

An episode is a folder that holds a CSV with robot columns. Folders that look like one (by name, view folders or sensor
files) but hold no robot log are returned too, so that they can be reported and never vanish.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_lib.core.errors import UserError
from vla_lib.episodes.csv_table import HEAD_BYTES, sniff

# Robot logs. Any case; a name in a tuple before another is the better one.
CLOCKS = ("origin_timestamp", "epoch_s", "timestamp", "recv_timestamp", "send_timestamp")
POSES = tuple(tuple(f"{prefix}{axis}" for axis in "xyzabr") for prefix in ("pose_", "ee_", "tcp_"))
JOINTS = tuple(tuple(f"{prefix}{number}" for number in range(1, 7)) for prefix in ("joint_", "joint_angle_", "j"))
QUATERNION = re.compile(r"(^|_)q(uat(ernion)?)?_?[wxyz]$", re.IGNORECASE)
FORCES = ("force", "force_mn", "force_n")
# Sensor files. Where no key has one of the names, one that contains `time` or `force` will do, or the right shape.
CHANNELS = 1026  # of a sample: force, then 1025 depth bins of the A-scan
TIME_KEYS = ("timestamps", "timestamp", "times", "time", "recv_timestamps", "recv_timestamp", "t")
FORCE_KEYS = ("forces", "force", "force_data", "forces_data")
ALINE_KEYS = ("alines", "aline", "a_lines", "a_line", "ascans", "ascan", "oct", "oct_data", "fpi")
# Folders and cameras.
EPISODE_NAME = re.compile(
    r"^(recv_all_|episode_|data_collection_)\d{8}_\d{6}|^ZED_Captures_\d+|^Captures_?\d+", re.IGNORECASE
)
VIEW_FOLDER = re.compile(r"^view[ _-]?(\d)(?!\d)", re.IGNORECASE)
SERIALS = {"41182735": 1, "49429257": 2, "44377151": 3, "49045152": 4}
HAND_EYE = 5
EXPECTED_VIEWS = ("View1_left", "View2_left", "View3_left", "View4_left", "View5")
MAX_DEPTH = 5  # levels searched below a root: dataset / task / episode, and room for two more
SKIPPED_FOLDERS = {"cache", "__pycache__", "runs", "wandb"}


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


@dataclass(frozen=True)
class EpisodeFiles:
    """Where the parts of one raw episode lie."""

    path: Path
    dataset: str  # the top folder of the dataset below the root
    task: str  # folders between dataset and episode (`Needle_insertion`), or empty
    layout: str  # `F0`..`F3`, judged by columns and folders
    robot_log: Path | None
    other_logs: tuple[Path, ...]  # further CSV files with robot columns: reported, not used
    sensor_files: tuple[Path, ...]  # all .npz files of the episode

    @property
    def name(self) -> str:
        return self.path.name


def find_episodes(root: str | Path, dataset_dirs: Sequence[str | Path] = ()) -> list[EpisodeFiles]:
    """All raw episodes below `root`, or only those below `dataset_dirs`, sorted by path.

    A dataset folder or an episode itself may be given too. Symbolic links are followed once; loops end.
    Raises UserError where a folder does not exist.
    """
    root = Path(root)
    found: dict[Path, EpisodeFiles] = {}
    for top in map(Path, dataset_dirs or (root,)):
        if not top.is_dir() and dataset_dirs and (root / top).is_dir():
            top = root / top
        if not top.is_dir():
            raise UserError(f"There is no dataset folder {top}; give an existing folder.")
        base = root if root in (top, *top.parents) else top.parent
        for files in _walk(top, base, 0, set()):
            found.setdefault(files.path, files)
    return sorted(found.values(), key=lambda files: files.path.as_posix())


def read_layout(path: str | Path) -> EpisodeFiles:
    """The parts of the one episode at `path`. Raises UserError where the folder does not look like an episode."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"There is no episode folder {path}.")
    parent = path.parent  # F2 and F3 keep a task folder between dataset and episode
    base = parent.parent.parent if parent.parent.name.lower().startswith("new_dataset") else parent.parent
    files = _examine(path, list(path.iterdir()), base)
    if files is None:
        raise UserError(f"{path} is no episode: it holds no robot log, no sensor file and no view folders.")
    return files


def dataset_of(path: Path, root: Path) -> tuple[str, str]:
    """(dataset, task) of an episode folder: the first folder below the root, and those between it and the episode."""
    parts = path.relative_to(root).parts if root in path.parents else ()
    if len(parts) < 2:  # the root is the dataset itself, or the episode
        return (root if parts else path.parent).resolve().name, ""
    return parts[0], "/".join(parts[1:-1])


def _walk(folder: Path, base: Path, depth: int, seen: set[tuple[int, int]]) -> Iterator[EpisodeFiles]:
    try:
        status = folder.stat()
        entries = sorted(folder.iterdir())
    except OSError:
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    raw = any(entry.suffix.lower() in (".csv", ".npz") for entry in entries)
    if not raw and any(entry.name == "data.pkl" for entry in entries):
        return  # prepared under an output root: its raw files lie elsewhere
    files = _examine(folder, entries, base)
    if files is not None and (folder != base or files.robot_log):  # a root must hold a log itself to be an episode
        yield files
    elif depth < MAX_DEPTH:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name not in SKIPPED_FOLDERS and entry.is_dir():
                yield from _walk(entry, base, depth + 1, seen)


def _examine(folder: Path, entries: list[Path], base: Path) -> EpisodeFiles | None:
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    csvs = [entry for entry in entries if entry.suffix.lower() == ".csv"]
    sensors = [entry for entry in entries if entry.suffix.lower() == ".npz"]
    views = [entry for entry in entries if VIEW_FOLDER.match(entry.name) and entry.is_dir()]
    images = any(entry.name.lower() == "images" and entry.is_dir() for entry in entries)
    columns = {path: found for path in csvs if (found := robot_columns(path))}
    logs = sorted(columns, key=lambda path: (-path.stat().st_size, path.name))
    # a blank log was never written: an episode to record again, not to pass over
    looks_like_one = EPISODE_NAME.match(folder.name) or views or (sensors and csvs)
    if not logs and not looks_like_one and all(path.stat().st_size for path in csvs):
        return None
    dataset, task = dataset_of(folder, base)
    layout = _layout(columns[logs[0]] if logs else None, images, views, folder.name.lower())
    return EpisodeFiles(
        path=folder,
        dataset=dataset,
        task=task,
        layout=layout,
        robot_log=logs[0] if logs else None,
        other_logs=tuple(logs[1:]),
        sensor_files=tuple(sorted(sensors)),
    )


def _layout(columns: RobotColumns | None, images: bool, views: list[Path], name: str) -> str:
    if columns and columns.pose[0].lower().startswith("ee_"):
        return "F0"
    if images or (columns and columns.force and not views):
        return "F2"
    for view in sorted(views):
        with os.scandir(view) as entries:
            first = next(entries, None)
        if first and os.path.isdir(first.path):
            return "F1"
        if first and first.name.startswith(("ZED_", "OAK_")) and "CAM_A" not in first.name:
            return "F3"
    by_name = {"data_collection": "F3", "episode": "F2"}
    found = next((layout for start, layout in by_name.items() if name.startswith(start)), None)
    return found or ("F0" if "captures" in name else "F1")
