"""The diffusion model's head: a noisy normalised chunk (B, H, 7) and its timestep in, the noise in it out; DDIM turns that into chunks.

The network's output is read as the velocity v = sqrt(a) noise - sqrt(1 - a) x0 (Salimans and Ho 2022), from which noise and x0 both follow
without a division: predicted as noise alone, x0 at the first sampling steps is the error of the noise divided by sqrt(a) ~ 0.005.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_lib.policy.config import ACTION_DIM, PolicyConfig

DRAWS = 4  # (noise, timestep) pairs a sample and training step: the context, the costly part, is computed once for all of them


class DiffusionHead(nn.Module):
    """DDPM with the cosine schedule; x0 is clamped to the range of the normalised training actions while sampling."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        from diffusers import DDPMScheduler

        self.horizon, self.timesteps, self.ddim_steps = config.horizon, config.diffusion_timesteps, config.ddim_steps
        self.scheduler = DDPMScheduler(
            num_train_timesteps=self.timesteps, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        )
        width = config.width
        self.noisy_in = nn.Linear(ACTION_DIM, width)
        self.time_in = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.out = nn.Linear(width, ACTION_DIM)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        half = width // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000.0) * torch.arange(half) / half), persistent=False)

    def _velocity(self, policy, context: dict, noisy: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep.float()[:, None] * self.frequencies  # (B, W/2)
        time = self.time_in(torch.cat([phase.sin(), phase.cos()], -1))[:, None]  # (B, 1, W)
        queries = policy.queries + self.noisy_in(noisy) + time
        return self.out(policy.trunk(context, queries)).float()

    def loss(self, policy, context: dict, target: Tensor, draws: dict) -> Tensor:
        """Squared error of the velocity (the noise's, divided by a), mean of the draws, (B, H, 7).

        `draws`: noise (B, DRAWS, H, 7), timestep (B, DRAWS) int64.
        """
        batch, count = draws["timestep"].shape
        context = context | {"prefix": context["prefix"].repeat_interleave(count, 0)}  # the trunk shares memory and sensor tokens
        target, noise, timestep = target.repeat_interleave(count, 0), draws["noise"].flatten(0, 1), draws["timestep"].flatten()
        noisy = self.scheduler.add_noise(target, noise, timestep)
        wanted = self.scheduler.get_velocity(target, noise, timestep)
        error = F.mse_loss(self._velocity(policy, context, noisy, timestep), wanted, reduction="none")
        return error.unflatten(0, (batch, count)).mean(1)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise (count, DRAWS, H, 7) and timesteps (count, DRAWS) for one training forward."""
        return {
            "noise": torch.randn(count, DRAWS, self.horizon, ACTION_DIM, generator=generator),
            "timestep": torch.randint(self.timesteps, (count, DRAWS), generator=generator),
        }

    def sample(self, policy, context: dict, noise: Tensor, ddim_steps: int | None) -> Tensor:
        """Deterministic DDIM from `noise` (B, H, 7) -> normalised chunk (B, H, 7)."""
        from diffusers import DDIMScheduler

        device, batch = context["prefix"].device, context["prefix"].shape[0]
        scheduler = DDIMScheduler(
            num_train_timesteps=self.timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=True,
            clip_sample_range=float(policy.normaliser.action_range),
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(ddim_steps or self.ddim_steps, device=device)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(self._velocity(policy, context, x, t.expand(batch)), t, x).prev_sample
        return x
