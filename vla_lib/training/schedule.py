"""The learning rate: settings, the step and the share of the run that is done in; the rate of that step out."""

import math

from vla_lib.training.settings import TrainingSettings

FLOOR = 0.01  # of the peak rate, where the cosine ends


def learning_rate(settings: TrainingSettings, step: int, done: float) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine to a hundredth of the peak; `step` counts from 0, `done` lies in 0..1."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return settings.lr * cosine * min(1.0, (step + 1) / max(1, settings.warmup_steps))
