"""The real clock: the same loop with a thread, a process, a watchdog. Logic only: counts and reasons, never
milliseconds."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import psutil
import pytest
from plain_robot import BOX, PlainExpert, PlainRobot
from plain_vlm import make_broken, make_mortal, make_quick, make_slow, tokens_of

from vla_lib.runtime.clock import RealClock, Watchdog, real_time
from vla_lib.runtime.runner import Runner, RunnerSettings
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import LiveVlm, vlm_process

PATIENT = {
    "sensor_age_s": 5.0,
    "state_age_s": 5.0,
    "picture_age_s": 5.0,
    "vl_age_s": 5.0,
    "watchdog_s": 5.0,
    "hold_s": 3.0,
}


def thread(compute):
    """A VLM in a thread of the test's own process."""
    return LiveVlm(compute, ThreadPoolExecutor(1))


def build(vlm, expert=None, limits=None, watch=None, edit=None, action_hz=10.0):
    clock = RealClock()
    robot = PlainRobot(clock, edit=edit)
    limits = SafetyLimits(workspace_mm=BOX, **{**PATIENT, **(limits or {})})
    return Runner(robot, expert or PlainExpert(), vlm, clock, RunnerSettings(action_hz), limits, watch), robot


def test_the_loop_keeps_its_ticks_while_the_vlm_works_in_a_process():
    vlm = vlm_process(make_slow)
    runner, robot = build(vlm)
    try:
        log = runner.run(2.0)
    finally:
        vlm.close()
    assert log.ended == "time limit" and not log.stopped
    summary = log.summary()
    assert summary["ticks"] + summary["skipped_ticks"] == 20
    assert len({tick.step for tick in log.ticks}) == len(log.ticks)
    assert len(log.vlm_ms) >= 2 and summary["expert_while_vlm_busy"] >= 1  # both at once
    assert all(features.tokens[0, 1] == len("insert") for features, *_ in runner.expert.asked)
    assert not psutil.pid_exists(vlm.executor.pid)
    assert len(robot.stops) == 1


@pytest.mark.parametrize("how", ("killed", "ends"))
def test_a_vlm_process_that_dies_stops_the_run(how):
    vlm = vlm_process(make_quick if how == "killed" else make_mortal)
    known = []  # after each tick: whether the worker's death was known by then

    def watch(tick, observation):
        known.append(bool(vlm.failure))
        if how == "killed" and tick.step == 3:
            psutil.Process(vlm.executor.pid).kill()

    runner, robot = build(vlm, watch=watch)
    try:
        log = runner.run(10.0)
    finally:
        vlm.close()
    assert log.ended.startswith("VLM worker died: RuntimeError: the VLM process ended") and log.stopped
    assert sum(known) <= 2  # the tick in which it became known, if any, and the one that stopped
    assert len(robot.stops) == 1


def test_the_vlm_process_sees_the_very_pictures_also_larger_ones():
    vlm = vlm_process(make_quick)
    try:
        for side in (2, 40, 3):  # the shared memory grows, and is then larger than needed
            pictures = {
                view: np.full((side, 6, 3), value, np.uint8)[:, ::2] for view, value in (("View1", 7), ("View5", 9))
            }
            assert vlm.compute(pictures, "insert")[0].tolist() == [[8.0, 6.0]]
    finally:
        vlm.close()


def test_a_vlm_that_cannot_be_made_says_why():
    with pytest.raises(RuntimeError, match="ValueError: no such weights"):
        vlm_process(make_broken)


def test_a_process_of_ones_own_dies_with_its_parent():
    code = "import time; from vla_lib.core.pool import OneProcess; print(OneProcess().pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    worker.wait(timeout=60)


def test_a_slow_vlm_thread_makes_features_stale_and_stops():
    release = threading.Event()
    calls = []

    def compute(pictures, instruction):
        calls.append(1)
        if len(calls) == 2:
            release.wait(20)
        return tokens_of(pictures, instruction)

    vlm = thread(compute)
    runner, robot = build(vlm, limits={"vl_age_s": 0.5, "hold_s": 0.3})
    log = runner.run(15.0)
    release.set()
    vlm.close()
    assert log.ended == "stale VL features" and [tick.mode for tick in log.ticks][-1] == "stop"
    assert sum(tick.mode == "hold" for tick in log.ticks) >= 1


def assert_stopped_within_one_tick_of_the_limit(log, reason: str, hold_ticks: int):
    """Counted in ticks, whatever the machine does: every held tick lies within the budget, and the first one beyond it
    stopped."""
    held = [tick for tick in log.ticks if tick.mode == "hold" and tick.reason == reason]
    stop = log.ticks[-1]
    assert (log.ended, stop.mode, stop.reason) == (reason, "stop", reason)
    assert held and held[-1].step < held[0].step + hold_ticks
    missed = log.ticks[log.ticks.index(held[-1]) + 1 : -1]  # on a busy machine
    assert {tick.reason for tick in missed} <= {"missed deadline"}
    assert not np.any([tick.action[:6] for tick in held])


def test_a_silent_sensor_stops_the_robot_in_real_time():
    def silent(t_s, fields):
        if sum(tick.mode == "act" for tick in runner.log.ticks) >= 3:
            fields["sensor"], fields["sensor_timestamps"] = fields["sensor"][:0], fields["sensor_timestamps"][:0]

    vlm = thread(tokens_of)
    runner, robot = build(vlm, limits={"sensor_age_s": 0.3, "hold_s": 0.6}, edit=silent, action_hz=5.0)
    log = runner.run(15.0)
    vlm.close()
    assert_stopped_within_one_tick_of_the_limit(log, "stale sensor", 3)
    hold = next(tick for tick in log.ticks if tick.reason == "stale sensor")
    assert hold.sensor_age_s > 0.3
    # the first tick beyond the age was held
    assert all(tick.sensor_age_s <= 0.3 for tick in log.ticks if tick.step < hold.step)


def test_nan_actions_stop_the_robot_in_real_time():
    good, bad = np.full((8, 7), 0.01), np.full((8, 7), np.nan)
    expert = PlainExpert(act=lambda call: good if call < 4 else bad)
    vlm = thread(tokens_of)
    runner, robot = build(vlm, expert, limits={"hold_s": 0.6}, action_hz=5.0)
    log = runner.run(15.0)
    vlm.close()
    assert_stopped_within_one_tick_of_the_limit(log, "non-finite action", 3)
    assert np.isfinite([action for _, action in robot.sent]).all()


def test_the_watchdog_stops_a_robot_whose_loop_hangs():
    release, bitten = threading.Event(), threading.Event()

    def hang(t_s, fields):
        if t_s > 0.25:
            assert bitten.wait(20)

    vlm = thread(tokens_of)
    runner, robot = build(vlm, limits={"watchdog_s": 0.3}, edit=hang)
    original, tries = robot.stop, []

    def stop(reason):  # the robot takes the second one
        tries.append(reason)
        if len(tries) == 1:
            raise ConnectionError("cable")
        original(reason)
        bitten.set()

    robot.stop = stop
    log = runner.run(15.0)
    release.set()
    vlm.close()
    assert robot.stops[0][1] == "watchdog" and log.ended == "watchdog" and log.summary()["failed_stops"] == 1
    assert len(robot.sent) <= 4


def test_the_watchdog_waits_for_slow_ticks_and_for_three_periods_at_the_least(monkeypatch):
    made = []

    class Seen(Watchdog):
        def __init__(self, limit_s, bite):
            super().__init__(limit_s, bite)
            made.append(limit_s)

    monkeypatch.setattr("vla_lib.runtime.runner.Watchdog", Seen)
    for action_hz in (10.0, 2.0):
        clock = RealClock()
        limits = SafetyLimits(workspace_mm=BOX, **PATIENT | {"watchdog_s": 0.5})
        vlm = thread(tokens_of)
        Runner(PlainRobot(clock), PlainExpert(), vlm, clock, RunnerSettings(action_hz), limits).run(0.0)
        vlm.close()
    assert made == [0.5, 1.5]


def test_a_stop_from_another_thread_is_the_last_word():
    vlm = thread(tokens_of)
    runner, robot = build(vlm)
    threading.Timer(0.35, runner.request_stop).start()
    log = runner.run(15.0)
    vlm.close()
    assert log.ended == "operator" and robot.stops[0][1] == "operator"


def test_the_loop_goes_before_other_work_where_the_system_allows_it(monkeypatch):
    """Asked of the kernel: within, all threads of this process are of the real-time class, this one first."""
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()

    def priorities():
        """Of this thread and of the other; 0 where it is of the usual class."""
        told = [
            subprocess.run(["chrt", "-p", str(one)], capture_output=True, text=True).stdout
            for one in (threading.get_native_id(), other.native_id)
        ]
        return tuple(int(one.split()[-1]) if "SCHED_FIFO" in one else 0 for one in told)

    with real_time() as given:
        assert priorities() == ((2, 1) if given else (0, 0))
    assert priorities() == (0, 0)
    grant = os.sched_setscheduler

    def up_to(most, thread, policy, asked):
        if asked.sched_priority > most:
            raise PermissionError("Operation not permitted")
        grant(thread, policy, asked)

    for most in (1, 0):  # who may have too little keeps nothing of it
        monkeypatch.setattr(os, "sched_setscheduler", partial(up_to, most))
        with real_time() as given:
            assert not given
        assert priorities() == (0, 0)
    over.set()
