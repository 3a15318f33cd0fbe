"""The closed loop through the whole wire: the simulated rig's pictures, sensor and tissue stand behind the sockets of a
fake arm, of camera hosts and of the sensor's host; the runner drives it through the real client, and it is judged as in
evaluation. The policy is the rig's own demonstrator: what is in question is the wire."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import wire
from needle_rig import NeedleInsertion, RigError
from needle_rig.demonstrator import demonstrator_action
from vla_lib.core.files import read_json
from vla_lib.episodes.episode import Episode
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.recording import Recording
from vla_lib.robots.settings import RobotSettings
from vla_lib.runtime.clock import RealClock
from vla_lib.runtime.runner import Runner, RunnerSettings
from vla_lib.runtime.vlm_worker import LiveVlm

VIEWS = ("View1_left", "View5")
SEED = 163  # a target near the start: seconds


class Demonstrator:
    """An Expert that reads the rig's truth."""

    sensor_window = 0

    def __init__(self, rig):
        self.rig = rig

    def __call__(self, features, age_s, state, window):
        action = demonstrator_action(self.rig)
        action[:6] *= self.rig.action_hz / 10.0  # it is of one period of the rig's
        return np.tile(action, (8, 1))


def tokens(pictures, instruction):
    return np.zeros((1, 2), np.float32), np.ones(1, bool)


class LoopThread:
    """`LoopProcess` in a thread, where the demonstrator sees the rig: the same robot, runner and recording."""

    def __init__(self, rig, given):
        self.runner, self._rig, self._given, self._found = None, rig, given, []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    @property
    def running(self):
        return self._thread.is_alive()

    def poll(self):
        return []

    def stop(self):
        self.runner.request_stop()

    def result(self):
        (log,) = self._found
        return {"log": log}

    def close(self):
        self._thread.join()

    def _work(self):
        settings = RobotSettings.load(self._given.robot)
        with LabRobot(settings) as robot, contextlib.closing(LiveVlm(tokens, ThreadPoolExecutor(1))) as vlm:
            robot.wait_ready()
            with Recording(self._given.root, robot, {"kind": "task"}) as recording:
                how = RunnerSettings(10.0, 3, 1, VIEWS)
                given = (robot, Demonstrator(self._rig), vlm, RealClock(), how, settings.safety(), recording.watch)
                self.runner = Runner(*given)
                robot.begin(0.1)
                log = self.runner.run(25.0)
                recording.close(log)
                self._found.append(log)


def test_the_needle_goes_in_through_the_whole_wire(tmp_path, monkeypatch):
    try:
        rig = NeedleInsertion(
            views=VIEWS, picture_width=64, picture_height=36, action_hz=wire.BATCH_HZ, max_time_s=60.0
        )
    except RigError as error:
        pytest.skip(str(error))
    given = SimpleNamespace(robot=tmp_path / "robot.yaml", root=tmp_path / "rollouts")
    (tmp_path / "policy.pt").touch()
    how = RolloutSettings(tmp_path / "policy.pt", instruction="insert", max_time_s=25.0)
    monkeypatch.setattr(wire, "LoopProcess", lambda work, given, *_: LoopThread(rig, given))
    with contextlib.closing(rig):
        row = wire.through_the_wire(given, rig, how, SEED)
    assert row["success"] and row["runner"]["ended"] == "operator", (row["reason"], row["events"])
    assert abs(row["depth_error_mm"]) < 0.3 and row["lateral_mm"] < 1.5 and 1.5 < row["time_s"] < 25.0
    (folder,) = given.root.iterdir()
    episode = Episode.open(folder)  # and it is data for the next training
    assert set(episode.pictures) == set(VIEWS) and len(episode.sensor.t_s) > 650
    assert read_json(folder / "rollout.json")["ended"] == "operator"
    # the rig's needle is where the arm says: as in recordings, the state lags behind what was ordered
    assert np.abs(np.ptp(episode.robot.pose[:, 2]) - np.ptp(rig.path()["position_mm"][:, 2])) < 0.2


def test_both_judgements_are_counted_side_by_side(tmp_path, capsys):
    row = dict.fromkeys(wire.COLUMNS, 0.5) | {"path": [0] * 9, "runner": {}}
    wired = [row | {"seed": seed, "success": seed != 2, "reason": "too deep" * (seed == 2)} for seed in (1, 2, 3)]
    plain = [one | {"success": one["seed"] != 3} for one in wired]
    (tmp_path / "policy.pt").touch()
    settings = wire.WireSettings(tmp_path / "policy.pt", output=tmp_path / "both.json")
    wire.report(settings, wired, plain)
    said = capsys.readouterr().out
    assert "success: 2 of 3 through the wire, 2 as evaluated; the same judgement on 1 of 3" in said
    assert "too deep" in said and "path" not in read_json(settings.output)["wire"][0]
