"""The newest whole window of 650 Hz samples, by the rule that decided in training whether a window is full."""

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.steps import SENSOR_LATE_S, window_full
from vla_lib.episodes.timeline import find_gaps
from vla_lib.policy.config import SENSOR_CHANNELS


class SensorBuffer:
    """A ring of `capacity` samples (n, 1026), each written twice, so that every window is one contiguous block."""

    def __init__(self, capacity: int, sensor_hz: float = 650.0):
        if capacity < 1 or sensor_hz <= 0:
            raise UserError(
                f"A sensor buffer of {capacity} samples at {sensor_hz:g} Hz cannot be; both must be above 0."
            )
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
            raise UserError(
                f"The sensor gave samples of shape {samples.shape} with times {t_s.shape}; "
                f"(n, {SENSOR_CHANNELS}) and (n,) go in."
            )
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
