"""Rows of metrics.jsonl, weights tables and predicted chunks in; figures of how a training went out."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from vla_lib.workbench.plots.style import style

OURS, GREY = "#0b6e99", "#9a9a9a"
BASELINES = {"zero": GREY, "mean": "#c58b00", "persistence": "#b5482a"}
LOSSES = ("train/loss_step", "train/noise_loss")
DIMENSIONS = ("x", "y", "z", "rx", "ry", "rz")
UNITS = ("mm", "mm", "mm", "deg", "deg", "deg")


def training_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss of each optimiser step, held-out error beside the baselines, learning rate; from metrics.jsonl, also while it grows."""
    steps = [r for r in rows if any(k in r for k in LOSSES)]
    validations = [r for r in rows if "val/action_loss" in r]
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.1))
        if steps:
            key = next(k for k in LOSSES if k in steps[0])
            x, y = np.array([r["step"] for r in steps]), np.array([r[key] for r in steps])
            axes[0].plot(x, y, color=OURS, alpha=0.25, lw=0.8, label="each step")
            axes[0].plot(x, _smooth(y), color=OURS, lw=1.8, label="running mean")
            axes[0].set_yscale("log")
            axes[0].legend()
            axes[2].plot(x, [r["train/lr"] for r in steps], color=OURS)
            axes[0].set_title(key)
        if validations:
            x = [r["step"] for r in validations]
            values = [r["val/action_loss"] for r in validations]
            axes[1].plot(x, values, "o-", ms=3, color=OURS, lw=2, label="policy")
            best = int(np.argmin(values))
            axes[1].plot(x[best], values[best], "o", ms=8, mfc="none", color=OURS, label=f"best (step {x[best]})")
            for name, colour in BASELINES.items():
                axes[1].axhline(validations[-1][f"val/baseline_{name}_action_loss"], color=colour, lw=1.2, ls="--", label=name)
            axes[1].set_ylim(0, None)
            axes[1].legend(fontsize=7)
        else:
            axes[1].text(0.5, 0.5, "no validation yet", ha="center", transform=axes[1].transAxes)
        axes[0].set(xlabel="optimiser step", ylabel="training loss (normalised units)")
        axes[1].set(xlabel="optimiser step", ylabel="held-out action error (Huber, in std)", title="held-out episodes")
        axes[2].set(xlabel="optimiser step", ylabel="learning rate", title="learning rate")
    plt.close(figure)
    return figure


def held_out_errors(predicted: np.ndarray, target: np.ndarray, mask: np.ndarray, previous: np.ndarray, mean: np.ndarray) -> Figure:
    """Mean absolute error of each dimension beside the baselines.

    predicted, target (n, H, 7): mm and degrees a step; mask (n, H) bool; previous (n, 7) and mean (7,): what persistence and mean say.
    """
    guesses = {"policy": predicted, "zero": np.zeros(7), "mean": mean, "persistence": previous[:, None]}
    errors = {name: np.abs(guess - target)[mask].mean(0)[:6] for name, guess in guesses.items()}
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.1))
        for axis, part in zip(axes, (slice(0, 3), slice(3, 6)), strict=True):
            for k, (name, error) in enumerate(errors.items()):
                axis.bar(np.arange(3) + 0.2 * (k - 1.5), error[part], 0.19, color=OURS if name == "policy" else BASELINES[name], label=name)
            axis.set_xticks(range(3), DIMENSIONS[part])
            axis.set_ylabel(f"mean absolute error ({UNITS[part][0]} a step)")
        axes[0].legend()
        figure.suptitle("Held-out error of each dimension")
    plt.close(figure)
    return figure


def sampled_chunks(chunks: np.ndarray, target: np.ndarray, mask: np.ndarray, action_hz: float, every: int = 10) -> Figure:
    """Predicted chunks over the true motion of one episode, x y z in mm.

    chunks (S, N, H, 7): S samples (1 for regression) of the chunk at each of N consecutive steps; target (N, H, 7), mask (N, H).
    """
    samples, steps, horizon = chunks.shape[:3]
    truth = np.concatenate([np.zeros((1, 3)), np.cumsum(target[:, 0, :3], 0)])  # (N + 1, 3) mm since the first step
    time_s = np.arange(steps + 1) / action_hz
    with style():
        figure, axes = plt.subplots(3, 1, figsize=(8.5, 6), sharex=True)
        for k, axis in enumerate(axes):
            axis.plot(time_s, truth[:, k], color="black", lw=1.5, label="true")
            for start in range(0, steps, every):
                length = int(mask[start].sum())
                for s in range(samples):
                    path = truth[start, k] + np.concatenate([[0.0], np.cumsum(chunks[s, start, :length, k])])
                    label = f"predicted chunks ({samples} samples each)" if samples > 1 else "predicted chunks"
                    first = start == 0 and s == 0
                    at = (start + np.arange(length + 1)) / action_hz
                    axis.plot(at, path, color=OURS, lw=1.1, alpha=0.9 if samples == 1 else 0.4, label=label if first else None)
            axis.set_ylabel(f"{DIMENSIONS[k]} since start (mm)")
        axes[0].legend()
        axes[-1].set_xlabel("time (s)")
        figure.suptitle(f"Chunks of {horizon} actions over the true trajectory")
    plt.close(figure)
    return figure


def reuse_counts(rows: Sequence[Mapping[str, Any]], action_hz: float = 10.0) -> Figure:
    """How often VL features of each age were used, over all epochs."""
    counts = _summed(rows, "train/vl_reuse_counts")
    ages = np.arange(len(counts))
    return _histogram(ages * 1000 / action_hz, counts, 800 / action_hz, "age of the VL features (ms)", "Reuse of VL features")


def timestep_counts(rows: Sequence[Mapping[str, Any]], timesteps: int) -> Figure:
    """How often each range of diffusion timesteps was drawn, over all epochs."""
    counts = _summed(rows, "train/diffusion_t_counts")
    width = timesteps / max(1, len(counts))
    return _histogram((np.arange(len(counts)) + 0.5) * width, counts, 0.9 * width, "diffusion timestep", "Diffusion timesteps drawn")


def weights_share(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of the draws beside the share of the steps, a data set a row; from `TrainingData.weights_table`."""
    names = [f"{r['dataset']} (weight {r['weight']:g})" for r in table]
    share = np.array([r["share"] for r in table])
    steps = np.array([r["train_steps"] for r in table], float)
    place = np.arange(len(table))
    with style():
        figure, axis = plt.subplots(figsize=(8, 0.55 * len(table) + 1.1))
        axis.barh(place + 0.2, 100 * share, 0.38, color=OURS, label="of the draws")
        axis.barh(place - 0.2, 100 * steps / steps.sum(), 0.38, color=GREY, label="of the steps")
        axis.set_yticks(place, names)
        axis.set(xlabel="share (%)", title="What each data set gets of the training")
        axis.legend()
    plt.close(figure)
    return figure


def _histogram(x: np.ndarray, counts: np.ndarray, width: float, label: str, title: str) -> Figure:
    with style():
        figure, axis = plt.subplots(figsize=(5.5, 2.8))
        axis.bar(x, counts, width, color=OURS)
        axis.set(xlabel=label, ylabel="samples", title=title)
        if not len(counts):
            axis.text(0.5, 0.5, "nothing counted yet", ha="center", transform=axis.transAxes)
    plt.close(figure)
    return figure


def _summed(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    found = [r[key] for r in rows if key in r]
    return np.sum(found, axis=0) if found else np.zeros(0)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Running mean of the last 20 values, shorter at the start; not-a-numbers stay where they are."""
    window = min(20, len(y))
    total = np.cumsum(np.concatenate([[0.0], y]))
    end = np.arange(1, len(y) + 1)
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)
