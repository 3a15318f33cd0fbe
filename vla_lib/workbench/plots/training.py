"""Rows of metrics.jsonl, weights tables and predicted chunks in; figures of how a training went out."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from vla_lib.workbench.plots.style import style

OURS, GREY = "#0b6e99", "#9a9a9a"
BASELINES = {"zero": GREY, "mean": "#c58b00", "persistence": "#b5482a"}
LOSSES = ("train/loss_step", "train/noise_loss")
GPU = "train/gpu_memory_gib"


def training_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss of each optimiser step, held-out error beside the baselines, learning rate, time waited for data and GPU memory; from
    metrics.jsonl, also while it grows."""
    steps = [r for r in rows if any(k in r for k in LOSSES)]
    validations = [r for r in rows if "val/action_loss" in r]
    with style():
        figure, grid = plt.subplots(2, 2, figsize=(10, 5.8))
        figure.get_layout_engine().set(hspace=0.08)
        axes = list(grid.flat)
        if steps:
            key = next(k for k in LOSSES if k in steps[0])
            x, y = np.array([r["step"] for r in steps]), np.array([r[key] for r in steps])
            axes[0].plot(x, y, color=OURS, alpha=0.25, lw=0.8, label="each step")
            axes[0].plot(x, _smooth(y), color=OURS, lw=1.8, label="running mean")
            axes[0].set_yscale("log")
            axes[0].yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
            axes[0].yaxis.set_major_formatter("{x:g}")
            axes[0].yaxis.set_minor_formatter("{x:g}")
            for axis in axes:
                axis.set_xlim(0, max(x) + 1)
            axes[0].legend()
            axes[2].plot(x, [r["train/lr"] for r in steps], color=OURS)
            axes[0].set_title(f"loss ({key})")
            _waits(axes[3], steps)
        if validations:
            x = [r["step"] for r in validations]
            values = [r["val/action_loss"] for r in validations]
            axes[1].plot(x, values, "o-", ms=3, color=OURS, lw=2, label="policy")
            best = int(np.argmin(values))
            axes[1].plot(x[best], values[best], "o", ms=8, mfc="none", color=OURS, label=f"best (step {x[best]})")
            for name, colour in BASELINES.items():
                axes[1].axhline(
                    validations[-1][f"val/baseline_{name}_action_loss"], color=colour, lw=1.2, ls="--", label=name
                )
            axes[1].set_ylim(0, None)
            axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
        else:
            axes[1].text(0.5, 0.5, "no validation yet", ha="center", transform=axes[1].transAxes)
        axes[0].set(xlabel="optimiser step", ylabel="training loss (normalised units)")
        axes[1].set(xlabel="optimiser step", ylabel="action error (Huber, in std)", title="held-out episodes")
        axes[2].set(xlabel="optimiser step", ylabel="learning rate", title="learning rate")
        axes[3].set(xlabel="optimiser step", ylabel="share of the time (%)", title="waited for data")
    plt.close(figure)
    return figure


def newest_figures(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line: the newest loss, learning rate, wait for data, GPU memory, and held-out error beside the baselines."""
    parts = []
    if steps := [r for r in rows if any(k in r for k in LOSSES)]:
        row = steps[-1]
        parts += [f"loss {next(row[k] for k in LOSSES if k in row):.4f}", f"lr {row['train/lr']:.2e}"]
        parts += (
            [f"loader wait {100 * _wait_share(steps)[-1]:.0f} %"]
            if "train/loader_wait_s" in row and len(steps) > 1
            else []
        )
        parts += [f"GPU memory {row[GPU]:.1f} GiB"] if GPU in row else []
    if validations := [r for r in rows if "val/action_loss" in r]:
        row = validations[-1]
        baselines = ", ".join(f"{name} {row[f'val/baseline_{name}_action_loss']:.4f}" for name in BASELINES)
        parts.append(f"held-out error {row['val/action_loss']:.4f} (baselines: {baselines})")
    return " · ".join(parts)


def reuse_counts(rows: Sequence[Mapping[str, Any]], action_hz: float) -> Figure:
    """How often VL features of each age were used, over all epochs."""
    counts = _summed(rows, "train/vl_reuse_counts")
    ages = np.arange(len(counts))
    return _histogram(
        ages * 1000 / action_hz, counts, 800 / action_hz, "age of the VL features (ms)", "Reuse of VL features"
    )


def timestep_counts(rows: Sequence[Mapping[str, Any]], timesteps: int) -> Figure:
    """How often each range of diffusion timesteps was drawn, over all epochs."""
    counts = _summed(rows, "train/diffusion_t_counts")
    width = timesteps / max(1, len(counts))
    return _histogram(
        (np.arange(len(counts)) + 0.5) * width, counts, 0.9 * width, "diffusion timestep", "Diffusion timesteps drawn"
    )


def weights_share(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of the draws beside the share of the steps, a dataset a row; from `TrainingData.weights_table`."""
    names = [f"{r['dataset']} (weight {r['weight']:g})" for r in table]
    share = np.array([r["share"] for r in table])
    steps = np.array([r["train_steps"] for r in table], float)
    place = np.arange(len(table))
    with style():
        figure, axis = plt.subplots(figsize=(8, 0.55 * len(table) + 1.1))
        axis.barh(place + 0.2, 100 * share, 0.38, color=OURS, label="of the draws")
        axis.barh(place - 0.2, 100 * steps / steps.sum(), 0.38, color=GREY, label="of the steps")
        axis.set_yticks(place, names)
        axis.set(xlabel="share (%)", title="What each dataset gets of the training")
        axis.legend()
    plt.close(figure)
    return figure


def _waits(axis: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    """Share of the time waited for data (%), and GPU memory (GiB) on an axis of its own where there is a GPU."""
    timed = [r for r in steps if "train/loader_wait_s" in r]
    if len(timed) > 1:
        axis.plot([r["step"] for r in timed], 100 * _wait_share(timed), color=OURS)
        axis.set_ylim(0, 100)
    memory = [r for r in steps if GPU in r]
    if memory:
        right = axis.twinx()
        right.plot([r["step"] for r in memory], [r[GPU] for r in memory], color="#7a3fa0", ls=":")
        right.set(ylim=(0, None))
        right.set_ylabel("GPU memory (GiB, dotted)", color="#7a3fa0")
        right.grid(False)


def _wait_share(steps: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Share of the time between steps that was waited for data, running mean, 0..1."""
    waited = np.array([r.get("train/loader_wait_s", np.nan) for r in steps])
    taken = np.diff([r["elapsed_s"] for r in steps], prepend=np.nan)
    taken[0] = taken[1]
    taken = np.maximum(taken, waited)
    return np.clip(_smooth(waited) / np.maximum(_smooth(taken), 1e-9), 0, 1)


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
    total = np.zeros(max(map(len, found), default=0))
    for counts in found:  # rows of a run that an older version began may be shorter
        total[: len(counts)] += counts
    return total


def _smooth(y: np.ndarray) -> np.ndarray:
    """Running mean of the last 20 values, shorter at the start; not-a-numbers stay where they are."""
    window = min(20, len(y))
    total = np.cumsum(np.concatenate([[0.0], y]))
    end = np.arange(1, len(y) + 1)
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)
