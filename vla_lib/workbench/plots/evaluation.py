"""Open-loop predictions in; figures of errors and of predicted over true paths out."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from vla_lib.evaluation.metrics import DIMENSIONS, UNITS
from vla_lib.evaluation.open_loop import OpenLoop
from vla_lib.workbench.plots.style import style

COLOURS = {
    "policy": "#0b6e99",
    "VL masked": "#7a3fa0",
    "sensor masked": "#2e7d32",
    "zero": "#9a9a9a",
    "mean": "#c58b00",
    "persistence": "#b5482a",
}


def error_by_step(metrics: dict[str, dict[str, Any]], action_hz: float) -> Figure:
    """Translation (mm) and rotation (deg) error against the step of the chunk, the policy beside the baselines."""
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
        for axis, key, label in zip(
            axes,
            ("translation_mae_mm", "rotation_mae_deg"),
            ("translation error (mm)", "rotation error (deg)"),
            strict=True,
        ):
            for name, found in metrics.items():
                values = [np.nan if value is None else value for value in found["by_step"][key]]
                ahead_s = np.arange(1, len(values) + 1) / action_hz
                axis.plot(
                    ahead_s, values, "o-", ms=3, lw=2.2 if name == "policy" else 1.2, color=COLOURS[name], label=name
                )
            axis.set(xlabel="time ahead (s)", ylabel=f"mean {label}", ylim=(0, None))
        axes[0].legend()
        figure.suptitle("Error of each step of the predicted chunk, held-out episodes")
    plt.close(figure)
    return figure


def error_by_dimension(metrics: dict[str, dict[str, Any]]) -> Figure:
    """Mean absolute error of each dimension of a step (mm, deg), the policy beside the baselines."""
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
        for axis, names in zip(axes, (DIMENSIONS[:3], DIMENSIONS[3:6]), strict=True):
            width = 0.8 / len(metrics)
            for k, (name, found) in enumerate(metrics.items()):
                values = [found["dimensions"][dimension]["mae"] for dimension in names]
                axis.bar(
                    np.arange(3) + width * (k - (len(metrics) - 1) / 2),
                    values,
                    0.95 * width,
                    color=COLOURS[name],
                    label=name,
                )
            axis.set_xticks(range(3), names)
            axis.set_ylabel(f"mean absolute error ({UNITS[DIMENSIONS.index(names[0])]} a step)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(metrics))
    plt.close(figure)
    return figure


def predicted_against_true(found: OpenLoop) -> Figure:
    """The first action of each chunk against the true one: one panel a dimension that varies, in mm or degrees."""
    first = found.mask[:, 0]
    panels = [k for k in range(6) if found.target[first, 0, k].std() > 1e-6] or [0]
    with style():
        columns = min(3, len(panels))
        figure, axes = plt.subplots(
            -(-len(panels) // columns), columns, figsize=(3 * columns, 2.8 * -(-len(panels) // columns)), squeeze=False
        )
        for axis, k in zip(axes.flat, panels, strict=False):
            true, predicted = found.target[first, 0, k], found.chunks["policy"][first, 0, k]
            low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
            axis.plot([low, high], [low, high], color="#9a9a9a", lw=1)
            axis.plot(true, predicted, ".", ms=3, alpha=0.4, color=COLOURS["policy"])
            axis.set(title=DIMENSIONS[k], xlabel=f"true ({UNITS[k]} a step)", ylabel=f"predicted ({UNITS[k]} a step)")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
    plt.close(figure)
    return figure


def chunks_over_path(found: OpenLoop, episode: str, every: int = 8, samples: np.ndarray | None = None) -> Figure:
    """The true motion of one held-out episode (summed from its start, mm) and every few predicted chunks drawn from where they begin.

    samples: (S, N, H, 7) other chunks of the episode's N samples, as a diffusion policy draws them from other noise.
    """
    rows = np.flatnonzero(found.episode == episode)
    step = found.step[rows]
    path_mm = np.zeros((int(step.max()) + 2, 3))
    path_mm[step + 1] = found.target[rows, 0, :3]
    path_mm = np.cumsum(path_mm, axis=0)
    with style():
        figure, axes = plt.subplots(3, 1, figsize=(9, 5.2), sharex=True)
        for k, axis in enumerate(axes):
            axis.plot(np.arange(len(path_mm)), path_mm[:, k], color="#333333", lw=1.4, label="recorded")
            drawn = found.chunks["policy"][rows][None] if samples is None else samples
            label = "predicted chunk" if samples is None else f"predicted chunks, {len(samples)} samples each"
            for n in range(0, len(rows), every):
                start = found.step[rows[n]]
                for chunk in drawn[:, n, :, k]:
                    path = path_mm[start, k] + np.concatenate([[0], np.cumsum(chunk)])
                    axis.plot(
                        start + np.arange(len(path)),
                        path,
                        color=COLOURS["policy"],
                        lw=1.3 if samples is None else 0.8,
                        label=label,
                    )
                    label = None
            axis.set(ylabel=f"{'xyz'[k]} (mm)")
        axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        axes[-1].set(xlabel="action step")
        figure.suptitle(f"Predicted chunks over the recorded motion: {episode}")
    plt.close(figure)
    return figure
