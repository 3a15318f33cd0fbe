"""Weights after each step in, their running average out: what is validated, saved and put on the robot."""

import copy
from collections.abc import Iterable

import torch

from vla_lib.policy.policy import Policy


class AveragedPolicy:
    """A second copy of the policy in eval mode, and of the LoRA weights of stage 2 (`adapter`).

    The decay grows to its full value with the steps, so early weights are soon forgotten.
    """

    def __init__(self, policy: Policy, decay: float, adapter: Iterable[torch.Tensor] = ()):
        self.decay = decay
        self.policy = copy.deepcopy(policy).eval().requires_grad_(False)
        self.adapter = [weight.detach().clone() for weight in adapter]

    @torch.no_grad()
    def update(self, policy: Policy, step: int, adapter: Iterable[torch.Tensor] = ()) -> None:
        """Take in the weights after optimiser step `step` (1, 2, ...). With decay 0 the average is the weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own, new = [*self.policy.parameters(), *self.adapter], [p.detach() for p in (*policy.parameters(), *adapter)]
        torch._foreach_lerp_(own, new, 1.0 - decay)
