"""Whether a robot's sensor, state and cameras can be believed: stamps on time, in order, data that change as live ones.

Everything is judged on the robot's clock, against the runner's own, which goes on when the robot's answers freeze.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.poses import delta_action
from vla_lib.episodes.steps import SENSOR_LATE_S, window_full
from vla_lib.episodes.timeline import find_gaps
from vla_lib.policy.config import SENSOR_CHANNELS
from vla_lib.runtime import safety
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.safety import SafetyLimits

BLANK = 10  # a guess: a picture whose pixels differ by no more, of 255, shows nothing (a covered lens, no light)
DRIFT = 1e-3  # a guess: how far two clocks may part, seconds a second; those of computers stay below 1e-4


class SensorBuffer:
    """A ring of `capacity` samples (n, 1026), each written twice, so that every window is one contiguous block.

    Whether a window is full is decided as in training.
    """

    def __init__(self, capacity: int, sensor_hz: float = 650.0):
        if capacity < 1 or sensor_hz <= 0:
            raise UserError(f"A sensor buffer of {capacity} samples at {sensor_hz:g} Hz: both must be above 0.")
        self.capacity, self.sensor_hz = capacity, sensor_hz
        self._samples = np.zeros((2 * capacity, SENSOR_CHANNELS), np.float32)
        self._t_s = np.zeros(2 * capacity)
        self._next = 0  # place of the next sample in 0..capacity-1
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def newest_s(self) -> float | None:
        """Time of the newest sample, None before the first."""
        return float(self._t_s[self._next - 1 + self.capacity]) if self._count else None

    def append(self, samples: np.ndarray, t_s: np.ndarray, latest_s: float = np.inf) -> np.ndarray:
        """Take (n, 1026) samples with their times (n,); returns those that are new: repeated ones do no harm.

        Those later than `latest_s` are left out: nothing would be new after them.

        Raises UserError where the shapes do not fit.
        """
        samples, t_s = np.asarray(samples, np.float32), np.asarray(t_s, float)
        if samples.ndim != 2 or samples.shape[1] != SENSOR_CHANNELS or t_s.shape != samples.shape[:1]:
            gave = f"samples of shape {samples.shape} with times {t_s.shape}"
            raise UserError(f"The sensor gave {gave}; (n, {SENSOR_CHANNELS}) and (n,) go in.")
        samples, t_s = samples[t_s <= latest_s], t_s[t_s <= latest_s]
        newest = self.newest_s
        before = np.maximum.accumulate(np.concatenate([[-np.inf if newest is None else newest], t_s]))[:-1]
        new = samples[t_s > before]
        kept, times = new[-self.capacity :], t_s[t_s > before][-self.capacity :]
        place = (self._next + np.arange(len(kept))) % self.capacity
        for twin in (place, place + self.capacity):
            self._samples[twin], self._t_s[twin] = kept, times
        self._next = (self._next + len(kept)) % self.capacity
        self._count = min(self.capacity, self._count + len(kept))
        return new

    def frozen(self, span_s: float) -> bool:
        """Whether force or A-line has been the very same for `span_s` seconds; False where less is kept."""
        kept = slice(self._next + self.capacity - self._count, self._next + self.capacity)
        within = self._t_s[kept] > self._t_s[kept][-1] - span_s if self._count else np.zeros(0, bool)
        if within.all():
            return False
        same = (recent := self._samples[kept][within]) == recent[-1]
        return bool(same[:, 0].all() or same[:, 1:].all())

    def window(self, length: int, now_s: float) -> np.ndarray | None:
        """(length, 1026) copy of the newest samples, oldest first; None where it is not whole, current and finite."""
        if not 0 < length <= self.capacity:
            raise UserError(f"A window of {length} samples does not fit a buffer of {self.capacity}.")
        if self._count < length:
            return None
        end = self._next + self.capacity
        t_s = self._t_s[end - length : end]
        gaps = find_gaps(t_s, SENSOR_LATE_S)
        if not window_full(np.array([length]), t_s, np.array([now_s]), length, self.sensor_hz, gaps)[0]:
            return None
        window = self._samples[end - length : end].copy()
        return window if np.isfinite(window.sum()) else None


@dataclass
class Scene:
    """The newest picture of a view: stamp, checksum, the pose (6,) of the arm when this content first came, faults."""

    stamp: float
    content: int
    pose: np.ndarray
    blank: bool
    frozen: bool = False


class Streams:
    """The streams of one run. `take` judges each reading; a fault is its reason in the log, "" where there is none.

    `sensor` keeps the samples; `views`: the pictures that count, default all.
    """

    def __init__(self, limits: SafetyLimits, capacity: int, views: tuple[str, ...] = ()):
        self.limits, self._views = limits, views
        self.sensor = SensorBuffer(capacity)
        self.now = 0.0  # Now on the robot's clock, at the newest reading
        self.sensor_age_s: float | None = None  # of the newest sample; None before the first
        self.clock_fault = self.sensor_fault = self.state_fault = ""
        self.picture_faults: dict[str, str] = {}  # by view
        self._first: tuple[float, float] | None = None  # least and greatest offset of the robot's clock to the run's
        self._newest_s = self._state_s = -np.inf
        self._scenes: dict[str, Scene] = {}

    def views(self, observation: Observation) -> tuple[str, ...]:
        """The views that the VLM is shown."""
        return self._views or tuple(observation.pictures)

    def take(self, observation: Observation, asked_s: float, had_s: float) -> None:
        """Judge what was read between `asked_s` and `had_s` of the run. Raises UserError where shapes do not fit."""
        self._judge_clock(observation.timestamp, asked_s, had_s)
        self._judge_sensor(np.asarray(observation.sensor_timestamps, float), observation.sensor)
        self.state_fault = self._stamp_fault(
            observation.state_timestamp,
            self._state_s,
            self.limits.state_age_s,
            (safety.STALE_STATE, safety.STATE_AHEAD, safety.STATE_ORDER),
        )
        if not self.state_fault:
            self._state_s = observation.state_timestamp
        faults = {view: self._picture_fault(view, observation) for view in self.views(observation)}
        self.picture_faults = {view: fault for view, fault in faults.items() if fault}

    def _judge_clock(self, stamp: float, asked_s: float, had_s: float) -> None:
        if self._first is None:
            # by the clock after the reading: a slow first one makes nothing look old
            self._first = stamp - had_s, stamp - asked_s
        least, most = self._first
        ahead = not stamp <= most + had_s + self.limits.ahead_s + DRIFT * had_s  # NaN is ahead, too
        self.clock_fault = safety.CLOCK_STEP if ahead or stamp < self._newest_s else ""
        if not ahead:
            self._newest_s = max(self._newest_s, stamp)
        self.now = least + asked_s if ahead else max(stamp, least + asked_s)

    def _judge_sensor(self, t_s: np.ndarray, samples: np.ndarray) -> None:
        # a sample from the future would make every later one look old: it is not kept
        latest_s, before = self.now + self.limits.ahead_s, self.sensor.newest_s
        self.sensor.append(samples, t_s, latest_s)
        newest = self.sensor.newest_s
        self.sensor_age_s = None if newest is None else self.now - newest
        went_back = len(t_s) and before is not None and t_s.max() < before
        if (t_s > latest_s).any():
            self.sensor_fault = safety.SENSOR_AHEAD
        elif self.sensor_age_s is None or self.sensor_age_s > self.limits.sensor_age_s:
            self.sensor_fault = safety.STALE_SENSOR
        elif went_back or (np.diff(t_s) < 0).any():
            self.sensor_fault = safety.SENSOR_ORDER
        else:
            self.sensor_fault = safety.FROZEN_SENSOR if self.sensor.frozen(self.limits.sensor_frozen_s) else ""

    def _picture_fault(self, view: str, observation: Observation) -> str:
        picture, stamp = observation.pictures.get(view), observation.picture_timestamps.get(view)
        if picture is None or stamp is None:
            return f"{safety.MISSING_VIEW} {view}"
        scene = self._scenes.get(view)
        reasons = safety.STALE_PICTURES, f"{safety.VIEW_AHEAD} {view}", f"{safety.VIEW_ORDER} {view}"
        before = scene.stamp if scene else -np.inf
        if fault := self._stamp_fault(stamp, before, self.limits.picture_age_s, reasons):
            return fault
        if stamp > before:
            content, pose = zlib.crc32(np.ascontiguousarray(picture).data), np.array(observation.state[6:12], float)
            blank = int(np.ptp(picture[::4, ::4])) <= BLANK
            if scene and scene.content == content:
                # a standing arm may change nothing in a picture without noise
                moved = np.linalg.norm(delta_action(scene.pose, pose)[:3])
                scene.stamp, scene.frozen = stamp, bool(moved > self.limits.picture_frozen_mm)
            else:
                scene = self._scenes[view] = Scene(stamp, content, pose, blank)
        if scene and scene.blank:
            return f"{safety.BLANK_VIEW} {view}"
        return f"{safety.FROZEN_VIEW} {view}" if scene and scene.frozen else ""

    def _stamp_fault(self, stamp: float, before: float, oldest_s: float, reasons: tuple[str, str, str]) -> str:
        """Which of the reasons (stale, ahead, out of order) a stamp gives rise to, that of the one before at hand."""
        stale, ahead, order = reasons
        if stamp > self.now + self.limits.ahead_s:
            return ahead
        if not self.now - stamp <= oldest_s:
            return stale
        return order if stamp < before else ""
