"""Measured streams: intervals, timelines with gaps, clock evidence; all verdicts; the check of data.pkl."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vla_lib.episodes.clocks import ClockOffset
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.findings import GOOD, REJECTED, USABLE
from vla_lib.episodes.motion import MotionMatch, camera_match, sensor_match
from vla_lib.episodes.quality import STAGGER_S, distinct_hz, measure
from vla_lib.workbench.plots.style import COLOURS, PALE, Panels, diagonal, legend, nth, panels, plot, say

RATES = {"robot_hz": "robot rows", "pose_hz": "distinct poses", "sensor_hz": "sensor", "camera_hz": "cameras"}

TIME = "time since first robot row (s)"


@plot
def intervals(episode: Episode, axes: Panels = None) -> Figure:
    """One histogram per stream: how long it took to the next row, sample or picture; the line is the median."""
    times = {name: t_s for name, t_s in _stream_times(episode).items() if len(t_s) > 2}
    columns = min(4, max(1, len(times)))
    rows = max(1, -(-len(times) // columns))
    figure, found = panels(axes, (11, 2.1 * rows + 0.5), (rows, columns), f"{episode.name}: intervals")
    for panel, (name, t_s) in zip(found, times.items(), strict=False):
        steps = 1e3 * np.diff(t_s)
        usual = float(np.median(steps))
        known = np.clip(steps, 0, max(4 * usual, 1e-3))
        bins = np.linspace(min(known.min(), 0.95 * usual), max(known.max(), 1.05 * usual, 1e-3), 61)
        panel.hist(known, bins=bins.tolist(), color=COLOURS["data"])
        panel.axvline(usual, color=COLOURS["median"], lw=1)
        rate = distinct_hz(episode.robot) if "distinct" in name else 1e3 / usual if usual else float("nan")
        clipped = ", clipped at 4 x median" if (steps > 4 * usual).any() else ""
        panel.set(yscale="log", xlabel=f"interval (ms){clipped}", ylabel="count")
        panel.set_ylim(0.7, max(12.0, panel.get_ylim()[1]))  # so that 1 and 10 are written, also of a few pictures
        panel.set_title(f"{name}\n{rate:.1f} Hz, longest {steps.max():.0f} ms")
    for panel in found[len(times) :]:
        panel.set_axis_off()
    return figure


@plot
def timeline(episode: Episode, axes: Panels = None) -> Figure:
    """When each stream runs, against the robot's motion (grey), with its gaps in red."""
    streams = list(measure(episode).values())
    figure, (panel,) = panels(axes, (10, 0.36 * len(streams) + 1.4))
    panel.axvspan(0, episode.duration_s, color=PALE, lw=0, zorder=0)
    last = max(episode.duration_s, *(row.end_s + episode.duration_s for row in streams))
    for place, row in enumerate(streams):
        panel.barh(place, row.end_s + episode.duration_s - row.start_s, 0.55, row.start_s, color=COLOURS["data"])
        for begin, end in row.gaps:
            panel.barh(place, end - begin, 0.8, begin - episode.start_s, color=COLOURS["gap"])
        gaps = f", {len(row.gaps)} gap(s)" if row.gaps else ""
        panel.text(last, place, f"  {row.hz:.1f} Hz, {row.count}{gaps}", va="center")
    panel.set_yticks(range(len(streams)), [row.stream for row in streams])
    panel.invert_yaxis()
    panel.set(xlabel=TIME, title=f"{episode.name}: streams (robot's motion in grey, gaps in red)")
    panel.set_xlim(right=1.28 * last)
    return figure


@plot
def offset_evidence(episode: Episode, axes: Panels = None) -> Figure:
    """What speaks for the clocks' offsets: where streams begin, both curves of one motion, their correlation over lags.

    Five panels: the starts; curves and correlation of the sensor; curves and correlation of the cameras.
    """
    title = f"{episode.name}: what its motion says of the clocks"
    figure, (starts, *found) = panels(axes, (11, 5.6), "abc;ade", title, width_ratios=(1, 2.4, 1.2))
    _starts(starts, episode)
    _agreement(found[:2], sensor_match(episode), episode, "sensor", episode.clocks.sensor)
    _agreement(found[2:], camera_match(episode), episode, "cameras", episode.clocks.cameras)
    return figure


def _starts(panel: Axes, episode: Episode) -> None:
    starts = {"robot": 0.0}
    if episode.sensor is not None:
        begins = [begin_s - episode.start_s for begin_s in episode.sensor.begins_s]
        starts |= dict(zip(("sensor, first sample", "sensor, first window's end"), begins, strict=False))
    left = {view: pictures for view, pictures in episode.pictures.items() if not view.endswith("_right")}
    starts |= {view: float(pictures.t_s[0]) - episode.start_s for view, pictures in left.items()}
    panel.axvspan(-STAGGER_S, STAGGER_S, color=PALE, lw=0, zorder=0)
    panel.plot(list(starts.values()), range(len(starts)), "o", color=COLOURS["data"])
    panel.set_yticks(range(len(starts)), list(starts))
    panel.invert_yaxis()
    panel.set(xlabel="first entry after the robot's (s)\ngrey: shifts nothing", title="where the streams begin")


def _agreement(
    found: Sequence[Axes], match: MotionMatch | None, episode: Episode, stream: str, clock: ClockOffset
) -> None:
    """Both curves, each in units of its spread, on the robot's time; and their correlation at each lag."""
    curves, lags = found
    curves.set_title(textwrap.fill(f"{stream}: {clock.sentence()}", 52))
    if match is None:
        lags.set_axis_off()
        return say(curves, f"no motion to compare the {stream} with")
    told = match.estimate
    for number, (name, (t_s, values)) in enumerate(match.curves.items()):
        sign = np.sign(told.correlation) if number else 1.0  # of the tool's axis, which differs between rigs
        ahead_s = told.offset_s if number else 0.0
        spread = (values - values.mean()) / max(float(values.std()), 1e-12)
        at_s, thick = t_s - ahead_s - episode.start_s, 1.0 if number < 2 else 0.5
        curves.plot(at_s, sign * spread, lw=thick, ls=nth(number).dash, label=name)
    curves.set(xlabel=TIME, ylabel="in units of its spread")
    legend(curves, 2)
    lags.plot(match.lags_s, np.abs(match.correlations), color=COLOURS["data"])
    lags.axvline(told.offset_s, color=COLOURS["median"], lw=1)
    text = f"{told.offset_s * 1e3:+.0f} +- {told.uncertainty_s * 1e3:.0f} ms, {'clear' if told.clear else 'not clear'}"
    lags.set(xlabel="assumed offset (s)", ylabel="|correlation|", title=text, ylim=(0, 1.05))


@plot
def verdicts(summaries: Sequence[Mapping[str, Any]], axes: Panels = None) -> Figure:
    """All episodes at once: how many of each verdict, valid steps over duration, and the rates of every stream."""
    table = pd.DataFrame(list(summaries), columns=None if summaries else ["verdict", "seconds", "valid", "steps"])
    figure, (counts, validity, rates) = panels(axes, (11, 3.2), "abc", width_ratios=(1, 1.3, 1.7))
    levels = (GOOD, USABLE, REJECTED)
    heights = [int((table["verdict"] == name).sum()) for name in levels]
    names = [name.replace(" with ", "\nwith\n") for name in levels]
    counts.bar_label(counts.bar(names, heights, color=[COLOURS[name] for name in levels]))
    counts.set(ylabel="episodes", title="verdicts")
    for number, level in enumerate(levels):
        part = table[table["verdict"] == level]
        share = 100 * part["valid"] / part["steps"].clip(lower=1)
        validity.scatter(part["seconds"], share, s=14, color=COLOURS[level], marker=nth(number).marker, label=level)
    validity.set(xlabel="duration of the motion (s)", ylabel="valid steps (%)", title="validity", ylim=(-4, 104))
    legend(validity, 3)
    measured = {text: table[name].dropna() for name, text in RATES.items() if name in table}
    measured = {text: values for text, values in measured.items() if len(values)}
    for place, values in enumerate(measured.values()):
        spread = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
        rates.plot(place + spread, values, "o", ms=3, color=COLOURS["data"])
    rates.set_xticks(range(len(measured)), list(measured))
    rates.set(ylabel="rate (Hz)", yscale="log", title="rates of all episodes")
    return figure


@plot
def recheck(table: pd.DataFrame, episode: str = "", axes: Panels = None) -> Figure:
    """The result of `episodes.recheck`: stored against recomputed actions, and their differences."""
    title = f"{episode}: data.pkl against the raw files"
    figure, (moved, turned, differences) = panels(axes, (11, 3.6), "abc", title)
    stored, again = (np.reshape(table[name].to_list(), (-1, 6)) for name in ("stored", "recomputed"))
    for panel, first, unit, what in ((moved, 0, "mm", "displacement"), (turned, 3, "deg", "rotation")):
        for column, name in enumerate("xyz", first):
            marker = nth(column).marker
            panel.plot(again[:, column], stored[:, column], marker, ls="", ms=4, alpha=0.7, label=name)
        diagonal(panel, again[:, first : first + 3], stored[:, first : first + 3])
        panel.set(xlabel=f"recomputed from raw ({unit})", ylabel=f"in data.pkl ({unit})", title=f"{what} per step")
        legend(panel)
    tiny = 1e-9  # a logarithmic axis has no zero
    differences.semilogy(table["seconds"], table["position_mm"] + tiny, "o", label="position (mm)")
    differences.semilogy(table["seconds"], table["rotation_deg"] + tiny, "s", label="rotation (deg)")
    differences.axhline(0.02, color=COLOURS["limit"], lw=1, ls="--", label="allowed")
    agree = int((table["picture"] & table["sensor"] & table["sample"]).sum())
    differences.set(xlabel=TIME, ylabel="difference", title=f"indices agree at {agree} of {len(table)} steps")
    legend(differences, 3)
    return figure


def _stream_times(episode: Episode) -> dict[str, np.ndarray]:
    """Stream name -> its times (UNIX seconds), robot and sensor first; `robot (distinct poses)` where poses repeat."""
    times = {"robot": episode.robot.t_s}
    changed = episode.robot.t_s[episode.robot.changed]
    if len(changed) < 0.95 * len(episode.robot.t_s):
        times["robot (distinct poses)"] = changed
    if episode.sensor is not None:
        times["sensor"] = episode.sensor.t_s
    return times | {view: pictures.t_s for view, pictures in episode.pictures.items()}
