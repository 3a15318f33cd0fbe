"""The heads: action queries (B * n, H, W) that the trunk has informed become a normalised chunk (B, H, 7).

- RegressionHead (async model): the queries are read out as the chunk.
- DiffusionHead: the queries carry a noisy chunk and its timestep; what is read out takes the noise off it (DDPM, Ho
  et al. 2020, cosine schedule of Nichol and Dhariwal 2021), step by step when sampling (DDIM, Song et al. 2021).

Each is given `read`, the trunk over one batch's context: `read(*added)` adds (B * n, H, W) tensors to the learned
queries, n of them to each observation in a row, and returns what the trunk makes of them, (B * n, H, W)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_lib.policy.config import ACTION_DIM, PolicyConfig
from vla_lib.policy.normaliser import Normaliser

Read = Callable[..., Tensor]
Draws = dict[str, Tensor]  # the random numbers of a training forward, given from outside

ABSOLUTE_FROM = 0.1  # standard deviations beyond which an error counts by its size, not its square
SMALL = 0.1  # spreads: up to here a motion counts in proportion, beyond by its logarithm
GAIN = 0.5  # brings compressed motions to about unit spread
SAMPLES = 8  # chunks whose median is the prediction: one alone carries the error of its noise
DRAWS = 4  # (noise, timestep) pairs a sample and step: the context, the costly part, is computed once for all of them


class RegressionHead(nn.Module):
    """A linear read-out that starts at zero, which is the mean action."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.width, ACTION_DIM)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def loss(self, read: Read, normaliser: Normaliser, target: Tensor, draws: Draws) -> Tensor:
        """Absolute error, smoothed near zero, of each element, (B, H, 7).

        Motions near the goal are a tenth of a usual one and pushes are several: squared errors would learn the pushes.
        """
        return F.smooth_l1_loss(self.out(read()).float(), target, reduction="none", beta=ABSOLUTE_FROM)

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Regression draws nothing."""
        return {}

    def noise(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Nor does it start from noise."""
        return None

    def sample(self, read: Read, normaliser: Normaliser, noise: Tensor | None, ddim_steps: int | None) -> Tensor:
        """The normalised chunk, (B, H, 7)."""
        return self.out(read()).float()


class DiffusionHead(nn.Module):
    """DDPM with the cosine schedule; x0 is clamped to the range of the training actions while sampling.

    Noise is added to compressed motions, arcsinh(motion / 0.1 spreads) / 2: those that decide, near the goal, are a
    twentieth of a push, and would drown in noise that is scaled to pushes. The output is read as the velocity v =
    sqrt(a) noise - sqrt(1 - a) x0 (Salimans and Ho 2022), from which noise and x0 follow without a division:
    predicted as noise alone, x0 at the first sampling steps is the error of the noise divided by sqrt(a) ~ 0.005."""

    frequencies: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        from diffusers import DDPMScheduler

        self.horizon, self.timesteps, self.ddim_steps = config.horizon, config.diffusion_timesteps, config.ddim_steps
        self.schedule = {
            "num_train_timesteps": self.timesteps,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
        }
        self.scheduler: Any = DDPMScheduler(**self.schedule)
        width = config.width
        self.noisy_in = nn.Linear(ACTION_DIM, width)
        self.time_in = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.out = nn.Linear(width, ACTION_DIM)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        half = width // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def velocity(self, read: Read, noisy: Tensor, timestep: Tensor) -> Tensor:
        """Noisy chunks (B * n, H, 7) at timesteps (B * n,) -> their velocities (B * n, H, 7)."""
        phase = timestep.float()[:, None] * self.frequencies  # (B * n, W/2)
        time = self.time_in(torch.cat([phase.sin(), phase.cos()], -1))[:, None]  # (B * n, 1, W)
        return self.out(read(self.noisy_in(noisy), time)).float()

    def compressed(self, normaliser: Normaliser, action: Tensor) -> Tensor:
        """Normalised actions (..., 7) -> compressed motions, about 0 where the robot does not move."""
        return GAIN * torch.asinh((action + _no_motion(normaliser)) / SMALL)

    def loss(self, read: Read, normaliser: Normaliser, target: Tensor, draws: Draws) -> Tensor:
        """Squared error of the velocity (the noise's, divided by a), mean of the draws, (B, H, 7).

        `draws`: noise (B, DRAWS, H, 7), timestep (B, DRAWS) int64.
        """
        batch, count = draws["timestep"].shape
        noise, timestep = draws["noise"].flatten(0, 1), draws["timestep"].flatten()  # (B * DRAWS, ...)
        target = self.compressed(normaliser, target).repeat_interleave(count, 0)
        noisy = self.scheduler.add_noise(target, noise, timestep)
        wanted = self.scheduler.get_velocity(target, noise, timestep)
        error = F.mse_loss(self.velocity(read, noisy, timestep), wanted, reduction="none")
        return error.unflatten(0, (batch, count)).mean(1)

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Noise (count, DRAWS, H, 7) and timesteps (count, DRAWS) for one training forward."""
        return {
            "noise": torch.randn(count, DRAWS, self.horizon, ACTION_DIM, generator=generator),
            "timestep": torch.randint(self.timesteps, (count, DRAWS), generator=generator),
        }

    def noise(self, count: int, generator: torch.Generator) -> Tensor | None:
        """What sampling starts from, (count, SAMPLES, H, 7)."""
        return torch.randn(count, SAMPLES, self.horizon, ACTION_DIM, generator=generator)

    def sample(self, read: Read, normaliser: Normaliser, noise: Tensor | None, ddim_steps: int | None) -> Tensor:
        """Deterministic DDIM from each of N `noise` (B, N, H, 7) -> the chunks' median by element, normalised (B, H,
        7)."""
        from diffusers import DDIMScheduler

        assert noise is not None
        (batch, count), device = noise.shape[:2], noise.device
        most = normaliser.action_range * torch.tensor([[-1.0], [1.0]], device=device)
        limit = float(self.compressed(normaliser, most).abs().max())
        scheduler: Any = DDIMScheduler(
            **self.schedule, clip_sample=True, clip_sample_range=limit, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(ddim_steps or self.ddim_steps, device=device)
        x = noise.flatten(0, 1)  # (B * N, H, 7)
        for t in scheduler.timesteps:
            x = scheduler.step(self.velocity(read, x, t.expand(batch * count)), t, x).prev_sample
        chunks = SMALL * torch.sinh(x.unflatten(0, (batch, count)) / GAIN) - _no_motion(normaliser)
        return chunks.quantile(0.5, 1)


def _no_motion(normaliser: Normaliser) -> Tensor:
    """What takes normalised actions to motions in spreads, (7,)."""
    return normaliser.action_mean / normaliser.action_std * normaliser.action_varies
