"""What pictures show, judged view by view: broken ones, other sizes, constant ones, and a camera that froze.

Of every picture the header and the end are read; its pixels only where few bytes make it suspect, or with `thorough`.
"""

import contextlib
import os
import warnings
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from vla_lib.episodes.findings import Findings
from vla_lib.episodes.pictures import Pictures
from vla_lib.episodes.poses import interpolate
from vla_lib.episodes.robot_log import RobotLog

SAME_SHAPE = 0.02  # sides may differ by this part, and by a factor of two in all: then a picture is only resized
CONSTANT = 2.0  # grey levels (0..255): the spread over all pixels of a picture that shows nothing
FROZEN_S = 0.5  # a camera that repeats one picture for so long while the arm moves is frozen
MOVED = 1.0  # mm or degrees: the arm moves
HOLE_BYTES = 512  # zeros in a row inside a JPEG's data: a block that was never written
EXIF_ORIENTATION = 274
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


CUT, NO_PICTURE = "cut", "no picture"
_MAGIC = (b"\xff\xd8", b"\x89PNG")


@dataclass(frozen=True)
class Head:
    """A picture's header."""

    width: int
    height: int
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
        sizes = Counter((head.width, head.height) for head in heads if head)
        if sizes:
            usual = sizes.most_common(1)[0][0]
            other = np.array([head is not None and not _alike((head.width, head.height), usual) for head in heads])
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
                return Head(picture.width, picture.height, int(exif.get(EXIF_ORIENTATION, 1)))
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
    repeats = np.array(
        [same and _same_bytes(episode, pictures, *numbers[k : k + 2]) for k, same in enumerate(same_size)]
    )
    for run in np.split(numbers, np.flatnonzero(~repeats.astype(bool)) + 1):
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
