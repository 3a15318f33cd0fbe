"""An episode folder in; per view the pictures' relative paths and times out. Pictures are opened only when asked for.

View keys: `View1_left`, `View1_right`, ... `View4_right` (ZED) and `View5` (hand-eye). A folder called `ViewN` decides the
view; elsewhere the camera's serial number does. The time is the number at the end of the name: UNIX seconds.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.episodes.findings import EXCLUDED, NOTE, Finding
from vla_lib.episodes.layouts import VIEW_FOLDER
from vla_lib.episodes.timeline import FAR_S

Array = np.ndarray[Any, Any]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
HAND_EYE = 5
EXPECTED_VIEWS = ("View1_left", "View2_left", "View3_left", "View4_left", "View5")
SERIALS = {"41182735": 1, "49429257": 2, "44377151": 3, "49045152": 4}
_TIME = re.compile(r"(\d{8,}(?:\.\d+)?)\.\w+$")
_SERIAL = re.compile(r"(?:^|_)(\d{8})(?:_|$)")
SMALL_PART = 0.6
"""A picture smaller than this part of its view's median size is checked for being cut off."""


@dataclass
class Pictures:
    """All pictures of one view, by time."""

    view: str
    root: Path
    """The episode folder."""
    paths: list[str] = field(repr=False)
    """Relative to the episode folder, posix."""
    t_s: Array = field(repr=False)
    """(n,) float64 UNIX seconds, rising."""
    bytes: Array = field(repr=False)
    """(n,) int64 file sizes."""

    def __len__(self) -> int:
        return len(self.paths)

    def newest(self, at_s: float) -> int:
        """Number of the newest picture at or before `at_s`; -1 where there is none."""
        return int(np.searchsorted(self.t_s, at_s, side="right")) - 1

    def open(self, number: int) -> Image.Image:
        """Picture `number`, decoded as RGB. Raises UserError where the file is damaged."""
        return open_picture(self.root / self.paths[number])


def open_picture(path: Path) -> Image.Image:
    """One picture as RGB. Raises UserError where the file is missing or damaged."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"The picture {path} cannot be opened ({error}).") from error


Row = tuple[float, str, int]
"""Time, relative path, size in bytes."""


@dataclass
class Listing:
    """What lies in the picture folders, before any judgement."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    """View key -> rows, sorted by time."""
    nameless: dict[str, int] = field(default_factory=dict)
    """Folder -> pictures without a time in their names."""


def list_pictures(episode: Path) -> Listing:
    """List all pictures of an episode without opening any."""
    listing = Listing()
    for folder in _picture_folders(episode):
        _scan(episode, folder, listing)
    listing.rows = {view: sorted(rows) for view, rows in sorted(listing.rows.items())}
    return listing


def read_pictures(
    episode: Path, findings: list[Finding], full_check: bool = False, listing: Listing | None = None
) -> dict[str, Pictures]:
    """All views of an episode, sorted by key. Cut-off pictures and names without a time are left out and said.

    Cut-off pictures are looked for among those that are much smaller than their neighbours, with `full_check` among all.
    """
    listing = listing or list_pictures(episode)
    for place, count in sorted(listing.nameless.items()):
        findings.append(
            Finding(EXCLUDED, place, f"{count} pictures in {place} carry no time in their names and are left out")
        )
    views = {}
    for view, rows in listing.rows.items():
        rows = _without_strays(view, rows, findings)
        rows = _without_broken(view, episode, rows, findings, full_check)
        if rows:
            times, paths, sizes = zip(*rows, strict=True)
            views[view] = Pictures(view, episode, list(paths), np.asarray(times), np.asarray(sizes, np.int64))
    return views


def _picture_folders(episode: Path) -> list[str]:
    folders = []
    for entry in sorted(os.scandir(episode), key=lambda entry: entry.name):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if entry.name.lower() == "images":
            folders += [
                f"{entry.name}/{inner.name}"
                for inner in sorted(os.scandir(entry.path), key=lambda e: e.name)
                if inner.is_dir()
            ]
        else:
            folders.append(entry.name)
    return folders


def _scan(episode: Path, folder: str, listing: Listing, side: str = "") -> None:
    matched = VIEW_FOLDER.match(folder.split("/")[1 if folder.lower().startswith("images/") else 0])
    number = int(matched.group(1)) if matched else 0
    for entry in os.scandir(episode / folder):
        name = entry.name
        if name.startswith("."):
            continue
        if not name.lower().endswith(SUFFIXES):
            if not side and name.lower() in ("left", "right") and entry.is_dir():
                _scan(episode, f"{folder}/{name}", listing, name.lower())
            continue
        view = number or _view_of_serial(name)
        if not view:
            continue
        stamp = _TIME.search(name)
        if stamp is None:
            listing.nameless[folder] = listing.nameless.get(folder, 0) + 1
            continue
        key = (
            f"View{view}"
            if view == HAND_EYE
            else f"View{view}_{side or ('right' if '_right_' in name.lower() else 'left')}"
        )
        listing.rows.setdefault(key, []).append((float(stamp.group(1)), f"{folder}/{name}", entry.stat().st_size))


def _view_of_serial(name: str) -> int:
    serial = _SERIAL.search(name)
    return HAND_EYE if name.lower().startswith("oak") else SERIALS.get(serial.group(1), 0) if serial else 0


def _without_strays(view: str, rows: list[Row], findings: list[Finding]) -> list[Row]:
    middle = rows[len(rows) // 2][0]
    kept = [row for row in rows if abs(row[0] - middle) <= FAR_S]
    if len(kept) < len(rows):
        findings.append(
            Finding(
                NOTE, view, f"{len(rows) - len(kept)} pictures carry a time hours away from the others and are left out"
            )
        )
    return kept


def _without_broken(view: str, episode: Path, rows: list[Row], findings: list[Finding], full_check: bool) -> list[Row]:
    usual = float(np.median([size for _, _, size in rows])) if rows else 0.0
    broken = {
        path
        for _, path, size in rows
        if (full_check or size < SMALL_PART * usual or not size) and not is_whole(episode / path)
    }
    if broken:
        findings.append(
            Finding(
                EXCLUDED,
                view,
                f"{len(broken)} pictures are cut off or empty and are left out (first: {min(broken)})",
                len(broken) == len(rows),
            )
        )
    return [row for row in rows if row[1] not in broken]


def is_whole(path: Path) -> bool:
    """Whether a picture file has its end: a JPEG's end mark, a PNG's last chunk; other kinds only need content."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(4)
            stream.seek(0, os.SEEK_END)
            stream.seek(max(stream.tell() - 64, 0))
            tail = stream.read(64)
    except OSError:
        return False
    if head[:2] == b"\xff\xd8":
        return b"\xff\xd9" in tail
    return b"IEND" in tail if head == b"\x89PNG" else bool(tail)
