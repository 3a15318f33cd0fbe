"""Measured streams of episodes in; figures of intervals, timelines with gaps, clock evidence, verdicts and checks out."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vla_lib.episodes.clocks import STAGGER_S, force_curve
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.rates import Rates, distinct_hz, intervals_ms, measure
from vla_lib.episodes.verdict import GOOD, REJECTED, USABLE
from vla_lib.workbench.plots.style import style

LINE, GAP, SECOND = "#0b6e99", "#b5122a", "#c58b00"
LEVELS = {GOOD: "#2e7d32", USABLE: "#c58b00", REJECTED: "#b5122a"}


def stream_times(episode: Episode) -> dict[str, np.ndarray]:
    """Stream name -> its times (UNIX seconds), robot and sensor first; `robot (distinct poses)` where poses repeat."""
    times = {"robot": episode.robot.t_s}
    changed = episode.robot.t_s[episode.robot.changed]
    if len(changed) < 0.95 * len(episode.robot.t_s):
        times["robot (distinct poses)"] = changed
    if episode.sensor is not None:
        times["sensor"] = episode.sensor.t_s
    return times | {view: pictures.t_s for view, pictures in episode.pictures.items()}


def intervals(episode: Episode) -> Figure:
    """One histogram per stream: how long it took to the next row, sample or picture; the red line is the median."""
    times = {name: t for name, t in stream_times(episode).items() if len(t) > 2}
    columns = min(4, max(1, len(times)))
    lines = max(1, -(-len(times) // columns))
    with style():
        figure, axes = plt.subplots(lines, columns, figsize=(3.3 * columns, 2.1 * lines + 0.5), squeeze=False)
        for axis in axes.flat[len(times) :]:
            axis.axis("off")
        for axis, (name, t_s) in zip(axes.flat, times.items(), strict=False):
            steps = intervals_ms(t_s)
            usual = float(np.median(steps))
            shown = np.clip(steps, 0, max(4 * usual, 1e-3))
            axis.hist(shown, bins=60, color=LINE)
            axis.axvline(usual, color=GAP, lw=1)
            axis.set_yscale("log")
            rate = distinct_hz(episode.robot) if "distinct" in name else 1e3 / usual if usual else float("nan")
            axis.set_title(f"{name}: {rate:.1f} Hz, longest {steps.max():.0f} ms", fontsize=9)
            axis.set_xlabel("interval (ms), clipped at 4 x median" if (steps > 4 * usual).any() else "interval (ms)")
        for axis in axes[:, 0]:
            axis.set_ylabel("count")
        figure.suptitle(f"{episode.name}: intervals", fontsize=11)
    plt.close(figure)
    return figure


def timeline(episode: Episode, rates: Rates | None = None) -> Figure:
    """When each stream runs, against the robot's motion (grey), with its gaps in red."""
    rates = rates or measure(episode)
    origin = episode.start_s
    with style():
        figure, axis = plt.subplots(figsize=(10, 0.36 * len(rates.streams) + 1.4))
        axis.axvspan(0, episode.duration_s, color="#d9d9d9", lw=0, zorder=0)
        for line, row in enumerate(rates.streams):
            begin, end = row.start_s, row.end_s + episode.duration_s
            axis.barh(line, end - begin, left=begin, height=0.55, color=LINE)
            for gap_begin, gap_end in row.gaps:
                axis.barh(line, gap_end - gap_begin, left=gap_begin - origin, height=0.8, color=GAP)
            axis.annotate(
                f" {row.hz:.1f} Hz, {row.count}" + (f", {len(row.gaps)} gap(s)" if row.gaps else ""),
                (max(end, episode.duration_s), line),
                va="center",
                fontsize=8,
            )
        axis.set_yticks(range(len(rates.streams)), [row.stream for row in rates.streams])
        axis.invert_yaxis()
        axis.set_xlim(right=1.28 * max(episode.duration_s, *(row.end_s + episode.duration_s for row in rates.streams)))
        axis.set(
            xlabel="time since first robot row (s)",
            title=f"{episode.name}: streams (robot's motion in grey, gaps in red)",
        )
    plt.close(figure)
    return figure


def offset_evidence(episode: Episode) -> Figure:
    """What speaks for the sensor clock's offset: where the streams begin, and the force traces' correlation where both exist."""
    clock = episode.sensor_clock
    curve = None
    if episode.sensor is not None:
        start = clock.start_difference_s or 0.0
        shifted = episode.sensor.t_s
        episode.sensor.t_s = shifted + clock.offset_s  # as recorded
        curve = force_curve(episode.robot, episode.sensor, start if abs(start) > STAGGER_S else 0.0)
        episode.sensor.t_s = shifted
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.0), width_ratios=(1.3, 1))
        starts = {"robot": 0.0}
        if clock.start_difference_s is not None:
            starts["sensor, as recorded"] = clock.start_difference_s
            starts["sensor, corrected"] = clock.start_difference_s - clock.offset_s
        starts |= {
            view: float(p.t_s[0]) - episode.start_s
            for view, p in episode.pictures.items()
            if not view.endswith("_right")
        }
        axes[0].axvspan(-STAGGER_S, STAGGER_S, color="#d9d9d9", lw=0, zorder=0)
        axes[0].plot(list(starts.values()), range(len(starts)), "o", color=LINE)
        axes[0].set_yticks(range(len(starts)), list(starts))
        axes[0].invert_yaxis()
        axes[0].set(
            xlabel="first entry after the robot's (s); grey: normal staggering", title="where the streams begin"
        )
        if curve is None:
            axes[1].text(
                0.5, 0.5, "the robot log holds no force,\nso forces cannot be compared", ha="center", va="center"
            )
            axes[1].axis("off")
        else:
            axes[1].plot(curve[0], curve[1], color=LINE)
            axes[1].axvline(clock.offset_s, color=GAP, lw=1)
            axes[1].set(
                xlabel="assumed offset (s)", ylabel="correlation of both forces", title="force in robot log and sensor"
            )
        figure.suptitle(f"{episode.name}: sensor clock {clock.sentence()}", fontsize=10)
    plt.close(figure)
    return figure


def verdicts(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """All episodes at once: valid and invalid steps by verdict, and the rates of robot, poses, sensor and cameras."""
    frame = pd.DataFrame(list(summaries))
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), width_ratios=(1, 1.4, 1.6))
        counts = [int((frame["verdict"] == level).sum()) for level in LEVELS] if len(frame) else [0, 0, 0]
        bars = axes[0].bar(
            [level.replace(" with ", "\nwith ") for level in LEVELS], counts, color=list(LEVELS.values())
        )
        axes[0].bar_label(bars)
        axes[0].set(ylabel="episodes", title="verdicts")
        for level, color in LEVELS.items():
            part = frame[frame["verdict"] == level] if len(frame) else frame
            if len(part):
                axes[1].scatter(
                    part["seconds"], part["valid"] / part["steps"].clip(lower=1) * 100, s=14, color=color, label=level
                )
        axes[1].set(
            xlabel="duration of the motion (s)", ylabel="valid steps (%)", title="length and validity", ylim=(-4, 104)
        )
        if axes[1].collections:
            axes[1].legend(loc="lower right", fontsize=7)
        names = {"robot_hz": "robot rows", "pose_hz": "distinct poses", "sensor_hz": "sensor", "camera_hz": "cameras"}
        columns = {text: frame[name].dropna() for name, text in names.items() if len(frame) and name in frame}
        columns = {text: values for text, values in columns.items() if len(values)}
        for place, values in enumerate(columns.values()):
            spread = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
            axes[2].plot(place + spread, values, "o", ms=3, color=LINE)
        axes[2].set_xticks(range(len(columns)), list(columns))
        axes[2].set_yscale("log")
        axes[2].set(ylabel="rate (Hz)", title="rates of all episodes")
    plt.close(figure)
    return figure


def recheck(table: pd.DataFrame, episode: str = "") -> Figure:
    """The result of `episodes.recheck`: stored against recomputed actions, and their differences."""
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
        stored = np.stack(table["stored"].to_list()) if len(table) else np.empty((0, 6))
        again = np.stack(table["recomputed"].to_list()) if len(table) else np.empty((0, 6))
        for axis, part, unit in ((axes[0], slice(0, 3), "mm"), (axes[1], slice(3, 6), "deg")):
            for column, name in enumerate("xyz"):
                axis.plot(again[:, part][:, column], stored[:, part][:, column], "o", ms=4, alpha=0.7, label=name)
            low, high = (float(f(again[:, part])) if len(again) else v for f, v in ((np.min, -1.0), (np.max, 1.0)))
            axis.plot([low, high], [low, high], color="#4a4a4a", lw=0.8)
            axis.set(xlabel=f"recomputed from raw ({unit})", ylabel=f"in data.pkl ({unit})")
            axis.legend(fontsize=7)
        axes[0].set_title("displacement per step")
        axes[1].set_title("rotation per step")
        tiny = 1e-9
        axes[2].semilogy(table["seconds"], table["position_mm"] + tiny, "o", color=LINE, label="position (mm)")
        axes[2].semilogy(table["seconds"], table["rotation_deg"] + tiny, "s", color=SECOND, label="rotation (deg)")
        axes[2].axhline(0.02, color=GAP, lw=1, ls="--", label="allowed")
        agree = int((table["picture"] & table["sensor"] & table["sample"]).sum()) if len(table) else 0
        axes[2].set(
            xlabel="time since first robot row (s)",
            ylabel="difference",
            title=f"indices agree at {agree} of {len(table)} steps",
        )
        axes[2].legend(fontsize=7)
        figure.suptitle(f"{episode}: data.pkl against the raw files", fontsize=11)
    plt.close(figure)
    return figure
