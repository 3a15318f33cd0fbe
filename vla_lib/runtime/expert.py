"""A trained policy as the runner's expert: features with their age, state and sensor window in, a chunk (H, 7) in mm and degrees out.

The observation batch is the one of vla_lib.training.samples.SampleSet.batch with B = 1; the same keys, types, units and rule of masking.
"""

from typing import Any, Literal, Protocol

import numpy as np
import torch

from vla_lib.core.errors import UserError
from vla_lib.policy.config import SENSOR_CHANNELS
from vla_lib.policy.policy import Policy
from vla_lib.runtime.vlm_worker import Features

Array = np.ndarray[Any, Any]


class Expert(Protocol):
    """What the runner asks of an expert. `sensor_window`: samples that it reads, 0 for none."""

    sensor_window: int

    def __call__(self, features: Features, age_s: float, state: Array, window: Array | None) -> Array: ...


HIDDEN = {"nothing": (), "vl": ("vl_mask",), "sensor": ("sensor", "sensor_mask")}


def hidden(observation: dict[str, torch.Tensor], without: str) -> dict[str, torch.Tensor]:
    """The observation batch with the VL tokens ("vl": every view and the text) or the sensor window ("sensor") missing, as in training."""
    return observation | {name: torch.zeros_like(observation[name]) for name in HIDDEN[without] if name in observation}


class PolicyExpert:
    """See the module's docstring. `without`: the input that is `hidden`.

    A diffusion policy draws new noise at every call, from `seed` on: the same noise each time would push every action the same way.
    """

    def __init__(
        self,
        policy: Policy,
        without: Literal["nothing", "vl", "sensor"] = "nothing",
        ddim_steps: int | None = None,
        seed: int = 0,
    ):
        if without not in HIDDEN:
            raise UserError(f"A policy can be run without nothing, vl or sensor, not without {without!r}.")
        self.policy, self.without, self.ddim_steps = policy, without, ddim_steps
        self.generator = torch.Generator().manual_seed(seed)
        self.sensor_window = policy.config.sensor_window_size if policy.config.sensor_enabled else 0

    def observation(
        self, features: Features, age_s: float, state: Array, window: Array | None
    ) -> dict[str, torch.Tensor]:
        """The batch of one; `window` (S, 1026) or None where it is not full."""
        batch = {
            "vl_tokens": torch.as_tensor(features.tokens)[None],
            "vl_mask": torch.as_tensor(features.mask, dtype=torch.bool)[None],
            "vl_age_s": torch.tensor([age_s], dtype=torch.float32),
            "state": torch.as_tensor(np.asarray(state, np.float32))[None],
        }
        if self.sensor_window:
            missing = np.zeros((self.sensor_window, SENSOR_CHANNELS), np.float32)
            batch["sensor"] = torch.from_numpy(np.asarray(missing if window is None else window, np.float32))[None]
            batch["sensor_mask"] = torch.tensor([window is not None])
        return hidden(batch, self.without)

    def __call__(self, features: Features, age_s: float, state: Array, window: Array | None) -> Array:
        """(H, 7) float32 actions."""
        with torch.inference_mode():
            observation = self.observation(features, age_s, state, window)
            chunk = self.policy.predict(observation, self.generator, self.ddim_steps)
        return chunk[0].float().cpu().numpy()

    def usual_step(self) -> tuple[float, float]:
        """Norms of a fast step of the training data, mean plus three spreads of each axis: mm and degrees in one action period."""
        normaliser = self.policy.normaliser
        fast = (normaliser.action_mean.abs() + 3 * normaliser.action_std * normaliser.action_varies).cpu().numpy()
        return float(np.linalg.norm(fast[:3])), float(np.linalg.norm(fast[3:6]))
