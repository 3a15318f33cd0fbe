"""Findings: what was noticed about an episode, each with a weight and a sentence; the gravest decides the verdict.

good: nothing is left out. usable: some steps, views or streams are excluded, the rest can be trained on. rejected:
record again.
"""

from dataclasses import asdict, dataclass
from typing import Any

NOTE, EXCLUDED, FATAL = "note", "excluded", "fatal"
"""A note changes nothing; `excluded` leaves some data out; `fatal` makes the episode useless."""
GOOD, USABLE, REJECTED = "good", "usable with exclusions", "rejected"
NO_NUMBERS = "hold values that are no numbers"  # how the sentence about a sensor's ends
NOT_JUDGED = "not judged"  # the machine failed, not the recording


@dataclass(frozen=True)
class Finding:
    """One sentence about one stream."""

    weight: str  # `note`, `excluded` or `fatal`
    stream: str  # `robot`, `sensor`, a view key such as `View1_left`, or `episode`
    text: str
    left_out: bool = False
    """True where a whole stream or file is not used: such findings end the run's list of what was left out."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Findings(list[Finding]):
    """The findings of one episode, in the order in which they were made."""

    def note(self, stream: str, text: str) -> None:
        self.append(Finding(NOTE, stream, text))

    def exclude(self, stream: str, text: str, left_out: bool = False) -> None:
        """Some data are not used; `left_out`: a whole stream or file."""
        self.append(Finding(EXCLUDED, stream, text, left_out))

    def reject(self, stream: str, text: str) -> None:
        self.append(Finding(FATAL, stream, text))

    @property
    def verdict(self) -> str:
        """`good`, `usable with exclusions` or `rejected`."""
        weights = {finding.weight for finding in self}
        return REJECTED if FATAL in weights else USABLE if EXCLUDED in weights else GOOD

    @property
    def reasons(self) -> list[str]:
        """All sentences, gravest first; notes last."""
        order = (FATAL, EXCLUDED, NOTE)
        return [f"{f.stream}: {f.text}" for f in sorted(self, key=lambda f: order.index(f.weight))]

    @property
    def left_out(self) -> list[str]:
        """Whole streams or files that are not used."""
        return [f"{f.stream}: {f.text}" for f in self if f.left_out]
