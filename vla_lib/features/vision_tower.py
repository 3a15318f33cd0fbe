"""Two parts of a Qwen-VL vision tower in a faster form with the same result, up to rounding.

Attention: transformers' SDPA path calls the kernel once a window, hundreds of times a picture and layer. Here a GPU
takes all windows in one call of torch's variable-length kernel; elsewhere windows of equal length share a call.
Patch embedding: the kernel of the first convolution covers exactly one patch, so nothing is convolved; a Conv3d call
costs many times the matrix product on CPUs, and on GPUs in bfloat16. Both together: 0.40 s of processor time instead of
0.54 for 20 pictures of 640x360 through the tiny tower. (Fused RMS norms were tried too: no gain on a CPU.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9 has it not yet
    varlen_attn = None  # type: ignore[assignment]

NAME = "vla_flash_windows"  # transformers passes window boundaries only to implementations with "flash" in their name


def speed_up(model: Any) -> None:
    """Swap the parts in a loaded inner model, in place."""
    AttentionInterface.register(NAME, windowed_attention)
    config = model.visual.config
    if "flash" not in (config._attn_implementation or ""):
        # a private name: the public `set_attn_implementation` looks for every "flash" implementation on the hub
        config._attn_implementation = NAME
    model.visual.patch_embed = LinearPatchEmbed(model.visual.patch_embed.proj)


def windowed_attention(
    module: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **given: Any
) -> tuple[Tensor, None]:
    """Attention within windows: query, key, value (1, heads, L, d) to (1, L, heads, d).

    given: as transformers calls it, of which `scaling`, `cu_seq_lens_q` (windows + 1,), the boundaries, and
    `max_length_q` are used.
    """
    bounds: Tensor = given["cu_seq_lens_q"]
    if _takes_all_windows(query):
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # (L, heads, d)
        bounds, longest = bounds.to(torch.int32), int(given["max_length_q"])
        attended = varlen_attn(q, k, v, bounds, bounds, longest, longest)
        assert isinstance(attended, Tensor)
        return attended[None], None
    output = torch.empty_like(query)
    starts, lengths = bounds[:-1].cpu().long(), bounds.cpu().diff()
    for length in lengths.unique():
        rows = (starts[lengths == length][:, None] + torch.arange(int(length))).to(query.device)  # (windows, length)
        q, k, v = (tensor[0][:, rows].transpose(0, 1) for tensor in (query, key, value))  # (windows, heads, length, d)
        attended = F.scaled_dot_product_attention(q, k, v, scale=given["scaling"])
        output[0][:, rows] = attended.transpose(0, 1)
    return output.transpose(1, 2), None


def _takes_all_windows(query: Tensor) -> bool:
    """Whether torch's variable-length kernel can be called: a 16-bit type, on a GPU of Ampere's generation or later."""
    if varlen_attn is None or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return query.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


class LinearPatchEmbed(nn.Module):
    """Takes the place of a `patch_embed`: (n, C*frames*p*p) -> (n, D).

    In float32 the kernel's frames are summed once, since a still picture repeats its frame: half the input, the same
    sum. In shorter types the sum would round the weights, so the frames stay.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        weight = conv.weight.detach()  # (D, C, frames, p, p)
        self.frames = 1 if weight.dtype == torch.float32 else weight.shape[2]
        weight = weight.sum(2) if self.frames == 1 else weight
        self.weight = nn.Parameter(weight.flatten(1).contiguous(), requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Embeddings of patches that hold `self.frames` frames each."""
        return F.linear(patches.to(self.weight.dtype), self.weight, self.bias)
