"""Cameras, sensor and state stream over real sockets on loopback; clocks of other hosts."""

import struct
import sys
import time
import types

import numpy as np
import pytest
import zmq
from fake_rig import CameraHost, SensorHost, free_port

from vla_lib.core.errors import UserError
from vla_lib.robots.arm import StateStream
from vla_lib.robots.cameras import OpenCvCamera, decode, open_cameras, zmq_name
from vla_lib.robots.settings import CameraSettings
from vla_lib.robots.streams import Frame, HostClock, Samples, SensorStream, Tap

RED_LEFT = np.zeros((48, 64, 3), np.uint8)
RED_LEFT[:, :32, 0], RED_LEFT[:, 32:, 2] = 220, 220


def until(what):
    deadline = time.monotonic() + 10
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def assert_red_left(picture):
    left, right = picture[:, 4:28].mean(axis=(0, 1)), picture[:, 36:60].mean(axis=(0, 1))
    assert left.argmax() == 0 and right.argmax() == 2


@pytest.mark.parametrize("bare", (True, False))
def test_both_forms_of_datagrams_are_read(bare):
    items, tap = [], Tap()
    tap.listen(items.append)
    stream = SensorStream("127.0.0.1", 0, tap)
    with SensorHost(stream.port, bare, clock_s=2.0) as host:
        until(lambda: stream.meter.count > 200)
        host.stop()
        time.sleep(0.05)
        host.send(b"x" * 100)
        host.send(struct.pack("<I", 3) + bytes(4120 * 2))
        host.send(struct.pack("<d", np.nan) * 2 + bytes(4104))
        until(lambda: sum(stream.meter.refused.values()) == 3)
        samples, times = stream.take()
    assert stream.meter.count == host.sent == len(times) == sum(len(item.t_s) for item in items)
    assert samples.shape == (len(times), 1026) and abs(samples[:, 0].mean() - 10.0) < 0.1
    assert (np.diff(times) > 0).all() and abs(times[-1] - time.time()) < 5  # not two seconds in the future
    assert stream.meter.clock.offset_ms == pytest.approx(-2000, abs=200)
    refused = stream.meter.report()["refused"]
    assert (
        "1 datagrams of 100 bytes" in refused and "1 datagrams of 8244 bytes" in refused and "without a time" in refused
    )
    assert isinstance(items[0], Samples) and not len(stream.take()[1])
    stream.close()


def test_a_port_in_use_is_said():
    stream = SensorStream("127.0.0.1", 0, Tap())
    with pytest.raises(UserError, match=f"port {stream.port} cannot be bound"):
        SensorStream("127.0.0.1", stream.port, Tap())
    stream.close()


def test_pictures_come_as_rgb_by_the_names_of_the_lab():
    items, tap, port = [], Tap(), free_port()
    tap.listen(items.append)
    views = {"View1_left": CameraSettings("zmq"), "View5": CameraSettings("zmq", name="oak_CAM_A")}
    (source,) = open_cameras(views, port, tap)
    names = ["ZED_41182735_left", "oak_CAM_A", "ZED_41182735_right"]
    with CameraHost(port, cameras=names, pictures=[RED_LEFT]) as host:
        until(lambda: len(source.newest()) == 2)
        host.stop()
        host.say({"camera": "OTHER", "timestamp": time.time()}, b"")
        host.say({"camera": "oak_CAM_A"}, b"")
        host.say({"camera": "oak_CAM_A", "timestamp": time.time(), "size": 7}, b"short")
        host.say({"camera": "oak_CAM_A", "timestamp": time.time()}, b"no picture")
        first, oak = source.meters["View1_left"].refused, source.meters["View5"].refused
        until(lambda: len(first) == 2 and len(oak) == 2)
    for picture, t_s in source.newest().values():
        assert picture.shape == (48, 64, 3) and abs(t_s - time.time()) < 5
        assert_red_left(picture)
    assert dict(first) == {"pictures of other": 1, "messages of another form": 1}
    assert dict(oak) == {"cut pictures": 1, "broken pictures": 1}
    assert {item.view for item in items if isinstance(item, Frame)} == {"View1_left", "View5"}
    source.close()


def test_a_video_file_runs_through_opencv_as_rgb(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "seen.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30.0, (64, 48))
    for _ in range(6):
        writer.write(RED_LEFT[..., ::-1])  # OpenCV's order
    writer.release()
    source = OpenCvCamera("View5", CameraSettings("opencv", str(path)), Tap())
    until(lambda: source.meters["View5"].failure)
    assert source.meters["View5"].failure == "the video is over" and source.meters["View5"].count == 6
    assert_red_left(source.newest()["View5"][0])
    source.close()
    with pytest.raises(UserError, match="cannot be opened; correct cameras.View5.name"):
        OpenCvCamera("View5", CameraSettings("opencv", str(tmp_path / "none.avi")), Tap())


def test_a_depthai_camera_is_asked_as_its_documentation_says(monkeypatch):
    """No device here: a stand-in of the calls that depthai 3 documents."""
    from datetime import timedelta

    class Frames:
        def getTimestamp(self):
            return timedelta(seconds=99.9)

        def getCvFrame(self):
            return RED_LEFT[..., ::-1]

        def tryGet(self):
            return self

    class Pipeline:
        def __init__(self, device):
            self.running = True

        def create(self, *_):
            return self

        build = create

        def start(self):
            pass

        def isRunning(self):
            return self.running

        def stop(self):
            self.running = False

        def requestOutput(self, size, type, fps):
            assert (size, type, fps) == ((64, 48), "BGR888p", 5.0)
            return self

        def createOutputQueue(self, maxSize, blocking):
            assert (maxSize, blocking) == (1, False)
            return Frames()

    stand_in = types.SimpleNamespace(
        Pipeline=Pipeline,
        Device=lambda *info: info,
        DeviceInfo=str,
        node=types.SimpleNamespace(Camera="Camera"),
        CameraBoardSocket=types.SimpleNamespace(CAM_A="A"),
        ImgFrame=types.SimpleNamespace(Type=types.SimpleNamespace(BGR888p="BGR888p")),
        Clock=types.SimpleNamespace(now=lambda: timedelta(seconds=100.0)),
    )
    monkeypatch.setitem(sys.modules, "depthai", stand_in)
    (source,) = open_cameras({"View5": CameraSettings("depthai", "1234", 64, 48)}, 0, Tap())
    picture, t_s = until(source.newest)["View5"]
    assert_red_left(picture)
    assert -5 < t_s + 0.1 - time.time() <= 0.001
    source.close()


def test_what_is_not_installed_or_not_named_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "depthai", None)
    with pytest.raises(UserError, match=r"depthai is not installed.*\.\[robot\]"):
        open_cameras({"View5": CameraSettings("depthai")}, 0, Tap())
    with pytest.raises(UserError, match="cameras.Side.name is missing"):
        zmq_name("Side", CameraSettings("zmq"))
    assert zmq_name("View3_left", CameraSettings("zmq")) == "zed_44377151_left"
    with pytest.raises(OSError):
        decode(b"no picture")


def test_the_state_stream_of_another_host():
    socket = zmq.Context.instance().socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    stream = StateStream(f"127.0.0.1:{port}", Tap())
    state = np.arange(12.0)

    def published():
        now = time.time() + 3.0  # that host's clock
        socket.send_multipart([b"robot_state", struct.pack("<ddf12f", now - 0.002, now, 0.0, *state)])
        socket.send_multipart([b"robot_state", b"short"])
        socket.send_multipart([b"episode_end", b"finished"])
        return stream.newest() and stream.episodes_ended

    until(published)
    values, t_s = stream.newest()
    np.testing.assert_array_equal(values, state)
    assert -5 < t_s - time.time() < 0.01 and stream.meter.refused["messages of another form"]
    with pytest.raises(UserError, match="watched, not driven"):
        stream.begin(0.1)
    stream.close()
    socket.close()


def test_the_offset_of_a_clock_is_the_least_way_and_follows_drift():
    clock = HostClock(window_s=5.0)
    way = np.random.default_rng(0).exponential(0.01, 2000)
    for k in range(2000):
        sent = 100.0 + k / 100
        clock.arrived(sent - 40.0 * (1 + 1e-5 * k / 100) + 0.002 + way[k], sent)
    assert clock.offset_s == pytest.approx(-40.0 * (1 + 1e-5 * 20) + 0.002, abs=3e-3) and clock.jumps == 0


def test_a_clock_that_jumps_ahead_is_not_followed_before_it_stays_there():
    clock = HostClock(window_s=2.0)
    for k in range(300):
        clock.arrived(k / 100, k / 100)
    for k in range(300, 320):
        clock.arrived(k / 100, k / 100 + 1.5)
    assert clock.offset_s == 0.0 and clock.jumps == 20
    assert clock.local(3.2 + 1.5) - 3.2 > 1.4  # its stamps lie ahead, for all to see
    for k in range(320, 700):
        clock.arrived(k / 100, k / 100 + 1.5)
    assert clock.offset_s == pytest.approx(-1.5)


def test_a_backlog_at_the_start_is_no_jump():
    clock = HostClock()
    for k in range(100):
        clock.arrived(k / 100 + max(0.0, 0.4 - k / 100), k / 100)
    assert clock.jumps == 0 and clock.offset_s == pytest.approx(0.0, abs=0.05)
