"""A short sequence (B, L, width) and a memory of VL tokens (B, T, width) in, the sequence (B, L, width) informed by the memory out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of a sequence on a context. No biases: a key bias has no gradient but rounding, which Adam would blow up."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def keys(self, context: Tensor) -> Tensor:
        """Context (B, M, W) -> its keys and values (2, B, heads, M, W/heads)."""
        return self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, shared: Tensor, mask: Tensor | None = None, own: Tensor | None = None) -> Tensor:
        """x (B * n, L, W) -> (B * n, L, W): n sequences in a row look at the same `shared` keys (of B contexts), and each at its `own` beside.

        mask (B, M) bool: True where the shared ones may be looked at.
        """
        if own is not None:
            shared = torch.cat([shared.repeat_interleave(len(x) // shared.shape[1], 1), own], 3)
        k, v = shared
        rows = x.reshape(k.shape[0], -1, x.shape[-1])  # sequences of one context, one behind the other
        q = self.query(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, n * L, W/heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2)).reshape(x.shape)


class Block(nn.Module):
    """Pre-norm: attention within the sequence, on the VL memory, on the sensor tokens (where asked for), then an MLP."""

    def __init__(self, width: int, heads: int, dropout: float, sensor: bool):
        super().__init__()
        self.norm_self, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_memory, self.memory_attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_sensor = nn.LayerNorm(width) if sensor else None
        self.sensor_attention = Attention(width, heads) if sensor else None
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def keys(
        self, prefix: Tensor, memory: Tensor, memory_mask: Tensor, sensor: Tensor | None
    ) -> dict[str, Tensor | None]:
        """What this block's sequences look at, as keys and values: prefix (B, P, W), which stands before them, memory (B, M, W), sensor (B, N, W)."""
        return {
            "prefix": self.self_attention.keys(self.norm_self(prefix)),
            "memory": self.memory_attention.keys(memory),
            "mask": memory_mask,
            "sensor": self.sensor_attention.keys(sensor) if self.sensor_attention is not None else None,
        }

    def forward(self, x: Tensor, keys: dict[str, Tensor | None], is_prefix: bool = False) -> Tensor:
        """x (B * n, L, W) -> the same, informed by the `keys`' prefix, by itself (unless it is that prefix), by memory and sensor."""
        y = self.norm_self(x)
        x = x + self.drop(
            self.self_attention(y, keys["prefix"], own=None if is_prefix else self.self_attention.keys(y))
        )
        x = x + self.drop(self.memory_attention(self.norm_memory(x), keys["memory"], keys["mask"]))
        if self.sensor_attention is not None:
            x = x + self.drop(self.sensor_attention(self.norm_sensor(x), keys["sensor"]))
        return x + self.drop(self.mlp(self.norm_mlp(x)))


class VLMemory(nn.Module):
    """Normalised VL tokens (B, T, D) -> memory (B, 1 + T, width) and its mask; each token knows its view, row and column.

    The first memory entry is learned and always visible, so a sample whose every view is missing still has something to look at.
    """

    def __init__(
        self,
        token_dim: int,
        width: int,
        token_view: tuple[int, ...],
        token_row: tuple[int, ...],
        token_col: tuple[int, ...],
    ):
        super().__init__()
        for name, ids in (("view", token_view), ("row", token_row), ("col", token_col)):
            index = torch.tensor(ids, dtype=torch.long) + 1  # 0: a text token
            self.register_buffer(f"{name}_index", index, persistent=False)
            self.register_parameter(f"{name}_embedding", nn.Parameter(torch.randn(int(index.max()) + 1, width) * 0.02))
        self.project = nn.Linear(token_dim, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)
        self.nothing = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D), (B, T) bool -> (B, 1 + T, width), (B, 1 + T) bool."""
        place = (
            self.view_embedding[self.view_index]
            + self.row_embedding[self.row_index]
            + self.col_embedding[self.col_index]
        )
        x = self.project(tokens.masked_fill(~mask[..., None], 0.0)) + place
        x = self.norm(x + self.mlp(self.norm_mlp(x)))
        batch = x.shape[0]
        x = torch.cat([self.nothing.to(x.dtype).expand(batch, 1, -1), x], 1)
        return x, torch.cat([mask.new_ones(batch, 1), mask], 1)


class SceneReader(nn.Module):
    """Normalised VL tokens (B, T, D) -> scene tokens (B, count, width), with weights of its own for each token position.

    Attention must learn what a position of the grid means; here it is known by construction, so where a target lies is read off far fewer
    scenes. A shared reduction keeps it small for wide VLMs. Unseen tokens count as the still scene (zeros).
    """

    def __init__(self, tokens: int, token_dim: int, width: int, dropout: float, rank: int = 32, count: int = 4):
        super().__init__()
        self.count = count
        self.reduce = nn.Linear(token_dim, rank, bias=False)
        self.read = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(tokens * rank, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, count * width),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D), (B, T) bool -> (B, count, width)."""
        seen = self.reduce(tokens.masked_fill(~mask[..., None], 0.0))  # (B, T, rank)
        return self.norm(self.read(seen.flatten(1)).unflatten(-1, (self.count, -1)))
