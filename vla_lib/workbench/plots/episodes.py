"""An opened episode, its action grid and an instant in; figures of pictures, pose, joints, force, A-scans and actions out.

Times on the axes are seconds since the first robot row; an instant `at_s` is on that axis too. Steps that are invalid are
shaded grey; the instant is a red line.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.instants import PictureAt, SensorImage, pictures_at, sensor_image
from vla_lib.episodes.steps import Steps
from vla_lib.workbench.plots.style import style

CURSOR, INVALID = "#b5122a", "#9a9a9a"
COLORS = ("#0b6e99", "#c58b00", "#7a3fa0", "#2e7d32", "#b5502a", "#4a4a4a")
PICTURE_PX = 480
"""Width to which pictures are thinned before drawing, so that a slider stays quick."""
POINTS = 1500


def overview(episode: Episode, steps: Steps, at_s: float, mmode: SensorImage | None = None) -> Figure:
    """Everything at one instant: all views with their age, position, angles, force, A-scans and action deltas.

    `mmode`: the thinned A-scans, where they were read already (a slider reads them once). Raises nothing for missing streams.
    """
    mmode = mmode if mmode is not None else sensor_image(episode)
    shown = _left_views(episode, at_s)
    with style():
        figure = plt.figure(
            figsize=(13, 8.2), layout="none"
        )  # fixed places: fitting the layout would take longer than drawing
        _draw_pictures(figure, shown, grid={"left": 0.01, "right": 0.99, "top": 0.925, "bottom": 0.70, "wspace": 0.03})
        axes = figure.subplots(
            3, 2, sharex=True, gridspec_kw={"left": 0.065, "right": 0.985, "top": 0.68, "bottom": 0.06, "wspace": 0.16}
        )
        _draw_lines(
            axes[0, 0],
            episode.robot.t_s - episode.start_s,
            episode.robot.pose[:, :3] - episode.robot.pose[0, :3],
            "xyz",
        )
        axes[0, 0].set_ylabel("position from\nstart (mm)")
        _draw_lines(
            axes[1, 0], episode.robot.t_s - episode.start_s, episode.robot.pose[:, 3:], ("alpha", "beta", "gamma")
        )
        axes[1, 0].set_ylabel("angles (deg)")
        _draw_lines(
            axes[2, 0], episode.robot.t_s - episode.start_s, episode.robot.joints, [f"joint {k}" for k in range(1, 7)]
        )
        axes[2, 0].set_ylabel("joints (deg)")
        _draw_force(axes[0, 1], episode)
        _draw_mmode(axes[1, 1], mmode, episode.start_s)
        _draw_actions(axes[2, 1], episode, steps)
        for axis in axes.flat:
            _mark(axis, episode, steps, at_s)
        axes[2, 0].set(xlabel="time since first robot row (s)", xlim=_limits(episode))
        axes[2, 1].set_xlabel("time since first robot row (s)")
        figure.suptitle(f"{episode.name} ({episode.layout}) at {at_s:.2f} s", fontsize=11)
    plt.close(figure)
    return figure


def instant(episode: Episode, at_s: float) -> Figure:
    """All views at one instant, right pictures included, each with its age in ms."""
    shown = pictures_at(episode, episode.start_s + at_s)
    columns = max(1, min(5, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    with style():
        figure = plt.figure(figsize=(13, 2.0 * lines + 0.4))
        _draw_pictures(figure, shown, columns)
        figure.suptitle(f"{episode.name} at {at_s:.2f} s", fontsize=11)
    plt.close(figure)
    return figure


def motion(episode: Episode, steps: Steps, at_s: float | None = None) -> Figure:
    """Position, angles and joints over time."""
    with style():
        figure, axes = plt.subplots(3, 1, figsize=(10, 6.4), sharex=True)
        t_s = episode.robot.t_s - episode.start_s
        _draw_lines(axes[0], t_s, episode.robot.pose[:, :3], "xyz")
        _draw_lines(axes[1], t_s, episode.robot.pose[:, 3:], ("alpha", "beta", "gamma"))
        _draw_lines(axes[2], t_s, episode.robot.joints, [f"joint {k}" for k in range(1, 7)])
        for axis, label in zip(axes, ("position (mm)", "angles (deg)", "joints (deg)"), strict=True):
            axis.set_ylabel(label)
            _mark(axis, episode, steps, at_s)
        axes[-1].set_xlabel("time since first robot row (s)")
        axes[0].set_title(f"{episode.name}: motion")
    plt.close(figure)
    return figure


def sensor(episode: Episode, steps: Steps, at_s: float | None = None, mmode: SensorImage | None = None) -> Figure:
    """Force over time, and the A-scans as an image: depth x time."""
    mmode = mmode if mmode is not None else sensor_image(episode)
    with style():
        figure, axes = plt.subplots(2, 1, figsize=(10, 5.2), sharex=True, height_ratios=(1, 1.6))
        _draw_force(axes[0], episode)
        _draw_mmode(axes[1], mmode, episode.start_s)
        for axis in axes:
            _mark(axis, episode, steps, at_s)
        axes[-1].set_xlabel("time since first robot row (s)")
        axes[0].set_title(f"{episode.name}: sensor ({episode.sensor_clock.sentence()})")
    plt.close(figure)
    return figure


def actions(episode: Episode, steps: Steps, at_s: float | None = None) -> Figure:
    """The motion of every step: displacement in mm and rotation in degrees."""
    with style():
        figure, axes = plt.subplots(2, 1, figsize=(10, 4.8), sharex=True)
        t_s = steps.t_s - episode.start_s
        _draw_steps(axes[0], t_s, steps.action[:, :3], ("dx", "dy", "dz"))
        _draw_steps(axes[1], t_s, steps.action[:, 3:6], ("rx", "ry", "rz"))
        axes[0].set_ylabel(f"per {1e3 / steps.hz:.0f} ms (mm)")
        axes[1].set(ylabel=f"per {1e3 / steps.hz:.0f} ms (deg)", xlabel="time since first robot row (s)")
        for axis in axes:
            _mark(axis, episode, steps, at_s)
        axes[0].set_title(f"{episode.name}: actions in the base frame")
    plt.close(figure)
    return figure


def _left_views(episode: Episode, at_s: float) -> list[PictureAt]:
    return [p for p in pictures_at(episode, episode.start_s + at_s) if not p.view.endswith("_right")]


def _limits(episode: Episode) -> tuple[float, float]:
    return -0.02 * episode.duration_s, 1.02 * episode.duration_s


def _mark(axis: Axes, episode: Episode, steps: Steps, at_s: float | None) -> None:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (~steps.valid).astype(int), [0]])))
    for begin, end in edges.reshape(-1, 2):
        left = steps.t_s[begin] - episode.start_s
        axis.axvspan(left, steps.t_s[end - 1] - episode.start_s + 1 / steps.hz, color=INVALID, alpha=0.35, lw=0)
    if at_s is not None:
        axis.axvline(at_s, color=CURSOR, lw=1)
    axis.set_xlim(_limits(episode))


def _draw_pictures(
    figure: Figure, shown: list[PictureAt], columns: int | None = None, grid: dict[str, float] | None = None
) -> None:
    columns = columns or max(1, len(shown))
    lines = max(1, -(-len(shown) // columns))
    axes = figure.subplots(lines, columns, squeeze=False, gridspec_kw=grid)
    for axis in axes.flat:
        axis.axis("off")
    if not shown:
        axes[0, 0].text(0.5, 0.5, "no pictures", ha="center", va="center")
    for axis, picture in zip(axes.flat, shown, strict=False):
        if picture.path is None:
            axis.text(0.5, 0.5, "none yet", ha="center", va="center")
            axis.set_title(picture.view)
            continue
        axis.set_title(f"{picture.view}  {picture.age_ms:.0f} ms old")
        try:
            axis.imshow(_thinned(picture))
        except (OSError, UserError):
            axis.text(0.5, 0.5, "damaged", ha="center", va="center", color=CURSOR)


def _thinned(picture: PictureAt) -> Image.Image:
    assert picture.path is not None
    with Image.open(picture.path) as opened:
        opened.draft("RGB", (PICTURE_PX, PICTURE_PX))  # JPEG: decode at a fraction of the size
        small = opened.convert("RGB")
    small.thumbnail((PICTURE_PX, PICTURE_PX))
    return small


def _draw_lines(axis: Axes, t_s: np.ndarray, values: np.ndarray, names: "str | list[str] | tuple[str, ...]") -> None:
    thin = slice(None, None, max(1, len(t_s) // POINTS))
    for column, name in enumerate(names):
        axis.plot(t_s[thin], values[thin, column], color=COLORS[column], lw=1.1, label=name)
    axis.legend(loc="upper left", ncols=min(6, len(names)), fontsize=7, handlelength=1.2, columnspacing=1.0)
    axis.margins(y=0.2)


def _draw_steps(axis: Axes, t_s: np.ndarray, values: np.ndarray, names: tuple[str, ...]) -> None:
    for column, name in enumerate(names):
        axis.step(t_s, values[:, column], where="post", color=COLORS[column], lw=1.0, label=name)
    axis.legend(loc="upper left", ncols=3, fontsize=7)
    axis.margins(y=0.2)


def _draw_force(axis: Axes, episode: Episode) -> None:
    axis.set_ylabel("force\n(sensor's unit)")
    if episode.sensor is None:
        axis.text(0.5, 0.5, "no sensor", ha="center", va="center", transform=axis.transAxes)
        return
    force, t_s = episode.sensor.force, episode.sensor.t_s - episode.start_s
    thin = max(1, len(force) // POINTS)
    whole = len(force) // thin * thin
    folded = force[:whole].reshape(-1, thin)  # the extremes of each stretch, so that no peak is thinned away
    axis.fill_between(t_s[:whole:thin], folded.min(axis=1), folded.max(axis=1), color=COLORS[1], lw=0.8)


def _draw_mmode(axis: Axes, image: SensorImage | None, start_s: float) -> None:
    axis.set_ylabel("A-scan depth (bin)")
    axis.grid(False)
    if image is None or len(image.t_s) < 2 or not np.isfinite(image.values).any():
        axis.text(0.5, 0.5, "no sensor", ha="center", va="center", transform=axis.transAxes)
        return
    low, high = np.nanpercentile(image.values[::4, ::4], (1, 99.5))
    t_s = image.t_s - start_s
    usual = float(np.median(np.diff(t_s)))
    at_s = np.arange(t_s[0], t_s[-1] + usual / 2, usual)
    column = np.clip(np.searchsorted(t_s, at_s + usual / 2) - 1, 0, len(t_s) - 1)
    drawn = image.values[::2, column].astype(np.float32)
    drawn[:, at_s - t_s[column] > 1.5 * usual] = np.nan  # a gap stays blank
    extent = (float(t_s[0]), float(at_s[-1] + usual), float(len(image.values)), 0.0)
    axis.imshow(drawn, extent=extent, aspect="auto", cmap="magma", vmin=low, vmax=high, interpolation="nearest")
    text = f"colours: intensity {low:.3g} to {high:.3g}"
    axis.text(
        0.01,
        0.03,
        text,
        transform=axis.transAxes,
        fontsize=7,
        color="white",
        bbox={"color": "black", "alpha": 0.4, "lw": 0},
    )


def _draw_actions(axis: Axes, episode: Episode, steps: Steps) -> None:
    _draw_steps(axis, steps.t_s - episode.start_s, steps.action[:, :3], ("dx", "dy", "dz"))
    axis.set_ylabel(f"action per\n{1e3 / steps.hz:.0f} ms (mm)")
