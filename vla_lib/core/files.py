"""Files that other processes read while we write: either the whole new file is there or the untouched old one."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from vla_lib.core.errors import UserError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
"""What mounts without file locks answer; the last: NFS, where a file of another user can only be opened for reading."""
NO_LOCKS_SENTENCE = "File locks do not work on this mount: run one preprocessing at a time there."


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at success it is flushed to disk and renamed over `path`, else removed.

    The temporary name starts with a dot and ends in `.partial`, so no reader's pattern takes it for a whole file.
    Whoever may read the folder may read the file. Raises OSError as the file system does.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
            _share(temporary, path.parent.stat().st_mode & 0o444)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checksum(parts: Iterable[Any]) -> str:
    """XXH3 of bytes or contiguous buffers, as 16 hex digits: 60 times as fast as SHA-256; tells damage, not malice."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """`checksum` of a whole file, in pieces. Raises OSError."""
    with open(path, "rb") as file:
        return checksum(iter(partial(file.read, 1 << 20), b""))


def make_folder(path: Path) -> None:
    """Make a folder and those above it; each is open to whom the one around it is, whatever the user's umask."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _share(path, path.parent.stat().st_mode & 0o777)


def _share(path: Path | int, mode: int) -> None:
    """Add rights; a file system that has none, or a file of somebody else, keeps what it has."""
    with contextlib.suppress(PermissionError, NotImplementedError):
        before = os.stat(path).st_mode & 0o777
        if before | mode != before:
            os.chmod(path, before | mode)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, waiting for it; it goes with the lock, and a killed holder's is free at once.

    Yields False on a mount without file locks: then nothing is held, and nobody waits. A lock file that another user's
    killed process left is taken over. Raises OSError where no file can be written there.
    """
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            handle = os.open(path, os.O_RDONLY)  # another user's: it can be locked for reading just as well
        locked = True
        try:
            _share(handle, 0o666)  # whoever comes next may be somebody else
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            locked = False
        with contextlib.suppress(FileNotFoundError):
            if not locked or os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # it went while we waited: ask again
    try:
        yield locked
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically; Path becomes str, numpy scalars and arrays become numbers and lists."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


RESERVE_BYTES = 32768


def reserve(path: str | Path) -> None:
    """Keep room beside `path` for its last writing, `write_reserved`; a disk that has none left is no error here."""
    with contextlib.suppress(OSError):
        _reserve(path).write_bytes(os.urandom(RESERVE_BYTES))  # not zeros: some file systems store none of those


def write_reserved(path: str | Path, value: Any) -> None:
    """Write as `write_json` does, in the room that `reserve` kept: how something ended is known of a full disk too."""
    _reserve(path).unlink(missing_ok=True)
    write_json(path, value)


def _reserve(path: str | Path) -> Path:
    return Path(path).with_name(f".{Path(path).name}.reserve")


def append_jsonl(path: str | Path, value: dict[str, Any]) -> None:
    """Append one JSON object as one line, in a single write: readers never see half a line of ours.

    Raises OSError, also where the disk took only a part.
    """
    path = Path(path)
    make_folder(path.parent)
    line = (json.dumps(value, ensure_ascii=False, default=_plain) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if not os.fstat(handle).st_size:
            _share(path, path.parent.stat().st_mode & 0o444)
        if os.write(handle, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises UserError where it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); remove or restore it.") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read the whole lines of a JSON-lines file; a missing file is empty, a last line still being written left out."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
