"""Raw units in, normalised tensors out, and back: statistics of the training episodes that live and travel inside the policy."""

import torch
from torch import Tensor, nn

from vla_lib.policy.config import ACTION_DIM, SENSOR_CHANNELS, STATE_DIM, PolicyConfig

STD_FLOOR = 1e-3  # mm, degrees: below it a spread is noise of the arithmetic, and dividing by it would blow noise up
STATE_LIMIT = 5.0  # a state outside the training range is held here instead of driving the trunk anywhere


class Normaliser(nn.Module):
    """Buffers only, all float32. `load_statistics` fills them once; afterwards they are part of the state dict.

    A constant action dimension (the gripper) normalises to 0 and comes back as its constant.
    """

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.register_buffer("action_mean", torch.zeros(ACTION_DIM))
        self.register_buffer("action_std", torch.ones(ACTION_DIM))
        self.register_buffer(
            "action_varies", torch.ones(ACTION_DIM)
        )  # 1 where the dimension is learnt, 0 where it is constant
        self.register_buffer("action_range", torch.ones(()))  # largest normalised action: what x0 is clamped to
        self.register_buffer("state_mean", torch.zeros(STATE_DIM))
        self.register_buffer("state_std", torch.ones(STATE_DIM))
        self.register_buffer("token_mean", torch.zeros(config.tokens, config.token_dim))
        self.register_buffer("token_std", torch.ones(config.token_dim))
        if config.uses_sensor:
            self.register_buffer("sensor_mean", torch.zeros(SENSOR_CHANNELS))
            self.register_buffer("sensor_std", torch.ones(SENSOR_CHANNELS))

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Copy `{"action": (mean, std), ...}` as made by training.statistics into the buffers; zero spreads become harmless.

        Keys: action_mean, action_std (7,), action_range (), state_mean, state_std (12,), token_mean (T, D), token_std (D,),
        sensor_mean, sensor_std (1026,) where the policy has a sensor.
        """
        action_std = statistics["action_std"]
        varies = action_std > 1e-6
        self.action_varies.copy_(varies.float())
        self.action_mean.copy_(statistics["action_mean"])
        self.action_std.copy_(torch.where(varies, action_std.clamp_min(STD_FLOOR), 1.0))
        self.action_range.copy_(torch.as_tensor(statistics["action_range"]).clamp_min(1.0))
        self.state_mean.copy_(statistics["state_mean"])
        self.state_std.copy_(torch.where(statistics["state_std"] > STD_FLOOR, statistics["state_std"], 1.0))
        self.token_mean.copy_(statistics["token_mean"])
        self.token_std.copy_(torch.where(statistics["token_std"] > 1e-6, statistics["token_std"], 1.0))
        if hasattr(self, "sensor_mean"):
            self.sensor_mean.copy_(statistics["sensor_mean"])
            self.sensor_std.copy_(torch.where(statistics["sensor_std"] > 1e-6, statistics["sensor_std"], 1.0))

    def action(self, action: Tensor) -> Tensor:
        """(..., 7) mm, deg -> normalised."""
        return (action.float() - self.action_mean) / self.action_std * self.action_varies

    def raw_action(self, normalised: Tensor) -> Tensor:
        """(..., 7) normalised -> mm, deg; constant dimensions are exact."""
        return normalised.float() * self.action_varies * self.action_std + self.action_mean

    def state(self, state: Tensor) -> Tensor:
        """(..., 12) deg, mm -> normalised, held within +-5."""
        return ((state.float() - self.state_mean) / self.state_std).clamp(-STATE_LIMIT, STATE_LIMIT)

    def tokens(self, tokens: Tensor) -> Tensor:
        """(B, T, D) of any float type -> float32; the mean of each token position is the still scene, what is left is what moves."""
        return (tokens.float() - self.token_mean) / self.token_std
