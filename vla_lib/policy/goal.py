"""The goal: where an episode ends, x, y (mm) and yaw (deg) in the base frame. Known of every recorded step by
hindsight, read off the VL tokens on the robot.

    GoalReader   VL tokens (B, T, D) and the state at their pictures (B, 12) -> normalised goal (B, 3); by the way how
                 far off each view shows the tip (B, V, 3)
    GoalToken    goal (B, 3) minus the present state (B, 12) -> one token of the trunk (B, 1, W)

Nothing else of the VL tokens reaches the trunk. So the trunk learns what to do about a goal from true goals, the
reader learns where the goal is, and the age of the pictures spoils neither: a goal stands still in the base frame, and
the state that is taken off it is the present one. B samples, V views of a grid of tokens, T of them with the text's.
"""

import torch
from torch import Tensor, nn

from vla_lib.core.errors import UserError
from vla_lib.policy.config import STATE_DIM, PolicyConfig
from vla_lib.policy.normaliser import Normaliser

GOAL_OF_STATE = (6, 7, 11)  # columns of a state: x, y (mm), and its third Euler angle, the yaw (deg)
GOAL_DIM = len(GOAL_OF_STATE)
TIP_OF_STATE = slice(6, 9)  # x, y, z (mm)
TIP_DIM = 3
KEYPOINTS = 32  # patterns whose place is read in each view
PATTERN_WIDTH = 32  # channels of what patterns are made of
# How much x, y and yaw count in the reader's loss. In spreads a yaw is read ten times worse than a place, and its error
# would be what is learnt by heart: with 1 in place of 0.1 the place of 176 unseen scenes erred by 1.43 mm, not 1.09.
LOSS_WEIGHT = (1.0, 1.0, 0.1)
TIP_WEIGHT = 0.3  # how much the places of the tip count beside the goal
FINE = 20.0  # parts of a goal's spread: differences from here on are told by their logarithm


def goal_of(state: Tensor) -> Tensor:
    """(..., 12) states -> (..., 3) goals of an episode that ends there."""
    return state[..., list(GOAL_OF_STATE)]


def goal_difference(goal: Tensor, other: Tensor) -> Tensor:
    """(..., 3) goal minus another; the yaw's within +-180 degrees."""
    difference = goal - other
    yaw = (difference[..., 2:] + 180.0) % 360.0 - 180.0
    return torch.cat([difference[..., :2], yaw], -1)


class GoalReader(nn.Module):
    """Keypoints (spatial soft-argmax, Levine et al. 2016): where in each view a pattern is seen, the same patterns in
    all views. A place is a few numbers, so it is learnt from few scenes. The state at the time of the tokens is read
    beside them (a hand's camera moves with it). Unseen tokens count as the still scene (zeros).

    The needle's tip is seen too, and the robot knows where it is. So each view tells by its keypoints where the tip
    seems to be, and how far that is off, as where the camera was moved, is read beside them."""

    view_index: Tensor  # (T,) 0 for a text token, else 1 + the view's number
    places: Tensor  # (cells, 2) row and column of a view's tokens, within +-1

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, views = config.width, len(config.views)
        self.grid = max(config.token_row) + 1, max(config.token_col) + 1
        cells = self.grid[0] * self.grid[1]
        if tuple(config.token_view[: views * cells]) != tuple(k // cells for k in range(views * cells)):
            raise UserError("The VL tokens are no whole grid of each view; build the VL cache with --vl-pooling grid:.")
        self.register_buffer("view_index", torch.tensor(config.token_view) + 1, persistent=False)
        row, col = (torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1) for count in self.grid)
        self.register_buffer("places", torch.cartesian_prod(row, col), persistent=False)
        self.reduce = nn.Linear(config.token_dim, PATTERN_WIDTH)
        # a bias would move no keypoint, so Adam would walk it by the noise of its gradient
        self.heat = nn.Conv2d(PATTERN_WIDTH, KEYPOINTS, 3, padding=1, bias=False)
        self.tip = nn.Conv1d(3 * views * KEYPOINTS, TIP_DIM * views, 1, groups=views)  # of each view by its own
        seen = (3 * KEYPOINTS + TIP_DIM) * views + STATE_DIM
        self.read = nn.Sequential(
            nn.Linear(seen, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, GOAL_DIM),
        )
        self.straight = nn.Linear(seen, GOAL_DIM)

    def forward(self, tokens: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised tokens (B, T, D), mask (B, T) bool, normalised state (B, 12) -> goal (B, 3), and how far off each
        view shows the tip (B, V, 3) in spreads; zeros where it is not seen."""
        tokens = tokens.masked_fill(~mask[..., None], 0.0)
        shown = mask[:, self.view_index > 0].unflatten(1, (-1, len(self.places))).any(-1)  # (B, V)
        views = tokens[:, self.view_index > 0].unflatten(1, (-1, len(self.places)))  # (B, V, cells, D)
        patterns = nn.functional.gelu(self.reduce(views)).flatten(0, 1)  # (B * V, cells, C)
        heat = self.heat(patterns.transpose(1, 2).unflatten(2, self.grid)).flatten(2).float()  # (B * V, K, cells)
        where = heat.softmax(-1)
        height = (where * heat).sum(-1, keepdim=True) - heat.mean(-1, keepdim=True)
        keypoints = torch.cat([2 * (where @ self.places), height / 4], -1)  # (B * V, K, 3)
        keypoints = keypoints.reshape(len(tokens), -1)
        tip = self.tip(keypoints[..., None]).unflatten(1, (-1, TIP_DIM))[..., 0]  # (B, V, 3)
        off = (tip - state[:, None, TIP_OF_STATE]) * shown[..., None]
        seen = torch.cat([keypoints, off.flatten(1), state], -1)
        return (self.read(seen) + self.straight(seen)).float(), off.float()


class GoalToken(nn.Module):
    """The way to the goal from where the robot is now, coarse and fine."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width = config.width
        self.embed = nn.Sequential(nn.Linear(2 * GOAL_DIM, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, goal: Tensor, state: Tensor, normaliser: Normaliser) -> Tensor:
        """Goal (B, 3) and present state (B, 12), both in mm and deg -> (B, 1, W)."""
        way = goal_difference(goal, goal_of(state.float())) / normaliser.goal_std
        return self.embed(torch.cat([way, torch.asinh(FINE * way) / 3], -1))[:, None]
