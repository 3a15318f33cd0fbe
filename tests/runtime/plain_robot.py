"""A robot without physics on the test's own clock, experts and VLMs that are told what to do, shared by the tests of
the runtime room."""

from collections.abc import Callable

import numpy as np
from plain_vlm import tokens_of

from vla_lib.episodes.poses import apply_action
from vla_lib.runtime.clock import SimulatedClock
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.runner import Runner, RunnerSettings
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import SimulatedVlm

BOX = ((0.0, 100.0), (0.0, 100.0), (0.0, 100.0))
START = (50.0, 50.0, 50.0, 0.0, 0.0, 0.0)


def striped(mean: float, rows: int = 8) -> np.ndarray:
    """(rows, rows, 3) a picture of this mean that is not blank."""
    return np.full((rows, rows, 3), mean, np.float32) + np.where(np.arange(rows) < rows / 2, -50, 50)[:, None, None]


class PlainRobot:
    """Does what it is told at once, samples at 650 Hz with a little noise, and keeps everything.

    `edit(t_s, fields)` may spoil an observation."""

    def __init__(self, clock, pose=START, edit: Callable[[float, dict], None] | None = None):
        self.clock, self.pose, self.edit = clock, np.array(pose, float), edit
        self.sent: list[tuple[float, np.ndarray]] = []
        self.stops: list[tuple[float, str]] = []
        self._samples = 0
        self._noise = np.random.default_rng(0)

    def read_observation(self) -> Observation:
        now = self.clock.now()
        until = int((now + 1.5) * 650 + 1e-6)  # the sensor has run for 1.5 s before the start
        times = 1000.0 + np.arange(self._samples + 1, until + 1) / 650 - 1.5
        self._samples = until
        samples = self._noise.normal(0.0, 0.01, (len(times), 1026)).astype(np.float32)
        samples[:, 0] += 10.0
        fields = {
            "timestamp": 1000.0 + now,
            "state": np.concatenate([np.zeros(6), self.pose]).astype(np.float32),
            "state_timestamp": 1000.0 + now,
            "pictures": {"View5": striped(len(self.sent) % 256)},
            "picture_timestamps": {"View5": 1000.0 + now},
            "sensor": samples,
            "sensor_timestamps": times,
            "instruction": "insert",
        }
        if self.edit:
            self.edit(now, fields)
        return Observation(**fields)

    def send_action(self, action: np.ndarray) -> None:
        self.sent.append((self.clock.now(), np.array(action)))
        self.pose = apply_action(self.pose, action)

    def stop(self, reason: str) -> None:
        self.stops.append((self.clock.now(), reason))


class PlainExpert:
    """Moves by `step` (6,) forever; `sensor_window` samples are asked for and kept."""

    def __init__(self, step=(0.1, 0.0, 0.0, 0.0, 0.0, 0.0), sensor_window: int = 65, act: Callable | None = None):
        self.step, self.sensor_window, self.act = step, sensor_window, act
        self.asked: list[tuple] = []

    def __call__(self, features, age_s, state, window) -> np.ndarray:
        self.asked.append((features, age_s, state, window))
        if self.act:
            return self.act(len(self.asked) - 1)
        return np.tile([*self.step, 1.0], (8, 1))


class Setup:
    """One simulated run, its parts at hand; `latencies_s`: "vlm" and "expert" -> list of durations in s (the last one
    goes on)."""

    def __init__(
        self, expert=None, compute=tokens_of, edit=None, pose=START, latencies_s=None, latency=None, seed=0, **changes
    ):
        self.clock = SimulatedClock(latency or {}, seed)
        if latencies_s:
            calls = {work: 0 for work in latencies_s}

            def draw(work: str) -> float:
                if work not in latencies_s:
                    return 0.0
                listed = latencies_s[work]
                calls[work] += 1
                return listed[min(calls[work], len(listed)) - 1]

            self.clock.draw_s = draw
        settings = {
            name: changes.pop(name) for name in ("steps_per_chunk", "vlm_reuse_count", "views") if name in changes
        }
        self.limits = SafetyLimits(**{"workspace_mm": BOX, **changes})
        self.robot = PlainRobot(self.clock, pose, edit)
        self.expert = expert or PlainExpert()
        self.vlm = SimulatedVlm(compute, self.clock)
        self.runner = Runner(self.robot, self.expert, self.vlm, self.clock, RunnerSettings(**settings), self.limits)

    def run(self, seconds: float = 5.0):
        return self.runner.run(seconds)
