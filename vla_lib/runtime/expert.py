"""The fast expert: a policy that makes action chunks (H, 7), mm and degrees, and the plan by which they are executed.

Its observation is vla_lib.training.samples.SampleSet.batch with B = 1: the same keys, types, units and rule of masking.
"""

from typing import Literal, Protocol

import numpy as np
import torch

from vla_lib.core.errors import UserError
from vla_lib.policy.config import SENSOR_CHANNELS
from vla_lib.policy.goal import goal_difference
from vla_lib.policy.policy import Policy
from vla_lib.runtime.vlm_worker import Features


class Expert(Protocol):
    """What the runner asks of an expert. `sensor_window`: samples that it reads, 0 for none."""

    sensor_window: int

    def __call__(
        self, features: Features, age_s: float, state: np.ndarray, window: np.ndarray | None
    ) -> np.ndarray: ...


GOALS = 6  # VLM ticks whose goals are averaged: 2 s at 3.33 Hz
Input = Literal["nothing", "vl", "sensor"]
HIDDEN: dict[Input, tuple[str, ...]] = {"nothing": (), "vl": ("vl_mask",), "sensor": ("sensor", "sensor_mask")}


def hidden(observation: dict[str, torch.Tensor], without: Input) -> dict[str, torch.Tensor]:
    """The observation batch without VL tokens ("vl": views and text) or sensor window: missing as in training."""
    return observation | {name: torch.zeros_like(observation[name]) for name in HIDDEN[without] if name in observation}


class PolicyExpert:
    """A policy as an Expert. `without`: the input that is `hidden`; `ddim_steps`: of a diffusion policy, None: its own.

    It draws new noise at every call, from `seed` on: the same noise each time would push every action the same way.
    The goal stands still, so it is the mean of what the newest `GOALS` pictures tell.
    """

    def __init__(self, policy: Policy, without: Input = "nothing", ddim_steps: int | None = None, seed: int = 0):
        if without not in HIDDEN:
            raise UserError(f"A policy can be run without nothing, vl or sensor, not without {without!r}.")
        self.policy, self.without, self.ddim_steps = policy, without, ddim_steps
        self.generator = torch.Generator().manual_seed(seed)
        self.vl_ages_s = 0.0, 0.0  # of VL features in training, 0, 0: not known; beyond them the runner says so
        self.sensor_window = policy.config.sensor_window_size if policy.config.sensor_enabled else 0
        self._read: Features | None = None  # whose goal is the newest of `_goals`, each (1, 3)
        self._goals: list[torch.Tensor] = []

    def observation(
        self, features: Features, age_s: float, state: np.ndarray, window: np.ndarray | None
    ) -> dict[str, torch.Tensor]:
        """The batch of one. `state` (12,); `window` (S, 1026), None where it is not full: masked, as in training."""
        batch = {
            "vl_tokens": torch.as_tensor(features.tokens)[None],
            "vl_mask": torch.as_tensor(features.mask, dtype=torch.bool)[None],
            "vl_age_s": torch.tensor([age_s], dtype=torch.float32),
            "vl_state": torch.as_tensor(np.asarray(features.state, np.float32))[None],
            "state": torch.as_tensor(np.asarray(state, np.float32))[None],
        }
        if self.sensor_window:
            missing = np.zeros((self.sensor_window, SENSOR_CHANNELS), np.float32)
            batch["sensor"] = torch.from_numpy(np.asarray(missing if window is None else window, np.float32))[None]
            batch["sensor_mask"] = torch.tensor([window is not None])
        return hidden(batch, self.without)

    def __call__(self, features: Features, age_s: float, state: np.ndarray, window: np.ndarray | None) -> np.ndarray:
        """(H, 7) float32 actions."""
        with torch.inference_mode():
            observation = self.observation(features, age_s, state, window)
            goal = self._goal(observation, features)
            chunk = self.policy.predict(observation, self.generator, self.ddim_steps, goal=goal)
        return chunk[0].float().cpu().numpy()

    def _goal(self, observation: dict[str, torch.Tensor], features: Features) -> torch.Tensor | None:
        if self._read is None or features.step <= self._read.step and features is not self._read:
            self._goals = []  # another run has begun
        if features is not self._read and (goal := self.policy.goal(observation)) is not None:
            self._goals = [*self._goals, goal][-GOALS:]
        self._read = features
        if not self._goals:
            return None
        newest = self._goals[-1]
        return newest + goal_difference(torch.stack(self._goals), newest).mean(0)

    def usual_step(self) -> tuple[float, float]:
        """Norms of a fast step of the training data (mean plus three spreads of each axis): mm, degrees a period."""
        statistics = self.policy.normaliser.state_dict()
        mean, std, varies = (statistics[f"action_{name}"].cpu().numpy() for name in ("mean", "std", "varies"))
        fast = np.abs(mean) + 3 * std * varies
        return float(np.linalg.norm(fast[:3])), float(np.linalg.norm(fast[3:6]))


class ChunkPlan:
    """The newest chunk, of which `steps` actions are executed before a new one. Step numbers count action periods."""

    def __init__(self, steps: int):
        self.steps = steps
        self.clear()

    def clear(self) -> None:
        """Forget the chunk: its motion did not happen. (After a missed deadline it stays: it bridges a slow expert.)"""
        self._begin, self._chunk = 0, np.empty((0, 7))

    def wants_chunk(self, step: int) -> bool:
        """Whether the expert is to be asked at this step."""
        return step - self._begin >= min(self.steps, len(self._chunk))

    def add(self, step: int, chunk: np.ndarray) -> None:
        """Take a chunk (H, 7) whose first action begins at `step`."""
        self._begin, self._chunk = step, np.asarray(chunk, float)

    def action(self, step: int) -> np.ndarray | None:
        """(7,) action of a step, None where the chunk does not reach that far."""
        ahead = step - self._begin
        return self._chunk[ahead].copy() if ahead < len(self._chunk) else None
