"""Sample weights and a position in, the micro-batches of one process out: weighted draws shared by all processes, none lost at the end.

The draws of an epoch are one sequence, the same in every process (it follows from seed and epoch alone). A micro-batch of all
processes together is `world * batch_size` consecutive draws, of which each process takes its own share: so no two processes draw the
same samples, and two processes of batch b do what one process of batch 2b does. `accum` micro-batches make an optimiser step; the
last step of an epoch takes what is left (missing places are filled with draws that count zero).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def draw_epoch(weights: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """`count` sample numbers, drawn with replacement in proportion to `weights` (n,) >= 0 -> (count,) int64.

    The semantics of torch's WeightedRandomSampler, without its limit of 2**24 samples.
    """
    cumulative = np.cumsum(weights, dtype=np.float64)
    uniform = np.random.default_rng([seed, epoch]).random(count)
    return np.minimum(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), len(weights) - 1)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: of this process `indices` and `counts` (batch,), 0 for filled places; `shared` (world * batch,) of all."""

    indices: np.ndarray
    counts: np.ndarray
    shared: np.ndarray  # all processes' draws, without the filled places
    offset: int  # place of this process's first draw within the micro-batch of all
    size: int  # world * batch_size


@dataclass(frozen=True)
class EpochPlan:
    """The optimiser steps of one epoch from `position` (draws already used) on, as one process sees them."""

    draws: np.ndarray
    batch_size: int
    accum: int
    rank: int = 0
    world: int = 1
    position: int = 0

    @property
    def draws_per_step(self) -> int:
        return self.batch_size * self.accum * self.world

    def __len__(self) -> int:
        """Number of optimiser steps left."""
        return -(-(len(self.draws) - self.position) // self.draws_per_step)

    def steps(self) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each optimiser step."""
        size = self.batch_size * self.world
        for start in range(self.position, len(self.draws), self.draws_per_step):
            step = self.draws[start : start + self.draws_per_step]
            yield [self._micro(step[k : k + size], size) for k in range(0, len(step), size)]

    def _micro(self, shared: np.ndarray, size: int) -> MicroBatch:
        full = np.concatenate([shared, np.repeat(shared[-1:], size - len(shared))])
        offset = self.rank * self.batch_size
        own = slice(offset, offset + self.batch_size)
        counts = (np.arange(size) < len(shared)).astype(np.float32)
        return MicroBatch(full[own], counts[own], shared, offset, size)


def shares(weights: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """The share of all draws that each group (dataset) gets: `{dataset: 0..1}`; `groups` has one name a sample."""
    total = float(np.sum(weights))
    names = np.asarray(groups)
    return {str(name): float(np.sum(weights[names == name]) / total) for name in np.unique(names)}


def step_seed(*numbers: int) -> int:
    """One seed from several numbers (run's seed, step, rank), as far apart as if they were drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
