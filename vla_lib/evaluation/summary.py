"""Open-loop predictions in; the tables and the results record that people read out."""

from typing import Any

import numpy as np
import pandas as pd

from vla_lib.evaluation.baselines import BASELINES
from vla_lib.evaluation.metrics import DIMENSIONS, UNITS
from vla_lib.evaluation.open_loop import OpenLoop, beaten

METHODS = ("policy", *BASELINES)


def error_table(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a method: mean and RMS error of a step's motion, error of the whole chunk's path, mean R2 over the moving dimensions."""
    rows = []
    for name in METHODS:
        found = metrics[name]
        r2 = [value["r2"] for value in found["dimensions"].values() if value["r2"] is not None]
        rows.append(
            {
                "method": name,
                "translation MAE (mm)": found["translation_mae_mm"],
                "translation RMSE (mm)": found["translation_rmse_mm"],
                "rotation MAE (deg)": found["rotation_mae_deg"],
                "rotation RMSE (deg)": found["rotation_rmse_deg"],
                "path error of a chunk (mm)": found["path_error_mm"],
                "R2 (mean)": float(np.mean(r2)) if r2 else None,
            }
        )
    return pd.DataFrame(rows)


def dimension_table(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a dimension of the action: the policy's MSE, MAE, R2 and correlation, and each baseline's MAE."""
    rows = []
    for name, unit in zip(DIMENSIONS, UNITS, strict=True):
        ours = metrics["policy"]["dimensions"][name]
        row = {
            "dimension": f"{name} ({unit})" if unit else name,
            "MSE": ours["mse"],
            "MAE": ours["mae"],
            "R2": ours["r2"],
            "correlation": ours["correlation"],
        }
        rows.append(row | {f"MAE of {other}": metrics[other]["dimensions"][name]["mae"] for other in BASELINES})
    return pd.DataFrame(rows)


def results(found: OpenLoop) -> dict[str, Any]:
    """What results.json records: plain figures first, then all metrics of all methods, whole and by dataset."""
    metrics = found.metrics()
    ours = metrics["policy"]
    return {
        "samples": ours["samples"],
        "held_out_episodes": len(np.unique(found.episode)),
        "translation_mae_mm": ours["translation_mae_mm"],
        "rotation_mae_deg": ours["rotation_mae_deg"],
        "translation_rmse_mm": ours["translation_rmse_mm"],
        "rotation_rmse_deg": ours["rotation_rmse_deg"],
        "episode_keys": sorted({str(key) for key in found.episode}),
        "beats": beaten(metrics),
        "metrics": metrics,
        "by_dataset": found.by_dataset(),
    }
