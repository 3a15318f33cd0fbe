"""Open-loop predictions beside the baselines: errors, predicted against true, chunks over the recorded path."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vla_lib.evaluation.open_loop import DIMENSIONS, UNITS, OpenLoop
from vla_lib.workbench.plots.style import COLOURS, Panels, diagonal, legend, nth, panels, plot

EVERY = 8  # steps between two chunks over the path
Metrics = Mapping[str, Mapping[str, Any]]
"""Name of the policy, a masked one or a baseline -> `open_loop_metrics`."""


@plot
def error_by_step(metrics: Metrics, action_hz: float, axes: Panels = None) -> Figure:
    """Translation (mm) and rotation (deg) error against the step of the chunk, the policy beside the baselines."""
    title = "Error of each step of the predicted chunk, held-out episodes"
    figure, found = panels(axes, (10, 3.6), "ab", title)
    for panel, kind, unit in zip(found, ("translation", "rotation"), ("mm", "deg"), strict=True):
        for number, (name, of) in enumerate(metrics.items()):
            values = np.array(of["by_step"][f"{kind}_mae_{unit}"], float)  # None becomes not-a-number
            ahead_s = np.arange(1, len(values) + 1) / action_hz
            _, dash, marker, _ = nth(number)
            width = 2.2 if name == "policy" else 1.2
            panel.plot(ahead_s, values, ls=dash, marker=marker, ms=3, color=COLOURS[name], lw=width, label=name)
        panel.set(xlabel="time ahead (s)", ylabel=f"mean {kind} error ({unit})", ylim=(0, None))
    legend(found[0], 3)
    return figure


@plot
def error_by_dimension(metrics: Metrics, axes: Panels = None) -> Figure:
    """Mean absolute error of each dimension of a step (mm, deg), the policy beside the baselines."""
    figure, found = panels(axes, (10, 3.4), "ab")
    width = 0.8 / len(metrics)
    for panel, dimensions, unit in zip(found, (DIMENSIONS[:3], DIMENSIONS[3:6]), ("mm", "deg"), strict=True):
        for k, (name, of) in enumerate(metrics.items()):
            values = [of["dimensions"][dimension]["mae"] for dimension in dimensions]
            place = np.arange(3) + width * (k - (len(metrics) - 1) / 2)
            panel.bar(place, values, 0.95 * width, color=COLOURS[name], hatch=nth(k).hatch, label=name)
        panel.set_xticks(range(3), dimensions)
        panel.set_ylabel(f"mean absolute error ({unit} a step)")
    legend(found[0], 3)
    return figure


@plot
def predicted_against_true(found: OpenLoop, axes: Panels = None) -> Figure:
    """The first action of each chunk against the true one: one panel a dimension that varies, in mm or degrees."""
    first = found.mask[:, 0]
    shown = [k for k in range(6) if found.target[first, 0, k].std() > 1e-6] or [0]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = panels(axes, (3.2 * columns, 3 * rows), (rows, columns))
    for panel, k in zip(grid, shown, strict=False):
        true, predicted = found.target[first, 0, k], found.chunks["policy"][first, 0, k]
        diagonal(panel, true, predicted)
        panel.plot(true, predicted, ".", ms=3, alpha=0.4, color=COLOURS["policy"])
        unit = UNITS[k]
        panel.set(title=DIMENSIONS[k], xlabel=f"true ({unit} a step)", ylabel=f"predicted ({unit} a step)")
    for panel in grid[len(shown) :]:
        panel.set_visible(False)
    return figure


@plot
def chunks_over_path(found: OpenLoop, episode: str, samples: np.ndarray | None = None, axes: Panels = None) -> Figure:
    """The recorded motion of a held-out episode (mm from its start), and predicted chunks from where they begin.

    samples: (S, N, H, 7) other chunks of the episode's N samples, as a diffusion policy draws them from other noise.
    """
    rows = np.flatnonzero(found.episode == episode)
    step = found.step[rows]
    path_mm = np.zeros((int(step.max()) + 2, 3))
    path_mm[step + 1] = found.target[rows, 0, :3]
    path_mm = np.cumsum(path_mm, axis=0)
    drawn = found.chunks["policy"][rows][None] if samples is None else samples  # (S, N, H, 7)
    label = "predicted chunk" if samples is None else f"predicted chunks, {len(samples)} samples each"
    title = f"Predicted chunks over the recorded motion: {episode}"
    figure, lines = panels(axes, (10, 5.4), (3, 1), title, sharex=True)
    for k, panel in enumerate(lines):
        panel.plot(path_mm[:, k], color=COLOURS["recorded"], lw=1.4, label="recorded")
        # (S, N', 1 + H) -> (1 + H, S * N'): a line is a column
        chunks = np.cumsum(np.pad(drawn[:, ::EVERY, :, k], ((0, 0), (0, 0), (1, 0))), axis=2)
        values = (path_mm[step[::EVERY], k][:, None] + chunks).reshape(-1, chunks.shape[2]).T
        at = np.tile(step[::EVERY], len(drawn)) + np.arange(chunks.shape[2])[:, None]
        made = panel.plot(at, values, color=COLOURS["policy"], lw=1.3 if samples is None else 0.8)
        made[0].set_label(label)
        panel.set_ylabel(f"{'xyz'[k]} (mm)")
    legend(lines[0])
    lines[-1].set_xlabel("action step")
    return figure
