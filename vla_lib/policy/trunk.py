"""The trunk: a transformer whose sequence attends to itself and to the prefix before it.

    Block   (B * n, L, W) -> (B * n, L, W), n sequences to each observation, informed by its prefix

B observations, P tokens of a prefix, L of a sequence, M of a context, W the trunk's width.
"""

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

    def forward(self, x: Tensor, shared: Tensor, own: Tensor | None = None) -> Tensor:
        """x (B * n, L, W) -> the same shape: n sequences in a row look at one of B `shared` keys, and each at its
        `own`."""
        if own is not None:
            shared = torch.cat([shared.repeat_interleave(len(x) // shared.shape[1], 1), own], 3)
        k, v = shared
        rows = x.reshape(k.shape[0], -1, x.shape[-1])  # (B, n * L, W): sequences of one context behind one another
        q = self.query(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, n * L, W/heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)).reshape(x.shape)


class Block(nn.Module):
    """Pre-norm: attention within the sequence, then an MLP."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_self, self.self_attention = nn.LayerNorm(width), Attention(width, config.heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(config.dropout)

    def keys(self, prefix: Tensor) -> Tensor:
        """Keys and values (2, B, heads, P, W/heads) of a prefix (B, P, W)."""
        return self.self_attention.keys(self.norm_self(prefix))

    def forward(self, x: Tensor, prefix: Tensor, is_prefix: bool = False) -> Tensor:
        """x (B * n, L, W) -> the same, informed by the `keys` of the prefix and by itself (unless it is that
        prefix)."""
        y = self.norm_self(x)
        own = None if is_prefix else self.self_attention.keys(y)
        x = x + self.drop(self.self_attention(y, prefix, own=own))
        return x + self.drop(self.mlp(self.norm_mlp(x)))
