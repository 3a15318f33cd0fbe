"""The async model's head: action queries through the trunk in, the normalised chunk (B, H, 7) out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_lib.policy.config import ACTION_DIM, PolicyConfig

ABSOLUTE_FROM = 0.1  # standard deviations beyond which an error counts by its size, not its square


class RegressionHead(nn.Module):
    """A linear read-out that starts at zero, which is the mean action."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.out = nn.Linear(config.width, ACTION_DIM)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _chunk(self, policy, context: list) -> Tensor:
        queries = policy.queries.expand(len(context[0]["mask"]), -1, -1)
        return self.out(policy.trunk(context, queries)).float()

    def loss(self, policy, context: list, target: Tensor, draws: dict) -> Tensor:
        """Absolute error, smoothed near zero, of each element, (B, H, 7).

        Motions near the goal are a tenth of a usual one and pushes are several: squared errors would learn the pushes and miss the goal.
        """
        return F.smooth_l1_loss(self._chunk(policy, context), target, reduction="none", beta=ABSOLUTE_FROM)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Regression draws nothing."""
        return {}

    def noise(self, count: int, generator: torch.Generator) -> None:
        """Nor does it start from noise."""

    def sample(self, policy, context: list, noise: Tensor | None, ddim_steps: int | None) -> Tensor:
        """The normalised chunk, (B, H, 7)."""
        return self._chunk(policy, context)
