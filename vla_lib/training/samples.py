"""Prepared episodes and their VL features in, whole batches of observations and action chunks out.

A sample is one step of one episode. Its observation holds what a robot could have known at that moment: the newest VL features that
had been computed by then (with their age), the sensor window that ends there, the robot state. Its target is the chunk of the next
`horizon` actions. All small tables are built once; a batch gathers them with one indexing operation each and copies the large arrays
(VL tokens, sensor windows) straight from the memory-mapped files into the batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_lib.core.errors import UserError
from vla_lib.policy.config import SENSOR_CHANNELS
from vla_lib.training.process import begin_worker, starting_workers

Batch = dict[str, Tensor]


class SampleSet:
    """All samples of `episodes` (prepared episodes), with features from `cache` (a FeatureCache).

    Public arrays, one entry a sample: `episode` (number in `episodes`), `step`, `tick` (row of its features), `age_steps`, `valid_actions`
    (steps of the chunk that count), `sensor_full` (the window is whole). Raises UserError where an episode has no features, or where the
    features' ticks do not fit `vlm_reuse_count`.
    """

    def __init__(
        self,
        episodes: Sequence[Any],
        cache: Any,
        *,
        horizon: int = 8,
        sensor_enabled: bool = True,
        sensor_window_size: int = 65,
        vlm_reuse_count: int = 3,
        vlm_latency_ms: float = 0.0,
    ):
        self.episodes = list(episodes)
        self.horizon, self.sensor_enabled, self.window = horizon, sensor_enabled, sensor_window_size
        if not self.episodes:
            raise UserError(
                "A sample set needs at least one episode; prepare some with `python -m vla_lib.preprocess`."
            )
        self.features = [cache.episode(e) for e in self.episodes]
        self.action_hz = float(self.episodes[0].action_hz)
        odd = [e.name for e in self.episodes if float(e.action_hz) != self.action_hz]
        if odd:
            raise UserError(
                f"Episodes differ in action_hz ({self.episodes[0].name}: {self.action_hz:g}; {odd[0]} does not); preprocess all at one rate."
            )

        lengths = np.array([len(e) for e in self.episodes])
        starts = np.concatenate([[0], np.cumsum(lengths)])  # rows of an episode in the joined tables
        action = np.concatenate([np.asarray(e.action, np.float32) for e in self.episodes])
        state = np.concatenate([np.asarray(e.state, np.float32) for e in self.episodes])
        valid = np.concatenate([np.asarray(e.valid, bool) for e in self.episodes])
        self._action, self._state = torch.from_numpy(action), torch.from_numpy(state)  # (N, 7), (N, 12)

        row = np.concatenate([np.arange(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]).astype(np.int64)
        episode = np.repeat(np.arange(len(lengths)), lengths)
        chunk = row[:, None] + np.arange(horizon)  # (N, H)
        inside = chunk < starts[1:][episode][:, None]
        chunk = np.minimum(chunk, starts[1:][episode][:, None] - 1)
        mask = inside & valid[chunk]
        keep = mask[:, 0]  # a sample's own step must be whole
        if not keep.any():
            raise UserError("No step of these episodes is valid; look at their quality findings in notebook 01.")

        tick, age = zip(
            *(
                _ticks(e, f, n, vlm_reuse_count, vlm_latency_ms)
                for e, f, n in zip(self.episodes, self.features, lengths, strict=True)
            ),
            strict=True,
        )
        self.episode, self.step = episode[keep], (row - starts[:-1][episode])[keep]
        self._row, self._chunk = torch.from_numpy(row[keep]), torch.from_numpy(chunk[keep])
        self._mask = torch.from_numpy(mask[keep])
        self.valid_actions = mask[keep].sum(1)
        self.tick = np.concatenate(tick)[keep]
        self.age_steps = np.concatenate(age)[keep]
        self._age_s = torch.from_numpy((self.age_steps / self.action_hz).astype(np.float32))
        self._first = torch.from_numpy(keep & (row == starts[:-1][episode]))[torch.from_numpy(keep)]
        self._sensor_end = np.concatenate([np.asarray(e.sensor_index, np.int64) for e in self.episodes])[keep]
        none = [np.zeros(n, bool) for n in lengths]
        full = [
            e.sensor_full(sensor_window_size) if sensor_enabled else f for e, f in zip(self.episodes, none, strict=True)
        ]
        self.sensor_full = np.concatenate(full)[keep]
        self._sensor: list[Any] = [None] * len(self.episodes)  # opened in the process that reads
        first = self.features[0]
        self.token_shape = tuple(first.tokens.shape[1:])  # (T, D)
        self._token_dtype = first.tokens.dtype

    def __len__(self) -> int:
        return len(self.step)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_sensor": [None] * len(self.episodes)}

    @property
    def datasets(self) -> list[str]:
        """Dataset of each sample."""
        return [self.episodes[e].dataset for e in self.episode]

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Batch:
        """Sample numbers -> observation and target.

        vl_tokens (B, T, D) in the cache's type, vl_mask (B, T) bool, vl_age_s (B,), state (B, 12), with the sensor also sensor
        (B, S, 1026) raw and sensor_mask (B,) bool (window full and finite; the others are zeros); action (B, H, 7), action_mask (B, H)
        bool, previous_action (B, 7): the motion before this step (zero at the first), which only the persistence baseline reads.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        index = torch.from_numpy(numbers)
        row = self._row[index]
        before = torch.where(self._first[index], row, row - 1)
        batch = {
            "state": self._state[row],
            "vl_age_s": self._age_s[index],
            "action": self._action[self._chunk[index]],
            "action_mask": self._mask[index],
            "previous_action": self._action[before].masked_fill(self._first[index][:, None], 0.0),
        }
        episode, tick = self.episode[numbers], self.tick[numbers]
        pairs = list(zip(episode.tolist(), tick.tolist(), strict=True))
        batch["vl_tokens"] = torch.stack([self.features[e].tokens[t] for e, t in pairs])
        batch["vl_mask"] = torch.stack([self.features[e].mask[t] for e, t in pairs])
        if self.sensor_enabled:
            batch.update(self._windows(episode.tolist(), self._sensor_end[numbers], self.sensor_full[numbers]))
        return batch

    def _windows(self, episode: list[int], end: np.ndarray, full: np.ndarray) -> Batch:
        out = np.empty((len(end), self.window, SENSOR_CHANNELS), np.float32)
        for b, (e, stop) in enumerate(
            zip(episode, end.tolist(), strict=True)
        ):  # one copy of a contiguous block a window
            if full[b]:
                if self._sensor[e] is None:
                    self._sensor[e] = np.asarray(
                        self.episodes[e].sensor
                    )  # still the mapped file, without memmap's slow indexing
                out[b] = self._sensor[e][stop - self.window : stop]
            else:
                out[b] = 0.0
        sensor = torch.from_numpy(out)
        present = torch.from_numpy(full)
        finite = torch.isfinite(sensor.sum(dim=(1, 2)))
        if not bool(finite.all()):
            sensor[~finite] = 0.0
            present = present & finite
        return {"sensor": sensor, "sensor_mask": present}

    def bytes_per_sample(self) -> int:
        """Window and feature bytes that one sample brings into memory."""
        tokens = self.token_shape[0] * self.token_shape[1] * self._token_dtype.itemsize
        return tokens + (self.window * SENSOR_CHANNELS * 4 if self.sensor_enabled else 0)


def _ticks(episode: Any, features: Any, length: int, reuse: int, latency_ms: float) -> tuple[np.ndarray, np.ndarray]:
    """For each step of an episode the row of its features and their age in steps: (N,), (N,) int64.

    Features are computed at every `reuse`-th step (a denser cache is thinned to that) and can be used `latency_ms` later; a robot waits
    for its first features before it moves, so the first steps use the first tick.
    """
    tick_step = np.asarray(features.tick_step, np.int64)
    rows = np.flatnonzero(tick_step % reuse == 0)
    used = tick_step[rows]
    expected = np.arange(0, length, reuse)
    if len(used) < len(expected) or not np.array_equal(used[: len(expected)], expected):
        spacing = int(np.diff(tick_step).min()) if len(tick_step) > 1 else 1
        raise UserError(
            f"The VL cache of {episode.name} has features every {spacing} steps, --vlm-reuse-count {reuse} needs them at steps 0, {reuse}, "
            f"{2 * reuse}, ...: pass a multiple of {spacing}, or build the cache with --vlm-reuse-count {reuse}."
        )
    delay = latency_ms / 1000.0 * float(episode.action_hz)  # steps
    steps = np.arange(length)
    newest = np.searchsorted(used, steps - delay + 1e-9, side="right") - 1
    newest = np.maximum(newest, 0)
    return rows[newest], steps - used[newest]


class MicroBatchDataset(torch.utils.data.Dataset):
    """What a DataLoader asks: a MicroBatch's (indices, counts) in, the batch with `count` and `sample` (B,) out. One request is one whole batch."""

    def __init__(self, samples: SampleSet):
        self.samples = samples

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> Batch:
        indices, counts = request
        batch = self.samples.batch(indices)
        batch["count"] = torch.from_numpy(counts)
        batch["sample"] = torch.from_numpy(indices)
        return batch


def batches(samples: SampleSet, requests: list, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches of the (indices, counts) in `requests`, in order; workers end with the epoch (persistent_workers=False)."""
    loader = torch.utils.data.DataLoader(
        MicroBatchDataset(samples),
        sampler=requests,  # a request is a whole micro-batch
        batch_size=None,
        num_workers=min(num_workers, len(requests)),
        persistent_workers=False,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )
    with starting_workers():
        return iter(loader)


def _start_worker(_: int) -> None:
    begin_worker()
    torch.set_num_threads(1)
