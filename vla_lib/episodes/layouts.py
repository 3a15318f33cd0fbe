"""A dataset root in; the episodes below it out, each with its robot log and sensor files, found by content.

An episode is a folder that holds a CSV with robot columns. Folders that look like one (by name, view folders or sensor
files) but hold no robot log are returned too, so that they can be reported and never vanish.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_lib.core.errors import UserError
from vla_lib.episodes.robot_log import read_header, robot_columns

MAX_DEPTH = 5
"""Levels searched below a root: dataset / task / episode, and room for two more."""
SKIPPED_FOLDERS = {"cache", "__pycache__", "runs", "wandb"}
EPISODE_NAME = re.compile(
    r"^(recv_all_|episode_|data_collection_)\d{8}_\d{6}|^ZED_Captures_\d+|^Captures_?\d+", re.IGNORECASE
)
VIEW_FOLDER = re.compile(r"^view[ _-]?(\d)(?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class EpisodeFiles:
    """Where the parts of one raw episode lie."""

    path: Path
    dataset: str
    """The top folder of the dataset below the root."""
    task: str
    """Folders between dataset and episode (`Needle_insertion`), or empty."""
    layout: str
    """`F0`..`F3`, judged by columns and folders."""
    robot_log: Path | None
    other_logs: tuple[Path, ...]
    """Further CSV files with robot columns: reported, not used."""
    sensor_files: tuple[Path, ...]
    """All .npz files of the episode."""

    @property
    def name(self) -> str:
        return self.path.name


def find_episodes(root: str | Path, dataset_dirs: Sequence[str | Path] = ()) -> list[EpisodeFiles]:
    """All raw episodes below `root`, or only those below `dataset_dirs`, sorted by path.

    A dataset folder or an episode itself may be given too. Symbolic links are followed once; loops end.
    Raises UserError where a folder does not exist.
    """
    found: dict[Path, EpisodeFiles] = {}
    for top, base in _tops(root, dataset_dirs):
        for files in _walk(top, base, 0, set()):
            found.setdefault(files.path, files)
    return sorted(found.values(), key=lambda files: files.path.as_posix())


def read_layout(path: str | Path, root: str | Path | None = None) -> EpisodeFiles:
    """The parts of the one episode at `path`. Raises UserError where the folder does not look like an episode."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"There is no episode folder {path}.")
    base = Path(root) if root is not None else _guess_root(path)
    files = _examine(path, list(os.scandir(path)), base)
    if files is None:
        raise UserError(f"{path} is no episode: it holds no robot log, no sensor file and no view folders.")
    return files


def dataset_of(path: Path, root: Path) -> tuple[str, str]:
    """(dataset, task) of an episode folder: the first folder below the root, and those between it and the episode."""
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        parts = ()
    if len(parts) < 2:  # the root is the dataset itself, or the episode
        return (root if parts else path.parent).resolve().name, ""
    return parts[0], "/".join(parts[1:-1])


def _guess_root(path: Path) -> Path:
    """The root of a lone episode: F2 and F3 keep a task folder between dataset and episode."""
    parent = path.parent
    return parent.parent.parent if parent.parent.name.lower().startswith("new_dataset") else parent.parent


def _tops(root: str | Path, dataset_dirs: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    tops = []
    for folder in dataset_dirs or (root,):
        path = Path(folder)
        if dataset_dirs and not path.is_dir() and (Path(root) / path).is_dir():
            path = Path(root) / path
        if not path.is_dir():
            raise UserError(f"There is no dataset folder {path}; give an existing folder.")
        inside = Path(root) in path.parents or path == Path(root)
        tops.append((path, Path(root) if inside else path.parent))
    return tops


def _walk(folder: Path, base: Path, depth: int, seen: set[tuple[int, int]]) -> Iterator[EpisodeFiles]:
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    names = {entry.name for entry in entries}
    if "data.pkl" in names and not any(name.lower().endswith((".csv", ".npz")) for name in names):
        return  # prepared under an output root: its raw files lie elsewhere
    files = _examine(folder, entries, base) if depth or folder != base or _has_robot_log(entries) else None
    if files is not None:
        yield files
        return
    if depth >= MAX_DEPTH:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS or not _is_dir(entry):
            continue
        yield from _walk(Path(entry.path), base, depth + 1, seen)


def _is_dir(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself
        return False


def _has_robot_log(entries: "list[os.DirEntry[str]]") -> bool:
    return any(
        entry.name.lower().endswith(".csv") and robot_columns(read_header(Path(entry.path))) for entry in entries
    )


def _examine(folder: Path, entries: "list[os.DirEntry[str]]", base: Path) -> EpisodeFiles | None:
    csvs, sensors, views = [], [], []
    images = False
    for entry in entries:
        lower = entry.name.lower()
        if entry.name.startswith("."):
            continue
        if lower.endswith(".csv"):
            csvs.append(Path(entry.path))
        elif lower.endswith(".npz"):
            sensors.append(Path(entry.path))
        elif VIEW_FOLDER.match(entry.name) and _is_dir(entry):
            views.append(Path(entry.path))
        elif lower == "images" and _is_dir(entry):
            images = True
    headers = {path: columns for path in csvs if (columns := robot_columns(read_header(path)))}
    logs = sorted(headers, key=lambda path: (-path.stat().st_size, path.name))
    blank = any(
        path.stat().st_size == 0 for path in csvs
    )  # a log that was never written: an episode to record again, not to pass over
    if not logs and not EPISODE_NAME.match(folder.name) and not views and not (sensors and csvs) and not blank:
        return None
    dataset, task = dataset_of(folder, base)
    return EpisodeFiles(
        path=folder,
        dataset=dataset,
        task=task,
        layout=_layout(
            headers[logs[0]].pose[0] if logs else "", bool(logs and headers[logs[0]].force), images, views, folder.name
        ),
        robot_log=logs[0] if logs else None,
        other_logs=tuple(logs[1:]),
        sensor_files=tuple(sorted(sensors)),
    )


def _layout(pose_column: str, has_force: bool, images: bool, views: list[Path], name: str) -> str:
    if pose_column.lower().startswith("ee_"):
        return "F0"
    if images or (has_force and not views):
        return "F2"
    for view in sorted(views):
        with os.scandir(view) as entries:
            first = next(entries, None)
        if first is None:
            continue
        if _is_dir(first):
            return "F1"
        if re.match(r"(ZED|OAK)_", first.name) and "CAM_A" not in first.name:
            return "F3"
    lower = name.lower()
    if lower.startswith("data_collection"):
        return "F3"
    if lower.startswith("episode"):
        return "F2"
    return "F0" if "captures" in lower else "F1"
