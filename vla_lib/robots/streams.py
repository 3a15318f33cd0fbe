"""Streams of the rig's hosts: clocks, what is told of each, what a recorder is given, a thread each; the sensor's.

Offset of a sender = least (received - sent), that is its clock's offset plus the least transport, kept over some
seconds. A stamp moved by it never lies after its arrival; one from a clock that jumps ahead does, and is left there.
"""

import contextlib
import importlib
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from vla_lib.core.errors import UserError, in_words

T = TypeVar("T", float, np.ndarray)

AHEAD_S = 0.05  # as SafetyLimits.ahead_s: more than this is a jump, not a quicker message
WINDOW_S = 5.0
SETTLE_S = 1.0  # in the first second a backlog may hide how quick messages can be
SLEW = 0.05  # seconds a second: stamps moved by a falling offset still ascend, at 650 Hz in batches of 15, too

RECORD = np.dtype([("sample_s", "<f8"), ("sent_s", "<f8"), ("sample", "<f4", 1026)])
KEPT = 1400  # samples at most that wait to be read: two seconds


class HostClock:
    """The offset of one sender's clock to this host's. `arrived` for each message, `local` for its stamps."""

    def __init__(self, window_s: float = WINDOW_S, ahead_s: float = AHEAD_S):
        self.window_s, self.ahead_s = window_s, ahead_s
        self.jumps = 0  # messages that came from the future
        self._parts: deque[list[float]] = deque()  # [begin, least difference] of tenths of the window
        self._first_s = self._good_s = self._sent_s = 0.0
        self.offset_s: float | None = None
        """What stamps are moved by."""

    def arrived(self, received_s: float, sent_s: float) -> None:
        """Take a message's times: this host's and the sender's."""
        difference = received_s - sent_s
        if self.offset_s is None or received_s - self._good_s > self.window_s:  # new, or the clock was set for good
            self._parts.clear()
            self._first_s = received_s
        elif difference < self.offset_s - self.ahead_s and received_s - self._first_s > SETTLE_S:
            self.jumps += 1
            return
        self._good_s = received_s
        if not self._parts or received_s - self._parts[-1][0] > self.window_s / 10:
            self._parts.append([received_s, difference])
        self._parts[-1][1] = min(self._parts[-1][1], difference)
        while received_s - self._parts[0][0] > self.window_s:
            self._parts.popleft()
        least = min(part[1] for part in self._parts)
        if self.offset_s is None or self.offset_s - least > self.ahead_s or least > self.offset_s:
            self.offset_s = least
        else:
            self.offset_s = max(least, self.offset_s - SLEW * max(0.0, sent_s - self._sent_s))
        self._sent_s = sent_s

    @property
    def offset_ms(self) -> float | None:
        """The offset as people read it; None before the first message, and for a clock that counts from a boot."""
        known = self.offset_s is not None and abs(self.offset_s) < 1e8
        return round(1000 * self.offset_s, 1) if known and self.offset_s is not None else None

    def local(self, stamp_s: T) -> T:
        """Stamps of the sender, one or an array, on this host's clock."""
        return stamp_s + (self.offset_s or 0.0)


@dataclass
class Meter:
    """What a stream did. `refused`: messages that were not understood, by what was wrong with them."""

    name: str
    clock: HostClock = field(default_factory=HostClock)
    refused: Counter[str] = field(default_factory=Counter)
    newest_s: float | None = None  # stamp of the newest item, this host's clock
    count: int = 0
    failure: str = ""  # why the stream ended
    _arrivals: deque[tuple[float, int]] = field(default_factory=deque)

    def took(self, received_s: float, stamp_s: float, items: int = 1) -> None:
        """Note that items came, the newest of this stamp."""
        self.count += items
        self.newest_s = stamp_s
        self._arrivals.append((received_s, items))
        while received_s - self._arrivals[0][0] > 2.0:
            self._arrivals.popleft()

    def report(self) -> dict[str, float | int | str | None]:
        """Rate (over 2 s), age and offset now, as a table shows them."""
        now, arrivals = time.time(), list(self._arrivals)
        recent = [items for at, items in arrivals if now - at <= 2.0]
        span_s = min(2.0, max(0.5, now - arrivals[0][0])) if arrivals else 0.0  # at the start it is a guess
        return {
            "stream": self.name,
            "rate_hz": round(sum(recent) / span_s, 1) if span_s > 0 else 0.0,
            "age_ms": None if self.newest_s is None else round(1000 * (now - self.newest_s), 1),
            "clock_offset_ms": self.clock.offset_ms,
            "received": self.count,
            "refused": ", ".join(f"{count} {what}" for what, count in self.refused.items()),
            "fault": self.failure or (f"{self.clock.jumps} stamped ahead" if self.clock.jumps else ""),
        }


@dataclass(frozen=True)
class Frame:
    """One picture of a view: JPEG as the camera's host made it, or (H, W, 3) RGB that is still to be packed."""

    view: str
    t_s: float  # this host's clock
    jpeg: bytes | None
    rgb: np.ndarray | None


@dataclass(frozen=True)
class Samples:
    """Samples of the sensor: times (n,) on this host's clock, send times (n,) on the sensor's, values (n, 1026)."""

    t_s: np.ndarray
    sent_s: np.ndarray
    samples: np.ndarray


@dataclass(frozen=True)
class Row:
    """One row of the robot's log: received and origin on this host's clock, sent as stamped; (6,) deg, (6,) mm, deg."""

    received_s: float
    origin_s: float
    sent_s: float
    joints: np.ndarray
    pose: np.ndarray


class Tap:
    """Where streams give their items; nothing happens with them until somebody `listen`s."""

    def __init__(self) -> None:
        self._listener: Callable[[Frame | Samples | Row], None] | None = None

    def listen(self, listener: Callable[[Frame | Samples | Row], None] | None) -> None:
        """From now on items go to `listener`, which must be quick; None: to nobody."""
        self._listener = listener

    def give(self, item: Frame | Samples | Row) -> None:
        """Hand over an item."""
        if listener := self._listener:
            listener(item)


class Stream:
    """Base of what receives in a thread of its own, until `close`: `_run`, and at its end `_release`.

    `meters`: of each stream in it, by name; an error that ends the thread is their failure.
    """

    _release: Callable[[], Any]

    def __init__(self, names: Iterable[str], tap: Tap):
        self.meters = {name: Meter(name) for name in names}
        self.meter = next(iter(self.meters.values()))
        self._tap, self._lock, self._open = tap, threading.Lock(), True
        self._thread = threading.Thread(target=self._guarded, name="-".join(self.meters), daemon=True)

    def close(self) -> None:
        """End the thread."""
        self._open = False
        if self._thread.ident:
            self._thread.join(timeout=2.0)

    def _guarded(self) -> None:
        try:
            try:
                self._run()
            finally:
                self._release()
        except Exception as error:  # a camera that fails is a stale view, with its reason in the table
            for meter in self.meters.values():
                meter.failure = in_words(error)

    def _run(self) -> None:
        raise NotImplementedError


def parse_datagram(datagram: bytes) -> np.ndarray | None:
    """(n,) RECORDs of a datagram; None where it has neither form."""
    size = RECORD.itemsize
    if len(datagram) == size:
        return np.frombuffer(datagram, RECORD)
    count = int.from_bytes(datagram[:4], "little")
    return np.frombuffer(datagram, RECORD, offset=4) if count and len(datagram) == 4 + size * count else None


class SensorStream(Stream):
    """The sensor's UDP stream, 650 to 700 samples a second; `take` hands over what came since the last call.

    A record is `<ddf1025f`, 4,120 bytes: sample time, send time (sensor host), force (mN), A-line. A datagram is one
    bare record, or `<I` n and n of them. One that is neither is counted by its length, never dropped in silence.
    """

    def __init__(self, host: str, port: int, tap: Tap):
        super().__init__(["sensor"], tap)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.settimeout(0.2)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise UserError(
                f"The sensor's port {port} cannot be bound ({error}); end the program that holds it, or correct "
                "sensor.port."
            ) from None
        self.port: int = self._socket.getsockname()[1]
        self._release = self._socket.close
        self._thread.start()

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples (n, 1026) float32, force first, and their times (n,) on this host's clock, since the last call."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if not waiting:
            return np.empty((0, 1026), np.float32), np.empty(0)
        samples, times = (np.concatenate(part)[-KEPT:] for part in zip(*waiting, strict=True))
        return samples, times

    def _run(self) -> None:
        while self._open:
            with contextlib.suppress(TimeoutError):
                self._understand(self._socket.recv(1 << 16), time.time())

    def _understand(self, datagram: bytes, received_s: float) -> None:
        records = parse_datagram(datagram)
        if records is None:
            self.meter.refused[f"datagrams of {len(datagram)} bytes"] += 1
            return
        if not (np.isfinite(records["sent_s"]).all() and np.isfinite(records["sample_s"]).all()):
            self.meter.refused["datagrams without a time"] += 1
            return
        self.meter.clock.arrived(received_s, float(records["sent_s"].max()))
        times = self.meter.clock.local(records["sample_s"])
        samples = records["sample"].astype(np.float32)
        self.meter.took(received_s, float(times[-1]), len(times))
        with self._lock:
            self._waiting.append((samples, times))
            if len(self._waiting) > KEPT:
                del self._waiting[0]
        self._tap.give(Samples(times, records["sent_s"], samples))


def needed(module: str, package: str) -> Any:
    """The module. Raises UserError with the remedy where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{package} is not installed; a robot needs it: pip install --editable '.[robot]'.") from None
