"""Training settings in; where and how a training computes out: its device, its precision, its group of processes."""

from datetime import timedelta
from typing import Any

import torch

from vla_lib.core.errors import UserError
from vla_lib.training.settings import TrainingSettings

PATIENCE = timedelta(
    hours=2
)  # of a process for the others: one may validate, make vision tokens or write to a slow disk alone


def uses_gpu(settings: TrainingSettings) -> bool:
    """Whether the training computes on a GPU. Raises UserError where one is asked for but there is none."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; pass --device auto.")
    return torch.cuda.is_available() and settings.device != "cpu"


def uses_bf16(settings: TrainingSettings) -> bool:
    """Whether products are bf16: as asked, or where the GPU has it by itself (an emulated bf16 is slower than float32)."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    return uses_gpu(settings) and torch.cuda.is_bf16_supported(including_emulation=False)


def open_accelerator(settings: TrainingSettings) -> Any:
    """The Accelerator of this process; a second training in the same process gets one of its own."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "bf16" if uses_bf16(settings) else "no"
    return Accelerator(
        cpu=not uses_gpu(settings),
        mixed_precision=precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
