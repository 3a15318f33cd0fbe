"""What the runner asks of a robot (observations, actions, one stop), and a dry run that logs actions in their place.

A real arm implements `RobotIO`; the simulated rig's implementation lives in vla_lib.evaluation.sim_robot. All times of
one robot are seconds on its own clock (UNIX time on the lab's rig); the runner compares them with each other only.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla_lib.core.files import append_jsonl


@dataclass(frozen=True)
class Observation:
    """What a robot knows now."""

    timestamp: float  # Now, seconds on the robot's clock
    state: np.ndarray  # (12,) joints 1..6 (deg), pose x y z (mm) a b r (deg, intrinsic XYZ)
    state_timestamp: float  # when the controller last refreshed the state
    pictures: Mapping[str, Any] = field(default_factory=dict)
    """View key -> (H, W, 3) uint8, the newest of each view; a view without a picture is absent."""
    picture_timestamps: Mapping[str, float] = field(default_factory=dict)
    sensor: np.ndarray = field(default_factory=lambda: np.empty((0, 1026), np.float32))
    """(n, 1026) float32 raw: the samples since the last reading, force (mN) first. All of them are judged for force."""
    sensor_timestamps: np.ndarray = field(default_factory=lambda: np.empty(0))  # (n,) float64, ascending
    instruction: str = ""  # the task in the words of the training data


class RobotIO(Protocol):
    """A robot. One thread calls `read_observation` and `send_action`; `stop` may come from any, at any moment, twice.

    One that takes actions and does not move says so with `moves = False`: it is judged by where it is, not by where it
    was sent. One that knows what it cannot carry out (a joint's limit, a singularity) has `refuses(action)`, which says
    why, "" where it can; such an action is not sent, the run is held.
    """

    def read_observation(self) -> Observation:
        """The newest of everything, without waiting: a stream that is silent returns what it had, with its old time."""
        ...

    def send_action(self, action: np.ndarray) -> None:
        """Begin one period's motion: (7,) dx dy dz in mm, rotation vector in degrees (both base frame), gripper.

        It shifts the commanded pose: `vla_lib.episodes.poses.apply_action(commanded_pose, action)` gives the new one in
        mm and Euler degrees. Without a further action the robot stands when the period is over.
        """
        ...

    def stop(self, reason: str) -> None:
        """Stand still and take no further action. A stop that raises is tried again."""
        ...


class DryRunIO:
    """Reads from `source`, sends nothing: actions and stops become lines of a JSON-lines file and entries of `sent`."""

    moves = False

    def __init__(self, source: RobotIO, path: str | Path | None = None):
        self.source, self.path = source, path
        self.sent: list[dict[str, Any]] = []
        self._timestamp = 0.0
        self._lock = threading.Lock()

    def read_observation(self) -> Observation:
        observation = self.source.read_observation()
        self._timestamp = observation.timestamp
        return observation

    def send_action(self, action: np.ndarray) -> None:
        self._write({"timestamp": self._timestamp, "action": np.asarray(action, float).tolist()})

    def refuses(self, action: np.ndarray) -> str:
        refuses = getattr(self.source, "refuses", None)
        return str(refuses(action)) if refuses is not None else ""

    def stop(self, reason: str) -> None:
        self._write({"timestamp": self._timestamp, "stop": reason})

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            self.sent.append(line)
            if self.path is not None:
                append_jsonl(self.path, line)
