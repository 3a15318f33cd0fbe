"""One opened episode: pictures, motion, sensor and actions, at an instant and over time.

Times are seconds since the first robot row, and so is an instant `at_s`, drawn as a red line. Invalid steps are shaded.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.episodes.episode import Episode, PictureAt, SensorImage, pictures_at, sensor_image
from vla_lib.episodes.steps import Steps
from vla_lib.workbench.plots.style import COLOURS, Panels, panels, picture, plot, say

PICTURE_PX = 480
"""Width to which pictures are thinned before drawing, so that a slider stays quick."""
POINTS = 1500
TIME = "time since first robot row (s)"


@plot
def overview(
    episode: Episode, steps: Steps, at_s: float, mmode: SensorImage | None = None, axes: Panels = None
) -> Figure:
    """Everything at one instant: left views with their age, motion, sensor, and displacement of each step.

    mmode: the thinned A-scans, where they were read already (a slider reads them once).
    """
    shown = [seen for seen in pictures_at(episode, episode.start_s + at_s) if not seen.view.endswith("_right")]
    columns = max(1, len(shown))
    figure, found = panels(axes or _places(columns, f"{episode.name} ({episode.layout}) at {at_s:.2f} s"))
    for panel, seen in zip(found, shown, strict=False):
        _picture(panel, seen)
    if not shown:
        picture(found[0], None, "no pictures")
    lines = found[columns:]
    motion(episode, steps, at_s, axes=lines[::2])
    sensor(episode, steps, at_s, mmode, axes=[lines[1], lines[3]])
    actions(episode, steps, at_s, axes=lines[5])
    lines[3].set_xlabel("")
    return figure


def _places(columns: int, title: str) -> list[Axes]:
    """Fixed places for an overview, in a new figure: fitting the layout would take longer than all the drawing."""
    figure = Figure(figsize=(11, 7.6))
    figure.suptitle(title, y=0.985)
    above = {"left": 0.01, "right": 0.99, "top": 0.92, "bottom": 0.70, "wspace": 0.03}
    below = {"left": 0.075, "right": 0.955, "top": 0.68, "bottom": 0.065, "wspace": 0.29}
    pictures = figure.subplots(1, columns, squeeze=False, gridspec_kw=above)
    return [*pictures.flat, *figure.subplots(3, 2, sharex=True, gridspec_kw=below).flat]


@plot
def motion(episode: Episode, steps: Steps, at_s: float | None = None, axes: Panels = None) -> Figure:
    """Position from the start, angles and joints over time."""
    figure, found = panels(axes, (10, 6.4), (3, 1), f"{episode.name}: motion", sharex=True)
    robot, t_s = episode.robot, episode.robot.t_s - episode.start_s
    thin = slice(None, None, max(1, len(t_s) // POINTS))
    rows = (
        ("position from\nstart (mm)", robot.pose[:, :3] - robot.pose[0, :3], ("x", "y", "z")),
        ("angles (deg)", robot.pose[:, 3:], ("α", "β", "γ")),
        ("joints (deg)", robot.joints, [str(k) for k in range(1, 7)]),  # a legend of "joint 1" would be wide
    )
    for panel, (label, values, names) in zip(found, rows, strict=True):
        for name, column in zip(names, values.T, strict=True):
            panel.plot(t_s[thin], column[thin], lw=1.1, label=name)
        panel.set_ylabel(label)
        _finish(panel, episode, steps, at_s)
    found[-1].set_xlabel(TIME)
    return figure


@plot
def sensor(
    episode: Episode, steps: Steps, at_s: float | None = None, mmode: SensorImage | None = None, axes: Panels = None
) -> Figure:
    """Force over time, and the A-scans as an image: depth x time."""
    title = f"{episode.name}: sensor ({episode.sensor_clock.sentence()})"
    figure, (force, scans) = panels(axes, (10, 5.2), (2, 1), title, sharex=True, height_ratios=(1, 1.6))
    _force(force, episode)
    _a_scans(scans, sensor_image(episode) if mmode is None else mmode, episode.start_s)
    for panel in (force, scans):
        _finish(panel, episode, steps, at_s)
    scans.set_xlabel(TIME)
    return figure


@plot
def actions(episode: Episode, steps: Steps, at_s: float | None = None, axes: Panels = None) -> Figure:
    """The motion of every step in the base frame: displacement (mm) and, in a second panel, rotation (deg).

    Of a rollout also what the policy ordered, as it was recorded.
    """
    title = f"{episode.name}: actions in the base frame"
    title += " (dots: what the policy ordered, in its own units)" if episode.commands is not None else ""
    figure, found = panels(axes, (10, 4.8), (2, 1), title, sharex=True)
    rows = (("mm", 0, ("dx", "dy", "dz")), ("deg", 3, ("rx", "ry", "rz")))
    for panel, (unit, first, names) in zip(found, rows, strict=False):
        for column, name in enumerate(names, first):
            (line,) = panel.step(steps.t_s - episode.start_s, steps.action[:, column], where="post", lw=1.1, label=name)
            if episode.commands is not None:
                sent_s = episode.commands.t_s - episode.start_s
                panel.plot(sent_s, episode.commands.action[:, column], ".", ms=4, color=line.get_color())
        panel.set_ylabel(f"action per\n{1e3 / steps.hz:.0f} ms ({unit})")
        _finish(panel, episode, steps, at_s)
    found[-1].set_xlabel(TIME)
    return figure


def _finish(panel: Axes, episode: Episode, steps: Steps, at_s: float | None) -> None:
    """What every panel over time shares: limits, shaded invalid steps, the instant, a legend beside the data."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (~steps.valid).astype(int), [0]])))
    for begin, end in edges.reshape(-1, 2):
        left, right = steps.t_s[begin] - episode.start_s, steps.t_s[end - 1] - episode.start_s + 1 / steps.hz
        panel.axvspan(left, right, color=COLOURS["invalid"], alpha=0.35, lw=0)
    if at_s is not None:
        panel.axvline(at_s, color=COLOURS["instant"], lw=1)
    panel.set_xlim(-0.02 * episode.duration_s, 1.02 * episode.duration_s)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1.0)


def _picture(panel: Axes, seen: PictureAt) -> None:
    """The picture, thinned, with its age, or why there is none."""
    if seen.path is None:
        picture(panel, None, "none yet")
        panel.set_title(seen.view)
        return
    panel.set_title(f"{seen.view}  {seen.age_ms:.0f} ms old")
    try:
        with Image.open(seen.path) as opened:
            opened.draft("RGB", (PICTURE_PX, PICTURE_PX))  # JPEG: decodes at a fraction of the size
            small = opened.convert("RGB")
        small.thumbnail((PICTURE_PX, PICTURE_PX))
        picture(panel, small)
    except (OSError, UserError):
        picture(panel, None, "damaged")


def _force(panel: Axes, episode: Episode) -> None:
    panel.set_ylabel("force\n(sensor's unit)")
    if episode.sensor is None:
        return say(panel, "no sensor")
    force, t_s = episode.sensor.force, episode.sensor.t_s - episode.start_s
    thin = max(1, len(force) // POINTS)
    whole = len(force) // thin * thin
    folded = force[:whole].reshape(-1, thin)  # the extremes of each stretch, so that no peak is thinned away
    panel.fill_between(t_s[:whole:thin], folded.min(axis=1), folded.max(axis=1), color=COLOURS["force"], lw=0.8)


def _a_scans(panel: Axes, image: SensorImage | None, start_s: float) -> None:
    panel.set_ylabel("A-scan depth (bin)")
    panel.grid(visible=False)
    if image is None or len(image.t_s) < 2 or not np.isfinite(image.values).any():
        return say(panel, "no sensor")
    low, high = np.nanpercentile(image.values[::4, ::4], (1, 99.5))
    t_s = image.t_s - start_s
    usual = float(np.median(np.diff(t_s)))
    at_s = np.arange(t_s[0], t_s[-1] + usual / 2, usual)
    column = np.clip(np.searchsorted(t_s, at_s + usual / 2) - 1, 0, len(t_s) - 1)
    drawn = image.values[::2, column].astype(np.float32)
    drawn[:, at_s - t_s[column] > 1.5 * usual] = np.nan  # a gap stays blank
    extent = (float(t_s[0]), float(at_s[-1] + usual), float(len(image.values)), 0.0)
    panel.imshow(drawn, extent=extent, aspect="auto", cmap="magma", vmin=low, vmax=high, interpolation="nearest")
    # a colour bar would take width from the time axis that the panels share
    panel.text(
        *(0.03, 0.04), f"colours: intensity {low:.3g} to {high:.3g}", transform=panel.transAxes, fontsize=8,
        color="white", bbox={"color": "black", "alpha": 0.4, "lw": 0},
    )  # fmt: skip
