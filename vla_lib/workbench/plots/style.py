"""How every plot looks and is made: fonts, colours by what they stand for, panels, pictures, legends.

    @plot
    def lateness(ticks: Sequence[Tick], axes: Panels = None) -> Figure:
        figure, (panel,) = panels(axes, (5, 3))
        panel.hist([tick.lateness_ms for tick in ticks])
        panel.set(xlabel="lateness of a tick (ms)", ylabel="ticks")
        return figure

A plot takes data and returns a Figure. Given `axes=`, it draws into those, so that plots compose; else it makes a
figure of its own. Figures are made without pyplot: nothing keeps them, so nothing has to be closed.
"""

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeAlias
from unicodedata import east_asian_width

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter

P = ParamSpec("P")
Panels: TypeAlias = Axes | Sequence[Axes] | None
"""Where to draw: as many axes as the plot has panels, or None for a new figure."""

# Okabe and Ito (2008): told apart with every kind of colour vision
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
BLACK, GREY, PALE = "#222222", "#8C8C8C", "#D9D9D9"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY)
"""For things of one kind that have no colour of their own, in this order."""
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
COLOURS = {
    "data": BLUE, "median": VERMILLION, "gap": VERMILLION, "invalid": GREY, "instant": VERMILLION,
    "policy": BLUE, "VL masked": PURPLE, "sensor masked": GREEN, "recorded": BLACK,
    "zero": GREY, "mean": ORANGE, "persistence": VERMILLION,
    "force": ORANGE, "limit": VERMILLION, "tolerance": GREEN, "target": VERMILLION, "membrane": PURPLE,
    "reference": GREY,
    "success": BLUE, "failure": VERMILLION,
    "good": GREEN, "usable with exclusions": ORANGE, "rejected": VERMILLION,
    "covered": GREEN, "stale": ORANGE, "missing": PALE,
    "act": BLUE, "wait": GREY, "hold": ORANGE, "retreat": PURPLE, "stop": VERMILLION,
    "expert": BLUE, "VLM": ORANGE, "GPU memory": PURPLE,
}  # fmt: skip

# Names of episodes and datasets may be Korean; the first of these that is installed draws what DejaVu lacks
KOREAN = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "AppleGothic")


@functools.cache
def _look() -> Any:  # matplotlib types it as a literal of all its settings
    korean = [name for name in KOREAN if name in font_manager.get_font_names()][:1]
    return {
        "font.family": ["DejaVu Sans", *korean],
        "text.parse_math": False,  # names of files are text, also with a $ in them
        "font.size": 9,  # points; 100 dpi makes it 12.5 pixels, and 11 inches fit a page unscaled
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "axes.titlesize": 9.5,
        "figure.titlesize": 11,
        "figure.dpi": 100,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.handlelength": 1.4,
        "legend.columnspacing": 1.2,
        "axes.prop_cycle": cycler(color=SERIES),
    }


def plot(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the house's look, and leave the caller's settings alone."""

    @functools.wraps(draw)
    def styled(*data: P.args, **how: P.kwargs) -> Figure:
        with mpl.rc_context(_look()):
            figure = draw(*data, **how)
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
            if isinstance(axis.get_major_formatter(), LogFormatter):  # it writes powers as formulas, which stay text
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
        return figure

    return styled


def panels(
    axes: Panels, size: tuple[float, float] = (8, 4), mosaic: Any = "a", title: str = "", **layout: Any
) -> tuple[Figure, list[Axes]]:
    """The figure and its panels in reading order: those in `axes`, or new ones of `size` inches.

    mosaic: as `Figure.subplot_mosaic` takes it ("ab;cc": two above a wide one), or the number of (rows, columns);
    layout: keywords of `subplot_mosaic`; title: of a new figure.
    """
    if axes is not None:
        given = [axes] if isinstance(axes, Axes) else list(axes)
        figure = given[0].get_figure(root=True)
        assert figure is not None
        return figure, given
    figure = Figure(figsize=size, layout="constrained")
    if isinstance(mosaic, tuple):
        mosaic = np.arange(mosaic[0] * mosaic[1]).reshape(mosaic).tolist()
    made = list(figure.subplot_mosaic(mosaic, **layout).values())
    if title:
        figure.suptitle(wrapped(title, size[0]))
    return figure, made


class Look(NamedTuple):
    """How the things of one kind in a plot are told apart, by colour and without."""

    colour: str
    dash: Any
    marker: str
    hatch: str


def nth(number: int) -> Look:
    """The look of thing `number`; colour and dash together come again after 30, colour and marker after 42."""
    return Look(SERIES[number % 6], DASHES[number % 5], "os^DvXP"[number % 7], HATCHES[number % 6])


def wrapped(title: str, inches: float) -> str:
    """A figure's title in lines that fit its width: 11 letters an inch, and a Korean one counts twice."""
    second = "\u2060"  # behind each wide letter, while lines are counted
    counted = "".join(letter + second * (east_asian_width(letter) in "WF") for letter in title)
    lines = [textwrap.fill(line, int(11 * inches)) for line in counted.splitlines() if line]
    return "\n".join(lines).replace(second, "")


def legend(panel: Axes, columns: int = 4) -> None:
    """A legend in rows above the panel, where it hides no data; the panel's title goes above it."""
    labels = panel.get_legend_handles_labels()[1]
    if labels:
        panel.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=columns, borderaxespad=0.2)
        panel.set_title(panel.get_title(), pad=6 + 12 * -(-len(labels) // columns))


def diagonal(panel: Axes, true: np.ndarray, predicted: np.ndarray) -> None:
    """The line on which a prediction is right; both axes show the same span, so that a flat prediction looks flat."""
    values = np.concatenate([np.ravel(true), np.ravel(predicted), [0.0] if not np.size(true) else []])
    low, high = float(values.min()), float(values.max())
    edge = 0.04 * (high - low) or 1.0
    panel.plot((low, high), (low, high), color=COLOURS["reference"], lw=1, zorder=1)
    panel.set(xlim=(low - edge, high + edge), ylim=(low - edge, high + edge))


def picture(panel: Axes, pixels: Any, missing: str = "") -> None:
    """A picture (H, W, 3) without ticks, or the sentence why there is none."""
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    if pixels is not None:
        panel.imshow(pixels)
    elif missing:
        say(panel, missing)


def say(panel: Axes, text: str) -> None:
    """A sentence in the middle of a panel that has nothing to show."""
    panel.text(0.5, 0.5, text, ha="center", va="center", transform=panel.transAxes)


def drawn(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a picture file: `png`, or `jpeg` where several stand in one page (a third of the bytes)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, pil_kwargs={"quality": 85} if kind == "jpeg" else None)
    return buffer.getvalue()
