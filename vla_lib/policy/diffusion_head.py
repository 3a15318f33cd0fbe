"""The diffusion model's head: a noisy normalised chunk (B, H, 7) and its timestep in, the noise in it out; DDIM turns that into chunks.

The noise is added to compressed motions, arcsinh(motion / 0.1 spreads) / 2: the motions that decide, near the goal, are a twentieth of a push,
and would drown in noise that is scaled to pushes.

The network's output is read as the velocity v = sqrt(a) noise - sqrt(1 - a) x0 (Salimans and Ho 2022), from which noise and x0 both follow
without a division: predicted as noise alone, x0 at the first sampling steps is the error of the noise divided by sqrt(a) ~ 0.005.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_lib.policy.config import ACTION_DIM, PolicyConfig

SMALL = 0.1  # spreads: up to here a motion counts in proportion, beyond by its logarithm
GAIN = 0.5  # brings compressed motions to about unit spread
SAMPLES = 8  # chunks whose median is the prediction: one alone carries the error of its noise
DRAWS = 4  # (noise, timestep) pairs a sample and training step: the context, the costly part, is computed once for all of them


class DiffusionHead(nn.Module):
    """DDPM with the cosine schedule; x0 is clamped to the range of the training actions while sampling."""

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
        self.register_buffer(
            "frequencies", torch.exp(-math.log(10_000.0) * torch.arange(half) / half), persistent=False
        )

    def _velocity(self, policy, context: list, noisy: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep.float()[:, None] * self.frequencies  # (B, W/2)
        time = self.time_in(torch.cat([phase.sin(), phase.cos()], -1))[:, None]  # (B, 1, W)
        queries = policy.queries + self.noisy_in(noisy) + time
        return self.out(policy.trunk(context, queries)).float()

    def _compressed(self, normaliser, action: Tensor) -> Tensor:
        """Normalised actions (..., 7) -> compressed motions, about 0 where the robot stands."""
        return GAIN * torch.asinh((action + self._still(normaliser)) / SMALL)

    def _expanded(self, normaliser, compressed: Tensor) -> Tensor:
        return SMALL * torch.sinh(compressed / GAIN) - self._still(normaliser)

    @staticmethod
    def _still(normaliser) -> Tensor:
        """What takes normalised actions to motions in spreads, (7,)."""
        return normaliser.action_mean / normaliser.action_std * normaliser.action_varies

    def loss(self, policy, context: list, target: Tensor, draws: dict) -> Tensor:
        """Squared error of the velocity (the noise's, divided by a), mean of the draws, (B, H, 7).

        `draws`: noise (B, DRAWS, H, 7), timestep (B, DRAWS) int64.
        """
        batch, count = draws["timestep"].shape
        target = self._compressed(policy.normaliser, target)
        target, noise, timestep = (
            target.repeat_interleave(count, 0),
            draws["noise"].flatten(0, 1),
            draws["timestep"].flatten(),
        )
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

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """What sampling starts from, (count, SAMPLES, H, 7)."""
        return torch.randn(count, SAMPLES, self.horizon, ACTION_DIM, generator=generator)

    def sample(self, policy, context: list, noise: Tensor, ddim_steps: int | None) -> Tensor:
        """Deterministic DDIM from each of N `noise` (B, N, H, 7) -> their chunks' median, element by element, normalised (B, H, 7)."""
        from diffusers import DDIMScheduler

        (batch, count), device = noise.shape[:2], noise.device
        most = policy.normaliser.action_range * torch.tensor([[-1.0], [1.0]], device=device)
        scheduler = DDIMScheduler(
            num_train_timesteps=self.timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=True,
            clip_sample_range=float(self._compressed(policy.normaliser, most).abs().max()),
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(ddim_steps or self.ddim_steps, device=device)
        x = noise.flatten(0, 1)
        for t in scheduler.timesteps:
            x = scheduler.step(self._velocity(policy, context, x, t.expand(batch * count)), t, x).prev_sample
        return self._expanded(policy.normaliser, x.unflatten(0, (batch, count))).quantile(0.5, 1)
