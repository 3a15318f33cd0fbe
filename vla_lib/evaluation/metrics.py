"""Open-loop metrics: how far predicted action chunks lie from the true ones, and the baselines that every policy must
beat.

Shapes: M samples, H steps of a chunk (0.1 s each at 10 Hz), 7 action dimensions (dx dy dz in mm, rotation vector in
degrees, gripper).
"""

from typing import Any

import numpy as np

DIMENSIONS = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
UNITS = ("mm", "mm", "mm", "deg", "deg", "deg", "")
Metrics = dict[str, Any]


def baseline_chunks(previous_action: np.ndarray, mean_action: np.ndarray, horizon: int) -> dict[str, np.ndarray]:
    """Chunks (M, horizon, 7) of each baseline for M samples.

    previous_action (M, 7): the motion that ended at the step (all that a robot could have known); mean_action (7,):
    mean over the valid steps of the training episodes. `zero` does not move, `mean` moves as the training data do on
    average, `persistence` repeats the previous motion.
    """
    shape = (len(previous_action), horizon, previous_action.shape[1])
    return {
        "zero": np.zeros(shape, np.float32),
        "mean": np.broadcast_to(mean_action.astype(np.float32), shape),
        "persistence": np.broadcast_to(previous_action.astype(np.float32)[:, None], shape),
    }


def open_loop_metrics(predicted: np.ndarray, target: np.ndarray, mask: np.ndarray) -> Metrics:
    """Errors of `predicted` (M, H, 7) against `target` (M, H, 7) where `mask` (M, H) is True.

    Returns `translation_mae_mm` (mean Euclidean error of a step's motion), `rotation_mae_deg`, the same as RMSE,
    `dimensions` (MSE, MAE, R2, correlation of each; R2 and correlation are None for a dimension that does not vary),
    `by_step` (errors by chunk index) and `path_error_mm` (distance between the integrated motions at the end of full
    chunks). Raises ValueError for unequal shapes or an empty mask.
    """
    if predicted.shape != target.shape or mask.shape != target.shape[:2]:
        raise ValueError(f"shapes differ: predicted {predicted.shape}, target {target.shape}, mask {mask.shape}")
    if not mask.any():
        raise ValueError("no valid step to evaluate")
    predicted, target = predicted.astype(np.float64), target.astype(np.float64)
    error = predicted - target
    sizes = {  # (M, H) Euclidean error of each step's motion
        "translation_{}_mm": np.linalg.norm(error[..., 0:3], axis=-1),
        "rotation_{}_deg": np.linalg.norm(error[..., 3:6], axis=-1),
    }
    full = mask.all(axis=1)  # only these: sums over different spans cannot be compared
    path = np.linalg.norm(error[full][..., 0:3].sum(axis=1), axis=-1)
    return {
        "samples": int(mask.any(axis=1).sum()),
        **{name.format("mae"): float(size[mask].mean()) for name, size in sizes.items()},
        **{name.format("rmse"): float(np.sqrt((size[mask] ** 2).mean())) for name, size in sizes.items()},
        "path_error_mm": _mean(path),
        "dimensions": {
            name: _dimension(predicted[mask][:, k], target[mask][:, k]) for k, name in enumerate(DIMENSIONS)
        },
        "by_step": {
            name.format("mae"): [_mean(size[:, h][mask[:, h]]) for h in range(mask.shape[1])]
            for name, size in sizes.items()
        },
    }


def _dimension(predicted: np.ndarray, target: np.ndarray) -> dict[str, float | None]:
    error = predicted - target
    varies = bool(target.std() > 1e-6)  # R2 and correlation divide by the spread
    related = varies and bool(predicted.std() > 1e-9)
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "r2": float(1 - (error**2).mean() / target.var()) if varies else None,
        "correlation": float(np.corrcoef(predicted, target)[0, 1]) if related else None,
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
