"""A loaded VLM in, the same one with LoRA weights in its language model out (through peft); and those weights as plain tensors, back in.

LoRA (Hu et al. 2021): beside the frozen matrix W of a projection stands B A, of a low rank; B starts at zero, so nothing changes at first.
Only the decoder layers that are computed get weights, and the vision tower gets none.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vla_lib.core.errors import UserError
from vla_lib.features.vlm import Vlm

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_adapter(vlm: Vlm, rank: int, alpha: int) -> dict[str, nn.Parameter]:
    """Put LoRA of `rank`, scaled by alpha / rank, beside every projection of the decoder layers that were loaded.

    Returns the new weights by name, float32 whatever the model's type; nothing else of the model is trained.
    """
    from peft import LoraConfig, inject_adapter_in_model

    language = vlm.model.language_model
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(PROJECTIONS)), language)
    vlm.model.eval()
    weights = {
        name.replace(".default", ""): weight for name, weight in language.named_parameters() if weight.requires_grad
    }
    for weight in weights.values():
        weight.data = weight.data.float()
    return weights


def adapter_record(weights: Mapping[str, torch.Tensor], rank: int, alpha: int) -> dict[str, Any]:
    """What a checkpoint holds of an adapter."""
    return {"rank": rank, "alpha": alpha, "weights": {name: weight.detach() for name, weight in weights.items()}}


def load_adapter(vlm: Vlm, record: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """`add_adapter` with the weights of an `adapter_record`."""
    weights = add_adapter(vlm, record["rank"], record["alpha"])
    fill_adapter(weights, record)
    return weights


@torch.no_grad()
def fill_adapter(weights: Mapping[str, nn.Parameter], record: Mapping[str, Any]) -> None:
    """Copy the weights of a record into those of a model. Raises UserError where one is missing, left over or of another shape."""
    given = record["weights"]
    odd = sorted(given.keys() ^ weights.keys()) or [
        name for name in weights if given[name].shape != weights[name].shape
    ]
    if odd:
        raise UserError(
            f"The LoRA weights of the checkpoint do not fit its VLM: {odd[0]} ({len(odd)} differ); take a checkpoint of this VLM."
        )
    for name, weight in weights.items():
        weight.copy_(given[name])
