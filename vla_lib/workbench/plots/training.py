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
