"""Open-loop metrics: predicted and true action chunks in; per-dimension, per-step and path errors in mm and degrees out.

Shapes: M samples, H steps of a chunk (0.1 s each at 10 Hz), A = 7 action dimensions (dx dy dz in mm, rotation vector in degrees, gripper).
"""

from typing import Any

import numpy as np

DIMENSIONS = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
UNITS = ("mm", "mm", "mm", "deg", "deg", "deg", "")
TRANSLATION, ROTATION = slice(0, 3), slice(3, 6)


def open_loop_metrics(predicted: np.ndarray, target: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Errors of `predicted` (M, H, 7) against `target` (M, H, 7) where `mask` (M, H) is True.

    Returns `translation_mae_mm` (mean Euclidean error of a step's motion), `rotation_mae_deg`, the same as RMSE, `dimensions` (MSE, MAE, R2,
    correlation of each; R2 and correlation are None for a dimension that does not vary), `by_step` (errors by chunk index) and `path_error_mm`
    (distance between the integrated motions at the end of full chunks). Raises ValueError for unequal shapes or an empty mask.
    """
    if predicted.shape != target.shape or mask.shape != target.shape[:2]:
        raise ValueError(f"shapes differ: predicted {predicted.shape}, target {target.shape}, mask {mask.shape}")
    if not mask.any():
        raise ValueError("no valid step to evaluate")
    error = predicted.astype(np.float64) - target
    distance_mm = np.linalg.norm(error[..., TRANSLATION], axis=-1)  # (M, H)
    angle_deg = np.linalg.norm(error[..., ROTATION], axis=-1)  # (M, H)
    full = mask.all(axis=1)
    path = np.linalg.norm(error[full][..., TRANSLATION].sum(axis=1), axis=-1)
    return {
        "samples": int(mask.any(axis=1).sum()),
        "translation_mae_mm": float(distance_mm[mask].mean()),
        "translation_rmse_mm": float(np.sqrt((distance_mm[mask] ** 2).mean())),
        "rotation_mae_deg": float(angle_deg[mask].mean()),
        "rotation_rmse_deg": float(np.sqrt((angle_deg[mask] ** 2).mean())),
        "path_error_mm": float(path.mean()) if full.any() else None,
        "dimensions": {
            name: _dimension(predicted[..., k][mask], target[..., k][mask]) for k, name in enumerate(DIMENSIONS)
        },
        "by_step": {
            "translation_mae_mm": [_mean(distance_mm[:, h][mask[:, h]]) for h in range(mask.shape[1])],
            "rotation_mae_deg": [_mean(angle_deg[:, h][mask[:, h]]) for h in range(mask.shape[1])],
        },
    }


def _dimension(predicted: np.ndarray, target: np.ndarray) -> dict[str, float | None]:
    predicted, target = predicted.astype(np.float64), target.astype(np.float64)
    error = predicted - target
    spread = ((target - target.mean()) ** 2).sum()
    varies = bool(target.std() > 1e-6)
    related = varies and bool(predicted.std() > 1e-9)
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "r2": float(1 - (error**2).sum() / spread) if varies else None,
        "correlation": float(np.corrcoef(predicted, target)[0, 1]) if related else None,
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
