"""The simulated rig as a robot: what the runner asks of `RobotIO`, answered by SimRig at the runner's clock."""

from typing import Any

import numpy as np

from needle_rig.rig import SimRig
from needle_rig.world import FORCE_LIMIT_MN, WORKSPACE_MM
from vla_lib.runtime.clock import Clock
from vla_lib.runtime.robot_io import Observation


class SimRobot:
    """A reset rig that follows `clock`: each reading runs it up to now, one action period after the other, with the action sent before
    or standing still. A period belongs to the action that was sent in it. Its time ends where the rollout is decided, unless it is to `go_on`."""

    def __init__(self, rig: SimRig, clock: Clock, seed: int, go_on: bool = False):
        self.rig, self.clock, self.go_on = rig, clock, go_on
        self.stopped = ""
        self._pending: np.ndarray | None = None
        self._observation, self.info = rig.reset(seed=seed)
        self._unread = [self._observation]  # what the sensor saw before the start
        self.done = False
        self.begin()

    def begin(self) -> None:
        """The rig's time starts now (it does so when made, too)."""
        self._begin_s = self.clock.now()

    def read_observation(self) -> Observation:
        """The newest of everything."""
        parts, self._unread = self._unread, []
        due = int((self.clock.now() - self._begin_s) * self.rig.action_hz + 1e-6)
        while self.rig.steps < due and (self.go_on or not self.done):
            action = np.zeros(6) if self._pending is None or self.stopped else self._pending
            self._pending = None
            self._observation, _, terminated, truncated, self.info = self.rig.step(action)
            self.done = self.done or terminated or truncated
            parts.append(self._observation)
        newest: dict[str, Any] = self._observation
        sensor = [part["sensor"] for part in parts] or [newest["sensor"][:0]]
        times = [part["sensor_timestamps"] for part in parts] or [newest["sensor_timestamps"][:0]]
        return Observation(
            timestamp=newest["timestamp"],
            state=newest["state"],
            state_timestamp=newest["state_timestamp"],
            pictures=newest["pictures"],
            picture_timestamps=newest["picture_timestamps"],
            sensor=np.concatenate(sensor),
            sensor_timestamps=np.concatenate(times),
            instruction=newest["instruction"],
        )

    def send_action(self, action: np.ndarray) -> None:
        """What the rig does in the period that has begun."""
        self._pending = np.asarray(action, float)

    def stop(self, reason: str) -> None:
        """Stand still from now on."""
        self.stopped = self.stopped or reason

    def over(self) -> str:
        """Why the rollout is over, "" while it goes on."""
        if not self.done:
            return ""
        return "success" if self.info["success"] else self.info["reason"]


def sim_limits() -> dict[str, Any]:
    """Workspace (mm) and force (mN) of the rig, for SafetyLimits. The force is judged on the true one; the margin is the sensor's bias and noise."""
    return {"workspace_mm": WORKSPACE_MM, "force_mN": FORCE_LIMIT_MN - 5.0}
