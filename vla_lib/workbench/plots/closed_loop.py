"""Closed-loop rollouts and runner logs in; figures of success, errors, reasons, timing and film strips out."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vla_lib.evaluation.closed_loop import ClosedLoop
from vla_lib.evaluation.sim_robot import BIN_MM, DEPTH_TOLERANCE_MM, FORCE_LIMIT_MN, LATERAL_TOLERANCE_MM
from vla_lib.runtime.run_log import RunLog
from vla_lib.workbench.plots.style import style

GOOD, BAD, CYCLE = "#0b6e99", "#b5122a", ("#0b6e99", "#c58b00", "#7a3fa0", "#2e7d32", "#b5482a", "#555555")
MODES = {"act": "#0b6e99", "wait": "#c9c4b8", "hold": "#c58b00", "retreat": "#7a3fa0", "stop": "#b5122a"}


def success(found: Mapping[str, ClosedLoop]) -> Figure:
    """Success rate of each variant with its 95 % interval (Wilson), and what the failures were."""
    summaries = {name: loop.summary() for name, loop in found.items()}
    reasons = list(dict.fromkeys(reason for summary in summaries.values() for reason in summary["reasons"]))
    place = np.arange(len(summaries))
    with style():
        figure, (rate, why) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.45 * len(summaries)), sharey=True)
        for y, summary in zip(place, summaries.values(), strict=True):
            low, high = (100 * value for value in summary["interval_95"])
            share = 100 * summary["success_rate"]
            rate.barh(y, share, color=GOOD, height=0.6)
            rate.plot((low, high), (y, y), color="black", lw=1.4)
            rate.annotate(
                f"{summary['successes']} of {summary['rollouts']}",
                (max(high, share), y),
                (5, 0),
                textcoords="offset points",
                va="center",
            )
        left = np.zeros(len(summaries))
        for reason, colour in zip(reasons, CYCLE * (1 + len(reasons) // len(CYCLE)), strict=False):
            counts = np.array([summary["reasons"].get(reason, 0) for summary in summaries.values()])
            why.barh(place, counts, left=left, height=0.6, color=colour, label=reason)
            left += counts
        rate.set(xlabel="success (%), line: 95 % interval", xlim=(0, 118), yticks=place, yticklabels=list(summaries))
        rate.set_xticks(range(0, 101, 20))
        rate.invert_yaxis()
        why.set(xlabel="failed rollouts", title="why rollouts failed" if reasons else "no rollout failed")
        if reasons:
            why.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plt.close(figure)
    return figure


def errors(found: Mapping[str, ClosedLoop]) -> Figure:
    """Where the needle ended (lateral and depth error of punctured rollouts, the tolerances shaded), peak forces, times to success."""
    with style():
        figure, (place, force, took) = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1.4, 1, 1))
        box = (0, -DEPTH_TOLERANCE_MM), LATERAL_TOLERANCE_MM, 2 * DEPTH_TOLERANCE_MM
        place.add_patch(Rectangle(*box, color="#2e7d32", alpha=0.2, lw=0, label="tolerance"))
        for (name, loop), colour in zip(found.items(), CYCLE * (1 + len(found) // len(CYCLE)), strict=False):
            through = [row for row in loop.rollouts if row["punctured"]]
            place.plot(
                [row["lateral_mm"] for row in through],
                [row["depth_error_mm"] for row in through],
                "o",
                ms=4,
                alpha=0.7,
                color=colour,
                label=name,
            )
            _steps(force, [row["peak_force_mN"] for row in loop.rollouts], colour, name)
            _steps(took, [row["time_s"] for row in loop.rollouts if row["success"]], colour, name)
        place.set(
            xlabel="distance from the target's axis (mm)", ylabel="depth error (mm), above 0: too deep", xlim=(0, None)
        )
        place.legend(fontsize=8)
        force.axvline(FORCE_LIMIT_MN, color=BAD, lw=1, ls="--")
        force.set(xlabel="peak force (mN), dashed: limit", ylabel="share of rollouts", ylim=(0, 1.02))
        if not any(row["success"] for loop in found.values() for row in loop.rollouts):
            took.text(0.5, 0.5, "no success", transform=took.transAxes, ha="center")
        took.set(xlabel="time to success (s)", ylabel="share of successes", ylim=(0, 1.02))
    plt.close(figure)
    return figure


def _steps(axis: Any, values: Sequence[float], colour: str, name: str) -> None:
    if len(values):
        axis.ecdf(values, color=colour, label=name, lw=1.5)


OUTCOMES = {
    (True, True): ("both", "#2e7d32"),
    (True, False): ("only {one}", GOOD),
    (False, True): ("only {other}", "#c58b00"),
}
OUTCOMES[False, False] = ("neither", BAD)


def paired(one: ClosedLoop, other: ClosedLoop, names: Sequence[str]) -> Figure:
    """Two variants on the same phantoms: who succeeds where the target lies, and how far from its axis each one ends."""
    with style():
        figure, (place, error) = plt.subplots(1, 2, figsize=(10, 4.4))
        rows = list(zip(one.rollouts, other.rollouts, strict=True))
        for outcome, (label, colour) in OUTCOMES.items():
            found = [(a, b) for a, b in rows if (bool(a["success"]), bool(b["success"])) == outcome]
            target = np.array([a["truth"]["target_xy_mm"] for a, _ in found]).reshape(-1, 2)
            told = f"{label.format(one=names[0], other=names[1])}: {len(found)}"
            place.plot(*target.T, "o", color=colour, label=told)
            error.plot(
                [a["lateral_mm"] for a, _ in found],
                [b["lateral_mm"] for _, b in found],
                "o",
                ms=5,
                alpha=0.8,
                color=colour,
            )
        most = 1.05 * max([LATERAL_TOLERANCE_MM, *(row["lateral_mm"] for pair in rows for row in pair)])
        error.plot((0, most), (0, most), color="#9a9a9a", lw=0.8)
        error.add_patch(Rectangle((0, 0), LATERAL_TOLERANCE_MM, LATERAL_TOLERANCE_MM, color="#2e7d32", alpha=0.2, lw=0))
        place.set(
            xlabel="x of the target (mm)", ylabel="y of the target (mm)", aspect="equal", title="who succeeds where"
        )
        place.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
        error.set(xlabel=f"{names[0]}: distance from the axis (mm)", ylabel=f"{names[1]}: distance from the axis (mm)")
        error.set(xlim=(0, most), ylim=(0, most), aspect="equal", title="green: within the tolerance")
    plt.close(figure)
    return figure


def timing(log: RunLog) -> Figure:
    """A run's lateness of ticks, durations of expert and VLM, and the age of the features with the mode of each tick."""
    with style():
        figure, axes = plt.subplot_mosaic([["late", "work"], ["age", "age"]], figsize=(10, 5))
        late = log.column("lateness_ms")
        axes["late"].hist(late, bins=40, color=GOOD)
        if len(late):
            axes["late"].axvline(np.percentile(late, 99), color=BAD, lw=1, ls="--")
        axes["late"].set(xlabel="lateness of a tick (ms), dashed: 99th percentile", ylabel="ticks")
        expert = log.column("expert_ms")
        for values, label, colour in (
            (expert[np.isfinite(expert)], "expert", GOOD),
            (np.array(log.vlm_ms), "VLM", CYCLE[1]),
        ):
            if len(values):
                axes["work"].hist(values, bins=30, color=colour, alpha=0.7, label=label)
        axes["work"].axvline(1000 * log.period_s, color=BAD, lw=1, ls="--", label="deadline of an action")
        axes["work"].set(xlabel="duration (ms)", ylabel="calls")
        axes["work"].legend()
        t, age, modes = log.column("t_s"), 1000 * log.column("vl_age_s"), log.column("mode")
        for mode, colour in MODES.items():
            if (modes == mode).any():
                axes["age"].plot(t[modes == mode], age[modes == mode], ".", ms=5, color=colour, label=mode)
        axes["age"].set(xlabel="time (s)", ylabel="age of the\nVL features (ms)", ylim=(0, None))
        axes["age"].legend(ncols=5)
    plt.close(figure)
    return figure


def film_strip(record: Mapping[str, Any], views: Sequence[str] = ("View1_left", "View5"), title: str = "") -> Figure:
    """A rollout with frames (evaluation.rollout.rollout): one column a frame; pictures of `views`, the A-scan over depth, force and action below."""
    frames = record["frames"]
    with style():
        heights = [1.0] * len(views) + [0.8]
        size = (1.6 * len(frames) + 0.6, 1.0 * len(views) + 2.0)
        figure, axes = plt.subplots(len(views) + 1, len(frames), figsize=size, height_ratios=heights, squeeze=False)
        for column, frame in zip(axes.T, frames, strict=True):
            for axis, view in zip(column, views, strict=False):
                if view in frame.pictures:
                    axis.imshow(frame.pictures[view])
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
            column[0].set_title(f"{frame.tick.t_s:.1f} s", fontsize=8)
            scan = column[-1]
            force_mN, *a_scan = frame.newest_sample
            scan.plot(np.arange(len(a_scan)) * BIN_MM, a_scan, lw=0.6, color=GOOD)
            dx, dy, dz = frame.tick.action[:3]
            action = frame.tick.reason or f"{dx:+.2f} {dy:+.2f} {dz:+.2f} mm"
            scan.set_xlabel(f"depth (mm)\n{force_mN:.0f} mN\n{action}", fontsize=7)
            scan.set(yticks=[], ylim=(0, 110))
            scan.tick_params(labelsize=6)
        for axis, view in zip(axes[:, 0], views, strict=False):
            axis.set_ylabel(view, fontsize=7)
        axes[-1, 0].set_ylabel("A-scan", fontsize=7)
        verdict = "success" if record["success"] else record["reason"]
        figure.suptitle(title or f"seed {record['seed']}: {verdict}")
    plt.close(figure)
    return figure
