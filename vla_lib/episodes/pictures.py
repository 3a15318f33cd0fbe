"""The pictures of an episode, view by view: their paths and times, and whether they show what a camera saw.

View keys: `View1_left`, `View1_right`, ... `View4_right` (ZED) and `View5` (hand-eye). A folder called `ViewN` decides
the view; elsewhere the camera's serial number does. The time is the number at the end of the name: UNIX seconds.

Listing them opens none. Judged are broken ones, other sizes, constant ones, and a camera that froze: of every picture
the header and the end are read; its pixels only where few bytes make it suspect, or with `thorough`.
"""

import contextlib
import os
import re
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.episodes.findings import Findings
from vla_lib.episodes.layouts import HAND_EYE, PICTURE_SUFFIXES, SERIALS, VIEW_FOLDER, is_folder
from vla_lib.episodes.poses import interpolate
from vla_lib.episodes.robot_log import RobotLog
from vla_lib.episodes.timeline import FAR_S, in_seconds

Row = tuple[float, str, int]  # time, relative path, size in bytes

SAME_SHAPE = 0.02  # sides may differ by this part, and by a factor of two in all: then a picture is only resized
CONSTANT = 2.0  # grey levels (0..255): the spread over all pixels of a picture that shows nothing
FROZEN_S = 0.5  # a camera that repeats one picture for so long while the arm moves is frozen
MOVED = 1.0  # mm or degrees: the arm moves
HOLE_BYTES = 512  # zeros in a row inside a JPEG's data: a block that was never written
EXIF_ORIENTATION = 274
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
CUT, NO_PICTURE = "cut", "no picture"
_MAGIC = (b"\xff\xd8", b"\x89PNG")
_TIME = re.compile(r"(\d{8,})(?:\.(\d+))?\.\w+$")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")  # line ends, backslashes, bytes that are no UTF-8
_SERIAL = re.compile(r"(?:^|_)(\d{8})(?:_|$)")


@dataclass
class Pictures:
    """All pictures of one view, by time."""

    view: str
    paths: list[str] = field(repr=False)  # relative to the episode folder, posix
    t_s: np.ndarray = field(repr=False)  # (n,) float64 UNIX seconds, rising
    sizes: np.ndarray = field(repr=False)  # (n,) int64 bytes; 0 where nothing can be opened, as behind a dangling link

    def only(self, chosen: np.ndarray) -> "Pictures":
        """Those that `chosen` (n,) bool names."""
        paths = [path for path, use in zip(self.paths, chosen.tolist(), strict=True) if use]
        return Pictures(self.view, paths, self.t_s[chosen], self.sizes[chosen])

    def __len__(self) -> int:
        return len(self.paths)


@dataclass
class Listing:
    """What lies in the picture folders, before any judgement."""

    rows: dict[str, list[Row]] = field(default_factory=dict)  # view key -> rows, sorted by time
    nameless: dict[str, int] = field(default_factory=dict)  # folder -> pictures without a time in their names
    read_as: dict[str, str] = field(default_factory=dict)  # view key -> how the times in its names are meant
    unsafe: dict[str, int] = field(default_factory=dict)  # folder -> pictures whose paths cannot stand in data.pkl


def list_pictures(episode: Path) -> Listing:
    """List all pictures of an episode without opening any."""
    listing = Listing()
    if not episode.is_dir():  # an HDF5 file that nothing was written from yet
        return listing
    named: dict[str, list[tuple[str, str, str, int]]] = {}  # view key -> whole seconds, fraction, path, size
    for folder, number, side in _folders(episode):
        for entry in os.scandir(episode / folder):
            name = entry.name.lower()
            view = number or _view_of(name)
            if name.startswith(".") or not name.endswith(PICTURE_SUFFIXES) or not view:
                continue
            if _UNSAFE.search(f"{folder}/{entry.name}"):
                listing.unsafe[folder] = listing.unsafe.get(folder, 0) + 1
                continue
            stamp = _TIME.search(name)
            if stamp is None:
                listing.nameless[folder] = listing.nameless.get(folder, 0) + 1
                continue
            key = f"View{view}"
            if view != HAND_EYE:
                key += f"_{side or ('right' if '_right_' in name else 'left')}"
            try:
                size = entry.stat().st_size
            except OSError:  # a link that dangles or loops
                size = 0
            named.setdefault(key, []).append((stamp[1], stamp[2] or "", f"{folder}/{entry.name}", size))
    for key, rows in sorted(named.items()):
        whole, fraction, paths, sizes = zip(*rows, strict=True)
        times, listing.read_as[key] = _read_times(whole, fraction)
        listing.rows[key] = sorted(zip(times.tolist(), paths, sizes, strict=True))
    return listing


def _read_times(whole: Sequence[str], fraction: Sequence[str]) -> tuple[np.ndarray, str]:
    """UNIX seconds (n,) of the numbers in names, and how they are meant where that is not what they say, else "".

    A recorder that joins seconds and milliseconds with a dot writes 1762.5 for 1762.005: fractions of one to three
    digits, none with a leading zero. What is right is seen from the spacing: cameras come evenly.
    """
    notes = Findings()
    times = in_seconds(np.array([float(f"{a}.{b or 0}") for a, b in zip(whole, fraction, strict=True)]), "", notes)
    lengths = {len(digits) for digits in fraction}
    digits = next((width for width in (3, 6, 9) if max(lengths) <= width), 0)
    padded = any(len(one) > 1 and one[0] == "0" for one in fraction)
    if len(lengths) > 1 and digits and not padded and min(lengths) > 0:
        joined = np.array([float(f"{a}.{b.zfill(digits)}") for a, b in zip(whole, fraction, strict=True)])
        if _unevenness(joined) < 0.5 * _unevenness(times):
            return joined, f"fractions of a second without leading zeros ({digits} digits)"
    return times, notes[0].text if notes else ""


def _unevenness(times: np.ndarray) -> float:
    steps = np.diff(np.sort(times))
    return float(np.abs(steps - np.median(steps)).mean()) if len(steps) else 0.0


def read_pictures(episode: Path, findings: Findings, listing: Listing | None = None) -> dict[str, Pictures]:
    """All views of an episode, sorted by key. Names without a time, or with one far off, are left out and said."""
    listing = listing or list_pictures(episode)
    for place, count in sorted(listing.nameless.items()):
        findings.exclude(place, f"{count} pictures in {place} carry no time in their names and are left out")
    for view, meant in listing.read_as.items():
        if meant:
            text = meant if meant.startswith("its") else f"its names carry {meant}, and are read as such"
            findings.note(view, text)
    for place, count in sorted(listing.unsafe.items()):
        text = f"{count} pictures have a line end, a backslash or broken letters in their paths"
        findings.exclude("pictures", f"{text} and are left out; rename them (in {place!r})")
    views = {}
    for view, rows in listing.rows.items():
        middle = rows[len(rows) // 2][0]
        near = [row for row in rows if abs(row[0] - middle) <= FAR_S]
        if len(near) < len(rows):
            text = "pictures carry a time hours away from the others and are left out"
            findings.note(view, f"{len(rows) - len(near)} {text}")
        times, paths, sizes = zip(*near, strict=True)
        views[view] = Pictures(view, list(paths), np.array(times), np.array(sizes))
    return views


def _folders(episode: Path) -> Iterator[tuple[str, int, str]]:
    """(folder below the episode, its view's number or 0, its side or none) of every folder that may hold pictures."""
    for top in _inner(episode):
        for folder in [f"{top}/{name}" for name in _inner(episode / top)] if top.lower() == "images" else [top]:
            matched = VIEW_FOLDER.match(folder.rsplit("/", 1)[-1])
            number = int(matched.group(1)) if matched else 0
            yield folder, number, ""
            for side in _inner(episode / folder):
                if side.lower() in ("left", "right"):
                    yield f"{folder}/{side}", number, side.lower()


def _inner(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.name[0] != "." and is_folder(entry))


def _view_of(name: str) -> int:
    serial = _SERIAL.search(name)
    return HAND_EYE if name.startswith("oak") else SERIALS.get(serial.group(1), 0) if serial else 0


def link_pictures(source: Path, views: Mapping[str, Pictures], out: Path) -> None:
    """Below an output root the picture folders are links to the raw ones, so that relative paths hold there too.

    Raises UserError where something else lies in the way.
    """
    folders = {path.split("/")[0] for pictures in views.values() for path in pictures.paths}
    for folder in sorted(folders):
        link, target = out / folder, (source / folder).resolve()
        if link.is_symlink() and link.resolve() != target:
            link.unlink()
        if link.is_symlink():
            continue
        if link.exists():
            needed = f"below an output root it must be a link to {target}; remove it or choose another root"
            raise UserError(f"{link} is in the way: {needed}.")
        link.symlink_to(target, target_is_directory=True)


# ---- what they show


class Head(NamedTuple):
    """A picture's header."""

    size: tuple[int, int]  # width, height
    orientation: int  # EXIF: 1 is upright


def sound_pictures(
    episode: Path, pictures: Pictures, robot: RobotLog, findings: Findings, thorough: bool = False
) -> Pictures | None:
    """The pictures of one view that show what the camera saw when they say; each kind left out is said in `findings`.

    None where more than half of the view is not sound: then the whole view is left out. Picture times are the robot's.
    """
    sound = np.ones(len(pictures), bool)
    start_s = float(robot.t_s[0])

    def leave_out(bad: np.ndarray, text: str) -> None:
        bad = bad & sound
        if bad.any():
            first = int(bad.argmax())
            where = f"first: {pictures.paths[first]}, at {pictures.t_s[first] - start_s:.2f} s"
            findings.exclude(pictures.view, f"{bad.sum()} pictures {text} and are left out ({where})")
            sound[bad] = False

    with warnings.catch_warnings(action="ignore"):  # PIL's about odd headers: what it cannot read is judged here
        seen = [_look(episode / path, thorough) for path in pictures.paths]
        leave_out(np.array([one == CUT for one in seen]), "are cut off or empty")
        leave_out(np.array([one == NO_PICTURE for one in seen]), "are no pictures, whatever their names say")
        heads = [one if isinstance(one, Head) else None for one in seen]
        sizes = Counter(head.size for head in heads if head)
        if sizes:
            usual = sizes.most_common(1)[0][0]
            other = np.array([head is not None and not _alike(head.size, usual) for head in heads])
            leave_out(other, f"are of another size than the others ({usual[0]}x{usual[1]})")
            upright = Counter(head.orientation for head in heads if head).most_common(1)[0][0]
            turned = np.array([head is not None and head.orientation != upright for head in heads])
            leave_out(turned, "are marked (EXIF) as turned another way than the others")
        leave_out(_constant(episode, pictures, sound), "are of one colour")
    leave_out(_frozen(episode, pictures, sound, robot), "repeat the one before while the arm moves (the camera froze)")
    if sound.sum() * 2 < len(sound):
        text = f"{(~sound).sum()} of its {len(sound)} pictures are not sound: the view is not used"
        findings.exclude(pictures.view, text, left_out=True)
        return None
    return pictures.only(sound)


def _look(path: Path, thorough: bool) -> Head | str:
    """A picture's header; CUT or NO_PICTURE where it has none, or where what follows is not whole."""
    begin = b""
    try:
        with open(path, "rb") as stream:
            begin = stream.read(4)
            if not begin or not _has_end(stream, begin):
                return CUT
            stream.seek(0)
            with Image.open(stream) as picture:
                if thorough:
                    picture.load()
                    stream.seek(0)
                    if bytes(HOLE_BYTES) in stream.read() and _spread(picture) > CONSTANT:
                        return CUT
                exif = picture.getexif() if "exif" in picture.info else {}
                return Head(picture.size, int(exif.get(EXIF_ORIENTATION, 1)))
    except _UNREADABLE:
        return CUT if not begin or begin.startswith(_MAGIC) else NO_PICTURE


def _has_end(stream: BinaryIO, begin: bytes) -> bool:
    """Whether a picture file has its end: a JPEG's end mark, a PNG's last chunk; other kinds are not known."""
    stream.seek(max(os.fstat(stream.fileno()).st_size - 64, 0))
    end = b"\xff\xd9" if begin[:2] == b"\xff\xd8" else b"IEND" if begin == b"\x89PNG" else b""
    return end in stream.read(64)


def _alike(size: tuple[int, int], usual: tuple[int, int]) -> bool:
    """Whether a picture is of the usual shape, resized by a factor of two at most."""
    across, down = size[0] / usual[0], size[1] / usual[1]
    return abs(across / down - 1) <= SAME_SHAPE and 0.5 <= across <= 2


def _spread(picture: Image.Image) -> float:
    """Standard deviation of a picture's grey levels (0..255)."""
    return float(np.asarray(picture.convert("L"), float).std())


def _constant(episode: Path, pictures: Pictures, sound: np.ndarray) -> np.ndarray:
    """(n,) bool: pictures of one colour. They compress to the fewest bytes: found from the smallest upwards."""

    def shows_nothing(number: int) -> bool:
        with contextlib.suppress(*_UNREADABLE), Image.open(episode / pictures.paths[number]) as picture:
            picture.draft("L", (picture.width // 8, picture.height // 8))  # the JPEG decoder's own shrinking
            return _spread(picture) <= CONSTANT
        return True

    by_size = sorted(np.flatnonzero(sound).tolist(), key=lambda number: int(pictures.sizes[number]))
    constant = np.zeros(len(pictures), bool)
    if not by_size or not shows_nothing(by_size[0]):
        return constant
    constant[by_size[: bisect_left(by_size, True, key=lambda number: not shows_nothing(number))]] = True
    return constant


def _frozen(episode: Path, pictures: Pictures, sound: np.ndarray, robot: RobotLog) -> np.ndarray:
    """(n,) bool: pictures that repeat the bytes of the one before, for FROZEN_S and while the arm moves."""
    frozen = np.zeros(len(pictures), bool)
    numbers = np.flatnonzero(sound)
    same_size = np.diff(pictures.sizes[numbers]) == 0
    repeats = [same and _same_bytes(episode, pictures, *numbers[k : k + 2]) for k, same in enumerate(same_size)]
    for run in np.split(numbers, np.flatnonzero(~np.array(repeats, bool)) + 1):
        if len(run) > 1 and pictures.t_s[run[-1]] - pictures.t_s[run[0]] >= FROZEN_S:
            pose, turned = interpolate(robot.t_s, robot.pose, pictures.t_s[run])
            moved = np.linalg.norm(pose[:, :3] - pose[0, :3], axis=1).max()
            turn = np.degrees((turned * turned[0].inv()).magnitude()).max()
            frozen[run[1:]] = max(moved, turn) >= MOVED
    return frozen


def _same_bytes(episode: Path, pictures: Pictures, one: int, other: int) -> bool:
    try:
        return (episode / pictures.paths[one]).read_bytes() == (episode / pictures.paths[other]).read_bytes()
    except OSError:
        return False
