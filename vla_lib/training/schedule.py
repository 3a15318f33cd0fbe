"""The schedule of a run: which samples each optimiser step draws, at which learning rate, and when the run is over.

All of it follows from the settings, the samples' weights and the run's counters, never from a process's own
generator. The draws of an epoch are one sequence, the same in every process. A micro-batch of all processes together
is `world * batch_size` consecutive draws, of which each process takes its own share: so no two processes draw the
same samples, and two processes of batch b do what one of batch 2b does. `grad_accum_steps` micro-batches make an
optimiser step; the last step of an epoch takes what is left (missing places are filled with draws that count zero).
"""

import math
from dataclasses import dataclass

import numpy as np

from vla_lib.training.settings import TrainingSettings
from vla_lib.training.state import TrainState

LR_FLOOR = 0.01  # of the peak rate, where the cosine ends


def draw_epoch(weights: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """`count` sample numbers, drawn with replacement in proportion to `weights` (n,) >= 0 -> (count,) int64.

    The semantics of torch's WeightedRandomSampler, without its limit of 2**24 samples.
    """
    return np.random.default_rng([seed, epoch]).choice(len(weights), count, p=weights / np.sum(weights))


def step_seed(*numbers: int) -> int:
    """One seed from several numbers (run's seed, step, rank), as far apart as if they were drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: this process's `indices` and `counts` (batch,), 0 for filled places; all's `shared`."""

    indices: np.ndarray
    counts: np.ndarray
    shared: np.ndarray  # all processes' draws, without the filled places
    offset: int  # place of this process's first draw within the micro-batch of all
    size: int  # world * batch_size


def plan(draws: np.ndarray, batch_size: int, accum: int, rank: int = 0, world: int = 1) -> list[list[MicroBatch]]:
    """The micro-batches of each optimiser step over `draws`, as one process of `world` sees them."""
    size, offset = batch_size * world, rank * batch_size
    own = slice(offset, offset + batch_size)

    def micro(shared: np.ndarray) -> MicroBatch:
        full = np.concatenate([shared, np.repeat(shared[-1:], size - len(shared))])
        counts = (np.arange(size) < len(shared)).astype(np.float32)
        return MicroBatch(full[own], counts[own], shared, offset, size)

    steps = [draws[start : start + size * accum] for start in range(0, len(draws), size * accum)]
    return [[micro(step[k : k + size]) for k in range(0, len(step), size)] for step in steps]


@dataclass(frozen=True)
class Schedule:
    """Of a run on `world` processes; `weights` (n,) float64: how often each training sample is drawn, in proportion."""

    settings: TrainingSettings
    weights: np.ndarray
    rank: int = 0
    world: int = 1

    def steps(self, state: TrainState) -> list[list[MicroBatch]]:
        """The optimiser steps to the end of the state's epoch, or of the run."""
        s = self.settings
        left = draw_epoch(self.weights, len(self.weights), s.seed, state.epoch)[state.position :]
        steps = plan(left, s.batch_size, s.grad_accum_steps, self.rank, self.world)
        return steps[: max(0, s.max_steps - state.step)] if s.max_steps else steps

    def steps_left(self, state: TrainState) -> int:
        """Optimiser steps to the end of the run, taken by as many processes as there are now."""
        s = self.settings
        if s.max_steps:
            return max(0, s.max_steps - state.step)
        draws, size = len(self.weights), s.batch_size * s.grad_accum_steps * self.world
        whole = max(0, s.epochs - state.epoch - 1) * math.ceil(draws / size)
        return whole + (math.ceil((draws - state.position) / size) if state.epoch < s.epochs else 0)

    def finished(self, state: TrainState) -> bool:
        """Whether all steps are done, and the last one is validated."""
        s = self.settings
        return s.max_steps <= state.step == state.validated if s.max_steps else state.epoch >= s.epochs

    def learning_rate(self, state: TrainState) -> float:
        """Of the state's next step: linear warm-up over `warmup_steps`, then a cosine to a hundredth of the peak."""
        s = self.settings
        epochs = state.epoch + state.position / len(self.weights)
        done = state.step / s.max_steps if s.max_steps else epochs / s.epochs  # whatever the number of processes
        cosine = LR_FLOOR + (1 - LR_FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return s.lr * cosine * min(1.0, (state.step + 1) / max(1, s.warmup_steps))
