"""The policy: an observation batch becomes (B, horizon, 7) actions in mm and degrees (`predict`), or the training
losses.

    observation: vl_tokens (B, T, D), vl_mask (B, T) bool, vl_state (B, 12): the state at the VL tokens' pictures,
                 state (B, 12) now; sensor (B, S, 1026) raw units and sensor_mask (B,) bool where it uses the sensor
    action j of a chunk is the motion from step k+j to step k+j+1: translation (mm) and rotation vector (deg) in the
    base frame, gripper

- VL tokens become a goal (goal.py), and the goal a token: the bottleneck that makes few scenes and old pictures do.
- One transformer over [state, goal, sensor tokens | action queries], which attends to itself.
- What is before the bar does not see the queries, so it is computed once for all noise draws and denoising steps (as
  in pi0, Black et al. 2024).
- A head (heads.py) reads the action queries: regression for the async model, diffusion for the other.
- The normaliser lives inside: raw units in, raw units out.
- Nothing is read that a robot would not know at that moment."""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_lib.core.errors import UserError
from vla_lib.policy.config import STATE_DIM, PolicyConfig
from vla_lib.policy.goal import LOSS_WEIGHT, TIP_WEIGHT, GoalReader, GoalToken, goal_difference
from vla_lib.policy.heads import ABSOLUTE_FROM, DiffusionHead, Draws, RegressionHead
from vla_lib.policy.normaliser import Normaliser
from vla_lib.policy.sensor_encoder import SensorEncoder
from vla_lib.policy.trunk import Block


class Policy(nn.Module):
    """See the module's docstring. Parameters and normalisation are float32; under autocast only the products are
    bf16."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.normaliser = Normaliser(config)
        self.goal_reader = GoalReader(config) if config.vl_enabled else None
        self.goal_token = GoalToken(config) if config.vl_enabled else None
        self.state_in = nn.Sequential(nn.Linear(STATE_DIM, width), nn.GELU(), nn.Linear(width, width))
        self.queries = nn.Parameter(torch.randn(config.horizon, width) * 0.02)
        self.sensor_encoder = SensorEncoder(config) if config.sensor_enabled else None
        blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.blocks: list[Block] = blocks  # type: ignore[assignment]
        self.norm = nn.LayerNorm(width)
        self.head = RegressionHead(config) if config.head == "regression" else DiffusionHead(config)

    def normalised_goal(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the episode will end by the VL tokens, (B, 3) in spreads, and how far off each view shows the tip
        (B, V, 3). Raises UserError as `context`."""
        assert self.goal_reader is not None
        tokens, state = self.normaliser.tokens(observation["vl_tokens"]), self.normaliser.state(observation["vl_state"])
        if self.training and self.config.token_noise:  # torch's own numbers, as for dropout: seeded in each step
            tokens = tokens + self.config.token_noise * torch.randn_like(tokens)
        return self.goal_reader(tokens, observation["vl_mask"], state)

    @torch.no_grad()
    def goal(self, observation: dict[str, Tensor]) -> Tensor | None:
        """Where the episode will end by the VL tokens, (B, 3): x, y (mm), yaw (deg), base frame; None without VL."""
        if self.goal_reader is None:
            return None
        self._check(observation)
        return self.normaliser.raw_goal(self.normalised_goal(observation)[0])

    def context(self, observation: dict[str, Tensor], goal: Tensor | None) -> list[Tensor]:
        """What does not depend on the actions: for each block the keys and values that action queries look at.

        Raises UserError where the observation does not fit the policy (token layout, sensor window, missing keys).
        """
        self._check(observation)
        prefix = [self.state_in(self.normaliser.state(observation["state"]))[:, None]]
        if self.goal_token is not None:
            assert goal is not None
            prefix.append(self.goal_token(goal, observation["state"], self.normaliser))
        if self.sensor_encoder is not None:
            prefix.append(self.sensor_encoder(observation["sensor"], observation["sensor_mask"], self.normaliser))
        x = torch.cat(prefix, 1)  # (B, P, W)
        context = [self.blocks[0].keys(x)]
        for before, block in itertools.pairwise(self.blocks):
            x = before(x, context[-1], is_prefix=True)
            context.append(block.keys(x))
        return context

    def trunk(self, context: list[Tensor], *added: Tensor) -> Tensor:
        """The action queries with `added` (B * n, H, W), n for each observation in a row -> (B * n, H, W), informed."""
        x = sum(added, start=self.queries) if added else self.queries.expand(context[0].shape[1], -1, -1)
        for block, keys in zip(self.blocks, context, strict=True):
            x = block(x, keys)
        return self.norm(x)

    def forward(self, batch: dict[str, Tensor], draws: Draws | None = None) -> Tensor:
        """Training: observation plus `action` (B, H, 7) and the true `goal` (B, 3) -> loss of each step of each chunk,
        (B, H), in normalised units; that of the goal is added to each.

        `draws` are the random numbers of `draw`, given from outside so that they belong to the sample and not to the
        process. Padded steps (action_mask) are masked by the caller.
        """
        draws = draws or {}
        if self.training and self.goal_reader is not None and "hide_view" in draws:
            shown = draws["hide_view"].new_zeros(len(draws["hide_view"]), 1)  # text is never hidden: index 0
            hidden = torch.cat([shown, draws["hide_view"]], 1)[:, self.goal_reader.view_index]  # (B, T)
            batch = batch | {"vl_mask": batch["vl_mask"] & ~hidden}
        target = self.normaliser.target(batch["action"])
        context = self.context(batch, batch["goal"])
        error = self.head.loss(partial(self.trunk, context), self.normaliser, target, draws)  # (B, H, 7)
        varies = self.normaliser.action_varies
        loss = (error.float() * varies).sum(-1) / varies.sum().clamp_min(1.0)
        if self.goal_reader is None:
            return loss
        goal, tip_off = self.normalised_goal(batch)
        off = goal_difference(self.normaliser.raw_goal(goal), batch["goal"]) / self.normaliser.goal_std  # (B, 3)
        missed = (_huber(off) * off.new_tensor(LOSS_WEIGHT)).mean(-1) + TIP_WEIGHT * _huber(tip_off).mean((-2, -1))
        return loss + missed[:, None]

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """The random numbers of `count` samples for one training forward, on the CPU: the head's, and with view dropout
        `hide_view` (count, views) bool."""
        draws = self.head.draw(count, generator)
        if (chance := self.config.view_dropout) and self.goal_reader is not None:
            draws["hide_view"] = torch.rand(count, len(self.config.views), generator=generator) < chance
        return draws

    @torch.no_grad()
    def predict(
        self,
        observation: dict[str, Tensor],
        generator: torch.Generator | None = None,
        ddim_steps: int | None = None,
        noise: Tensor | None = None,
        goal: Tensor | None = None,
    ) -> Tensor:
        """Observation batch -> (B, horizon, 7) actions: mm, degrees (rotation vector), gripper; float32.

        The diffusion head samples a chunk with DDIM in `ddim_steps` (default: the policy's own) from each of N
        `noise` (B, N, horizon, 7) and returns their median, element by element. Default: what a CPU `generator` draws
        for its usual number of samples (default: seed 0, so that the same observation gives the same chunk).
        `goal` (B, 3): a better one than this observation's own `goal`, such as the mean of several. The
        module must be in eval mode; raises RuntimeError otherwise."""
        if self.training:
            raise RuntimeError("predict() needs eval mode: call policy.eval() first")
        device = self.queries.device
        observation = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in observation.items()}
        if noise is None:
            noise = self.head.noise(len(observation["state"]), generator or torch.Generator().manual_seed(0))
        noise = None if noise is None else noise.to(device)
        goal = self.goal(observation) if goal is None else goal.to(device)
        read = partial(self.trunk, self.context(observation, goal))
        return self.normaliser.raw_action(self.head.sample(read, self.normaliser, noise, ddim_steps))

    def _check(self, observation: dict[str, Tensor]) -> None:
        c, tokens = self.config, observation["vl_tokens"]
        if tuple(tokens.shape[1:]) != (c.tokens, c.token_dim):
            raise UserError(
                f"The policy was trained on {c.tokens} VL tokens of width {c.token_dim} (views {', '.join(c.views)}), "
                f"the observation has {tokens.shape[1]} of width {tokens.shape[2]}; use the views and the VL cache "
                "that it was trained with."
            )
        if c.sensor_enabled and "sensor" not in observation:
            raise UserError("The policy was trained with the sensor, but the observation has none.")
        if c.sensor_enabled and observation["sensor"].shape[1] != c.sensor_window_size:
            have = observation["sensor"].shape[1]
            raise UserError(f"The policy reads {c.sensor_window_size} sensor samples, the observation has {have}.")

    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters())


def _huber(off: Tensor) -> Tensor:
    return F.smooth_l1_loss(off, torch.zeros_like(off), reduction="none", beta=ABSOLUTE_FROM)
