"""The simulated rig as a robot: what the runner asks of `RobotIO`, answered by needle_rig at the runner's clock.

Everything that vla_lib takes from needle_rig comes through here (the demo's recording apart): the environment, the
figures by which it judges, and its errors as UserError.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# "X as X" hands a name on: to the other rooms these are this module's
from needle_rig import NeedleInsertion as NeedleInsertion
from needle_rig import RigError
from needle_rig.disturbances import CHANGES as CHANGES
from needle_rig.recorder import MANIFEST as MANIFEST
from needle_rig.render import check_gl
from needle_rig.render import prepare_gl as prepare_gl
from needle_rig.tissue import BIN_MM as BIN_MM
from needle_rig.world import DEFAULT_TASK as DEFAULT_TASK
from needle_rig.world import DEPTH_TOLERANCE_MM as DEPTH_TOLERANCE_MM
from needle_rig.world import FORCE_LIMIT_MN as FORCE_LIMIT_MN
from needle_rig.world import LATERAL_TOLERANCE_MM as LATERAL_TOLERANCE_MM
from needle_rig.world import VIEWS as VIEWS
from needle_rig.world import WORKSPACE_MM, task_of
from vla_lib.core.errors import UserError
from vla_lib.episodes.datasets import DatasetTable
from vla_lib.runtime.clock import Clock
from vla_lib.runtime.robot_io import Observation


@contextlib.contextmanager
def rig_errors() -> Iterator[None]:
    """What the rig refuses is the user's to mend: its sentence becomes a UserError."""
    try:
        yield
    except RigError as error:
        raise UserError(str(error)) from None


@rig_errors()
def make_rig(**how: Any) -> NeedleInsertion:
    """The environment with these settings. Raises UserError where it cannot be, or EGL is missing."""
    return NeedleInsertion(**how)


@rig_errors()
def check_drawing() -> None:
    """Raises UserError with the remedy where the rig's cameras cannot draw on this machine."""
    check_gl()


@rig_errors()
def instruction_of(task: str, root: Path | None = None) -> str:
    """The instruction that prepared episodes of the task below `root` carry: live and recorded prompts must agree.

    Default root: the built-in table. Raises UserError where the root's datasets.yaml cannot be understood.
    """
    table = DatasetTable() if root is None else DatasetTable.load(root)
    return table.instruction(*task_of(task).folders)


class SimRobot:
    """A reset rig that follows `clock`: each reading runs it up to now, one action period after the other.

    A period belongs to the action that was sent in it; without one the rig rests. Its time ends where the rollout is
    decided, unless it is to `go_on`. `instruction`: default, the built-in one of the rig's task.
    """

    def __init__(
        self,
        rig: NeedleInsertion,
        clock: Clock,
        seed: int,
        go_on: bool = False,
        instruction: str = "",
        disturbance: str = "",
    ):
        self.rig, self.clock, self.go_on = rig, clock, go_on
        self.instruction = instruction or instruction_of(rig.task)
        self.stopped = ""
        self._pending: np.ndarray | None = None
        self._newest, self.info = rig.reset(seed=seed, options={"disturbance": disturbance})
        self._unread = [(self._newest["sensor"], self._newest["sensor_timestamps"])]  # of the rest before the start
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
            self._newest, _, terminated, truncated, self.info = self.rig.step(action)
            self.done = self.done or terminated or truncated
            new = slice(-self.rig.ticks, None)
            parts.append((self._newest["sensor"][new], self._newest["sensor_timestamps"][new]))
        newest = self._newest
        parts = parts or [(newest["sensor"][:0], newest["sensor_timestamps"][:0])]
        sensor, sensor_timestamps = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Observation(
            timestamp=float(newest["timestamp"]),
            state=newest["state"],
            state_timestamp=float(newest["state_timestamp"]),
            pictures=newest["pictures"],
            picture_timestamps={view: float(stamp) for view, stamp in newest["picture_timestamps"].items()},
            sensor=sensor,
            sensor_timestamps=sensor_timestamps,
            instruction=self.instruction,
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
    """Workspace (mm) and force (mN) of the rig, for SafetyLimits."""
    # the rig judges by the true force; the runner sees it with the sensor's bias and noise
    return {"workspace_mm": WORKSPACE_MM, "force_mN": FORCE_LIMIT_MN - 5.0}
