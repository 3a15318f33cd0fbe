"""Cameras: JPEG from the camera hosts over ZMQ, DepthAI devices, and any UVC camera or video file through OpenCV.

Each source runs in a thread of its own and keeps the newest picture of its views as RGB; OpenCV's pictures, which are
BGR, are turned. A picture's time is that right after its grab, on this host's clock.
"""

import contextlib
import io
import json
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.episodes.layouts import SERIALS
from vla_lib.robots.settings import CameraSettings
from vla_lib.robots.streams import Frame, Stream, Tap, needed


class Source(Stream):
    """Base of the sources, which keep the newest picture of each view. Packages and devices are asked for at once."""

    def __init__(self, views: Iterable[str], tap: Tap):
        super().__init__(views, tap)
        self._newest: dict[str, tuple[np.ndarray, float]] = {}

    def newest(self) -> dict[str, tuple[np.ndarray, float]]:
        """View -> ((H, W, 3) uint8 RGB, time on this host's clock) of each view that has a picture."""
        with self._lock:
            return dict(self._newest)

    def _keep(self, view: str, rgb: np.ndarray, t_s: float) -> None:
        with self._lock:
            self._newest[view] = rgb, t_s


class ZmqCameras(Source):
    """The camera hosts' PUSH streams: this host binds PULL. `cameras`: name in the messages (lower case) -> view."""

    def __init__(self, port: int, cameras: Mapping[str, str], tap: Tap):
        super().__init__(cameras.values(), tap)
        zmq = needed("zmq", "pyzmq")
        self._cameras, self._again = dict(cameras), zmq.Again
        self._socket = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 20)
        self._socket.setsockopt(zmq.RCVTIMEO, 200)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            if port:
                self._socket.bind(f"tcp://*:{port}")
            self.port = port or int(self._socket.bind_to_random_port("tcp://*"))
        except zmq.ZMQError as error:
            self._socket.close()
            raise UserError(
                f"The cameras' port {port} cannot be bound ({error}); end the program that holds it, or correct "
                "zmq_port."
            ) from None
        self._poll, self._release = zmq.NOBLOCK, self._socket.close
        self._thread.start()

    def _run(self) -> None:
        while self._open:
            newest: dict[str, tuple[bytes, float]] = {}
            with contextlib.suppress(self._again):
                self._understand(self._socket.recv_multipart(), newest)
                while True:  # what waits behind it: only the newest of each view is decoded
                    self._understand(self._socket.recv_multipart(self._poll), newest)
            for view, (jpeg, t_s) in newest.items():
                try:
                    self._keep(view, decode(jpeg), t_s)
                except (OSError, ValueError, SyntaxError):
                    self.meters[view].refused["broken pictures"] += 1

    def _understand(self, frames: list[bytes], newest: dict[str, tuple[bytes, float]]) -> None:
        received_s = time.time()
        try:
            header, jpeg = frames
            told = json.loads(header)
            name, stamp = str(told["camera"]).lower(), float(told["timestamp"])
        except (ValueError, KeyError, TypeError):
            self.meter.refused["messages of another form"] += 1
            return
        view = self._cameras.get(name)
        if view is None:
            if not name.endswith("_right"):  # the right pictures of older hosts are no view of a policy
                self.meter.refused[f"pictures of {name[:40]}"] += 1
            return
        meter = self.meters[view]
        if told.get("size", len(jpeg)) != len(jpeg):
            meter.refused["cut pictures"] += 1
            return
        meter.clock.arrived(received_s, float(told.get("send_time", stamp)))
        t_s = meter.clock.local(stamp)
        meter.took(received_s, t_s)
        newest[view] = jpeg, t_s
        self._tap.give(Frame(view, t_s, jpeg, None))


class OpenCvCamera(Source):
    """A UVC camera (a number, or its device file) or a video file, which runs once at its own rate."""

    def __init__(self, view: str, settings: CameraSettings, tap: Tap):
        super().__init__([view], tap)
        self._cv2, self.view, self.settings = needed("cv2", "opencv-python-headless"), view, settings
        device: Any = int(settings.name) if settings.name.isdigit() else settings.name
        self._capture = self._cv2.VideoCapture(device)
        if not self._capture.isOpened():
            raise UserError(f"The camera of {view}, {settings.name}, cannot be opened; correct cameras.{view}.name.")
        self._release, self._file_hz = self._capture.release, 0.0
        if isinstance(device, str) and not device.startswith("/dev/"):
            self._file_hz = self._capture.get(self._cv2.CAP_PROP_FPS) or settings.hz
        else:
            wanted = (("WIDTH", settings.width), ("HEIGHT", settings.height), ("FPS", settings.hz))
            for what, value in wanted:
                name = f"CAP_PROP_{'' if what == 'FPS' else 'FRAME_'}{what}"
                self._capture.set(getattr(self._cv2, name), value)
        self._thread.start()

    def _run(self) -> None:
        due_s, meter = time.monotonic(), self.meter
        while self._open:
            had, bgr = self._capture.read()
            t_s = time.time()
            if not had:
                meter.failure = "the video is over" if self._file_hz else "the camera gives no picture"
                break
            rgb = np.ascontiguousarray(bgr[..., ::-1])
            meter.took(t_s, t_s)
            self._keep(self.view, rgb, t_s)
            self._tap.give(Frame(self.view, t_s, None, rgb))
            due_s += 1 / (self._file_hz or self.settings.hz)
            if self._file_hz:  # a camera keeps its own rate
                time.sleep(max(0.0, due_s - time.monotonic()))


class DepthAiCamera(Source):
    """A DepthAI 3 device (OAK), by its id or address; empty: the only one. Its clock is synchronised by DepthAI."""

    def __init__(self, view: str, settings: CameraSettings, tap: Tap):
        super().__init__([view], tap)
        self._dai, self.view = needed("depthai", "depthai"), view
        dai = self._dai
        try:
            device = dai.Device(dai.DeviceInfo(settings.name)) if settings.name else dai.Device()
            self._pipeline = dai.Pipeline(device)
            camera = self._pipeline.create(dai.node.Camera).build(dai.CameraBoardSocket.CAM_A)
            size = settings.width, settings.height
            output = camera.requestOutput(size, type=dai.ImgFrame.Type.BGR888p, fps=settings.hz)
            self._queue = output.createOutputQueue(maxSize=1, blocking=False)
            self._pipeline.start()
            self._release = self._pipeline.stop
        except RuntimeError as error:
            raise UserError(f"The DepthAI camera of {view} cannot be opened ({error}); see cameras.{view}.") from None
        self._thread.start()

    def _run(self) -> None:
        while self._open and self._pipeline.isRunning():
            frame = self._queue.tryGet()
            if frame is None:
                time.sleep(0.002)
                continue
            received_s, waited = time.time(), self._dai.Clock.now() - frame.getTimestamp()
            t_s = received_s - max(waited, timedelta(0)).total_seconds()
            rgb = np.ascontiguousarray(frame.getCvFrame()[..., ::-1])
            self.meter.took(received_s, t_s)
            self._keep(self.view, rgb, t_s)
            self._tap.give(Frame(self.view, t_s, None, rgb))


def open_cameras(cameras: Mapping[str, CameraSettings], zmq_port: int, tap: Tap) -> list[Source]:
    """All sources of these views. Raises UserError where a package, a port or a device is missing."""
    sources: list[Source] = []
    try:
        if by_zmq := {zmq_name(view, one): view for view, one in cameras.items() if one.source == "zmq"}:
            sources.append(ZmqCameras(zmq_port, by_zmq, tap))
        kinds = {"opencv": OpenCvCamera, "depthai": DepthAiCamera}
        sources += [kinds[one.source](view, one, tap) for view, one in cameras.items() if one.source in kinds]
    except BaseException:
        for source in sources:
            source.close()
        raise
    return sources


def zmq_name(view: str, settings: CameraSettings) -> str:
    """The camera's name in the messages, in lower case: as given, else by the lab's serials, and `oak` for View5."""
    if settings.name:
        return settings.name.lower()
    serials = {f"View{number}_left": f"zed_{serial}_left" for serial, number in SERIALS.items()}
    if view not in serials and view != "View5":
        raise UserError(f"cameras.{view}.name is missing; give the name that the camera's host sends.")
    return serials.get(view, "oak")


def decode(jpeg: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises OSError, ValueError or SyntaxError where it is no whole picture."""
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.array(picture.convert("RGB"))
