"""Statistics: mean and spread of the training samples' actions, states, sensor and VL tokens, for the policy's
normaliser. One row in a thousand that cannot be true moves none of them."""

import numpy as np
import torch
from torch import Tensor

from vla_lib.policy.config import SENSOR_CHANNELS
from vla_lib.policy.normaliser import STD_FLOOR, VARIES
from vla_lib.training.samples import SampleSet

# one action of 80 mm among 1,500 of 0.5 mm would make the spread four times as large, one of 150 mm eight times
TYPICAL, FAR = 0.98, 4.0  # what lies further from the median than FAR times the reach of this part counts as that far
SENSOR_ROWS = 2_000  # rows read per episode: neighbours at 650 Hz are nearly the same
TICKS = 4_000  # VL ticks read in all


def training_statistics(samples: SampleSet) -> dict[str, Tensor]:
    """Of the samples' episodes alone (pass the training split). Keys and shapes: Normaliser.load_statistics."""
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
