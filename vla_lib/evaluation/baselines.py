"""Baselines that every policy must beat: what was known at each step in; action chunks of doing nothing, the usual, and the same again out."""

import numpy as np

BASELINES = ("zero", "mean", "persistence")


def baseline_chunks(action: np.ndarray, steps: np.ndarray, horizon: int, mean_action: np.ndarray) -> dict[str, np.ndarray]:
    """Baseline chunks (len(steps), horizon, 7) for the `steps` of one episode.

    action (N, 7): the episode's actions; mean_action (7,): mean over valid steps of the training episodes. `zero` does not move (the gripper
    stays closed: 1.0), `mean` is the training mean, `persistence` repeats the motion that ended at the step, action[k - 1] (zero at k = 0):
    all a robot could have known at that moment.
    """
    still = np.zeros(action.shape[1], np.float32)
    still[-1] = 1.0
    last = np.concatenate([still[None], action[:-1]])[steps]  # (M, 7)
    shape = (len(steps), horizon, action.shape[1])
    return {
        "zero": np.broadcast_to(still, shape),
        "mean": np.broadcast_to(mean_action.astype(np.float32), shape),
        "persistence": np.broadcast_to(last[:, None], shape),
    }
