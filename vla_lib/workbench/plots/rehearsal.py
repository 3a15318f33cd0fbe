"""A policy that runs in real time: what it sees and does now, and how well it kept its times."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vla_lib.evaluation.rollout import Moment
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.run_log import RunLog, Tick
from vla_lib.workbench.plots.rollouts import LIMIT, a_scans
from vla_lib.workbench.plots.style import COLOURS, Panels, legend, nth, panels, picture, plot

SHOWN_S = 10.0
MODES = ("act", "wait", "hold", "retreat", "stop")


@plot
def moment(moments: Sequence[Moment], force_limit_mN: float, axes: Panels = None) -> Figure:
    """Newest pictures; sensor, actions and age of the VL features of the last 10 s; latencies of the whole run."""
    pictures: dict[str, np.ndarray] = {}
    for seen in moments:
        pictures |= seen.pictures
    ticks = [seen.tick for seen in moments]
    recent = [seen for seen in moments if seen.tick.t_s >= ticks[-1].t_s - SHOWN_S]
    last = ticks[-1]
    title = f"{last.t_s:.1f} s: {last.mode}{', ' + last.reason if last.reason else ''}"
    columns = max(1, len(pictures))
    figure, found = panels(axes or _places(columns, title))
    for panel, view in zip(found, sorted(pictures) or ["no picture"], strict=False):
        picture(panel, pictures.get(view))
        panel.set_title(view)
    scans, action, late, force, age, duration = found[columns:]
    _sensor(scans, force, recent, force_limit_mN)
    _actions(action, [seen.tick for seen in recent])
    _ages(age, [seen.tick for seen in recent], 3)
    _lateness(late, ticks)
    _durations(duration, {"expert": [tick.expert_ms for tick in ticks]}, 1000 * moments[-1].period_s)
    return figure


@plot
def rig(seen: Observation, axes: Panels = None) -> Figure:
    """What a rig shows now: the newest picture of each view, the newest A-scan, the force of the newest samples."""
    views = sorted(seen.pictures) or ["no picture"]
    names = "abcdefghij"[: len(views)]
    layout = f"{names};{'y' * (len(views) - 1)}z" if len(views) > 1 else "a;y;z"
    figure, found = panels(axes, (11, 5.0), layout)
    for panel, view in zip(found, views, strict=False):
        picture(panel, seen.pictures.get(view))
        panel.set_title(view)
    scan, force = found[len(views) :]
    if len(seen.sensor):
        scan.plot(seen.sensor[-1, 1:], color=COLOURS["data"], lw=0.8)
        force.plot(seen.sensor_timestamps - seen.timestamp, seen.sensor[:, 0], color=COLOURS["force"], lw=0.9)
    scan.set(xlabel="depth bin", ylabel="A-scan")
    force.set(xlabel="time (s)", ylabel="force (mN)")
    return figure


@plot
def timing(log: RunLog, axes: Panels = None) -> Figure:
    """Lateness of a run's ticks, durations of expert and VLM, and the age of the features in each mode."""
    figure, (late, duration, age) = panels(axes, (10, 5.4), "ab;cc")
    _lateness(late, log.ticks)
    expert = [tick.expert_ms for tick in log.ticks]
    _durations(duration, {"expert": expert, "VLM": log.vlm_ms}, 1000 * log.period_s)
    _ages(age, log.ticks, 5)
    return figure


def _places(columns: int, title: str) -> list[Axes]:
    """Fixed places in a new figure: fitting the layout would take the processor time that the control loop needs."""
    figure = Figure(figsize=(11, 6.8))
    figure.suptitle(title, y=0.985)
    above = {"left": 0.01, "right": 0.99, "top": 0.92, "bottom": 0.70, "wspace": 0.03}
    below = {"left": 0.065, "right": 0.985, "top": 0.62, "bottom": 0.07, "wspace": 0.25, "hspace": 0.42}
    pictures = figure.subplots(1, columns, squeeze=False, gridspec_kw=above)
    return [*pictures.flat, *figure.subplots(2, 3, gridspec_kw=below | {"width_ratios": (1.3, 1.3, 1)}).flat]


def _sensor(scans: Axes, force: Axes, recent: Sequence[Moment], limit_mN: float) -> None:
    samples = np.concatenate([seen.sensor for seen in recent])
    t_s = np.concatenate([seen.sensor_t_s for seen in recent])
    if len(t_s):
        a_scans(scans, samples, t_s, vmin=10, vmax=100)
        force.plot(t_s, samples[:, 0], color=COLOURS["force"], lw=0.9)
    force.axhline(limit_mN, **LIMIT, label="limit")
    force.set(xlabel="time (s)", ylabel="force (mN)")
    legend(force)


def _actions(panel: Axes, ticks: Sequence[Tick]) -> None:
    for k, (name, column) in enumerate(zip(("dx", "dy", "dz"), np.array([t.action for t in ticks]).T, strict=False)):
        panel.step([tick.t_s for tick in ticks], column, where="post", lw=1.2, ls=nth(k).dash, label=name)
    panel.set(ylabel="sent (mm a step)", title="actions")
    legend(panel)


def _ages(panel: Axes, ticks: Sequence[Tick], columns: int) -> None:
    for number, mode in enumerate(MODES):
        if found := [tick for tick in ticks if tick.mode == mode]:
            ages_ms = [1000 * (tick.vl_age_s or 0.0) for tick in found]
            marker = nth(number).marker
            panel.plot([tick.t_s for tick in found], ages_ms, marker, ls="", ms=3, color=COLOURS[mode], label=mode)
    panel.set(xlabel="time (s)", ylabel="age of VL features (ms)", ylim=(0, None))
    legend(panel, columns)


def _lateness(panel: Axes, ticks: Sequence[Tick]) -> None:
    late_ms = [tick.lateness_ms for tick in ticks]
    panel.hist(late_ms, bins=30, color=COLOURS["data"])
    if late_ms:
        panel.axvline(np.percentile(late_ms, 99), **LIMIT)
    panel.set(xlabel="lateness of a tick (ms); dashed: p99", ylabel="ticks", title=f"{len(ticks)} ticks")


def _durations(panel: Axes, found: Mapping[str, Iterable[float | None]], deadline_ms: float) -> None:
    for number, (name, values) in enumerate(found.items()):
        if known := [value for value in values if value is not None]:
            bins = np.linspace(0, max(*known, deadline_ms), 61).tolist()  # one width: a bar is wide enough to be seen
            panel.hist(known, bins=bins, color=COLOURS[name], alpha=0.8, hatch=nth(number).hatch, label=name)
    panel.axvline(deadline_ms, **LIMIT, label="deadline of an action")
    panel.set(xlabel=f"duration of the {' and the '.join(found)} (ms)", ylabel="calls")
    legend(panel, 2)
