"""The survey of a dataset root: its episodes, those recorded twice, and what was looked at and is no episode."""

import contextlib
import hashlib
import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.core.settings import ROOT_VARIABLE
from vla_lib.episodes.data_pkl import DATA_NAME
from vla_lib.episodes.datasets import DatasetTable, Marks
from vla_lib.episodes.hdf5 import is_episode
from vla_lib.episodes.layouts import (
    EPISODE_NAME,
    H5_SUFFIXES,
    VIEW_FOLDER,
    EpisodeFiles,
    describe_log,
    examine,
    h5_files,
    is_folder,
)

MAX_DEPTH = 8  # levels searched below a root: collecting folder / dataset / task / episode, and room for more
CACHE_FOLDERS = ("qwen_vl_features", "run.json")  # A folder that holds one of them is ours: a VL cache or a run
NAS_MARKS = ("#", "@", "$")  # a NAS's own folders: #recycle, #snapshot, @eaDir, @Recycle, $RECYCLE.BIN
NAS_FOLDERS = {"lost+found", "system volume information"}
OTHERS = {"__pycache__", "wandb", "images"}

Remark = tuple[Path, str]  # what else was looked at, and why it is no episode
Above = tuple[tuple[int, int], ...]  # device and inode of each folder above


@dataclass
class Survey:
    """What lies below a dataset root."""

    episodes: list[EpisodeFiles] = field(default_factory=list)  # sorted by path, copies included
    copies: dict[Path, Path] = field(default_factory=dict)
    """Folder of an episode whose recording is there twice -> folder of the one that is kept."""
    remarks: list[Remark] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # sentences about datasets that no table names


def survey(root: str | Path, dataset_dirs: Sequence[str | Path] = ()) -> Survey:
    """Search `root`, or only `dataset_dirs` (datasets or episodes). Links are followed, loops end, real folders win.

    Raises UserError where a folder does not exist or datasets.yaml cannot be understood.
    """
    table, result = DatasetTable.load(root), Survey()
    result.episodes = _all(Path(root), dataset_dirs, table, result.remarks)
    result.copies = _copies(result.episodes, table)
    kept = (files for files in result.episodes if files.path not in result.copies)
    result.unknown = table.unknown((files.dataset, files.task) for files in kept)
    return result


def find_episodes(root: str | Path, dataset_dirs: Sequence[str | Path] = ()) -> list[EpisodeFiles]:
    """All raw episodes of `survey`, sorted by path, without comparing them. Raises UserError as it does."""
    return _all(Path(root), dataset_dirs, DatasetTable.load(root), [])


def _all(
    root: Path, dataset_dirs: Sequence[str | Path], table: DatasetTable, remarks: list[Remark]
) -> list[EpisodeFiles]:
    found: dict[str, EpisodeFiles] = {}
    for top in map(Path, dataset_dirs or (root,)):
        if not top.is_dir() and dataset_dirs and (root / top).is_dir():
            top = root / top
        if not top.is_dir():
            raise UserError(f"There is no dataset folder {top}; give an existing folder.")
        base = root if root in (top, *top.parents) else top.parent
        for files in _below(top, base, table, (), remarks):
            real = os.path.realpath(files.path)
            if real not in found or os.path.abspath(found[real].path) != real:
                found[real] = files
    return sorted(found.values(), key=lambda files: files.path.as_posix())


def find_prepared(root: str | Path) -> list[Path]:
    """All folders below `root` (itself included) with a data.pkl, sorted, but those that the marks leave out.

    A data.pkl in a folder that holds prepared episodes is a stray one and not counted. Raises UserError where root is
    no folder, or its marks cannot be understood.
    """
    return [folder for folder, why in all_prepared(root).items() if not why]


def all_prepared(root: str | Path) -> dict[Path, str]:
    """All folders below `root` with a data.pkl, sorted, each with why it is left out ("" where it is used)."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no dataset folder {root}; give one with --dataset-root or in {ROOT_VARIABLE}.")
    found: dict[str, Path] = {}
    for folder in _prepared_below(root, ()):
        real = os.path.realpath(folder)
        if real not in found or os.path.abspath(found[real]) != real:
            found[real] = folder
    marks = Marks.load(root)
    return {folder: marks.left_out(folder.relative_to(root).as_posix()) for folder in sorted(found.values())}


def left_out(root: str | Path) -> str:
    """How many prepared episodes below `root` the marks leave out, and why; "" where none."""
    states = all_prepared(root)
    reasons = Counter(why.partition(" (")[0] for why in states.values() if why)
    words = ", ".join(f"{count} {why}" for why, count in reasons.items())
    return f"{reasons.total()} of {len(states)} prepared episodes: {words}" if words else ""


def _prepared_below(folder: Path, above: Above) -> list[Path]:
    entries, above = _look(folder, above)
    inner = []
    for entry in entries:
        if not VIEW_FOLDER.match(entry.name) and is_folder(entry) and not _passed_over(entry):
            inner += _prepared_below(folder / entry.name, above)
    return inner or [folder for entry in entries if entry.name == DATA_NAME]


def recording_id(files: EpisodeFiles) -> str | None:
    """What identifies a recording wherever it is copied to: a hash of its robot log; None where that holds no rows."""
    if files.robot_log is None:
        return None
    if files.layout == "F4":
        return file_id(files.robot_log)
    content = files.robot_log.read_bytes()
    return hashlib.sha256(content).hexdigest()[:32] if len(content[:65536].splitlines()) > 2 else None


def file_id(path: Path) -> str:
    """What identifies a large file without reading all of it: its size, and 64 blocks of it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for number in range(64):
            stream.seek(size * number // 64)
            digest.update(stream.read(16384))
    return digest.hexdigest()[:32]


def _look(folder: Path, above: Above) -> tuple[list[os.DirEntry[str]], Above]:
    """The sorted entries of a folder, and the folders above and at it; no entries where a link leads in a circle."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above or len(above) > MAX_DEPTH:
        return [], above
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name), (*above, here)


def _passed_over(entry: os.DirEntry[str]) -> str:
    """Why a folder is not searched; empty where it is. A space where that goes without saying."""
    name = entry.name.lower()
    if name.startswith(NAS_MARKS) or name in NAS_FOLDERS or name.startswith(".trash"):
        return "is a folder of the NAS or the file manager and is not searched"
    ours = name.startswith(".") or name in OTHERS
    return " " if ours or any(os.path.exists(os.path.join(entry.path, mark)) for mark in CACHE_FOLDERS) else ""


def _below(folder: Path, base: Path, table: DatasetTable, above: Above, remarks: list[Remark]) -> list[EpisodeFiles]:
    try:
        entries, above = _look(folder, above)
        prepared = any(entry.name == DATA_NAME for entry in entries)
        raw = any(entry.name.lower().endswith((".csv", ".npz")) for entry in entries)
        files = examine(folder, entries, base, table) if raw or not prepared else None
    except OSError as error:
        remarks.append((folder, f"cannot be read ({error.strerror})"))
        return []
    if files is not None and folder == base and files.robot_log is None:
        files = None  # a root must hold a log itself to be an episode
    whole = files is not None and files.robot_log and (files.pictures or files.sensor_files)
    if files is not None and whole and EPISODE_NAME.match(folder.name):
        return [files]
    said = len(remarks)
    inner = _h5_episodes(folder, entries, base, table, remarks)
    ours = {one.path.name for one in inner}  # what was prepared from them
    for entry in entries:
        if is_folder(entry) and entry.name not in ours:
            why = _passed_over(entry)
            if why.strip():
                remarks.append((folder / entry.name, why))
            elif not why:
                inner += _below(folder / entry.name, base, table, above, remarks)
    if files is None:
        if not prepared or inner:
            remarks += [(folder, text) for text in _strangers(folder, entries, bool(inner))]
        return inner
    # an episode holds no episodes: what lies beside them in a dataset's folder is not one
    if any(one.robot_log is not None and (one.pictures or one.sensor_files or not whole) for one in inner):
        odd = [log.name for log in (files.robot_log, *files.other_logs, *files.unknown_logs) if log]
        odd += [entry.name for entry in entries if VIEW_FOLDER.match(entry.name) or entry.name == DATA_NAME]
        remarks.append((folder, f"holds episodes, so it is none itself in spite of {', '.join(odd) or 'its name'}"))
        return inner
    del remarks[said:]  # parts of this episode
    return [files]


def _h5_episodes(
    folder: Path, entries: Iterable[os.DirEntry[str]], base: Path, table: DatasetTable, remarks: list[Remark]
) -> list[EpisodeFiles]:
    found = []
    for entry in entries:
        path = folder / entry.name
        if path.suffix.lower() not in H5_SUFFIXES or entry.name.startswith("."):
            continue
        try:
            is_one = is_episode(path)
        except UserError:  # damaged: an episode to record again, if it is called one
            is_one = bool(EPISODE_NAME.match(path.name))
        if is_one:
            found.append(h5_files(path, base, table))
        else:
            remarks.append((path, "holds no poses of an arm"))
    return found


def _strangers(folder: Path, entries: Iterable[os.DirEntry[str]], dataset: bool) -> list[str]:
    """What is said of a folder that is no episode: unknown logs and, unless it holds episodes, other files."""
    names = [e.name for e in entries if not e.name.startswith(".") and not is_folder(e)]
    logs = [name for name in names if name.lower().endswith(".csv")]
    told = [f"{describe_log(folder / name)}, which is no robot log" for name in logs]
    if DATA_NAME in names and dataset:
        told.append(f"holds a {DATA_NAME} that belongs to none of the episodes below it")
    others = sorted({os.path.splitext(name)[1].lower() or name for name in names if name not in logs})
    if others and not dataset:
        told.append(f"holds no robot log ({len(names) - len(logs)} other files: {', '.join(others[:5])})")
    return told


def _left_of(episodes: Sequence[EpisodeFiles]) -> Iterator[tuple[EpisodeFiles, EpisodeFiles]]:
    """Episodes of which only the arrays of the log are left, each with one of the same name that has these rows."""
    for files in episodes:
        if files.robot_log is None or files.robot_log.suffix != ".npz":
            continue
        for one in episodes:
            log = one.robot_log if one.name == files.name else None
            if log is not None and log.suffix.lower() == ".csv" and _same_rows(log, files.robot_log):
                yield files, one


def _same_rows(log: Path, arrays: Path) -> bool:
    """Whether a CSV has as many rows as the arrays, and the first at the same time."""
    try:
        with np.load(arrays) as held:
            t_s = held["timestamps"]
        lines = log.read_bytes().splitlines()
        return len(lines) == len(t_s) + 1 and any(abs(float(cell) - t_s[0]) < 1e-3 for cell in lines[1].split(b","))
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
        return False


def _copies(episodes: Sequence[EpisodeFiles], table: DatasetTable) -> dict[Path, Path]:
    """Episodes with the same robot log, byte by byte, are one recording.

    Kept is the one with a sensor file, with pictures, in a dataset that the table knows, with the shortest path.
    """
    by_size: dict[int, list[EpisodeFiles]] = defaultdict(list)
    for files in episodes:
        if files.robot_log is not None:
            by_size[files.robot_log.stat().st_size].append(files)
    groups: dict[str, list[EpisodeFiles]] = defaultdict(list)
    for alike in by_size.values():
        for files in alike if len(alike) > 1 else ():  # most sizes are there once: nothing has to be read
            with contextlib.suppress(OSError):
                if known := recording_id(files):
                    groups[known].append(files)

    for files, twin in _left_of(episodes):
        if known := recording_id(twin):
            groups[known] += [one for one in (twin, files) if one not in groups[known]]

    def rank(files: EpisodeFiles) -> tuple[bool, bool, bool, bool, int, str]:
        place, arrays = files.path.as_posix(), files.robot_log is not None and files.robot_log.suffix == ".npz"
        return not files.sensor_files, not files.pictures, arrays, not table.knows(files.dataset), len(place), place

    kept = {known: min(group, key=rank).path for known, group in groups.items()}
    return {files.path: kept[k] for k, group in groups.items() for files in group if files.path != kept[k]}
