"""How a training run goes: curves from the rows of metrics.jsonl, also while they grow, and what it drew."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vla_lib.workbench.plots.style import COLOURS, GREY, Panels, legend, nth, panels, plot, say

Row = Mapping[str, Any]
BASELINES = ("zero", "mean", "persistence")
LOSSES = ("train/loss_step", "train/noise_loss")
GPU = "train/gpu_memory_gib"


@plot
def training_curves(rows: Sequence[Row], axes: Panels = None) -> Figure:
    """Loss of each step, held-out error beside the baselines, learning rate, time waited for data, GPU memory."""
    steps = [row for row in rows if any(name in row for name in LOSSES)]
    figure, found = panels(axes, (10, 6), (2, 2))
    loss, held_out, rate, waiting = found
    _loss(loss, steps)
    _held_out(held_out, [row for row in rows if "val/action_loss" in row])
    at, rates = ([row[name] for row in steps] for name in ("step", "train/lr"))
    rate.plot(at, rates, color=COLOURS["data"], marker=_dot(len(at)))
    rate.set(ylabel="learning rate", title="learning rate")
    _waiting(waiting, steps)
    for panel in found:
        panel.set_xlabel("optimiser step")
        if steps:
            panel.set_xlim(0, steps[-1]["step"] + 1)
    return figure


def _loss(panel: Axes, steps: Sequence[Row]) -> None:
    panel.set(ylabel="training loss (normalised units)", title="training loss")
    if not steps:
        return say(panel, "no step yet")
    name = next(name for name in LOSSES if name in steps[0])
    x, y = np.array([row["step"] for row in steps]), np.array([row[name] for row in steps])
    panel.plot(x, y, color=COLOURS["policy"], alpha=0.25, lw=0.8, marker=_dot(len(x)), label="each step")
    panel.plot(x, smooth(y), color=COLOURS["policy"], lw=1.8, label="running mean")
    panel.set(yscale="log", title=f"training loss ({name})")
    panel.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    legend(panel)


def _dot(count: int) -> str:
    """The marker of a line: a point that stands alone is not seen without."""
    return "." if count < 3 else ""


def _held_out(panel: Axes, validations: Sequence[Row]) -> None:
    panel.set(ylabel="action error (Huber, in std)", title="held-out episodes")
    if not validations:
        return say(panel, "no validation yet")
    x, values = [row["step"] for row in validations], [row["val/action_loss"] for row in validations]
    panel.plot(x, values, "o-", ms=3, color=COLOURS["policy"], lw=2, label="policy")
    best = int(np.argmin(values))
    label = f"best (step {x[best]})"
    panel.plot(x[best], values[best], "o", ms=8, mfc="none", color=COLOURS["policy"], label=label)
    for number, name in enumerate(BASELINES, 1):
        value = validations[-1][f"val/baseline_{name}_action_loss"]
        panel.axhline(value, color=COLOURS[name], lw=1.2, ls=nth(number).dash, label=name)
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])  # room for the markers
    legend(panel, 5)


def _waiting(panel: Axes, steps: Sequence[Row]) -> None:
    """Share of the time waited for data (%), and GPU memory (GiB) on an axis of its own where there is a GPU."""
    panel.set(ylabel="share of the time (%)", title="waited for data", ylim=(0, 100))
    timed = [row for row in steps if "train/loader_wait_s" in row]
    if len(timed) > 1:
        panel.plot([row["step"] for row in timed], 100 * _wait_share(timed), color=COLOURS["data"])
    if memory := [row for row in steps if GPU in row]:
        right = panel.twinx()
        right.plot([row["step"] for row in memory], [row[GPU] for row in memory], color=COLOURS["GPU memory"], ls=":")
        right.set_ylim(0, None)
        right.set_ylabel("GPU memory (GiB, dotted)", color=COLOURS["GPU memory"])
        right.grid(visible=False)


def newest_figures(rows: Sequence[Row]) -> str:
    """One line: the newest loss, learning rate, wait for data, GPU memory, and held-out error beside the baselines."""
    parts = []
    if steps := [row for row in rows if any(name in row for name in LOSSES)]:
        row = steps[-1]
        parts += [f"loss {next(row[name] for name in LOSSES if name in row):.4f}", f"lr {row['train/lr']:.2e}"]
        if "train/loader_wait_s" in row and len(steps) > 1:
            parts.append(f"loader wait {100 * _wait_share(steps)[-1]:.0f} %")
        if GPU in row:
            parts.append(f"GPU memory {row[GPU]:.1f} GiB")
    if validations := [row for row in rows if "val/action_loss" in row]:
        row = validations[-1]
        baselines = ", ".join(f"{name} {row[f'val/baseline_{name}_action_loss']:.4f}" for name in BASELINES)
        parts.append(f"held-out error {row['val/action_loss']:.4f} (baselines: {baselines})")
    return " · ".join(parts)


@plot
def reuse_counts(rows: Sequence[Row], action_hz: float, axes: Panels = None) -> Figure:
    """How often VL features of each age were used, over all epochs."""
    counts = _summed(rows, "train/vl_reuse_counts")
    figure, (panel,) = panels(axes, (5.5, 2.8))
    _bars(panel, np.arange(len(counts)) * 1000 / action_hz, counts)
    panel.set(xlabel="age of the VL features (ms)", ylabel="samples", title="Reuse of VL features")
    return figure


@plot
def timestep_counts(rows: Sequence[Row], timesteps: int, axes: Panels = None) -> Figure:
    """How often each range of diffusion timesteps was drawn, over all epochs."""
    counts = _summed(rows, "train/diffusion_t_counts")
    figure, (panel,) = panels(axes, (5.5, 2.8))
    _bars(panel, (np.arange(len(counts)) + 0.5) * timesteps / max(1, len(counts)), counts)
    panel.set(xlabel="diffusion timestep", ylabel="samples", title="Diffusion timesteps drawn")
    return figure


@plot
def weights_share(table: Sequence[Row], axes: Panels = None) -> Figure:
    """Share of the draws beside the share of the steps, a dataset a row; from `TrainingData.weights_table`."""
    steps = np.array([row["train_steps"] for row in table], float)
    place = np.arange(len(table))
    figure, (panel,) = panels(axes, (8, 0.55 * len(table) + 1.4))
    panel.barh(place - 0.2, [100 * row["share"] for row in table], 0.38, color=COLOURS["data"], label="of the draws")
    panel.barh(place + 0.2, 100 * steps / steps.sum(), 0.38, color=GREY, hatch=nth(1).hatch, label="of the steps")
    panel.set_yticks(place, [f"{row['dataset']} (weight {row['weight']:g})" for row in table])
    panel.invert_yaxis()
    panel.set(xlabel="share (%)", title="How much each dataset counts in training")
    legend(panel)
    return figure


def _bars(panel: Axes, x: np.ndarray, counts: np.ndarray) -> None:
    if not len(counts):
        return say(panel, "nothing counted yet")
    panel.bar(x, counts, 0.9 * (x[1] - x[0] if len(x) > 1 else 1.0), color=COLOURS["data"])
    if len(x) <= 10:
        panel.set_xticks(x)


def _wait_share(steps: Sequence[Row]) -> np.ndarray:
    """Share of the time between steps that was waited for data, running mean, 0..1."""
    waited = np.array([row.get("train/loader_wait_s", np.nan) for row in steps])
    taken = np.diff([row["elapsed_s"] for row in steps], prepend=np.nan)
    taken[0] = taken[1]
    taken = np.maximum(taken, waited)
    return np.clip(smooth(waited) / np.maximum(smooth(taken), 1e-9), 0, 1)


def _summed(rows: Sequence[Row], key: str) -> np.ndarray:
    # rows of a run that an older version began may be shorter
    return pd.DataFrame([row[key] for row in rows if key in row]).sum().to_numpy()


def smooth(y: np.ndarray) -> np.ndarray:
    """Running mean of the last 20 values, shorter at the start; not-a-numbers do not count."""
    return pd.Series(y).rolling(20, min_periods=1).mean().to_numpy()
