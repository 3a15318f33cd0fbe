"""Findings: what was noticed about an episode, each with a weight and a sentence."""

from dataclasses import dataclass
from typing import Any

NOTE, EXCLUDED, FATAL = "note", "excluded", "fatal"
"""A note changes nothing; `excluded` leaves some data out; `fatal` makes the episode useless."""


@dataclass(frozen=True)
class Finding:
    """One sentence about one stream."""

    weight: str
    """`note`, `excluded` or `fatal`."""
    stream: str
    """`robot`, `sensor`, a view key such as `View1_left`, or `episode`."""
    text: str
    left_out: bool = False
    """True where a whole stream or file is not used: such findings end the run's list of what was left out."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))
