"""Patches (n, C*frames*p*p) in, embeddings (n, D) out: the vision tower's first convolution as the matrix product that it is.

Its kernel covers exactly one patch, so nothing is convolved; a Conv3d call costs many times the product on CPUs, and on GPUs in bfloat16.
"""

import torch
from torch import nn


class LinearPatchEmbed(nn.Module):
    """Takes the place of a Qwen-VL `patch_embed`. In float32 the kernel's frames are summed once, since a still picture repeats its frame:
    half the input, the same sum. In shorter types the sum would round the weights, so the frames stay."""

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        weight = conv.weight.detach()  # (D, C, frames, p, p)
        self.frames = 1 if weight.dtype == torch.float32 else weight.shape[2]
        if self.frames == 1:
            weight = weight.sum(2)
        self.weight = nn.Parameter(weight.flatten(1).contiguous(), requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(n, C*frames*p*p) -> (n, D)."""
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight, self.bias)
