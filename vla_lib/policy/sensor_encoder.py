"""The sensor encoder: a window (B, S, 1026) in raw units becomes ten tokens (B, 10, W).

- The force has a token of its own.
- Consecutive A-scans at 650 Hz are nearly the same: learned temporal filters first mix S of them into a few frames.
- Convolutions then run along depth only, and depth is kept twice: as soft arg-max positions at 8-bin steps (what a
  membrane's depth is read from; they interpolate between bins), and as eight segment tokens for whatever else is seen.
"""

import torch
from torch import Tensor, nn

from vla_lib.policy.config import PolicyConfig
from vla_lib.policy.normaliser import Normaliser

FRAMES = 4  # learned temporal mixtures of the window's S A-scans
PEAKS = 16  # soft arg-max channels: each says at which depth it sees its pattern
SEGMENTS = 8  # the depth axis as this many tokens
TOKENS = 1 + 1 + SEGMENTS  # force, peaks, segments


class SensorEncoder(nn.Module):
    """See the module's docstring. A sample whose window is not full gets learned tokens instead."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        steps, width = config.sensor_window_size, config.width
        frames = min(FRAMES, steps)
        filters = torch.zeros(frames, steps)
        for k, part in enumerate(torch.arange(steps).tensor_split(frames)):
            filters[k, part] = 1.0 / len(part)  # at first the means of consecutive quarters of the window
        self.filters = nn.Parameter(filters)  # (K, S)
        self.conv1 = nn.Conv1d(frames, 32, 9, stride=4, padding=4)  # 1025 -> 257
        self.conv2 = nn.Conv1d(32, 64, 5, stride=2, padding=2)  # 257 -> 129
        self.conv3 = nn.Conv1d(64, 64, 5, stride=2, padding=2)  # 129 -> 65
        self.peak_heat = nn.Conv1d(64, PEAKS, 1)
        self.peak_token = nn.Sequential(nn.Linear(2 * PEAKS, width), nn.GELU(), nn.Linear(width, width))
        self.segment_token = nn.Linear(64 * 8, width)  # 8 positions x 64 channels a segment
        self.segment_position = nn.Parameter(torch.randn(SEGMENTS, width) * 0.02)
        self.force_token = nn.Sequential(nn.Linear(steps, 64), nn.GELU(), nn.Linear(64, width))
        self.missing = nn.Parameter(torch.randn(TOKENS, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.act = nn.GELU()

    def forward(self, sensor: Tensor, present: Tensor, normaliser: Normaliser) -> Tensor:
        """(B, S, 1026) raw, (B,) bool -> (B, 10, W)."""
        mean, std = normaliser.sensor_mean, normaliser.sensor_std
        sensor = sensor.float()
        force = (sensor[..., 0] - mean[0]) / std[0]  # (B, S)
        # mixing is linear, so it goes before the normalisation: S x 1025 numbers are touched once;
        # bmm and slicing afterwards, so that the window is not copied
        frames = torch.bmm(self.filters.expand(len(sensor), -1, -1), sensor)[..., 1:]  # (B, K, 1025)
        frames = (frames - self.filters.sum(1)[:, None] * mean[1:]) / std[1:]
        x = self.act(self.conv1(frames))  # (B, 32, 257)
        x = self.act(self.conv2(x))  # (B, 64, 129)
        heat = self.peak_heat(x).float()  # (B, P, 129)
        grid = torch.linspace(-1, 1, heat.shape[-1], device=heat.device)
        where = heat.softmax(-1)
        depth = (where * grid).sum(-1)  # (B, P) in [-1, 1] of the scan's depth
        height = (where * heat).sum(-1) - heat.mean(-1)  # (B, P)
        x = self.act(self.conv3(x))[..., :64]  # (B, 64, 64)
        segments = x.unflatten(-1, (SEGMENTS, 8)).permute(0, 2, 1, 3).flatten(2)  # (B, 8, 512)
        force_token = self.force_token(force)[:, None]
        peak_token = self.peak_token(torch.cat([2 * depth, height / 4], -1))[:, None]
        tokens = torch.cat([force_token, peak_token, self.segment_token(segments) + self.segment_position], 1)
        return torch.where(present[:, None, None], self.norm(tokens).float(), self.missing)
