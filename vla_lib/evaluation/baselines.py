"""Baselines that every policy must beat: what was known at each step in; chunks of doing nothing, the usual, and the same again out."""

import numpy as np


def baseline_chunks(previous_action: np.ndarray, mean_action: np.ndarray, horizon: int) -> dict[str, np.ndarray]:
    """Chunks (M, horizon, 7) of each baseline for M samples.

    previous_action (M, 7): the motion that ended at the step (all that a robot could have known); mean_action (7,): mean over the valid steps of
    the training episodes. `zero` does not move, `mean` moves as the training data do on average, `persistence` repeats the previous motion.
    """
    shape = (len(previous_action), horizon, previous_action.shape[1])
    return {
        "zero": np.zeros(shape, np.float32),
        "mean": np.broadcast_to(mean_action.astype(np.float32), shape),
        "persistence": np.broadcast_to(previous_action.astype(np.float32)[:, None], shape),
    }
