"""One sensor file (.npz of any layout): which of its arrays hold what, and its samples in blocks of bounded memory.

A large array is never loaded whole: what numpy's `savez` stored uncompressed is memory-mapped, what is compressed is
streamed. Arrays of Python objects are refused: nothing in a file is ever executed.
"""

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.layouts import ALINE_KEYS, CHANNELS, FORCE_KEYS, TIME_KEYS

BLOCK_ROWS = 512  # rows read at a time: 2 MB, so that the work stays in the processor's cache
CHECK_BYTES = 1 << 20
MOST_SAMPLES = 30_000_000  # 12 hours at 650 Hz: more is no recording
_NO_NPZ = (OSError, zipfile.BadZipFile, ValueError, EOFError, struct.error, zlib.error, RuntimeError)


@dataclass(frozen=True)
class Member:
    """One array of an .npz file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int | None  # byte where the values begin in the file; None where they are compressed

    @property
    def size(self) -> int:
        """Bytes of the values, inflated."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class NpzFile:
    """Opens an .npz by its directory alone. Raises UserError where it is no whole .npz file."""

    def __init__(self, path: Path):
        self.path = path
        self.members: dict[str, Member] = {}
        self.signature: list[tuple[str, int, int]] = []
        """(name, size, CRC-32) of every array: what identifies the content without reading it."""
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith(".npy"):
                        self.members[info.filename[:-4]] = self._member(archive, info)
                        self.signature.append((info.filename, info.file_size, info.CRC))
        except _NO_NPZ as error:
            said = " ".join(str(error).split())
            raise UserError(f"{path} is no whole .npz file ({said}); it may have been cut off.") from error
        self.signature.sort()

    def _member(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
        with archive.open(info) as packed:
            shape, fortran, dtype = _read_header(packed)
            begin = packed.tell()
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds Python objects, which are never opened")
        member = Member(shape, dtype, fortran, None)
        if begin + member.size > info.file_size:
            raise ValueError(f"{info.filename} is shorter than its header says")
        if info.compress_type != zipfile.ZIP_STORED:
            return member
        with open(self.path, "rb") as stream:  # the member's own zip header: 30 bytes, its name, an extra field
            stream.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", stream.read(4))
        return replace(member, offset=info.header_offset + 30 + name + extra + begin)

    @contextlib.contextmanager
    def _unpacked(self, key: str) -> Iterator[IO[bytes]]:
        """The bytes of an array, compared with their CRC-32 at their end. Raises UserError where they are damaged."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{key}.npy") as stream:
                yield stream
        except _NO_NPZ as error:
            raise UserError(f"{self.path} is damaged inside ({error}); copy it again from its source.") from error

    def check(self, key: str) -> None:
        """Raise UserError where a bit of a stored array is not what was written; a compressed one is checked as it is
        read."""
        if self.members[key].offset is not None:
            with self._unpacked(key) as stream:
                while stream.read(CHECK_BYTES):
                    pass

    def load(self, key: str) -> np.ndarray:
        """The whole array; for small members only. Raises UserError where it is damaged."""
        self.check(key)
        chunks = [np.array(chunk) for chunk in self.chunks(key, 65536)]
        return np.concatenate(chunks) if chunks else np.empty(self.members[key].shape, self.members[key].dtype)

    def mapped(self, key: str) -> np.ndarray | None:
        """A read-only memory map of a stored array; None where it is compressed."""
        member = self.members[key]
        if member.offset is None or not np.prod(member.shape):
            return None
        order: Literal["F", "C"] = "F" if member.fortran else "C"
        return np.memmap(self.path, member.dtype, "r", member.offset, member.shape, order)

    def chunks(self, key: str, rows: int) -> Iterator[np.ndarray]:
        """The array in order, at most `rows` of its first axis at a time. Raises UserError where it is damaged."""
        member = self.members[key]
        if not member.shape:
            raise UserError(f"{self.path}: {key} is a single value, not an array of rows.")
        stored = self.mapped(key)
        if stored is not None:
            for start in range(0, len(stored), rows):
                yield stored[start : start + rows]
            return
        if member.fortran and len(member.shape) > 1:
            raise UserError(f"{self.path}: {key} is compressed column by column; save it again with numpy.savez.")
        row_bytes = int(np.prod(member.shape[1:], dtype=np.int64)) * member.dtype.itemsize
        with self._unpacked(key) as packed:
            _read_header(packed)
            for start in range(0, member.shape[0], rows):
                count = min(rows, member.shape[0] - start)
                yield np.frombuffer(packed.read(count * row_bytes), member.dtype).reshape(count, *member.shape[1:])


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


@dataclass(frozen=True)
class SensorKeys:
    """Which keys of a file hold what."""

    time: str
    body: str  # windows (N, W, 1026) or samples (N, 1026), force first; with `force`: A-lines (N, 1025)
    force: str | None = None


def sensor_keys(members: dict[str, Member]) -> SensorKeys:
    """Find times, force and A-scans by name or shape. Raises UserError (naming the keys) where one is missing."""
    lower = {key.lower(): key for key in members}

    def named(names: tuple[str, ...], part: str, *dimensions: int) -> str | None:
        fits = {low: key for low, key in lower.items() if len(members[key].shape) in dimensions}
        found = [fits[name] for name in names if name in fits]
        return next(iter(found + [key for low, key in fits.items() if part in low]), None)

    def shaped(dimensions: int, channels: int) -> str | None:
        fits = (k for k, m in members.items() if len(m.shape) == dimensions and m.shape[-1] == channels)
        return next((key for key in fits if members[key].dtype.kind in "fiu"), None)

    shown = ", ".join(f"{key} {member.shape}" for key, member in members.items()) or "no arrays"
    time = named(TIME_KEYS, "time", 1)
    if time is None:
        raise UserError(f"it holds no times (found {shown})")
    body = shaped(3, CHANNELS) or shaped(2, CHANNELS)
    if body:
        return SensorKeys(time, body)
    alines = named(ALINE_KEYS, "\0", 2) or shaped(2, CHANNELS - 1)
    force = named(FORCE_KEYS, "force", 1, 2)
    if alines is None or force is None:
        missing = " and ".join(name for name, key in (("forces", force), ("A-lines", alines)) if key is None)
        raise UserError(f"it holds no {missing} (found {shown})")
    if members[alines].shape[1] != CHANNELS - 1:
        raise UserError(f"its A-lines have {members[alines].shape[1]} depth bins, {CHANNELS - 1} are needed")
    return SensorKeys(time, alines, force)


class SensorFile(NpzFile):
    """The samples of one file: float32, force first. `keep` and `new` choose among them; `sensor_log` sets them."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.keys = sensor_keys(self.members)
        shape = self.members[self.keys.body].shape
        self.window = shape[1] if len(shape) == 3 else 0
        """Rows of a window; 0 where the file holds samples one by one."""
        if max(shape[0], *self.members[self.keys.time].shape) > MOST_SAMPLES:
            raise UserError(f"it says that it holds {shape[0]} samples, more than any recording")
        self.stamps_s = np.asarray(self.load(self.keys.time), np.float64)
        self.keep: np.ndarray = np.arange(len(self.stamps_s))  # (K,) rows (or windows) that are used, in order
        self.new: np.ndarray = np.full(len(self.stamps_s), self.window or 1)
        """(K,) samples of each that none before it holds: the last rows of a window."""
        self.cut = 0  # times of `stamps_s` that were taken out, since they lie far from the robot log

    def __len__(self) -> int:
        return int(self.new.sum())

    def windows(self) -> Iterator[np.ndarray]:
        """The windows in use (W, 1026), one after the other."""
        stored = self.mapped(self.keys.body)
        used = set(self.keep.tolist())
        if stored is not None:
            return (stored[number] for number in self.keep)
        return (chunk[0] for number, chunk in enumerate(self.chunks(self.keys.body, 1)) if number in used)

    def blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """((n, 1026) float32 block, overlapping rows that disagree with the window before), in order.

        A block is only valid until the next one is asked for.
        """
        if self.window:
            yield from self._new_rows()
            return
        start = 0
        for block in self._rows():
            first, last = np.searchsorted(self.keep, (start, start + len(block)))
            if last > first:
                inside = slice(None) if last - first == len(block) else self.keep[first:last] - start
                yield block[inside], 0
            start += len(block)
            if not len(self.keep) or start > self.keep[-1]:
                return

    def _rows(self) -> Iterator[np.ndarray]:
        if not self.keys.force:
            yield from (chunk.astype(np.float32, copy=False) for chunk in self.chunks(self.keys.body, BLOCK_ROWS))
            return
        force = self._forces(self.keys.force)
        block = np.empty((BLOCK_ROWS, CHANNELS), np.float32)  # used again: fresh pages cost more than reading
        start = 0
        for chunk in self.chunks(self.keys.body, BLOCK_ROWS):
            count = min(len(chunk), len(force) - start)
            block[:count, 0], block[:count, 1:] = force[start : start + count], chunk[:count]
            start += count
            yield block[:count]

    def _new_rows(self) -> Iterator[tuple[np.ndarray, int]]:
        before: np.ndarray | None = None
        for window, count in zip(self.windows(), self.new.tolist(), strict=True):
            shared = len(window) - count
            differ = 0
            if before is not None and not np.array_equal(before[count:], window[:shared]):
                differ = int((bits(before[count:]) != bits(window[:shared])).any(axis=1).sum())
            before = window
            yield window[shared:].astype(np.float32, copy=False), differ

    def _forces(self, key: str) -> np.ndarray:
        force = self.load(key)
        return force.reshape(len(force), -1)[:, 0]

    def force(self) -> np.ndarray:
        """(S,) float32 force of every sample in use."""
        if self.keys.force:
            return self._forces(self.keys.force)[self.keep].astype(np.float32)
        return np.concatenate([block[:, 0].copy() for block, _ in self.blocks()])

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """(M, 1026) float32: the samples in use with the given numbers."""
        out = np.empty((len(wanted), CHANNELS), np.float32)
        body = self.mapped(self.keys.body)
        if body is not None and self.window:
            ends = np.cumsum(self.new)
            place = np.searchsorted(ends, wanted, side="right")
            out[:] = body[self.keep[place], self.window - (ends[place] - wanted)]
        elif body is not None and self.keys.force:
            out[:, 0], out[:, 1:] = self._forces(self.keys.force)[self.keep[wanted]], body[self.keep[wanted]]
        elif body is not None:
            out[:] = body[self.keep[wanted]]
        else:  # compressed: stream through
            start = 0
            for block, _ in self.blocks():
                inside = (wanted >= start) & (wanted < start + len(block))
                out[inside] = block[wanted[inside] - start]
                start += len(block)
        return out


def bits(values: np.ndarray) -> np.ndarray:
    """The values as bits, so that NaN equals NaN."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
