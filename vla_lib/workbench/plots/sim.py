"""Rollouts on the simulated rig in; figures of their paths, forces and A-scans, and montages of the views out.

A rollout's path is what `NeedleInsertion.path()` gives (t_s (n,), position_mm (n, 3), force_mN (n,)), its truth `info["truth"]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from vla_lib.evaluation.sim_robot import BIN_MM, DEPTH_TOLERANCE_MM, FORCE_LIMIT_MN, LATERAL_TOLERANCE_MM
from vla_lib.workbench.plots.style import style

PATH, TARGET, MEMBRANE, GEL = "#0b6e99", "#b5122a", "#7a3fa0", "#c9c4b8"


def rollout(path: Mapping[str, np.ndarray], truth: Mapping[str, Any], title: str = "") -> Figure:
    """One rollout: in 3-D and from above with target and membrane, depth behind the membrane over time, force over time."""
    t, position, force = (np.asarray(path[key]) for key in ("t_s", "position_mm", "force_mN"))
    target, membrane_mm = np.asarray(truth["target_xy_mm"]), truth["membrane_z_mm"]
    with style():
        figure, axes = plt.subplot_mosaic(
            [["space", "above", "depth"], ["space", "above", "forces"]],
            figsize=(13, 4.8),
            width_ratios=(1.15, 1, 1),
            per_subplot_kw={"space": {"projection": "3d"}},
            layout="constrained",
        )
        depth, forces = axes["depth"], axes["forces"]
        _draw_space(axes["space"], [position], truth)
        _draw_above(axes["above"], [position], target)
        asked = truth["asked_depth_mm"]
        depth.axhspan(
            asked - DEPTH_TOLERANCE_MM, asked + DEPTH_TOLERANCE_MM, color="#2e7d32", alpha=0.25, lw=0, label="asked"
        )
        depth.axhline(0, color=MEMBRANE, lw=1, label="membrane")
        depth.plot(t, membrane_mm - position[:, 2], color=PATH)
        depth.set(ylabel="depth behind\nmembrane (mm)", ylim=(-8, 3.5))
        depth.invert_yaxis()
        depth.legend(loc="upper right")
        forces.sharex(depth)
        forces.plot(t, force, color="#c58b00")
        forces.axhline(FORCE_LIMIT_MN, color=TARGET, lw=1, ls="--", label="limit")
        forces.set(xlabel="time (s)", ylabel="force (mN)")
        forces.legend(loc="center left")
        if title:
            figure.suptitle(title)
    plt.close(figure)
    return figure


def rollouts_from_above(
    paths: Sequence[np.ndarray], truths: Sequence[Mapping[str, Any]], success: Sequence[bool]
) -> Figure:
    """Many rollouts, each about its own target: paths (n, 3) mm from above, and depth against lateral distance."""
    with style():
        figure, (above, side) = plt.subplots(1, 2, figsize=(10, 4.6))
        above.add_patch(Circle((0, 0), LATERAL_TOLERANCE_MM, color=TARGET, alpha=0.2, lw=0))
        side.axhline(0, color=MEMBRANE, lw=1, label="membrane")
        side.axvline(LATERAL_TOLERANCE_MM, color=TARGET, lw=1, ls="--", label="lateral tolerance")
        for position, truth, ok in zip(paths, truths, success, strict=True):
            offset = position[:, :2] - np.asarray(truth["target_xy_mm"])
            colour = PATH if ok else TARGET
            above.plot(*offset.T, color=colour, lw=0.8, alpha=0.6)
            above.plot(*offset[-1], "o", ms=3, color=colour)
            side.plot(np.hypot(*offset.T), position[:, 2] - truth["membrane_z_mm"], color=colour, lw=0.8, alpha=0.6)
        above.set(
            xlabel="x from target (mm)",
            ylabel="y from target (mm)",
            aspect="equal",
            title=f"{sum(success)} of {len(success)} succeeded",
        )
        side.set(xlabel="distance from target axis (mm)", ylabel="height over membrane (mm)")
        side.legend()
    plt.close(figure)
    return figure


def sensor_m_mode(samples: np.ndarray, t_s: np.ndarray, most: int = 1500) -> Figure:
    """Sensor samples (n, 1026), force first, over time (n,) s: A-scans as an image of depth (mm) and time, force (mN) below."""
    keep = np.linspace(0, len(t_s) - 1, min(most, len(t_s))).astype(int)
    with style():
        figure, (scan, force) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(3, 1))
        extent = (t_s[0], t_s[-1], (samples.shape[1] - 1) * BIN_MM, 0)
        image = scan.imshow(samples[keep, 1:].T, aspect="auto", extent=extent, cmap="magma", interpolation="nearest")
        scan.set(ylabel="distance from tip (mm)", title="OCT A-scans")
        scan.grid(False)
        figure.colorbar(image, ax=(scan, force), label="intensity (counts)")
        force.plot(t_s[keep], samples[keep, 0], color="#c58b00", lw=0.8)
        force.set(xlabel="time (s)", ylabel="force (mN)")
    plt.close(figure)
    return figure


def montage(moments: Sequence[Mapping[str, np.ndarray]], labels: Sequence[str] = ()) -> Figure:
    """Pictures {view: (H, W, 3)} of some moments, a row a moment and a column a view."""
    views = list(moments[0])
    with style():
        figure, axes = plt.subplots(
            len(moments), len(views), figsize=(2.6 * len(views), 1.6 * len(moments) + 0.3), squeeze=False
        )
        for row, pictures in enumerate(moments):
            for column, view in enumerate(views):
                axis = axes[row, column]
                axis.imshow(pictures[view])
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
                if row == 0:
                    axis.set_title(view)
            if row < len(labels):
                axes[row, 0].set_ylabel(labels[row])
    plt.close(figure)
    return figure


def _draw_space(axis, paths: Sequence[np.ndarray], truth: Mapping[str, Any]) -> None:
    x, y = truth["target_xy_mm"]
    angle = np.linspace(0, 2 * np.pi, 60)
    for height, radius, colour, name in (
        (truth["surface_z_mm"], 6.0, TARGET, "target"),
        (truth["membrane_z_mm"], 8.0, MEMBRANE, "membrane (hidden)"),
    ):
        axis.plot(x + radius * np.cos(angle), y + radius * np.sin(angle), height, color=colour, lw=1.5, label=name)
    axis.plot(
        [x, x],
        [y, y],
        [truth["membrane_z_mm"] - truth["asked_depth_mm"], truth["surface_z_mm"] + 12],
        color=GEL,
        lw=1,
        ls="--",
    )
    for position in paths:
        axis.plot(*position.T, color=PATH, lw=1.5)
        axis.scatter(*position[-1], color=PATH, s=15)
    axis.set(xlabel="x (mm)", ylabel="y (mm)", zlabel="z (mm)", title="path of the tip")
    axis.legend(loc="upper left")
    axis.set_box_aspect(None, zoom=0.85)  # room for the label of z
    axis.locator_params(nbins=5)


def _draw_above(axis, paths: Sequence[np.ndarray], target: np.ndarray) -> None:
    axis.add_patch(Circle(target, 6.0, fill=False, color=TARGET, lw=1, ls=":"))
    axis.add_patch(Circle(target, LATERAL_TOLERANCE_MM, color=TARGET, alpha=0.25, lw=0, label="tolerance"))
    for position in paths:
        axis.plot(position[:, 0], position[:, 1], color=PATH, lw=1.5)
        axis.plot(*position[0, :2], "s", color=PATH, ms=5, label="start")
        axis.plot(*position[-1, :2], "o", color=PATH, ms=5, label="end")
    axis.set(xlabel="x (mm)", ylabel="y (mm)", aspect="equal", title="from above")
    x, y = target
    axis.set(
        xlim=(min(axis.get_xlim()[0], x - 12), max(axis.get_xlim()[1], x + 12)),
        ylim=(min(axis.get_ylim()[0], y - 12), max(axis.get_ylim()[1], y + 12)),
    )
    axis.legend()
