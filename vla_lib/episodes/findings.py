"""Findings: what was noticed about an episode, each with a weight and a sentence; the gravest decides the verdict.

good: nothing is left out. usable: some steps, views or streams are excluded, the rest can be trained on. rejected:
record again. `verdicts.json` beside what was prepared keeps those of all episodes of a root, rejected ones too:
`vla_lib.preprocess` writes it, and whoever only looks reads one file in place of a thousand.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.files import file_lock, read_json, write_json

NOTE, EXCLUDED, FATAL = "note", "excluded", "fatal"
"""A note changes nothing; `excluded` leaves some data out; `fatal` makes the episode useless."""
GOOD, USABLE, REJECTED = "good", "usable with exclusions", "rejected"
NO_NUMBERS = "hold values that are no numbers"  # how the sentence about a sensor's ends
NOT_JUDGED = "not judged"  # the machine failed, not the recording
VERDICTS_NAME = "verdicts.json"
Row = Mapping[str, Any]  # of `quality.summary_row`


@dataclass(frozen=True)
class Finding:
    """One sentence about one stream."""

    weight: str  # `note`, `excluded` or `fatal`
    stream: str  # `robot`, `sensor`, a view key such as `View1_left`, or `episode`
    text: str
    left_out: bool = False
    """True where a whole stream or file is not used: such findings end the run's list of what was left out."""


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


def read_verdicts(root: str | Path) -> dict[str, dict[str, Any]]:
    """Key of an episode -> the row of its last judging (`quality.summary_row`), where there is one.

    Raises UserError where the file is damaged.
    """
    path = Path(root) / VERDICTS_NAME
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(row, dict) and "verdict" in row for row in found.values()):
        raise UserError(f"{path} holds no verdicts; remove it, and run python -m vla_lib.preprocess to judge again.")
    return found


def keep_verdicts(root: Path, rows: Mapping[str, Row], known: Collection[str] | None) -> str:
    """Merge the rows into the root's file, where only the `known` keys stay (None: all); returns why that failed, ""
    where it did not."""
    try:
        if _merged(root, rows, known) is not None:  # a root that is read-only does not matter where nothing is new
            with file_lock(root / f".{VERDICTS_NAME}.lock"):
                write_json(root / VERDICTS_NAME, _merged(root, rows, known) or {})
    except OSError as error:
        return f"{root / VERDICTS_NAME} could not be written ({error.strerror}): verdicts are not kept"
    return ""


def _merged(root: Path, rows: Mapping[str, Row], known: Collection[str] | None) -> dict[str, Row] | None:
    """What the file should hold; None where it does."""
    try:
        before = read_verdicts(root)
    except UserError:  # damaged: every row is judged again, or in data.pkl
        before = {}
    plain = {key: {name: _plain(value) for name, value in row.items()} for key, row in rows.items()}
    merged: dict[str, Row] = {
        key: row for key, row in sorted((before | plain).items()) if known is None or key in known
    }
    return merged if merged != before else None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no not-a-number
