"""An .npz file in; its arrays' shapes and their rows in bounded memory out, without ever loading a whole large array.

Members that are stored uncompressed (numpy's `savez`) are read in place or memory-mapped; compressed members are streamed.
Arrays of Python objects are refused: nothing in a file is ever executed.
"""

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vla_lib.core.errors import UserError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Member:
    """One array of the file."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    compressed: bool
    offset: int
    """Byte where the array's values begin in the file (stored members only)."""
    signature: tuple[str, int, int]
    """(key, size, CRC-32): what identifies the content without reading it."""


class NpzFile:
    """Opens an .npz by its directory alone. Raises UserError where it is no whole .npz file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.members: dict[str, Member] = {}
        try:
            with zipfile.ZipFile(self.path) as archive, open(self.path, "rb") as stream:
                for info in archive.infolist():
                    if info.filename.endswith(".npy"):
                        self.members[info.filename[:-4]] = self._member(archive, info, stream)
        except (
            OSError,
            zipfile.BadZipFile,
            ValueError,
            EOFError,
            struct.error,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise UserError(
                f"{self.path} is no whole .npz file ({' '.join(str(error).split())}); it may have been cut off."
            ) from error

    def _member(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, stream: BinaryIO) -> Member:
        compressed = info.compress_type != zipfile.ZIP_STORED
        offset = 0
        if compressed:
            with archive.open(info) as packed:
                shape, fortran, dtype = _read_header(packed)
        else:
            stream.seek(info.header_offset)
            local = struct.unpack("<4s5H3I2H", stream.read(30))
            if local[0] != b"PK\x03\x04":
                raise ValueError(f"no member begins where {info.filename} should")
            stream.seek(info.header_offset + 30 + local[9] + local[10])
            begin = stream.tell()
            shape, fortran, dtype = _read_header(stream)
            offset = stream.tell()
            if offset - begin + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize > info.file_size:
                raise ValueError(f"{info.filename} is shorter than its header says")
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds Python objects, which are never opened")
        return Member(
            info.filename[:-4], shape, dtype, fortran, compressed, offset, (info.filename, info.file_size, info.CRC)
        )

    def load(self, key: str) -> Array:
        """The whole array; for small members only."""
        member = self.members[key]
        rows = [chunk.copy() for chunk in self.chunks(key, 65536)]
        return np.concatenate(rows) if len(rows) > 1 else rows[0] if rows else np.empty(member.shape, member.dtype)

    def mapped(self, key: str) -> Array | None:
        """A read-only memory map of a stored array; None where it is compressed."""
        member = self.members[key]
        if member.compressed or not np.prod(member.shape):
            return None
        order = "F" if member.fortran else "C"
        return np.memmap(self.path, member.dtype, "r", member.offset, member.shape, order)  # type: ignore[call-overload, no-any-return]

    def chunks(self, key: str, rows: int, buffers: int = 1) -> Iterator[Array]:
        """The array in order, at most `rows` of its first axis at a time. Raises UserError where the file breaks off.

        The memory of a chunk is used again `buffers` chunks later: fresh pages for each would cost more than reading them.
        """
        member = self.members[key]
        if not member.shape:
            raise UserError(f"{self.path}: {key} is a single value, not an array of rows.")
        if member.fortran and len(member.shape) > 1:
            yield from self._fortran_chunks(member, rows)
            return
        row_bytes = int(np.prod(member.shape[1:], dtype=np.int64)) * member.dtype.itemsize
        with open(self.path, "rb") as stream, zipfile.ZipFile(self.path) as archive:
            source: Any = archive.open(f"{key}.npy") if member.compressed else stream
            if member.compressed:
                _read_header(source)
            else:
                stream.seek(member.offset)
            rows = min(rows, max(member.shape[0], 1))
            memory = [np.empty(rows * row_bytes, np.uint8) for _ in range(buffers)]
            for start in range(0, member.shape[0], rows):
                count = min(rows, member.shape[0] - start)
                buffer = memory[start // rows % buffers][: count * row_bytes]
                _fill(source, buffer, self.path)
                yield buffer.view(member.dtype).reshape(count, *member.shape[1:])

    def _fortran_chunks(self, member: Member, rows: int) -> Iterator[Array]:
        whole = self.mapped(member.key)
        if whole is None:
            raise UserError(
                f"{self.path}: {member.key} is compressed column by column; save it again with numpy.savez."
            )
        for start in range(0, member.shape[0], rows):
            yield np.ascontiguousarray(whole[start : start + rows])


def _fill(source: Any, buffer: Array, path: Path) -> None:
    view = memoryview(buffer)
    while len(view):
        try:
            read = source.readinto(view)
        except (OSError, zipfile.BadZipFile, EOFError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
            raise UserError(f"{path} is damaged inside ({error}).") from error
        if not read:
            raise UserError(f"{path} ends before its arrays do.")
        view = view[read:]


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
