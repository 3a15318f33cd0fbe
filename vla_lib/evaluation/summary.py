"""Open-loop predictions and closed-loop rollouts in; the tables and the results record that people read out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.evaluation.closed_loop import ClosedLoop, compare
from vla_lib.evaluation.metrics import DIMENSIONS, UNITS
from vla_lib.evaluation.open_loop import OpenLoop, beaten
from vla_lib.training.validation import BASELINES


def error_table(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a method (the policy, the policy with an input masked, each baseline): mean and RMS error of a step's motion,
    error of the whole chunk's path, mean R2 over the moving dimensions."""
    rows = []
    for name, found in metrics.items():
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


def phase_table(found: OpenLoop) -> pd.DataFrame:
    """`error_table` of the steps in contact and of those in free motion (and of those whose force is not known), one below the other."""
    tables = {phase: error_table(metrics) for phase, metrics in found.by_phase().items()}
    steps = {phase: int((found.phase == phase).sum()) for phase in tables}
    return pd.concat([table.assign(phase=phase, steps=steps[phase]) for phase, table in tables.items()])[
        ["phase", "steps", *next(iter(tables.values())).columns]
    ]


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
        "by_phase": found.by_phase(),
    }


def side_by_side(found: Mapping[str, OpenLoop]) -> pd.DataFrame:
    """One row a checkpoint: the policy's row of `error_table`, its held-out episodes, and the baselines that it does not beat."""
    rows = []
    for name, loop in found.items():
        metrics = loop.metrics()
        row = error_table(metrics).iloc[0].to_dict() | {"method": name}
        lost_to = [other for other, won in beaten(metrics).items() if not won]
        rows.append(row | {"episodes": len(np.unique(loop.episode)), "not better than": ", ".join(lost_to) or "-"})
    return pd.DataFrame(rows).rename(columns={"method": "checkpoint"})


def closed_loop_table(found: Mapping[str, ClosedLoop]) -> pd.DataFrame:
    """One row a variant: successes with their 95 % interval; median / 90th percentile of lateral and depth error (punctured rollouts), peak force
    (all) and time to target (successes); the reasons of failure."""
    rows = []
    for name, loop in found.items():
        summary = loop.summary()
        low, high = (100 * value for value in summary["interval_95"])
        rows.append(
            {
                "variant": name,
                "success": f"{summary['successes']} of {summary['rollouts']}",
                "95 % interval": f"{low:.0f} to {high:.0f} %",
                "punctured": summary["punctured"],
                "lateral (mm)": _spread(summary["lateral_mm"], 2),
                "depth (mm)": _spread(summary["depth_error_mm"], 2),
                "force (mN)": _spread(summary["peak_force_mN"], 0),
                "time (s)": _spread(summary["time_to_target_s"], 1),
                "reasons": ", ".join(f"{reason} {count}" for reason, count in summary["reasons"].items()) or "-",
            }
        )
    return pd.DataFrame(rows)


def pair_table(found: Mapping[str, ClosedLoop]) -> pd.DataFrame:
    """The first variant against each other one on the same seeds: who succeeds where, and the p value of the sign test."""
    (first, main), *others = found.items()
    rows = []
    for name, loop in others:
        pair = compare(main, loop)
        rows.append(
            {
                "first": first,
                "other": name,
                "both": pair["both"],
                "only the first": pair["only_one"],
                "only the other": pair["only_other"],
                "neither": pair["neither"],
                "p value": f"{pair['p_value']:.2g}",
            }
        )
    return pd.DataFrame(rows)


def _spread(found: dict[str, float] | None, digits: int) -> str:
    return f"{found['median']:.{digits}f} / {found['p90']:.{digits}f}" if found else ""
