"""The sensor's UDP stream: force and A-line, 650 to 700 samples a second, in both forms of its datagrams.

A record is `<ddf1025f`, 4,120 bytes: sample time, send time (sensor host), force (mN), A-line. A datagram is one bare
record, or `<I` n and n of them. One that is neither is counted by its length, never dropped in silence.
"""

import contextlib
import socket
import time

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.robots.streams import Samples, Stream, Tap

RECORD = np.dtype([("sample_s", "<f8"), ("sent_s", "<f8"), ("sample", "<f4", 1026)])
KEPT = 1400  # samples at most that wait to be read: two seconds


def parse(datagram: bytes) -> np.ndarray | None:
    """(n,) RECORDs of a datagram; None where it has neither form."""
    size = RECORD.itemsize
    if len(datagram) == size:
        return np.frombuffer(datagram, RECORD)
    count = int.from_bytes(datagram[:4], "little")
    return np.frombuffer(datagram, RECORD, offset=4) if count and len(datagram) == 4 + size * count else None


class SensorStream(Stream):
    """Receives in a thread; `take` hands over what came since the last call."""

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
        records = parse(datagram)
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
