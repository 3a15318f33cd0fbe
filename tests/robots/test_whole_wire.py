"""The closed loop through the whole wire: the simulated rig's pictures, sensor and tissue stand behind the sockets of a
fake arm, of camera hosts and of the sensor's host; the runner drives it through the real client, and it is judged as in
evaluation. The policy is the rig's own demonstrator: what is in question is the wire."""

import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zmq
from fake_arm import FakeArm
from fake_rig import VIEWS, jpeg, mapping
from scipy.spatial.transform import Rotation

from needle_rig import NeedleInsertion, RigError
from needle_rig.demonstrator import demonstrator_action
from needle_rig.world import WORKSPACE_MM
from vla_lib.core.files import read_json
from vla_lib.episodes.episode import Episode
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.recording import Recording
from vla_lib.robots.settings import RobotSettings
from vla_lib.runtime.clock import RealClock
from vla_lib.runtime.runner import Runner, RunnerSettings
from vla_lib.runtime.vlm_worker import LiveVlm

TOOL_MM = 40.0  # of the rig
SEED = 163  # a target near the start: seconds


class RigBehindSockets:
    """Steps the rig each 100 ms by what the fake arm moved, and sends what it sees as its hosts would."""

    def __init__(self, rig, arm, first, camera_port, sensor_port):
        self.rig, self.arm, self.info, self.done = rig, arm, {}, False
        self._sent: dict[str, float] = {}
        self._push = zmq.Context.instance().socket(zmq.PUSH)
        self._push.setsockopt(zmq.LINGER, 0)
        self._push.connect(f"tcp://127.0.0.1:{camera_port}")
        self._udp, self._to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), ("127.0.0.1", sensor_port)
        self._zero_s = time.time() - float(first["timestamp"])  # of the rig's clock: its samples come evenly
        self._send(first)

    def go(self, while_) -> None:
        """To the rollout's end, in the thread that made the rig: its drawing context belongs to that one."""
        due = time.monotonic()
        while while_() and not self.done:
            due += 0.1
            time.sleep(max(0.0, due - time.monotonic()))
            with self.arm._lock:
                self.arm._advance()
                place, turn = self.arm.place.copy(), self.arm.turn.copy()
            command = self.rig.arm.command
            turned = Rotation.from_matrix(turn) * Rotation.from_rotvec(command[3:], degrees=True).inv()
            action = np.concatenate([place - command[:3], turned.as_rotvec(degrees=True)])
            seen, _, terminated, truncated, self.info = self.rig.step(action)
            self.done = terminated or truncated
            self._send(seen)

    def over(self) -> str:
        return "success" if self.done and self.info["success"] else self.info["reason"] if self.done else ""

    def _send(self, seen) -> None:
        now = time.time()
        for view, picture in seen["pictures"].items():
            if (stamp := float(seen["picture_timestamps"][view])) > self._sent.get(view, 0.0):
                self._sent[view], packed = stamp, jpeg(picture)
                told = {"camera": VIEWS[view], "timestamp": self._zero_s + stamp, "size": len(packed)}
                self._push.send_multipart([json.dumps(told).encode(), packed])
        new, count = seen["sensor"][-self.rig.ticks :].astype("<f4"), self.rig.ticks
        times = self._zero_s + seen["sensor_timestamps"][-count:]
        records = [struct.pack("<dd", times[k], now) + new[k].tobytes() for k in range(count)]
        for first in range(0, count, 13):
            batch = records[first : first + 13]
            self._udp.sendto(struct.pack("<I", len(batch)) + b"".join(batch), self._to)

    def close(self) -> None:
        self._push.close()


class Demonstrator:
    """An Expert that reads the rig's truth."""

    sensor_window = 0

    def __init__(self, rig):
        self.rig = rig

    def __call__(self, features, age_s, state, window):
        return np.tile(demonstrator_action(self.rig), (8, 1))


def tokens(pictures, instruction):
    return np.zeros((1, 2), np.float32), np.ones(1, bool)


def test_the_needle_goes_in_through_the_whole_wire(tmp_path):
    try:
        rig = NeedleInsertion(views=tuple(VIEWS), picture_width=64, picture_height=36, max_time_s=25.0)
    except RigError as error:
        pytest.skip(str(error))
    first, _ = rig.reset(seed=SEED)
    with FakeArm(first["state"][:6], TOOL_MM, up=True) as arm:
        np.testing.assert_allclose(arm.place, rig.arm.command[:3], atol=1e-3)  # joints and tool give the rig's pose
        content = mapping(arm)
        content["limits"] = {"workspace_mm": [list(side) for side in WORKSPACE_MM], "force_mN": 145.0}
        content["limits"] |= {"sensor_age_s": 1.0, "picture_age_s": 2.0, "hold_s": 2.0}
        settings = RobotSettings.of_mapping(content)
        vlm = LiveVlm(tokens, ThreadPoolExecutor(1))
        with LabRobot(settings) as robot:
            wire = RigBehindSockets(rig, arm, first, settings.zmq_port, settings.sensor.port)
            try:
                with Recording(tmp_path / "rollouts", robot, {"kind": "task"}) as recording:
                    how = RunnerSettings(10.0, 3, 1, tuple(VIEWS))
                    given = (robot, Demonstrator(rig), vlm, RealClock(), how, settings.safety(), recording.watch)
                    robot.begin(0.1)
                    found = []
                    thread = threading.Thread(target=lambda: found.append(Runner(*given).run(25.0, wire.over)))
                    thread.start()
                    wire.go(thread.is_alive)
                    thread.join()
                    (log,) = found
                    recording.close(log)
            finally:
                wire.close()
                vlm.close()
                rig.close()
    assert log.ended == "success" and not log.stopped, (log.ended, log.events)
    assert wire.info["success"] and abs(wire.info["depth_error_mm"]) < 0.3 and wire.info["lateral_mm"] < 1.5
    episode = Episode.open(recording.folder)  # and it is data for the next training
    assert set(episode.pictures) == set(VIEWS) and len(episode.sensor.t_s) > 650
    assert read_json(recording.folder / "rollout.json")["ended"] == "success"
