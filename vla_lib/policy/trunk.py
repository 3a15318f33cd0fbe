"""The trunk: a transformer whose sequence attends to itself and to a memory of VL tokens.

    Block        (B * n, L, W) -> (B * n, L, W), n sequences to each observation, informed by its prefix and memory
    VLMemory     VL tokens (B, T, D) -> memory (B, 1 + T, W), by attention
    SceneReader  VL tokens (B, T, D) -> scene tokens (B, 4, W), by position

B observations, T VL tokens of width D, L tokens of a sequence, M of a context, W the trunk's width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_lib.policy.config import PolicyConfig


class Attention(nn.Module):
    """Multi-head attention of a sequence on a context. No biases: a key's has no gradient but rounding, blown up by
    Adam."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def keys(self, context: Tensor) -> Tensor:
        """Context (B, M, W) -> its keys and values (2, B, heads, M, W/heads)."""
        return self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, shared: Tensor, mask: Tensor | None = None, own: Tensor | None = None) -> Tensor:
        """x (B * n, L, W) -> the same shape: n sequences in a row look at one of B `shared` keys, and each at its
        `own`.

        mask (B, M) bool: True where the shared ones may be looked at.
        """
        if own is not None:
            shared = torch.cat([shared.repeat_interleave(len(x) // shared.shape[1], 1), own], 3)
        k, v = shared
        rows = x.reshape(k.shape[0], -1, x.shape[-1])  # (B, n * L, W): sequences of one context behind one another
        q = self.query(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, n * L, W/heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2)).reshape(x.shape)


class Keys(NamedTuple):
    """What a block's sequences look at, as keys and values (2, B, heads, M, W/heads): the prefix before them, the
    memory."""

    prefix: Tensor
    memory: Tensor
    mask: Tensor  # (B, M) bool: memory that may be seen


class Block(nn.Module):
    """Pre-norm: attention within the sequence, on the VL memory, then an MLP."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.norm_self, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_memory, self.memory_attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(config.dropout)

    def keys(self, prefix: Tensor, memory: Tensor, mask: Tensor) -> Keys:
        """Of a prefix (B, P, W) and a memory (B, M, W) with its mask (B, M)."""
        return Keys(self.self_attention.keys(self.norm_self(prefix)), self.memory_attention.keys(memory), mask)

    def forward(self, x: Tensor, keys: Keys, is_prefix: bool = False) -> Tensor:
        """x (B * n, L, W) -> the same, informed by the prefix, by itself (unless it is that prefix) and by the
        memory."""
        y = self.norm_self(x)
        own = None if is_prefix else self.self_attention.keys(y)
        x = x + self.drop(self.self_attention(y, keys.prefix, own=own))
        x = x + self.drop(self.memory_attention(self.norm_memory(x), keys.memory, keys.mask))
        return x + self.drop(self.mlp(self.norm_mlp(x)))


class VLMemory(nn.Module):
    """Normalised VL tokens (B, T, D) -> memory (B, 1 + T, W) and its mask; each token knows its view, row and
    column."""

    view_index: Tensor  # (T,) 0 for a text token, else 1 + the view's number
    row_index: Tensor
    col_index: Tensor
    view_embedding: nn.Parameter
    row_embedding: nn.Parameter
    col_embedding: nn.Parameter

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width = config.width
        for name, ids in (("view", config.token_view), ("row", config.token_row), ("col", config.token_col)):
            index = torch.tensor(ids, dtype=torch.long) + 1  # 0: a text token
            self.register_buffer(f"{name}_index", index, persistent=False)
            self.register_parameter(f"{name}_embedding", nn.Parameter(torch.randn(int(index.max()) + 1, width) * 0.02))
        self.project = nn.Linear(config.token_dim, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)
        self.nothing = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D), (B, T) bool -> (B, 1 + T, W), (B, 1 + T) bool."""
        place = self.view_embedding[self.view_index] + self.row_embedding[self.row_index]
        place = place + self.col_embedding[self.col_index]  # (T, W)
        x = self.project(tokens.masked_fill(~mask[..., None], 0.0)) + place
        x = self.norm(x + self.mlp(self.norm_mlp(x)))  # (B, T, W)
        # the first entry is learned and always visible: a sample whose every view is missing still sees something
        nothing = self.nothing.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([nothing, x], 1), torch.cat([mask.new_ones(len(x), 1), mask], 1)


class SceneReader(nn.Module):
    """Normalised VL tokens (B, T, D) -> scene tokens (B, count, W), with weights of its own for each token position.

    Attention must learn what a position of the grid means; here it is known by construction, so where a target lies
    is read off far fewer scenes. A shared reduction keeps it small for wide VLMs. Unseen tokens count as the still
    scene (zeros)."""

    def __init__(self, config: PolicyConfig, rank: int = 32, count: int = 4) -> None:
        super().__init__()
        width = config.width
        self.count = count
        self.reduce = nn.Linear(config.token_dim, rank, bias=False)
        self.read = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(config.tokens * rank, 2 * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(2 * width, count * width),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D), (B, T) bool -> (B, count, W)."""
        seen = self.reduce(tokens.masked_fill(~mask[..., None], 0.0))  # (B, T, rank)
        return self.norm(self.read(seen.flatten(1)).unflatten(-1, (self.count, -1)))
