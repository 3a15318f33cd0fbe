"""Samples: prepared episodes and their VL features as whole batches of observations and action chunks.

A sample is one step of one episode. Its observation holds what a robot could have known at that moment: the newest VL
features that had been computed by then (with their age), the sensor window that ends there, the robot state. Its
target is the chunk of the next `horizon` actions. Small tables are built once; a batch gathers them with one indexing
operation each and copies the large arrays (VL tokens, sensor windows) straight from the memory-mapped files.

Their statistics are for the policy's normaliser: one row in a thousand that cannot be true moves none of them.

N steps of all episodes, n samples, B in a batch, H actions in a chunk, S sensor samples in a window, T VL tokens of
width D."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vla_lib.core.errors import UserError
from vla_lib.episodes import PreparedEpisode
from vla_lib.features.cache import EpisodeFeatures, FeatureCache
from vla_lib.features.vision_cache import ComputedFeatures
from vla_lib.policy.config import SENSOR_CHANNELS
from vla_lib.policy.goal import goal_of
from vla_lib.policy.normaliser import STD_FLOOR, VARIES

Batch = dict[str, Tensor]
SPEED_MM_S = 1_000.0  # of the lab's arm at most, as its maker says
BEYOND = 10.0  # so many times what nine of ten steps stay below is no motion of this dataset (a guess)
# one action of 80 mm among 1,500 of 0.5 mm would make the spread four times as large, one of 150 mm eight times
TYPICAL, FAR = 0.98, 4.0  # what lies further from the median than FAR times the reach of this part counts as that far
SENSOR_ROWS = 2_000  # rows read per episode: neighbours at 650 Hz are nearly the same
TICKS = 4_000  # VL ticks read in all


# Settings of a run that decide what its samples are.
PAIRING = ("horizon", "sensor_enabled", "sensor_window_size", "vlm_reuse_count", "vlm_latency_ms", "vlm_latency_max_ms")


class SampleSet(torch.utils.data.Dataset[Batch | UserError]):
    """All samples of `episodes`, with features from `cache`.

    Public arrays, one entry a sample: `episode` (number in `episodes`), `step`, `tick` (row of its features),
    `age_steps`, `valid_actions` (steps of the chunk that count), `sensor_full` (the window is whole). Above
    `vlm_latency_ms`, `vlm_latency_max_ms` asks for a delay of its own for each sample: `draw_delays`. Raises UserError
    where an episode has no features, or where the features' ticks do not fit `vlm_reuse_count`."""

    def __init__(
        self,
        episodes: Sequence[PreparedEpisode],
        cache: FeatureCache | ComputedFeatures,
        *,
        horizon: int = 8,
        sensor_enabled: bool = True,
        sensor_window_size: int = 65,
        vlm_reuse_count: int = 3,
        vlm_latency_ms: float = 0.0,
        vlm_latency_max_ms: float = 0.0,
    ) -> None:
        self.episodes = list(episodes)
        self.horizon, self.sensor_enabled, self.window = horizon, sensor_enabled, sensor_window_size
        if not self.episodes:
            raise UserError("A sample set needs at least one episode; run `python -m vla_lib.preprocess` first.")
        self.features = [cache.episode(e) for e in self.episodes]
        self.token_shape = tuple(self.features[0].tokens.shape[1:])  # (T, D)
        self.action_hz = float(self.episodes[0].action_hz)
        if odd := [e.name for e in self.episodes if float(e.action_hz) != self.action_hz]:
            rates = f"{self.episodes[0].name}: {self.action_hz:g}; {odd[0]} does not"
            raise UserError(f"Episodes differ in action_hz ({rates}); preprocess all at one rate.")
        lengths = np.array([len(e) for e in self.episodes])
        starts = np.concatenate([[0], np.cumsum(lengths)])  # rows of an episode in the joined tables
        action = np.concatenate([np.asarray(e.action, np.float32) for e in self.episodes])
        state = np.concatenate([np.asarray(e.state, np.float32) for e in self.episodes])
        valid = np.concatenate([np.asarray(e.valid, bool) for e in self.episodes])
        self._action, self._state = torch.from_numpy(action), torch.from_numpy(state)  # (N, 7), (N, 12)

        row = np.arange(starts[-1])
        episode = np.repeat(np.arange(len(lengths)), lengths)
        end = starts[1:][episode][:, None]  # (N, 1)
        chunk = row[:, None] + np.arange(horizon)  # (N, H)
        inside = chunk < end
        chunk = np.minimum(chunk, end - 1)
        mask = inside & valid[chunk]
        keep = mask[:, 0]  # a sample's own step must be whole
        if not keep.any():
            raise UserError("No step of these episodes is valid; look at their quality findings in notebook 01.")
        self.episode, self.step = episode[keep], (row - starts[:-1][episode])[keep]
        pairs = zip(self.episodes, self.features, strict=True)
        ticks = [_ticks(e, features, vlm_reuse_count) for e, features in pairs]
        self._tick = np.concatenate(ticks)
        self._first_tick = np.concatenate([[0], np.cumsum([len(rows) for rows in ticks])])[self.episode]
        self.reuse, period_ms = vlm_reuse_count, 1000.0 / self.action_hz
        self.delay_steps = vlm_latency_ms / period_ms, max(vlm_latency_ms, vlm_latency_max_ms) / period_ms
        self.draw_delays(0, 0)
        self.valid_actions = mask[keep].sum(1)
        usable = np.where(valid, row, -1)  # an episode's last whole step is where it ends
        last = np.array([usable[a:b].max() for a, b in zip(starts, starts[1:], strict=False)])
        self._goal = goal_of(self._state[torch.from_numpy(last[self.episode])])  # (n, 3)
        self._row, self._chunk, self._mask = (torch.from_numpy(table[keep]) for table in (row, chunk, mask))
        self._first = torch.from_numpy(self.step == 0)
        full = [e.sensor_full(self.window) if sensor_enabled else np.zeros(len(e), bool) for e in self.episodes]
        self.sensor_full = np.concatenate(full)[keep]

        self._refuse_impossible(action, valid, starts)
        # episodes whose files were compared with their checksums, known to all loader processes of the run: when a
        # batch first needs one, since its bytes have to be read then anyway
        self._checked = torch.zeros(len(self.episodes), dtype=torch.bool).share_memory_()

    def _refuse_impossible(self, action: np.ndarray, valid: np.ndarray, starts: np.ndarray) -> None:
        """Raise UserError where an action is faster than an arm and all others: an old data.pkl has no checksum."""
        moved_mm = np.linalg.norm(action[:, :3], axis=1) * valid
        limit_mm = max(SPEED_MM_S / self.action_hz, BEYOND * float(np.quantile(moved_mm, 0.9)))
        worst = int(moved_mm.argmax())
        if moved_mm[worst] > limit_mm:
            number = int(np.searchsorted(starts, worst, side="right")) - 1
            raise UserError(
                f"{self.episodes[number].path / 'data.pkl'}: the action of step {worst - starts[number]} moves by "
                f"{moved_mm[worst]:.0f} mm, which no arm does and no other episode comes near; prepare its dataset "
                "again with python -m vla_lib.preprocess --overwrite, or leave the episode out."
            )

    def draw_delays(self, seed: int, epoch: int) -> None:
        """Pair each sample with the newest features that a robot would have had: `tick`, `age_steps`.

        Features are computed at every `reuse`-th step and can be used a delay later; a robot waits for its first ones
        before it moves, so the first steps use the first tick. With a range of delays each sample's is drawn from it by
        seed and epoch, before the epoch's loader processes begin. A VLM does one moment at a time: behind a delay of d
        steps, d > `reuse`, the newest features are up to d - `reuse` steps older than at its full rate."""
        shortest, longest = self.delay_steps
        delay = np.full(len(self.step), shortest)
        if longest > shortest:
            draw = np.random.default_rng([seed, epoch, 1]).random((2, len(self.step)))
            delay += (longest - shortest) * draw[0]
            delay += np.maximum(np.ceil(delay) - self.reuse, 0) * draw[1]
        newest = np.maximum((self.step - delay + 1e-9) // self.reuse, 0).astype(np.int64)
        self.tick, self.age_steps = self._tick[self._first_tick + newest], self.step - newest * self.reuse  # (n,), (n,)
        self._age_s = torch.from_numpy((self.age_steps / self.action_hz).astype(np.float32))

    @property
    def oldest_steps(self) -> int:
        """No sample's features are older, whatever is drawn."""
        shortest, longest = self.delay_steps
        waits = max(0, math.ceil(longest) - self.reuse) if longest > shortest else 0
        return max(math.ceil(longest) + waits + self.reuse - 1, int(self.age_steps.max()))

    @property
    def trained_ages_s(self) -> tuple[float, float]:
        """Least and greatest age of the features of steps that do not begin an episode, s."""
        return math.ceil(self.delay_steps[0]) / self.action_hz, self.oldest_steps / self.action_hz

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, indices: np.ndarray) -> Batch | UserError:
        """One whole batch. An error crosses processes as a value: raised, it would be buried in a traceback."""
        try:
            return self.batch(indices)
        except UserError as error:
            return error

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Batch:
        """Sample numbers -> observation and target.

        vl_tokens (B, T, D) in the cache's type, vl_mask (B, T) bool, vl_age_s (B,), vl_state (B, 12): the state then,
        state (B, 12) now; with the sensor also sensor (B, S, 1026) raw and sensor_mask (B,) bool (window full and
        finite; the others are zeros); goal (B, 3): where the episode ends (policy.goal, by hindsight), action
        (B, H, 7), action_mask (B, H) bool, previous_action (B, 7): the motion before this step (zero at the first),
        for the persistence baseline."""
        numbers = np.asarray(indices, dtype=np.int64)
        for e in np.unique(self.episode[numbers]).tolist():
            if not self._checked[e]:
                self.features[e].check()
                if self.sensor_enabled:
                    self.episodes[e].check_sensor()
                self._checked[e] = True
        index = torch.from_numpy(numbers)
        row, first = self._row[index], self._first[index]
        before = torch.where(first, row, row - 1)
        batch = {
            "state": self._state[row],
            "vl_age_s": self._age_s[index],
            "vl_state": self._state[row - torch.from_numpy(self.age_steps[numbers])],
            "goal": self._goal[index],
            "action": self._action[self._chunk[index]],
            "action_mask": self._mask[index],
            "previous_action": self._action[before].masked_fill(first[:, None], 0.0),
        }
        pairs = list(zip(self.episode[numbers].tolist(), self.tick[numbers].tolist(), strict=True))
        batch["vl_tokens"] = torch.stack([self.features[e].tick(t) for e, t in pairs])
        batch["vl_mask"] = torch.stack([self.features[e].mask[t] for e, t in pairs])
        return batch | (self._windows(numbers) if self.sensor_enabled else {})

    def largest(self, numbers: np.ndarray, losses: np.ndarray) -> tuple[float, str]:
        """The largest of the `losses` (B,) of samples `numbers` (B,), or one that is not finite; its place in words."""
        worst = int(np.argmax(np.nan_to_num(losses, nan=np.inf)))
        number = int(numbers[worst])
        episode, step = self.episodes[int(self.episode[number])], int(self.step[number])
        where = f"step {step} ({step / self.action_hz:.1f} s) of episode {episode.path}"
        return float(losses[worst]), where

    def _windows(self, numbers: np.ndarray) -> Batch:
        full = self.sensor_full[numbers]
        out = np.zeros((len(numbers), self.window, SENSOR_CHANNELS), np.float32)
        for b in np.flatnonzero(full):  # one read of a contiguous block a window
            out[b] = self.episodes[self.episode[numbers[b]]].sensor_window(self.step[numbers[b]], self.window)
        sensor, present = torch.from_numpy(out), torch.from_numpy(full)
        finite = torch.isfinite(sensor.sum(dim=(1, 2)))
        sensor[~finite] = 0.0
        return {"sensor": sensor, "sensor_mask": present & finite}


def _ticks(episode: PreparedEpisode, features: EpisodeFeatures, reuse: int) -> np.ndarray:
    """Rows of an episode's features at steps 0, `reuse`, 2 `reuse`, ...: a denser cache is thinned to that."""
    tick_step = np.asarray(features.tick_step, np.int64)
    rows = np.flatnonzero(tick_step % reuse == 0)
    used, expected = tick_step[rows], np.arange(0, len(episode), reuse)
    if len(used) < len(expected) or not np.array_equal(used[: len(expected)], expected):
        spacing = int(np.diff(tick_step).min()) if len(tick_step) > 1 else 1
        raise UserError(
            f"The VL cache of {episode.name} has features every {spacing} steps, --vlm-reuse-count {reuse} needs them "
            f"at steps 0, {reuse}, {2 * reuse}, ...: pass a multiple of {spacing}, or build the cache with "
            f"--vlm-reuse-count {reuse}."
        )
    return rows


def training_statistics(samples: SampleSet) -> dict[str, Tensor]:
    """Mean and spread of these samples (pass the training split); keys and shapes: Normaliser.load_statistics."""
    action = samples._action[samples._row].double()  # (n, 7): the actions of valid steps
    state = samples._state[samples._row].double()
    action, state = held(action), held(state)
    mean, std = action.mean(0), action.std(0, correction=0)
    scale = torch.where(std > VARIES, std.clamp_min(STD_FLOOR), 1.0)
    result = {
        "action_mean": mean,
        "action_std": std,
        "action_range": ((action - mean) / scale).abs().max(),
        "state_mean": state.mean(0),
        "state_std": state.std(0, correction=0),
        "goal_mean": samples._goal.double().mean(0),
        "goal_std": samples._goal.double().std(0, correction=0),
    }
    result |= _token_statistics(samples)
    if samples.sensor_enabled:
        result |= _sensor_statistics(samples)
    return {k: v.float() for k, v in result.items()}


def held(values: Tensor) -> Tensor:
    """(n, D): the values, those far out of each column's distribution held at FAR times its usual reach."""
    middle = values.median(0).values
    # a dimension that mostly rests has its reach where it moves
    moved = [away[away > VARIES].numpy() for away in (values - middle).abs().T]
    usual = [float(np.quantile(one, TYPICAL)) if len(one) else np.inf for one in moved]
    reach = FAR * torch.tensor(usual, dtype=values.dtype)
    return values.clamp(middle - reach, middle + reach)


def _token_statistics(samples: SampleSet) -> dict[str, Tensor]:
    """Mean of each token position (T, D); a spread of each channel (D,) about them. Masked tokens do not count."""
    stride = max(1, sum(len(f.tick_step) for f in samples.features) // TICKS)
    total, square = torch.zeros(2, *samples.token_shape, dtype=torch.float64)
    count = torch.zeros(samples.token_shape[0], 1, dtype=torch.float64)
    for features in samples.features:
        mask = torch.as_tensor(np.asarray(features.mask[::stride]))[..., None]  # (t, T, 1)
        tokens = features.tokens[::stride].double().masked_fill(~mask, 0.0)
        total += tokens.sum(0)
        square += tokens.square().sum(0)
        count += mask.sum(0)
    mean = total / count.clamp_min(1)
    variance = (square - count * mean.square()).clamp_min(0).sum(0) / count.sum().clamp_min(1)
    return {"token_mean": mean, "token_std": variance.sqrt()}


def _sensor_statistics(samples: SampleSet) -> dict[str, Tensor]:
    """Mean of each of the 1026 channels; the force's spread, and one for all depth bins (empty bins stay small)."""
    total, square, count = np.zeros(SENSOR_CHANNELS), np.zeros(SENSOR_CHANNELS), 0
    for episode in samples.episodes:
        if episode.has_sensor:
            stream = np.asarray(episode.sensor)
            rows = np.asarray(stream[:: max(1, len(stream) // SENSOR_ROWS)], np.float64)
            rows = rows[np.isfinite(rows).all(1)]
            total, square, count = total + rows.sum(0), square + np.square(rows).sum(0), count + len(rows)
    if not count:
        return {"sensor_mean": torch.zeros(SENSOR_CHANNELS), "sensor_std": torch.ones(SENSOR_CHANNELS)}
    mean = total / count
    variance = np.maximum(square / count - mean**2, 0)
    std = np.full(SENSOR_CHANNELS, np.sqrt(variance[1:].mean()))
    std[0] = np.sqrt(variance[0])
    return {"sensor_mean": torch.from_numpy(mean), "sensor_std": torch.from_numpy(std)}
