"""Rollouts on the simulated rig: single ones with the rig's truth, many about their targets, variants, frames.

A rollout is a record of `evaluation.rollout.judged` with its `path` (t_s (n,), position_mm (n, 3), force_mN (n,)).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from vla_lib.evaluation.closed_loop import ClosedLoop
from vla_lib.evaluation.sim_robot import BIN_MM, DEPTH_TOLERANCE_MM, FORCE_LIMIT_MN, LATERAL_TOLERANCE_MM
from vla_lib.workbench.plots.style import BLACK, COLOURS, SERIES, Panels, legend, nth, panels, picture, plot, say

Rollout = Mapping[str, Any]
LIMIT: dict[str, Any] = {"color": COLOURS["limit"], "lw": 1, "ls": "--"}
TOLERANCE: dict[str, Any] = {"color": COLOURS["tolerance"], "alpha": 0.25, "lw": 0}


@plot
def rollout(row: Rollout, title: str = "", axes: Panels = None) -> Figure:
    """One rollout: in space and from above with target and membrane; depth behind the membrane and force over time."""
    path, truth = {name: np.asarray(values) for name, values in row["path"].items()}, row["truth"]
    figure, (space, above, depth, force) = panels(
        axes, (11, 4.6), [["space", "above", "depth"], ["space", "above", "force"]], title,
        width_ratios=(1.3, 1, 1), per_subplot_kw={"space": {"projection": "3d"}},
    )  # fmt: skip
    _space(space, path["position_mm"], truth)
    _above(above, path["position_mm"], np.asarray(truth["target_xy_mm"]))
    asked = truth["asked_depth_mm"]
    depth.axhspan(asked - DEPTH_TOLERANCE_MM, asked + DEPTH_TOLERANCE_MM, **TOLERANCE, label="asked")
    depth.axhline(0, color=COLOURS["membrane"], lw=1, label="membrane")
    depth.plot(path["t_s"], truth["membrane_z_mm"] - path["position_mm"][:, 2], color=COLOURS["policy"])
    depth.set(ylabel="depth behind\nmembrane (mm)", ylim=(3.5, -8))
    force.plot(path["t_s"], path["force_mN"], color=COLOURS["force"])
    force.axhline(FORCE_LIMIT_MN, **LIMIT, label="limit")
    force.set(xlabel="time (s)", ylabel="force (mN)")
    force.sharex(depth)
    legend(depth)
    legend(force)
    return figure


def _space(panel: Any, position_mm: np.ndarray, truth: Mapping[str, Any]) -> None:  # Axes3D has no types
    x, y = truth["target_xy_mm"]
    angle = np.linspace(0, 2 * np.pi, 60)
    for name, height, radius in (("target", truth["surface_z_mm"], 6), ("membrane", truth["membrane_z_mm"], 8)):
        ring = x + radius * np.cos(angle), y + radius * np.sin(angle), height
        hidden = name == "membrane"
        look: dict[str, Any] = {"color": COLOURS[name], "ls": ":" if hidden else "-"}
        panel.plot(*ring, lw=1.5, label="membrane (hidden)" if hidden else name, **look)
    axis_z = truth["membrane_z_mm"] - truth["asked_depth_mm"], truth["surface_z_mm"] + 12
    panel.plot([x, x], [y, y], axis_z, color=COLOURS["reference"], lw=1, ls="--")
    panel.plot(*position_mm.T, color=COLOURS["policy"], lw=2.2)
    panel.scatter(*position_mm[-1], color=COLOURS["policy"], s=15)
    panel.set(xlabel="x (mm)", ylabel="y (mm)", zlabel="z (mm)", title="path of the tip")
    legend(panel)
    panel.set_box_aspect(None, zoom=0.8)  # room for the label of z
    panel.locator_params(nbins=5)


def _above(panel: Axes, position_mm: np.ndarray, target: np.ndarray) -> None:
    panel.add_patch(Circle(tuple(target), 6.0, fill=False, color=COLOURS["target"], lw=1, ls=":"))
    panel.add_patch(Circle(tuple(target), LATERAL_TOLERANCE_MM, **TOLERANCE, label="tolerance"))
    panel.plot(position_mm[:, 0], position_mm[:, 1], color=COLOURS["policy"], lw=1.5)
    panel.plot(*position_mm[0, :2], "s", color=COLOURS["policy"], ms=5, label="start")
    panel.plot(*position_mm[-1, :2], "o", color=COLOURS["policy"], ms=5, label="end")
    panel.set(xlabel="x (mm)", ylabel="y (mm)", aspect="equal", title="from above")
    half = max(12.0, 1.1 * float(np.abs(position_mm[:, :2] - target).max()))
    panel.set(xlim=(target[0] - half, target[0] + half), ylim=(target[1] - half, target[1] + half))
    legend(panel)


@plot
def from_above(rows: Sequence[Rollout], axes: Panels = None) -> Figure:
    """Many rollouts, each about its own target: paths from above, and height over the membrane by distance."""
    figure, (above, side) = panels(axes, (10, 4.6), "ab")
    above.add_patch(Circle((0, 0), LATERAL_TOLERANCE_MM, **TOLERANCE))
    side.axhline(0, color=COLOURS["membrane"], lw=1, label="membrane")
    side.axvline(LATERAL_TOLERANCE_MM, **LIMIT, label="lateral tolerance")
    for row in rows:
        position = np.asarray(row["path"]["position_mm"])
        offset = position[:, :2] - np.asarray(row["truth"]["target_xy_mm"])
        kind = "success" if row["success"] else "failure"
        look: dict[str, Any] = {"color": COLOURS[kind], "ls": "-" if row["success"] else "--", "lw": 0.8, "alpha": 0.6}
        above.plot(*offset.T, **look)
        above.plot(*offset[-1], "o" if row["success"] else "x", ms=4, color=COLOURS[kind])
        side.plot(np.hypot(*offset.T), position[:, 2] - row["truth"]["membrane_z_mm"], **look)
    above.set(xlabel="x from target (mm)", ylabel="y from target (mm)", aspect="equal")
    succeeded = sum(bool(row["success"]) for row in rows)
    others = " (the others dashed, ending in x)" if succeeded < len(rows) else ""
    above.set_title(f"{succeeded} of {len(rows)} succeeded{others}")
    side.set(xlabel="distance from target axis (mm)", ylabel="height over membrane (mm)")
    legend(side)
    return figure


@plot
def sensor(samples: np.ndarray, t_s: np.ndarray, axes: Panels = None) -> Figure:
    """Sensor samples (n, 1026), force first, over time (n,) s: A-scans as an image, force (mN) below."""
    keep = np.linspace(0, len(t_s) - 1, min(1500, len(t_s))).astype(int)
    figure, (scans, force) = panels(axes, (9, 5), (2, 1), sharex=True, height_ratios=(3, 1))
    image = a_scans(scans, samples[keep], t_s[keep])
    figure.colorbar(image, ax=[scans, force], label="intensity (counts)")
    force.plot(t_s[keep], samples[keep, 0], color=COLOURS["force"], lw=0.8)
    force.set(xlabel="time (s)", ylabel="force (mN)")
    return figure


def a_scans(panel: Axes, samples: np.ndarray, t_s: np.ndarray, **look: Any) -> Any:
    """Draw the A-scans of samples (n, 1026) as an image over time; returns the image, for a colour bar."""
    panel.set(ylabel="distance from tip (mm)", title="OCT A-scans")
    panel.grid(visible=False)
    extent = (t_s[0], t_s[-1], (samples.shape[1] - 1) * BIN_MM, 0)
    return panel.imshow(samples[:, 1:].T, aspect="auto", extent=extent, cmap="magma", interpolation="nearest", **look)


@plot
def montage(moments: Sequence[Mapping[str, np.ndarray]], labels: Sequence[str] = (), axes: Panels = None) -> Figure:
    """Pictures {view: (H, W, 3)} of some moments, a row a moment and a column a view."""
    views = list(moments[0])
    size = (min(11, 2.6 * len(views)), 1.35 * len(moments) + 0.3)
    figure, found = panels(axes, size, (len(moments), len(views)))
    for number, panel in enumerate(found):
        row, column = divmod(number, len(views))
        picture(panel, moments[row][views[column]])
        panel.set_title(views[column] if row == 0 else "")
        panel.set_ylabel(labels[row] if column == 0 and labels else "")
    return figure


@plot
def success(found: Mapping[str, ClosedLoop], axes: Panels = None) -> Figure:
    """Success rate of each variant with its 95 % interval (Wilson), and what the failures were."""
    summaries = {name: loop.summary() for name, loop in found.items()}
    figure, (rate, why) = panels(axes, (11, 1.8 + 0.45 * len(found)), "ab", sharey=True)
    for place, summary in enumerate(summaries.values()):
        low, high = (100 * value for value in summary["interval_95"])
        share = 100 * summary["success_rate"]
        rate.barh(place, share, color=COLOURS["success"], height=0.6)
        rate.plot((low, high), (place, place), color=BLACK, lw=1.4)
        counted = f"{summary['successes']} of {summary['rollouts']}"
        rate.annotate(counted, (max(high, share), place), (5, 0), textcoords="offset points", va="center")
    reasons = list(dict.fromkeys(reason for summary in summaries.values() for reason in summary["reasons"]))
    left = np.zeros(len(summaries))
    for reason, look in zip(reasons, map(nth, range(len(reasons))), strict=True):
        counts = np.array([summary["reasons"].get(reason, 0) for summary in summaries.values()])
        why.barh(range(len(found)), counts, left=left, height=0.6, label=reason, color=look.colour, hatch=look.hatch)
        left += counts
    rate.set_yticks(range(len(summaries)), list(summaries))
    rate.set(xlabel="success (%), line: 95 % interval", xlim=(0, 118), xticks=range(0, 101, 20))
    rate.invert_yaxis()
    why.set(xlabel="failed rollouts", title="why rollouts failed" if reasons else "no rollout failed")
    why.locator_params(axis="x", integer=True)
    legend(why, 3)
    return figure


@plot
def errors(found: Mapping[str, ClosedLoop], axes: Panels = None) -> Figure:
    """Where the needle ended (of punctured rollouts), and shares of peak forces and times to success."""
    figure, (ends, force, took) = panels(axes, (11, 3.8), "abc", width_ratios=(1.4, 1, 1))
    box = (0, -DEPTH_TOLERANCE_MM), LATERAL_TOLERANCE_MM, 2 * DEPTH_TOLERANCE_MM
    ends.add_patch(Rectangle(*box, **TOLERANCE, label="tolerance"))
    for number, (name, loop) in enumerate(found.items()):
        colour, style = nth(number).colour, nth(number).dash
        through = [row for row in loop.rollouts if row["punctured"]]
        lateral, depth = ([row[key] for row in through] for key in ("lateral_mm", "depth_error_mm"))
        ends.plot(lateral, depth, nth(number).marker, ls="", ms=4, alpha=0.7, color=colour, label=name)
        force.ecdf([row["peak_force_mN"] for row in loop.rollouts], color=colour, ls=style, lw=1.5)
        if times := [row["time_s"] for row in loop.rollouts if row["success"]]:
            took.ecdf(times, color=colour, ls=style, lw=1.5)
    ends.set(xlabel="distance from the axis (mm)", ylabel="depth error (mm), above 0: too deep", xlim=(0, None))
    if axes is None:  # of all panels: names of variants may be long
        (tolerance, *points), labels = ends.get_legend_handles_labels()
        looks: list[Any] = [tolerance, *zip(points, force.lines, strict=True)]
        figure.legend(looks, labels, loc="outside upper center", ncols=3)
    force.axvline(FORCE_LIMIT_MN, **LIMIT)
    force.set(xlabel="peak force (mN), dashed: limit", ylabel="share of rollouts", ylim=(0, 1.02))
    if not took.lines:
        say(took, "no success")
    took.set(xlabel="time to success (s)", ylabel="share of successes", ylim=(0, 1.02))
    return figure


@plot
def paired(one: ClosedLoop, other: ClosedLoop, names: Sequence[str], axes: Panels = None) -> Figure:
    """Two variants on the same phantoms: who succeeds where, and how far from the target's axis each one ends."""
    figure, (where, distance) = panels(axes, (10, 4.8), "ab")
    pairs = list(zip(one.rollouts, other.rollouts, strict=True))
    outcomes = {
        (True, True): ("both", COLOURS["good"]),
        (True, False): (f"only {names[0]}", SERIES[0]),
        (False, True): (f"only {names[1]}", SERIES[1]),
        (False, False): ("neither", COLOURS["failure"]),
    }
    for number, (outcome, (label, colour)) in enumerate(outcomes.items()):
        marker = nth(number).marker
        found = [(a, b) for a, b in pairs if (bool(a["success"]), bool(b["success"])) == outcome]
        target = np.array([a["truth"]["target_xy_mm"] for a, _ in found]).reshape(-1, 2)
        where.plot(*target.T, marker, ls="", color=colour, label=f"{label}: {len(found)}")
        ends = np.array([(a["lateral_mm"], b["lateral_mm"]) for a, b in found]).reshape(-1, 2)
        distance.plot(*ends.T, marker, ls="", ms=5, alpha=0.8, color=colour)
    most = 1.05 * max([LATERAL_TOLERANCE_MM, *(row["lateral_mm"] for pair in pairs for row in pair)])
    distance.plot((0, most), (0, most), color=COLOURS["reference"], lw=0.8)
    distance.add_patch(Rectangle((0, 0), LATERAL_TOLERANCE_MM, LATERAL_TOLERANCE_MM, **TOLERANCE))
    where.set(xlabel="x of the target (mm)", ylabel="y of the target (mm)", title="who succeeds where")
    where.set_aspect("equal", adjustable="datalim")
    legend(where, 1)
    distance.set(xlabel=f"{names[0]}:\ndistance from the axis (mm)", ylabel=f"{names[1]}:\ndistance from the axis (mm)")
    distance.set(xlim=(0, most), ylim=(0, most), aspect="equal", title="green: within the tolerance")
    return figure


@plot
def frame_strip(row: Rollout, views: Sequence[str], title: str = "", axes: Panels = None) -> Figure:
    """A rollout with frames: a column a frame, with pictures of `views`, A-scan, force and action."""
    frames, lines = row["frames"], len(views) + 1
    size = (min(11, 1.45 * len(frames) + 0.4), 0.9 * len(views) + 1.9)
    heights = [1.0] * len(views) + [0.8]
    figure, found = panels(axes, size, (lines, len(frames)), title, height_ratios=heights)
    for column, frame in zip(np.array(found, dtype=object).reshape(lines, -1).T, frames, strict=True):
        for panel, view in zip(column, views, strict=False):
            picture(panel, frame.pictures.get(view))
        column[0].set_title(f"{frame.tick.t_s:.1f} s")
        scan = column[-1]
        force_mN, *a_scan = frame.newest_sample
        scan.plot(np.arange(len(a_scan)) * BIN_MM, a_scan, lw=0.6, color=COLOURS["data"])
        motion = "{:+z.2f} {:+z.2f} {:+z.2f}".format(*frame.tick.action[:3])
        scan.set_xlabel(f"depth (mm)\n{force_mN:z.0f} mN\n{frame.tick.reason or motion}", fontsize=8)
        scan.set(yticks=[], ylim=(0, 110))
    for panel, name in zip(found[:: len(frames)], (*views, "A-scan"), strict=True):
        panel.set_ylabel(name, fontsize=8)
    return figure
