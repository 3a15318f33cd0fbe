"""Who works in a folder: one process at a time, also from several machines that share it, and without file locks.

The owner's file `.<role>.owner` is made as a file that must not exist yet, which every file system knows; a thread
touches it now and then. On the owner's machine its process says whether it lives; elsewhere the file's age does, by the
file server's clock.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from vla_lib.core.errors import UserError

HEARTBEAT_S = 10.0
STALE_S = 120.0  # longer than a network's file system keeps a time of change to itself
STAGE = "stage"  # the role of whoever writes checkpoints and results


def machine() -> str:
    """Names this machine since it was started, and the process numbers' space (a container has its own)."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def alive(pid: Any, created: Any) -> bool:
    """Whether the process `pid` of this machine runs; numbers are used again, so it is known by when it began, too."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1.0
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return False


def owner_file(folder: Path, role: str = STAGE) -> Path:
    """Where the owner of `folder` in that role is noted."""
    return Path(folder) / f".{role}.owner"


def living(file: Path, probe: Path | None = None) -> str:
    """The living owner that an owner's file names, in words; "" where there is none. `probe`: a path beside it whose
    file is made and removed to ask the server's clock; without, this machine's clock is asked."""
    seen = _read(file)
    with contextlib.suppress(FileNotFoundError):  # released meanwhile
        return "" if seen is None else _who(seen, file, probe)
    return ""


def _who(seen: dict[str, Any], file: Path, probe: Path | None) -> str:
    """As `living`, of a note that was read. Raises FileNotFoundError where it has gone since."""
    if seen.get("machine") == machine():
        return f"process {seen['pid']} of this machine" if alive(seen["pid"], seen["pid_created"]) else ""
    age_s = _now(probe) - file.stat().st_mtime
    who = f"process {seen['pid']} on {seen['host']}" if seen else "a process that has just begun"
    return f"{who}, last heard of {max(age_s, 0.0):.0f} s ago" if age_s < STALE_S else ""


def elsewhere(file: Path) -> bool:
    """Whether an owner's file is there and of another machine."""
    seen = _read(file)
    return seen is not None and seen.get("machine") != machine()


def _read(file: Path) -> dict[str, Any] | None:
    """What the file holds: {} where it is no note (yet), None where there is none."""
    try:
        seen = json.loads(file.read_text())
        return seen if {"machine", "host", "pid", "pid_created", "token"} <= seen.keys() else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        return {}


def _now(probe: Path | None) -> float:
    if probe is not None:
        with contextlib.suppress(OSError):
            probe.touch()
            try:
                return probe.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)
    return time.time()


class Owner:
    """This process as the owner of a folder, from `take` to `release`."""

    def __init__(self, folder: Path, role: str):
        self.file, self._token, self._over = owner_file(folder, role), secrets.token_hex(8), threading.Event()
        self._probe = self.file.with_name(f"{self.file.name}.{self._token}.partial")

    @classmethod
    def take(cls, folder: Path, role: str = STAGE) -> "Owner":
        """Become the owner. Raises UserError where another process is, OSError as the file system does."""
        own = cls(folder, role)
        folder.mkdir(parents=True, exist_ok=True)
        while not own._made():
            if who := living(own.file, own._probe):
                remedy = "wait for it or stop it there, or use another run folder"
                raise UserError(f"{folder} is in use by {who}; {remedy}.")
            own._remove_dead()
        threading.Thread(target=own._beat, daemon=True, name=f"owner of {folder.name}").start()
        return own

    def _made(self) -> bool:
        process = psutil.Process()
        note = {"host": socket.gethostname(), "pid": process.pid, "pid_created": process.create_time()}
        try:
            with open(self.file, "x", encoding="utf-8") as file:
                try:
                    json.dump({**note, "machine": machine(), "token": self._token}, file)
                    file.flush()
                except OSError:
                    self.file.unlink(missing_ok=True)
                    raise
            return True
        except FileExistsError:
            return False

    def _remove_dead(self) -> None:
        """Remove a dead owner's note; one at a time, so that no living one's goes where several find a dead one."""
        busy = self.file.with_name(f"{self.file.name}.partial")
        try:
            busy.touch(exist_ok=False)
        except FileExistsError:
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):
                if time.time() - busy.stat().st_mtime > STALE_S:  # whoever made it died at it
                    busy.unlink()
            return
        try:
            seen = _read(self.file)
            with contextlib.suppress(FileNotFoundError):
                if seen is not None and not _who(seen, self.file, self._probe):
                    self.file.unlink()
        finally:
            busy.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def check(self) -> None:
        """Raises UserError where another process has taken the folder over: this one was stopped for long."""
        seen = _read(self.file)
        if seen is None or seen.get("token", self._token) != self._token:
            who = (living(self.file) if seen else "") or "somebody who removed its owner's note"
            raise UserError(f"{self.file.parent} was taken over by {who}; nothing more is written, this run ends here.")

    def release(self) -> None:
        """Leave the folder to others; one that another has taken over stays theirs."""
        self._over.set()
        with contextlib.suppress(OSError, UserError):
            self.check()
            self.file.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(folder: Path | None, role: str = STAGE) -> Iterator[Owner | None]:
    """Inside, this process owns `folder` (None: none to own); one made for nothing goes again. Raises as `take`."""
    if folder is None:
        yield None
        return
    new = not Path(folder).exists()
    own = Owner.take(Path(folder), role)
    try:
        yield own
    finally:
        own.release()
        if new:
            with contextlib.suppress(OSError):  # there is something in it by now
                Path(folder).rmdir()
