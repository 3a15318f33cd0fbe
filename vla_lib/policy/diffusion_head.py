"""The diffusion model's head: a noisy normalised chunk (B, H, 7) and its timestep in, the noise in it out; DDIM turns that into chunks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_lib.policy.config import ACTION_DIM, PolicyConfig


class DiffusionHead(nn.Module):
    """Noise prediction with the cosine schedule; x0 is clamped to the range of the normalised training actions while sampling."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        from diffusers import DDPMScheduler

        self.horizon, self.timesteps, self.ddim_steps = config.horizon, config.diffusion_timesteps, config.ddim_steps
        self.scheduler = DDPMScheduler(num_train_timesteps=self.timesteps, beta_schedule="squaredcos_cap_v2", clip_sample=False)
        width = config.width
        self.noisy_in = nn.Linear(ACTION_DIM, width)
        self.time_in = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.out = nn.Linear(width, ACTION_DIM)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        half = width // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000.0) * torch.arange(half) / half), persistent=False)

    def _noise(self, policy, context: dict, noisy: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep.float()[:, None] * self.frequencies  # (B, W/2)
        time = self.time_in(torch.cat([phase.sin(), phase.cos()], -1))[:, None]  # (B, 1, W)
        queries = policy.queries + self.noisy_in(noisy) + time
        return self.out(policy.trunk(context, queries)).float()

    def loss(self, policy, context: dict, target: Tensor, draws: dict) -> Tensor:
        """Squared error of the predicted noise, (B, H, 7); `draws`: noise (B, H, 7), timestep (B,) int64."""
        noisy = self.scheduler.add_noise(target, draws["noise"], draws["timestep"])
        return F.mse_loss(self._noise(policy, context, noisy, draws["timestep"]), draws["noise"], reduction="none")

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise (count, H, 7) and timesteps (count,) for one training forward."""
        return {
            "noise": torch.randn(count, self.horizon, ACTION_DIM, generator=generator),
            "timestep": torch.randint(self.timesteps, (count,), generator=generator),
        }

    def sample(self, policy, context: dict, noise: Tensor, ddim_steps: int | None) -> Tensor:
        """Deterministic DDIM from `noise` (B, H, 7) -> normalised chunk (B, H, 7)."""
        from diffusers import DDIMScheduler

        device, batch = context["prefix"].device, context["prefix"].shape[0]
        scheduler = DDIMScheduler(
            num_train_timesteps=self.timesteps,
            beta_schedule="squaredcos_cap_v2",
            clip_sample=True,
            clip_sample_range=float(policy.normaliser.action_range),
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(ddim_steps or self.ddim_steps, device=device)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(self._noise(policy, context, x, t.expand(batch)), t, x).prev_sample
        return x
