"""The rest of a lab's rig on loopback: camera hosts (ZMQ PUSH), the sensor's host (UDP), and a robot.yaml for all."""

import contextlib
import io
import json
import socket
import struct
import threading
import time

import numpy as np
import yaml
import zmq
from PIL import Image

VIEWS = {"View1_left": "ZED_41182735_left", "View5": "OAK"}


def jpeg(rgb: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "JPEG", quality=75)
    return stream.getvalue()


class Sender(contextlib.AbstractContextManager):
    """A thread that calls `send` at a rate; `stop` it as a host that dies."""

    def __init__(self, hz: float, send):
        self._hz, self._send, self.runs = hz, send, True
        self._thread = threading.Thread(target=self._go, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.runs = False
        self._thread.join()

    def __exit__(self, *_):
        self.stop()

    def _go(self) -> None:
        due = time.monotonic()
        while self.runs:
            self._send()
            due += 1 / self._hz
            time.sleep(max(0.0, due - time.monotonic()))


class CameraHost(Sender):
    """Pushes noisy pictures of every view; `freeze`: the same one again with new stamps."""

    def __init__(self, port: int, hz: float = 10.0, size=(36, 64), cameras=(), clock_s=0.0, pictures=()):
        self._socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(20)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        noise = np.random.default_rng(0)
        drawn = pictures or [noise.integers(0, 255, (*size, 3), np.uint8) for _ in range(7)]
        self._pictures = [jpeg(picture) for picture in drawn]
        self.freeze, self.clock_s, self.cameras, self._count = False, clock_s, list(cameras or VIEWS.values()), 0
        super().__init__(hz, self._push)

    def _push(self) -> None:
        self._count += not self.freeze
        picture = self._pictures[self._count % len(self._pictures)]
        for name in self.cameras:
            self.say({"camera": name, "timestamp": time.time() + self.clock_s, "size": len(picture)}, picture)

    def say(self, header, picture: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart([json.dumps(header).encode(), picture], zmq.NOBLOCK)

    def __exit__(self, *_):
        super().__exit__()
        self._socket.close()


BATCH = 15  # samples that one datagram holds


class SensorHost(Sender):
    """Sends the samples since the last time in batches, or each bare; their clock is `clock_s` ahead of ours. A sensor
    samples also while this machine is too busy to send."""

    def __init__(self, port: int, bare: bool = False, clock_s: float = 0.0):
        self._port, self.bare, self.clock_s, self.freeze = port, bare, clock_s, False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._noise, self._newest = np.random.default_rng(0), time.time()
        self.force_mN, self.sent = 10.0, 0
        super().__init__(50, self._send_new)

    def _send_new(self) -> None:
        times = np.arange(self._newest + 1 / 650, time.time(), 1 / 650)
        for batch in (times[first : first + BATCH] for first in range(0, len(times), BATCH)):
            self._newest = batch[-1]
            records = [self.record(t_s + self.clock_s, time.time() + self.clock_s) for t_s in batch]
            self.sent += len(records)
            for datagram in records if self.bare else [struct.pack("<I", len(records)) + b"".join(records)]:
                self.send(datagram)
            if len(times) > BATCH:
                time.sleep(0.001)  # the receiver's buffer holds few

    def record(self, sample_s: float, sent_s: float) -> bytes:
        aline = np.zeros(1025) if self.freeze else self._noise.normal(0, 1, 1025)
        force = self.force_mN if self.freeze else self.force_mN + self._noise.normal(0, 0.1)
        return struct.pack("<ddf1025f", sample_s, sent_s, force, *aline)

    def send(self, datagram: bytes) -> None:
        self._socket.sendto(datagram, ("127.0.0.1", self._port))


def free_port(kind=socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def mapping(arm, **changes) -> dict:
    """What a robot.yaml for this arm and the doubles above holds."""
    x, y, z = arm.place
    box = [[float(v) - 40, float(v) + 40] for v in (x, y, z)]
    return {
        "instruction": "insert",
        "arm": {"address": arm.address, "trf": arm.trf},
        "cameras": {view: {"source": "zmq"} for view in VIEWS},
        "zmq_port": free_port(),
        "sensor": {"port": free_port(socket.SOCK_DGRAM), "host": "127.0.0.1"},
        "limits": {"workspace_mm": box, "speed_mm_s": 5, "turn_deg_s": 30, "force_mN": 100},
    } | changes


def write(path, content: dict):
    path.write_text(yaml.safe_dump(content))
    return path
