"""The verdicts of all episodes of a root, rejected ones too: `verdicts.json` beside what was prepared.

`vla_lib.preprocess` writes it; whoever only looks reads one file in place of a thousand.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.files import file_lock, read_json, write_json

VERDICTS_NAME = "verdicts.json"
Row = Mapping[str, Any]


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
