"""The policy: an observation batch in, `predict` gives (B, horizon, 7) actions in mm and degrees, `forward` the training losses.

    observation: vl_tokens (B, T, D), vl_mask (B, T) bool, vl_age_s (B,), state (B, 12),
                 sensor (B, S, 1026) raw units and sensor_mask (B,) bool where the policy uses the sensor
    action j of a chunk is the motion from step k+j to step k+j+1: translation (mm) and rotation vector (deg) in the base frame, gripper

The trunk is one transformer over [state, age, scene tokens, sensor tokens | action queries], which attends to itself and to the VL tokens. What stands
before the bar does not see the queries, so it is computed once for all noise draws and denoising steps (as in pi0, Black et al. 2024).
The regression head reads the action queries; the diffusion head first adds the noisy chunk and its timestep to them (DDPM, Ho et al.
2020, with the cosine schedule of Nichol and Dhariwal 2021; DDIM sampling, Song et al. 2021; schedulers from `diffusers`).
"""

import itertools

import torch
from torch import Tensor, nn

from vla_lib.core.errors import UserError
from vla_lib.policy.config import STATE_DIM, PolicyConfig
from vla_lib.policy.diffusion_head import DiffusionHead
from vla_lib.policy.normaliser import Normaliser
from vla_lib.policy.regression_head import RegressionHead
from vla_lib.policy.sensor_encoder import SensorEncoder
from vla_lib.policy.trunk import Block, SceneReader, VLMemory

AGE_SCALE_S = 0.3  # three steps of 100 ms: ages of the default reuse count lie within 0..1


class Policy(nn.Module):
    """See the module's docstring. Parameters and normalisation are float32; under autocast only the products are bf16."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.normaliser = Normaliser(config)
        self.memory = VLMemory(config.token_dim, width, config.token_view, config.token_row, config.token_col)
        self.scene = SceneReader(config.tokens, config.token_dim, width, config.dropout)
        self.state_in = nn.Sequential(nn.Linear(STATE_DIM, width), nn.GELU(), nn.Linear(width, width))
        self.age_in = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.queries = nn.Parameter(torch.randn(config.horizon, width) * 0.02)
        self.sensor_encoder = SensorEncoder(config) if config.uses_sensor else None
        self.gate = nn.Linear(2 * width, width) if config.uses_sensor and config.fusion == "gated" else None
        crossed = config.uses_sensor and config.fusion == "cross_attention"
        self.blocks = nn.ModuleList(Block(width, config.heads, config.dropout, crossed) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        head_class = {"regression": RegressionHead, "diffusion": DiffusionHead}[config.head]
        self.head = head_class(config)

    # ---- the trunk

    def context(self, observation: dict[str, Tensor]) -> list[dict[str, Tensor | None]]:
        """What does not depend on the actions: for each block the keys and values that action queries look at (see Block.keys).

        Raises UserError where the observation does not fit the policy (token layout, sensor window, missing keys).
        """
        self._check(observation)
        tokens, seen = self.normaliser.tokens(observation["vl_tokens"]), observation["vl_mask"]
        if not self.config.vl_enabled:
            seen = torch.zeros_like(seen)  # the learned stand-in of the memory is all that is left
        memory, memory_mask = self.memory(tokens, seen)  # (B, 1 + T, W)
        age = observation["vl_age_s"].float()[:, None] / AGE_SCALE_S
        prefix = [
            self.state_in(self.normaliser.state(observation["state"]))[:, None],
            self.age_in(torch.cat([age, age**2], -1))[:, None],
        ]
        prefix.append(self.scene(tokens, seen))
        sensor = None
        if self.sensor_encoder is not None:
            sensor = self.sensor_encoder(
                observation["sensor"], observation["sensor_mask"], self.normaliser
            )  # (B, N, W)
            if self.config.fusion == "concat":
                prefix.append(sensor)
        x = self._gated(torch.cat(prefix, 1), sensor)  # (B, P, W)
        context = [self.blocks[0].keys(x, memory, memory_mask, sensor) | {"tokens": sensor}]
        for before, block in itertools.pairwise(self.blocks):
            x = before(x, context[-1], is_prefix=True)
            context.append(block.keys(x, memory, memory_mask, sensor))
        return context

    def trunk(self, context: list[dict[str, Tensor | None]], queries: Tensor) -> Tensor:
        """Action queries (B * n, H, W), n for each observation in a row -> (B * n, H, W), informed by the context."""
        x = self._gated(queries, context[0]["tokens"])
        for block, keys in zip(self.blocks, context, strict=True):
            x = block(x, keys)
        return self.norm(x)

    def _gated(self, x: Tensor, sensor: Tensor | None) -> Tensor:
        """With gated fusion, the mean of the sensor tokens is added to each token of the sequence as far as the token asks for it."""
        if self.gate is None:
            return x
        summary = sensor.mean(1, keepdim=True).repeat_interleave(len(x) // len(sensor), 0).expand_as(x)
        return x + torch.sigmoid(self.gate(torch.cat([x, summary], -1))) * summary

    # ---- training and inference

    def forward(self, batch: dict[str, Tensor], draws: dict[str, Tensor] | None = None) -> Tensor:
        """Training: observation plus `action` (B, H, 7) -> loss of each step of each chunk, (B, H), unmasked, in normalised units.

        `draws` are the random numbers of the diffusion head (`draw`), given from outside so that they belong to the sample and not
        to the process. Padded steps (action_mask) are masked by the caller.
        """
        draws = draws or {}
        if self.training and "hide_view" in draws:
            batch = batch | {"vl_mask": batch["vl_mask"] & ~self._of_hidden_views(draws["hide_view"])}
        target = self.normaliser.action(batch["action"])
        error = self.head.loss(self, self.context(batch), target, draws)  # (B, H, 7)
        varies = self.normaliser.action_varies
        return (error.float() * varies).sum(-1) / varies.sum().clamp_min(1.0)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers that `count` samples need for one training forward, on the CPU: those of the head, and with view dropout
        `hide_view` (count, views) bool."""
        draws = self.head.draw(count, generator)
        if self.config.view_dropout:
            draws["hide_view"] = (
                torch.rand(count, len(self.config.views), generator=generator) < self.config.view_dropout
            )
        return draws

    def _of_hidden_views(self, hide_view: Tensor) -> Tensor:
        """(B, views) bool -> (B, T) bool, True for the tokens of those views; text tokens are never hidden."""
        shown = hide_view.new_zeros(hide_view.shape[0], 1)
        return torch.cat([shown, hide_view], 1)[:, self.memory.view_index]  # index 0: text

    @torch.no_grad()
    def predict(
        self,
        observation: dict[str, Tensor],
        generator: torch.Generator | None = None,
        ddim_steps: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Observation batch -> (B, horizon, 7) actions: mm, degrees (rotation vector), gripper; float32.

        The diffusion head samples a chunk with DDIM in `ddim_steps` (default: the policy's own) from each of N `noise` (B, N, horizon, 7) and
        returns their median, element by element. Default: what a CPU `generator` draws for its usual number of samples (default: seed 0, so
        that the same observation gives the same chunk). The module must be in eval mode; raises RuntimeError otherwise.
        """
        if self.training:
            raise RuntimeError("predict() needs eval mode: call policy.eval() first")
        device = self.queries.device
        observation = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in observation.items()}
        if noise is None:
            noise = self.head.noise(observation["state"].shape[0], generator or torch.Generator().manual_seed(0))
        noise = None if noise is None else noise.to(device)
        return self.normaliser.raw_action(self.head.sample(self, self.context(observation), noise, ddim_steps))

    def _check(self, observation: dict[str, Tensor]) -> None:
        c = self.config
        tokens = observation["vl_tokens"]
        if tuple(tokens.shape[1:]) != (c.tokens, c.token_dim):
            raise UserError(
                f"The policy was trained on {c.tokens} VL tokens of width {c.token_dim} (views {', '.join(c.views)}), the observation has "
                f"{tokens.shape[1]} of width {tokens.shape[2]}; use the views and the VL cache that it was trained with."
            )
        if c.uses_sensor:
            if "sensor" not in observation:
                raise UserError("The policy was trained with the sensor, but the observation has none.")
            if observation["sensor"].shape[1] != c.sensor_window_size:
                raise UserError(
                    f"The policy reads {c.sensor_window_size} sensor samples, the observation has {observation['sensor'].shape[1]}."
                )

    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters())
