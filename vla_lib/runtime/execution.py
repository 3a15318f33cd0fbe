"""Action chunks in as they are predicted; the one action of each step out, by the chosen way of executing chunks."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla_lib.core.errors import UserError

Array = np.ndarray[Any, Any]
Execution = Literal["first action", "temporal ensemble", "chunk of n"]


@dataclass(frozen=True)
class ExecutionSettings:
    """`first action`: predict at every step and take the first; `temporal ensemble`: predict at every step and average all chunks that
    speak of the step (after ACT, Zhao et al. 2023, but the newest weighs most: exp(-decay * age in steps)); `chunk of n`: follow `steps`
    actions of a chunk before the next prediction."""

    execution: Execution = "first action"
    steps: int = 4
    decay: float = 0.3

    def __post_init__(self) -> None:
        if self.execution not in ("first action", "temporal ensemble", "chunk of n"):
            raise UserError(
                f"Chunks are executed by first action, temporal ensemble or chunk of n, not by {self.execution!r}."
            )
        if self.steps < 1 or not self.decay >= 0:
            raise UserError(
                f"A chunk is followed for 1 step or more and decays by 0 or more, not {self.steps} and {self.decay:g}."
            )


class ChunkPlan:
    """The chunks that still speak of the present. Step numbers count action periods."""

    def __init__(self, settings: ExecutionSettings):
        self.settings = settings
        self._chunks: list[tuple[int, Array]] = []  # (step of the first action, (H, 7)), newest last

    def clear(self) -> None:
        """Forget all chunks: they speak of a motion that did not happen. (After a missed deadline they stay, and bridge a slow expert.)"""
        self._chunks.clear()

    def wants_chunk(self, step: int) -> bool:
        """Whether the expert is to be asked at this step."""
        if self.settings.execution != "chunk of n" or not self._chunks:
            return True
        begin, chunk = self._chunks[-1]
        return step - begin >= min(self.settings.steps, len(chunk))

    def add(self, step: int, chunk: Array) -> None:
        """Take a chunk (H, 7) whose first action begins at `step`."""
        self._chunks.append((step, np.asarray(chunk, float)))

    def action(self, step: int) -> Array | None:
        """(7,) action of a step, None where no chunk speaks of it."""
        self._chunks = [(begin, chunk) for begin, chunk in self._chunks if 0 <= step - begin < len(chunk)]
        if not self._chunks:
            return None
        if self.settings.execution != "temporal ensemble":
            begin, chunk = self._chunks[-1]
            return chunk[step - begin].copy()
        ages = np.array([step - begin for begin, _ in self._chunks])
        weights = np.exp(-self.settings.decay * ages)
        spoken = np.stack([chunk[age] for (_, chunk), age in zip(self._chunks, ages, strict=True)])
        return weights @ spoken / weights.sum()
