"""Look of all plots: font sizes and colours that stay readable on screen and in print."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the look while a figure is built, and leave the caller's settings alone."""
    with mpl.rc_context(STYLE):
        yield
