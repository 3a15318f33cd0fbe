"""A training process: its device, precision and process group; stop signals."""

import contextlib
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Self

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from vla_lib.core.errors import UserError
from vla_lib.core.loader import STOPS
from vla_lib.training.settings import TrainingSettings

# of a process for the others: one may validate, make vision tokens or write to a slow disk alone
PATIENCE = timedelta(hours=2)


def uses_gpu(settings: TrainingSettings) -> bool:
    """Whether the run computes on a GPU. Raises UserError where one is asked for but there is none."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; pass --device auto.")
    return torch.cuda.is_available() and settings.device != "cpu"


def uses_bf16(settings: TrainingSettings) -> bool:
    """Whether products are bf16: as asked, or where the GPU has it (an emulated one is slower than float32)."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    return uses_gpu(settings) and torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def open_accelerator(settings: TrainingSettings) -> Iterator[Accelerator]:
    """The Accelerator of this process, for as long as the block lasts."""
    # a private name: Accelerator's state is one for the whole process, and only this gives a second run in it (of a
    # notebook, of a test) a device and a precision of its own; the tests that train twice in one process watch it
    AcceleratorState._reset_state(reset_partial_state=True)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    precision = "bf16" if uses_bf16(settings) else "no"
    accelerator = Accelerator(cpu=not uses_gpu(settings), mixed_precision=precision, kwargs_handlers=[patience])
    try:
        yield accelerator
    finally:
        with contextlib.suppress(Exception):  # the group may be broken: another rank died
            accelerator.end_training()


class StopRequest(contextlib.ExitStack):
    """SIGTERM and SIGINT set `asked`; the loop looks at it once a step. Handlers are put back at the end.

    `agreed` is who asked, once all processes know of it: they stop after the same step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: str | None = None
        self.agreed = ""

    def agree(self) -> None:
        """At least one process was asked."""
        self.agreed = self.asked or "another process's signal"

    def __enter__(self) -> Self:
        for number in STOPS:
            with contextlib.suppress(ValueError):  # not the main thread: whoever started this one stops it otherwise
                self.callback(signal.signal, number, signal.signal(number, self._ask))
        return self

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
