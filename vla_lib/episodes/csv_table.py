"""A CSV as loggers write it: numbers by column name, whatever its encoding, delimiter, decimal sign and line ends.

What can be read in one way only is read, and said; what could be read in two ways is refused with the line that shows
it. pandas alone would shift every column where rows have one value more than the header: it takes the first for an
index.
"""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.core.errors import UserError

Wanted = Callable[[Sequence[str]], Any]  # Whether column names are those of the table that is looked for

HEAD_BYTES = 65536
HEAD_LINES = 50  # of which the header must be one
DELIMITERS = (",", ";", "\t", "|")
COMMENTS = ("#", "//", "%")
UNIX_S = (1e8, 1e11)  # between these a number is taken for UNIX seconds; nothing else in a robot log is as large
HEADERLESS = {
    16: ["recv_timestamp", "origin_timestamp", "send_timestamp", "force_placeholder"]
    + [f"joint_{k}" for k in range(1, 7)]
    + [f"pose_{axis}" for axis in "xyzabr"],
    13: ["epoch_s", *(f"joint_angle_{k}" for k in range(1, 7)), *(f"EE_{axis}" for axis in "xyzabr")],
}
"""Number of cells -> what the lab's recorders write in that order, for a log without its header."""
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d*")


@dataclass(frozen=True)
class Dialect:
    """How one CSV is written."""

    encoding: str
    delimiter: str
    names: list[str]  # of the columns, trimmed
    header_line: int  # number of the header among the lines, from 0; where there is none, of the line before the first
    notes: list[str] = field(default_factory=list)


@dataclass
class Table:
    """The numbers of one CSV."""

    frame: pd.DataFrame  # one column a name, float64; NaN where a cell is empty, infinite or no number
    notes: list[str]  # what had to be read otherwise than plainly, in words


def sniff(raw: bytes, wanted: Wanted) -> Dialect | None:
    """How the CSV that begins with `raw` is written; None where it does not begin with wanted column names."""
    encoding = _encoding(raw)
    notes = [f"it is written in {encoding}"] if not encoding.startswith("utf-8") else []
    for number, line in enumerate(_lines(raw.decode(encoding, errors="replace"), HEAD_LINES)[:HEAD_LINES]):
        if not line.strip() or line.lstrip().startswith(COMMENTS):
            continue
        for delimiter in DELIMITERS:
            names = _cells(line, delimiter)
            if wanted(names):
                if delimiter != ",":
                    notes.append(f"its cells are separated by {'tabs' if delimiter == chr(9) else delimiter!r}")
                if number:
                    notes.append(f"{number} line(s) stand before its header")
                return Dialect(encoding, delimiter, names, number, notes)
        guessed = _headerless(line)
        if guessed and wanted(guessed[1]):
            notes.append("it has no header; by the number of its cells it is taken for a log of the lab's (a guess)")
            return Dialect(encoding, *guessed, number - 1, notes)
        return None  # the first line with content decides
    return None


def read_table(path: Path, wanted: Wanted) -> Table:
    """Read one CSV. Raises UserError, with file, line and repair, where its rows could be read in two ways."""
    raw = path.read_bytes()
    dialect = sniff(raw[:HEAD_BYTES], wanted)
    if dialect is None:
        needed = "a clock and six pose columns are needed"
        raise UserError(f"{path} has no robot columns ({needed}); it cannot be used as a robot log.")
    twice = sorted({name for name in dialect.names if name and dialect.names.count(name) > 1})
    if twice:
        why = f"column {twice[0]} stands twice; which of them holds the values is not known"
        raise UserError(f"{path}, line {dialect.header_line + 1}: {why}. Rename or remove one of them.")
    notes = list(dialect.notes)
    if not raw.endswith((b"\n", b"\r", b"\n\0", b"\r\0")):
        notes.append("the last line is cut off (no line end) and is left out")
        raw = raw[: max(raw.rfind(b"\n"), raw.rfind(b"\r")) + 1]
    frame = _plain(raw, dialect)
    if frame is None:
        frame = _by_cells(path, raw, dialect, notes)
    named = frame.loc[:, [bool(name) for name in frame.columns]]
    return Table(named.replace([np.inf, -np.inf], np.nan), notes)


def _plain(raw: bytes, dialect: Dialect) -> pd.DataFrame | None:
    """Read fast, by pandas, where every line has as many cells as the header and all are numbers; else None."""
    usual = dialect.encoding == "utf-8-sig" and dialect.delimiter == "," and dialect.header_line == 0
    if not usual or b'"' in raw or raw.count(b",") != raw.count(b"\n") * (len(dialect.names) - 1):
        return None
    try:
        values = pd.read_csv(io.BytesIO(raw), dtype=np.float64, header=None, skiprows=1, index_col=False)
    except ValueError:
        return None
    if values.shape[1] != len(dialect.names):  # some lines had more cells and others as many fewer
        return None
    return values.set_axis(dialect.names, axis=1)


def _by_cells(path: Path, raw: bytes, dialect: Dialect, notes: list[str]) -> pd.DataFrame:
    """Read cell by cell. Rows of another length than the header are understood where only one way fits the times."""
    lines = _lines(raw.decode(dialect.encoding, errors="replace").replace("\0", ""))
    first = dialect.header_line + 1
    filled = [(n + 1, _cells(lines[n], dialect.delimiter)) for n in range(first, len(lines)) if lines[n].strip()]
    repeated = [number for number, cells in filled if cells == dialect.names]
    if repeated:
        notes.append(f"the header is repeated {len(repeated)} time(s), first in line {repeated[0]}")
    rows = [(number, cells) for number, cells in filled if cells != dialect.names]
    names, total = dialect.names, len(rows)
    if rows:
        usual = int(np.bincount([len(cells) for _, cells in rows]).argmax())
        rows = [(number, cells) for number, cells in rows if len(cells) == usual]
        names = _names_for(path, names, rows, notes)
        if usual == 2 * len(names):  # a decimal comma parted every number
            rows = [(n, [f"{a}.{b}" for a, b in zip(cells[::2], cells[1::2], strict=True)]) for n, cells in rows]
    frame = pd.DataFrame([cells for _, cells in rows], columns=names).astype(str)
    if frame.map(lambda cell: bool(_DECIMAL_COMMA.fullmatch(cell))).to_numpy().any():
        notes.append("its numbers have a decimal comma")
        frame = frame.map(lambda cell: cell.replace(",", "."))
    numbers = frame.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    broken = int((numbers.isna() & (frame != "")).any(axis=1).sum())
    if broken or total > len(rows):
        odd = f"{total - len(rows)} lines have too many or too few cells"
        notes.append(f"{broken} rows hold text where numbers belong and {odd}")
    return numbers


def _names_for(path: Path, names: list[str], rows: list[tuple[int, list[str]]], notes: list[str]) -> list[str]:
    """Column names for rows of any length, "" for a value without one. Raises UserError where two readings are open."""
    number, cells = rows[0]
    usual = len(cells)
    while len(names) > usual and not names[-1]:  # a header that ends with a delimiter
        names = names[:-1]
    if len(names) == usual:
        return names
    width = len(names)
    if usual == 2 * width and all(cell.isdigit() for _, row in rows for cell in row[1::2]):
        notes.append("its numbers have a decimal comma, which is its delimiter too")
        return names
    clocks = {k for k, name in enumerate(names) if "time" in name.lower() or name.lower() == "epoch_s"}

    def fits(shift: int) -> bool:  # times stand in the columns of times, and nowhere else
        found = [all(_is_time(row[k + shift]) == (k in clocks) for k in range(width)) for _, row in rows]
        return float(np.mean(found)) > 0.95  # single rows may be damaged

    if usual == width + 1 and clocks and fits(0) != fits(1):
        where = "begin" if fits(1) else "end"
        notes.append(f"its rows {where} with a value that the header does not name, which is left out")
        return ["", *names] if fits(1) else [*names, ""]
    shown = f"{usual} cells ({', '.join(cells[:3])}, ...) below a header of {width} names"
    remedy = "Add the missing name to the header, or remove the value from every row"
    raise UserError(f"{path}, line {number}: {shown}; which value belongs to which name is not known. {remedy}.")


def _is_time(cell: str) -> bool:
    try:
        return UNIX_S[0] < float(cell.replace(",", ".")) < UNIX_S[1]
    except ValueError:
        return False


def _headerless(line: str) -> tuple[str, list[str]] | None:
    """(delimiter, names) of a line of numbers that the lab's recorders write; None for anything else."""
    for delimiter in DELIMITERS:
        cells = _cells(line, delimiter)
        names = HEADERLESS.get(len(cells))
        times = 3 if len(cells) == 16 else 1
        if names and all(map(_is_time, cells[:times])) and not any(map(_is_time, cells[times:])):
            return delimiter, names
    return None


def _encoding(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    zeros = raw[0:64:2].count(0), raw[1:64:2].count(0)  # where Latin letters are stored as two bytes each
    if max(zeros) > 20 and min(zeros) == 0:
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return "utf-8-sig"


def _lines(text: str, most: int = 0) -> list[str]:
    return re.split(r"\r\n|\n|\r", text, maxsplit=most)


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
    except csv.Error:  # a cell of more than 128 KB: bytes, not a table
        return []
