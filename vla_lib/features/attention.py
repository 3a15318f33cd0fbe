"""Attention within the windows of a packed sequence, in few calls: the vision tower's attention where flash attention is not installed.

transformers' SDPA path calls the kernel once a window, hundreds of times a picture and layer. On a GPU torch's own variable-length flash
kernel takes all windows in one call; elsewhere windows of equal length are stacked into one batch. Same results up to rounding.
"""

import torch
import torch.nn.functional as F

NAME = "vla_flash_windows"  # transformers passes window boundaries to implementations with "flash" in their name


def register() -> str:
    """Make the implementation known to transformers; returns its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, windowed_attention)
    return NAME


def windowed_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_
):
    """query, key, value: (1, heads, L, d); cu_seq_lens_q: (windows + 1,) boundaries. Returns ((1, L, heads, d), None)."""
    if _varlen_usable(query):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # (L, heads, d)
        bounds = cu_seq_lens_q.to(torch.int32)
        return varlen_attn(q, k, v, bounds, bounds, int(max_length_q), int(max_length_q)).unsqueeze(0), None
    output = torch.empty_like(query)
    for rows in equal_windows(cu_seq_lens_q, query.device):
        count, length = rows.shape

        def stacked(tensor, rows=rows, count=count, length=length):  # (count, heads, length, d)
            return tensor[0][:, rows.reshape(-1)].unflatten(1, (count, length)).transpose(0, 1)

        attended = F.scaled_dot_product_attention(stacked(query), stacked(key), stacked(value), scale=scaling)
        output[0, :, rows.reshape(-1)] = attended.transpose(0, 1).flatten(1, 2)
    return output.transpose(1, 2), None


def equal_windows(bounds: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """Row numbers (windows, length) of the windows of each length in turn."""
    if (known := _LAST.get(id(bounds))) is not None and known[0] is bounds:
        return known[1]
    starts, lengths = bounds[:-1].cpu().long(), (bounds[1:] - bounds[:-1]).cpu().long()
    groups = [(starts[lengths == n][:, None] + torch.arange(int(n))).to(device) for n in lengths.unique()]
    if len(_LAST) > 8:  # one forward uses two sets of boundaries in every layer
        _LAST.clear()
    _LAST[id(bounds)] = (bounds, groups)
    return groups


_LAST: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}


def _varlen_usable(query: torch.Tensor) -> bool:
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] % 8:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401  (torch 2.10 and newer)
    except ImportError:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)
