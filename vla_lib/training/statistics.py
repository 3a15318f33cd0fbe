"""Training samples in, the normalisation statistics of a policy out (mean and spread of actions, state, sensor, VL tokens)."""

import numpy as np
import torch
from torch import Tensor

from vla_lib.training.samples import SampleSet

SENSOR_ROWS = 2_000  # rows read per episode: neighbours at 650 Hz are nearly the same
TICKS = 4_000  # VL ticks read in all


def training_statistics(samples: SampleSet) -> dict[str, Tensor]:
    """Statistics of the samples' episodes alone (pass the training split). Keys and shapes: Normaliser.load_statistics."""
    action = samples._action[samples._row].double()  # (n, 7): the actions of valid steps
    state = samples._state[samples._row].double()
    mean, std = action.mean(0), action.std(0, correction=0)
    scale = torch.where(std > 1e-6, std.clamp_min(1e-3), 1.0)
    result = {
        "action_mean": mean,
        "action_std": std,
        "action_range": ((action - mean) / scale).abs().max(),
        "state_mean": state.mean(0),
        "state_std": state.std(0, correction=0),
    }
    result |= _token_statistics(samples)
    if samples.sensor_enabled:
        result |= _sensor_statistics(samples)
    return {k: v.float() for k, v in result.items()}


def _token_statistics(samples: SampleSet) -> dict[str, Tensor]:
    """Mean of each token position (T, D); one spread a feature channel (D,) about those means. Masked tokens do not count."""
    ticks = sum(len(f.tick_step) for f in samples.features)
    stride = max(1, ticks // TICKS)
    shape = samples.token_shape
    total, count = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], 1, dtype=torch.float64)
    square = torch.zeros(shape, dtype=torch.float64)
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
    """Mean of each of the 1026 channels; the spread of the force, and one common spread for all depth bins (empty bins stay small)."""
    total, square, count = 0.0, 0.0, 0
    for episode in samples.episodes:
        if not episode.has_sensor:
            continue
        stream = np.asarray(episode.sensor)
        rows = np.asarray(stream[:: max(1, len(stream) // SENSOR_ROWS)], np.float64)
        rows = rows[np.isfinite(rows).all(1)]
        total, square, count = total + rows.sum(0), square + np.square(rows).sum(0), count + len(rows)
    if not count:
        return {"sensor_mean": torch.zeros(1026), "sensor_std": torch.ones(1026)}
    mean = total / count
    variance = np.maximum(square / count - mean**2, 0)
    std = np.full(1026, np.sqrt(variance[1:].mean()))
    std[0] = np.sqrt(variance[0])
    return {"sensor_mean": torch.from_numpy(mean), "sensor_std": torch.from_numpy(std)}
