"""Shared by the tests of the robots room: one run of the real mecademicpy client against doubles on loopback."""

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_rig import CameraHost, SensorHost, mapping

from benchmarks.fake_arm import FakeArm
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.settings import RobotSettings
from vla_lib.runtime.clock import RealClock
from vla_lib.runtime.runner import Runner, RunnerSettings
from vla_lib.runtime.vlm_worker import LiveVlm


class SteadyExpert:
    """Wants the same action for ever."""

    sensor_window = 65

    def __init__(self, action):
        self.action = action

    def __call__(self, features, age_s, state, window):
        return np.tile([*self.action, 1.0], (8, 1))


@contextlib.contextmanager
def open_rig(arm=None, bare=False, clock_s=0.0, **limits):
    """arm, robot and its hosts, running."""
    with contextlib.ExitStack() as opened:
        arm = opened.enter_context(arm or FakeArm())
        content = mapping(arm)
        content["limits"] |= limits
        settings = RobotSettings.of_mapping(content)
        robot = opened.enter_context(LabRobot(settings))
        camera = opened.enter_context(CameraHost(settings.zmq_port, clock_s=clock_s))
        sensor = opened.enter_context(SensorHost(settings.sensor.port, bare, clock_s))
        robot.wait_ready()
        yield SimpleNamespace(arm=arm, robot=robot, camera=camera, sensor=sensor, settings=settings)


def tokens(pictures, instruction):
    return np.zeros((1, 2), np.float32), np.ones(1, bool)


@pytest.fixture
def rig():
    """`with rig(...) as it`: see `open_rig`."""
    return open_rig


@pytest.fixture
def drive():
    """drive(it, action, max_s, watch, held) -> the log of a run on an open rig; `it.runner` while it runs."""

    def go(it, action=(0.2, 0, 0, 0, 0, 0), max_s=8.0, watch=None, held=None, io=None):
        vlm = LiveVlm(tokens, ThreadPoolExecutor(1))
        settings, limits = RunnerSettings(10.0, 3, 1, tuple(it.settings.cameras)), it.settings.safety()
        it.runner = Runner(io or it.robot, SteadyExpert(action), vlm, RealClock(), settings, limits, watch)
        try:
            it.robot.begin(0.1)
            return it.runner.run(max_s, held=held)
        finally:
            vlm.close()

    return go
