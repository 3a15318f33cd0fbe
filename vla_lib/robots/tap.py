"""What the streams hand to a recorder, as it comes: pictures, samples, rows of the robot's log."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Frame:
    """One picture of a view: JPEG as the camera's host made it, or (H, W, 3) RGB that is still to be packed."""

    view: str
    t_s: float  # this host's clock
    jpeg: bytes | None
    rgb: np.ndarray | None


@dataclass(frozen=True)
class Samples:
    """Samples of the sensor: times (n,) on this host's clock, send times (n,) on the sensor's, values (n, 1026)."""

    t_s: np.ndarray
    sent_s: np.ndarray
    samples: np.ndarray


@dataclass(frozen=True)
class Row:
    """One row of the robot's log: received and origin on this host's clock, sent as stamped; (6,) deg, (6,) mm, deg."""

    received_s: float
    origin_s: float
    sent_s: float
    joints: np.ndarray
    pose: np.ndarray


class Tap:
    """Where streams give their items; nothing happens with them until somebody `listen`s."""

    def __init__(self) -> None:
        self._listener: Callable[[Frame | Samples | Row], None] | None = None

    def listen(self, listener: Callable[[Frame | Samples | Row], None] | None) -> None:
        """From now on items go to `listener`, which must be quick; None: to nobody."""
        self._listener = listener

    @property
    def open(self) -> bool:
        """Whether somebody listens."""
        return self._listener is not None

    def give(self, item: Frame | Samples | Row) -> None:
        """Hand over an item."""
        if listener := self._listener:
            listener(item)
