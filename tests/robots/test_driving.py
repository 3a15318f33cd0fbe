"""The real mecademicpy client drives a fake arm over TCP under the runner: motion, faults, stops. Ticks are counted, by
the numbers of their periods; no time is measured against the machine."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from fake_rig import write

from benchmarks.fake_arm import FakeArm, turned
from vla_lib.core.errors import UserError
from vla_lib.runtime.robot_io import DryRunIO

PERIOD_S = 0.1


def at_act(number: int, do):
    """A watch that calls `do` at the given act tick; `.step` is its step."""

    def watch(tick, observation):
        watch.acts += tick.mode == "act"
        if watch.acts == number and watch.step is None:
            watch.step = tick.step
            do()

    watch.acts, watch.step = 0, None
    return watch


@pytest.mark.parametrize(
    "joints, tool_mm, action",
    (
        ((0, 0, 0, 0, 60, 0), 0.0, (0.2, -0.1, -0.2, 0.0, 0.0, 0.0)),
        ((0, 10, -20, 0, 100, 0), 120.0, (0.1, 0.0, -0.1, 0.0, 0.0, 1.0)),  # tool down, turning about base z
    ),
    ids=("slanted", "tool down"),
)
def test_the_arm_moves_as_it_is_told(rig, drive, joints, tool_mm, action):
    with rig(FakeArm(joints, tool_mm), sensor_age_s=1, picture_age_s=2) as it:
        place, turn = it.arm.place.copy(), it.arm.turn.copy()
        if tool_mm:
            assert turn[2, 2] == pytest.approx(-1.0)  # the tool's z axis points down
        log = drive(it, action, watch=at_act(25, lambda: it.runner.request_stop("enough")))
        sent = [t for t in log.ticks if t.mode in ("act", "hold") and t.reason != "missed deadline"]
        assert log.ended == "enough" and sum(tick.mode == "act" for tick in log.ticks) == 25
        # the client sends each motion as a velocity of one period
        moves = [(t_s, text) for t_s, text in it.arm.log if text.startswith("MoveLinVelWrf")]
        told = np.array([text[14:-1].split(",") for _, text in moves], float)
        np.testing.assert_allclose(told * PERIOD_S, [tick.action[:6] for tick in sent], atol=1e-4)
        assert (np.abs(told * PERIOD_S - action) < 1e-4).all(axis=1).sum() == 25
        assert it.arm.timeout_s == pytest.approx(1.5 * PERIOD_S)
        # how long each lasted is known from the arm's own log
        stopped_s = next(t_s for t_s, text in it.arm.log if text == "ClearMotion")
        spans = np.minimum(np.diff([t_s for t_s, _ in moves] + [stopped_s]), it.arm.timeout_s)
        way = (told * spans[:, None]).sum(axis=0)
        np.testing.assert_allclose(it.arm.place - place, way[:3], atol=0.05)
        off = turned(way[3:]).T @ it.arm.turn @ turn.T
        assert np.degrees(np.arccos(np.clip((np.trace(off) - 1) / 2, -1, 1))) < 0.05
        # and the commanded pose of the runner's log is where the arm went, but for what late ticks made longer
        late_mm = np.abs(way - 25 * np.array(action)).max()
        assert np.abs(np.array(log.ticks[-2].commanded[:3]) - it.arm.place).max() < 0.05 + late_mm


def stop_hosts(it):
    it.camera.runs = it.sensor.runs = False


def jump_ahead(it):
    it.sensor.clock_s += 1.5


def go_back(it):
    it.sensor.clock_s -= 0.3


def freeze_sensor(it):
    it.sensor.freeze = True


def lose_view(it):
    it.camera.cameras.pop()


FAULTS = {
    "motion error": (lambda it: it.arm.fail(), "robot failed: RobotFault: the arm is in error", 2),
    "e-stop": (lambda it: it.arm.press_estop(), "robot failed: RobotFault: the arm is not activated", 2),
    "closed socket": (lambda it: it.arm.drop(), "robot failed: RobotFault: the connection to the arm", 2),
    "silent arm": (lambda it: setattr(it.arm, "silent", True), "stale state", 7),
    "standing arm": (lambda it: setattr(it.arm, "stuck", True), "robot does not follow", 12),
    "dead hosts": (stop_hosts, "stale sensor", 6),
    "sensor's clock ahead": (jump_ahead, "sensor stamped ahead", 6),
    "sensor's clock back": (go_back, "stale sensor|sensor out of order", 6),
    "frozen sensor": (freeze_sensor, "frozen sensor", 8),
    "lost view": (lose_view, "stale pictures", 8),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_in_its_named_stop(rig, drive, name):
    fault, reason, ticks = FAULTS[name]
    # limits that another fault is for are wide: on a busy machine the doubles are late
    limits = {"picture_age_s": 0.3 if name == "lost view" else 2.0, "state_age_s": 0.2 if name == "silent arm" else 1.0}
    with rig(follow_mm=0.6, **limits) as it:
        if "clock" in name:
            time.sleep(1.1)  # until the offset has settled
        watch = at_act(4, lambda: fault(it))
        log = drive(it, watch=watch)
        named = [one for one in reason.split("|") if log.ended.startswith(one)]
        assert named and log.stopped, log.ended
        assert log.ticks[-1].step - watch.step <= ticks + 1  # the one on whose end the fault came
        assert bool(log.summary()["failed_stops"]) == (name in ("closed socket", "silent arm"))
        if name not in ("closed socket", "silent arm"):
            assert it.arm.paused and not it.arm.velocity.any()


NEWER = "11.1.10.1234"  # firmware that the client asks for JSON


def test_firmware_that_speaks_json_drives_and_stops_alike(rig, drive):
    with rig(FakeArm(version=NEWER), sensor_age_s=1, picture_age_s=2) as it:
        assert it.arm.json and str(it.robot.arm.version).startswith("11.1.10") and it.robot.arm.watches
        start = it.arm.place.copy()
        log = drive(it, (0.2, 0, 0, 0, 0, 0), watch=at_act(5, lambda: it.runner.request_stop("enough")))
        assert log.ended == "enough" and not log.summary()["failed_stops"] and it.arm.paused
        moved = it.arm.place - start
        assert moved[0] > 0.5 and np.abs(moved[1:]).max() < 1e-6
        frames = {name: (told, holds) for name, told, holds in it.robot.arm.frames()}
        assert all(np.allclose(*pair) for pair in frames.values())
        assert it.robot.arm.controller_facts()["torque limits (%)"] == str([10.0] * 6)


@pytest.mark.parametrize("name", ("motion error", "e-stop"))
def test_a_fault_is_told_in_json_too(rig, drive, name):
    fault, reason, ticks = FAULTS[name]
    with rig(FakeArm(version=NEWER), sensor_age_s=1, picture_age_s=2, state_age_s=1) as it:
        log = drive(it, watch=at_act(3, lambda: fault(it)))
        assert re.match(reason, log.ended) and log.summary()["modes"]["act"] <= 3 + ticks
        assert name == "e-stop" or "3005" in log.ended  # with its number, which text firmware does not give


def test_a_clock_that_is_ahead_all_the_time_is_corrected(rig, drive):
    with rig(clock_s=1.5, sensor_age_s=1, picture_age_s=2, hold_s=2) as it:
        log = drive(it, watch=at_act(10, lambda: it.runner.request_stop("enough")))
        assert log.ended == "enough"
        assert {tick.reason for tick in log.ticks if tick.mode == "hold"} <= {"missed deadline", "broken sensor window"}
        offsets = {row["stream"]: row["clock_offset_ms"] for row in it.robot.streams()}
        assert offsets["sensor"] == pytest.approx(-1500, abs=200) and offsets["arm"] is None
        assert abs(np.median([tick.sensor_age_s for tick in log.ticks])) < 0.5


def test_a_stop_from_another_thread_gets_past_a_hanging_send(rig, drive):
    with rig() as it:
        hangs, real = threading.Event(), it.robot.arm.robot.MoveLinVelWrf
        watch = at_act(3, lambda: setattr(it.robot.arm.robot, "MoveLinVelWrf", lambda *_: hangs.wait(20)))
        thread = threading.Thread(target=lambda: setattr(it, "log", drive(it, watch=watch)))
        thread.start()
        while not it.arm.log or watch.step is None:
            time.sleep(0.01)
        it.robot.arm.robot.MoveLinVelWrf, before = real, len(it.arm.log)
        time.sleep(0.15)  # the fourth send hangs by now, or was the last of the real ones
        assert it.runner.request_stop()
        assert "ClearMotion" in [text for _, text in it.arm.log[before - 1 :]] and it.arm.paused
        hangs.set()
        thread.join(20)
        assert it.log.ended == "operator"
        moves = [t_s for t_s, text in it.arm.log if text.startswith("Move")]
        assert max(moves) < next(t_s for t_s, text in it.arm.log if text == "ClearMotion")


def test_a_controller_that_hears_nothing_makes_the_stop_fail_and_stands_by_itself(rig, drive):
    with rig() as it:
        log = drive(it, watch=at_act(3, lambda: (setattr(it.arm, "deaf", True), it.runner.request_stop())))
        assert log.ended == "operator" and log.summary()["failed_stops"] >= 1
        it.arm.deaf = False
        places = [place for t_s, place in it.arm.way if t_s > it.arm.until_s]
        assert places and np.ptp(places, axis=0).max() == 0.0  # the velocity time-out has stopped it


def test_the_hold_to_run_key(rig, drive):
    with rig() as it:
        keys = iter([False] * 3 + [True] * 5 + [False] * 99)
        log = drive(it, held=lambda: next(keys))
        modes = [tick.mode for tick in log.ticks if "key" in tick.reason or tick.mode == "act"]
        assert log.ended == "hold-to-run key released" and {"wait", "act", "hold", "stop"} == set(modes)


@pytest.mark.parametrize(
    "joints, action, reason",
    (
        ((0, 0, 0, 0, 5.5, 0), (0, 0, 0, 0, -1.0, 0), "singularity of the wrist"),
        ((172, 0, 0, 0, 60, 0), (0, 0, 0, 0, 0, 2.0), "joint limit 1"),
    ),
)
def test_joint_limits_and_singularities_hold_before_the_arm_does(rig, drive, joints, action, reason):
    with rig(FakeArm(joints)) as it:
        box = [[float(v) - 90, float(v) + 90] for v in it.arm.place]
        it.settings.limits["workspace_mm"] = box
        if "limit" in reason:  # a turn about the base's z axis by joint 1: the tip goes round
            action = (*(np.cross([0, 0, np.radians(1.0)], it.arm.place)), 0, 0, 1.0)
            it.settings.limits["speed_mm_s"] = 90
            it.settings.limits["follow_mm"] = 20
        log = drive(it, action)
        assert log.ended == reason and sum(tick.mode == "act" for tick in log.ticks) >= 1
        assert it.robot.refuses(-np.array([*action, 1.0])) == ""  # the way out is free


def test_a_dry_run_moves_nothing_and_hears_what_the_arm_would_refuse(rig, drive, tmp_path):
    with rig(FakeArm((0, 0, 0, 0, 3.5, 0)), sensor_age_s=1, picture_age_s=2, hold_s=2) as it:
        it.settings.limits["workspace_mm"] = [[float(v) - 90, float(v) + 90] for v in it.arm.place]
        log = drive(it, (0, 0, 0, 0, -1.0, 0), io=DryRunIO(it.robot, tmp_path / "dry.jsonl"))
        assert log.ended == "singularity of the wrist" and not [t for t in it.arm.log if "Move" in t[1]]


def test_an_arm_that_may_not_move_is_refused_with_a_sentence(rig):
    with rig(FakeArm(tool_mm=120.0)) as it:
        it.robot.arm.settings.__dict__["trf"] = (0.0,) * 6
        with pytest.raises(UserError, match="controller's TRF is .*120.* robot.yaml says"):
            it.robot.begin(0.1)
        it.arm.press_estop()
        while not it.robot.arm._fault:
            time.sleep(0.01)
        with pytest.raises(UserError, match="not activated and homed"):
            it.robot.begin(0.1)


WORKBENCH = """
import sys, time
import numpy as np
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.settings import RobotSettings
robot = LabRobot(RobotSettings.load(sys.argv[1]))
robot.begin(0.1)
print("drives", flush=True)
while True:
    robot.read_observation()
    robot.send_action(np.array([2.0, 0, 0, 0, 0, 0, 1.0]))
    time.sleep(0.1)
"""


def test_a_killed_workbench_leaves_the_arm_standing(tmp_path):
    with FakeArm() as arm:
        content = {
            "instruction": "insert",
            "arm": {"address": arm.address},
            "cameras": {"View5": {"source": "zmq"}},
            "zmq_port": 0,
            "limits": {"workspace_mm": [[0, 300], [-100, 100], [100, 300]], "speed_mm_s": 20},
        }
        path = write(tmp_path / "robot.yaml", content)
        child = subprocess.Popen([sys.executable, "-c", WORKBENCH, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "drives\n"
        while sum("Move" in text for _, text in arm.log) < 5:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        killed_s = time.monotonic()
        time.sleep(0.4)
        late_s = max(t_s for t_s, _ in arm.log) - killed_s  # what was in the socket still came
        end = arm.place.copy()
        there_s = next(t_s for t_s, place in arm.way if np.array_equal(place, end))
        assert there_s - killed_s <= max(0.0, late_s) + arm.timeout_s + 2 * arm.interval_s
        assert np.array_equal(arm.place, end) and arm.paused
