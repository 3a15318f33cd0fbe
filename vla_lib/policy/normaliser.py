"""The normaliser: raw units to normalised tensors and back, by statistics that travel inside the policy.

action (..., 7) mm, deg <-> (..., 7) in standard deviations     state (..., 12) -> within +-5 standard deviations
VL tokens (B, T, D) -> what moves: each token position has its own mean, the still scene
"""

import torch
from torch import Tensor, nn

from vla_lib.policy.config import ACTION_DIM, SENSOR_CHANNELS, STATE_DIM, PolicyConfig

STD_FLOOR = 1e-3  # mm, degrees: below it a spread is noise of the arithmetic, and dividing by it would blow noise up
VARIES = 1e-6  # a spread up to here is that of a constant
STATE_LIMIT = 5.0  # a state outside the training range is held here instead of driving the trunk anywhere


class Normaliser(nn.Module):
    """Buffers only, all float32. `load_statistics` fills them once; afterwards they are part of the state dict.

    A constant action dimension (the gripper) normalises to 0 and comes back as its constant.
    """

    action_mean: Tensor
    action_std: Tensor
    action_varies: Tensor  # 1 where the dimension is learnt, 0 where it is constant
    action_range: Tensor  # largest normalised action: what targets and x0 are held to
    state_mean: Tensor
    state_std: Tensor
    goal_mean: Tensor
    goal_std: Tensor
    token_mean: Tensor
    token_std: Tensor
    sensor_mean: Tensor
    sensor_std: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.register_buffer("action_mean", torch.zeros(ACTION_DIM))
        self.register_buffer("action_std", torch.ones(ACTION_DIM))
        self.register_buffer("action_varies", torch.ones(ACTION_DIM))
        self.register_buffer("action_range", torch.ones(()))
        self.register_buffer("state_mean", torch.zeros(STATE_DIM))
        self.register_buffer("state_std", torch.ones(STATE_DIM))
        self.register_buffer("goal_mean", torch.zeros(3))
        self.register_buffer("goal_std", torch.ones(3))
        self.register_buffer("token_mean", torch.zeros(config.tokens, config.token_dim))
        self.register_buffer("token_std", torch.ones(config.token_dim))
        if config.sensor_enabled:
            self.register_buffer("sensor_mean", torch.zeros(SENSOR_CHANNELS))
            self.register_buffer("sensor_std", torch.ones(SENSOR_CHANNELS))

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Copy what training.samples made into the buffers; zero spreads become harmless.

        Keys: action_mean, action_std (7,), action_range (), state_mean, state_std (12,), goal_mean, goal_std (3,),
        token_mean (T, D), token_std (D,), sensor_mean, sensor_std (1026,) where the policy has a sensor."""
        varies = statistics["action_std"] > VARIES
        harmless = {
            **statistics,
            "action_varies": varies.float(),
            "action_std": torch.where(varies, statistics["action_std"].clamp_min(STD_FLOOR), 1.0),
            "action_range": statistics["action_range"].clamp_min(1.0),
        }
        floors = {"state_std": STD_FLOOR, "goal_std": STD_FLOOR, "token_std": VARIES, "sensor_std": VARIES}
        for name, floor in floors.items():
            if name in statistics:
                harmless[name] = torch.where(statistics[name] > floor, statistics[name], 1.0)
        for name, buffer in self.named_buffers():
            buffer.copy_(harmless[name])

    def action(self, action: Tensor) -> Tensor:
        """(..., 7) mm, deg -> normalised."""
        return (action.float() - self.action_mean) / self.action_std * self.action_varies

    def target(self, action: Tensor) -> Tensor:
        """As `action`, held within `action_range`: an action that cannot be true pulls no harder than the farthest."""
        return self.action(action).clamp(-self.action_range, self.action_range)

    def raw_action(self, normalised: Tensor) -> Tensor:
        """(..., 7) normalised -> mm, deg; constant dimensions are exact."""
        return normalised.float() * self.action_varies * self.action_std + self.action_mean

    def state(self, state: Tensor) -> Tensor:
        """(..., 12) deg, mm -> normalised, held within +-5."""
        return ((state.float() - self.state_mean) / self.state_std).clamp(-STATE_LIMIT, STATE_LIMIT)

    def raw_goal(self, normalised: Tensor) -> Tensor:
        """(..., 3) normalised -> mm, deg."""
        return normalised.float() * self.goal_std + self.goal_mean

    def tokens(self, tokens: Tensor) -> Tensor:
        """(B, T, D) of any float type -> float32, in spreads about the mean of each token position."""
        return (tokens.float() - self.token_mean) / self.token_std
