"""What people decided about episodes: `<dataset root>/marks.yaml`, one line an episode or a folder of episodes.

    White_silicone_white_circle/recv_all_20250904_101500: {exclude: true, note: the camera was moved}
    New_dataset/Needle/episode_20250911_090000: {start_s: 0.5, end_s: 12, label: success}
    part1: {exclude: true}

A key is a path below the root. What a folder's line says holds for all episodes below it, unless a longer path says
otherwise. An episode that is excluded, or of a dataset of weight 0 (`datasets.yaml`), is neither prepared nor cached,
trained on nor evaluated. Its files stay. With --output-root both files lie there. Lines are sorted, and others stay as
they are when one is written, so that two people's marks merge.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge
from pydantic import BaseModel, ValidationError

from vla_lib.core.errors import UserError, needing_room
from vla_lib.core.files import file_lock, write_text
from vla_lib.episodes.datasets import TABLE_NAME, DatasetTable
from vla_lib.episodes.layouts import place_of

MARKS_NAME = "marks.yaml"
HEAD = "# Decisions about episodes: exclude, start_s and end_s (trim), label, task, note\n"
Seconds = Annotated[float, Ge(0), "since the first robot row"]


class Mark(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What one line says; None: nothing."""

    exclude: bool | None = None
    start_s: Seconds | None = None
    end_s: Seconds | None = None
    label: Literal["success", "failure"] | None = None
    task: str | None = None  # in place of the task folder's words, in the instruction and in datasets.yaml
    note: str | None = None

    @property
    def said(self) -> dict[str, Any]:
        """The values that are given."""
        return self.model_dump(exclude_none=True)

    @property
    def trim(self) -> tuple[float, float]:
        """(first, last) second that is used, since the first robot row; (0, inf) is all."""
        return self.start_s or 0.0, float("inf") if self.end_s is None else self.end_s

    @property
    def words(self) -> str:
        """The mark as a person reads it in a table."""
        said = self.said
        start, end = said.pop("start_s", None), said.pop("end_s", None)
        parts = ["excluded"] if said.pop("exclude", False) else []
        parts += [f"{start or 0:g} s to {'the end' if end is None else f'{end:g} s'}"] if start or end else []
        return ", ".join([*parts, *map(str, said.values())])


@dataclass(frozen=True)
class Marks:
    """The marks and the table of datasets that hold below one root."""

    root: Path
    entries: dict[str, Mark] = field(default_factory=dict)
    table: DatasetTable = DatasetTable()

    @classmethod
    def load(cls, root: str | Path) -> "Marks":
        """The marks of a root. Raises UserError where marks.yaml or datasets.yaml cannot be understood."""
        path = Path(root) / MARKS_NAME
        entries = {key: node for key, (node, _, _) in _lines(path).items()}
        marks = {key: _mark(yaml.SafeLoader("").construct_document(node), key, path) for key, node in entries.items()}
        return cls(Path(root), marks, DatasetTable.load(root))

    def of(self, key: str) -> Mark:
        """What holds for an episode, by its path below the root."""
        parts = key.split("/")
        found: dict[str, Any] = {}
        for count in range(1, len(parts) + 1):
            if entry := self.entries.get("/".join(parts[:count])):
                found |= entry.said
        return Mark(**found)

    def left_out(self, key: str, place: tuple[str, str] | None = None) -> str:
        """Why an episode is not used; empty where it is. place: its dataset and task, where they are known."""
        mark = self.of(key)
        if mark.exclude:
            return f"excluded in {MARKS_NAME}" + (f" ({mark.note})" if mark.note else "")
        dataset, task = place or place_of(self.root / key, self.root, self.table)
        none = self.table.weight(dataset, mark.task or task) == 0
        return f"weight 0 in {TABLE_NAME}" if none else ""

    def write(self, key: str, **changes: Any) -> "Marks":
        """Change the line of one episode or folder (None: take that value away); returns the marks as they are then.

        Raises UserError where a value is refused, or the file cannot be written.
        """
        path = self.root / MARKS_NAME
        remedy = "Give a root that you may write, or prepare into one with --output-root and keep the marks there."
        with needing_room(path, remedy), file_lock(path.with_name(f".{MARKS_NAME}.lock")):
            known = _lines(path)
            entries = Marks.load(self.root).entries
            before = entries[key].said if key in entries else {}
            said = _mark({k: v for k, v in (before | changes).items() if v not in (None, "")}, key, path).said
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else [HEAD]
            if lines and not lines[-1].endswith("\n"):
                lines[-1] += "\n"
            later = min((begin for other, (_, begin, _) in known.items() if other > key), default=len(lines))
            begin, end = known[key][1:] if key in known else (later, later)
            values = yaml.safe_dump(said, default_flow_style=True, allow_unicode=True, width=1e9, sort_keys=False)
            name = yaml.safe_dump(key, allow_unicode=True, width=1e9).removesuffix("...\n").strip()
            lines[begin:end] = [f"{name}: {values.strip()}\n"] if said else []
            write_text(path, "".join(lines))
        return Marks.load(self.root)


def _lines(path: Path) -> dict[str, tuple[yaml.Node, int, int]]:
    """Key -> its values, and the lines [begin, end) on which it stands."""
    if not path.is_file():
        return {}
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({said}); correct it, marks are not ignored.") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path} must map episodes to marks, such as `part1: {{exclude: true}}`; correct it.")
    found: dict[str, tuple[yaml.Node, int, int]] = {}
    for key, value in node.value:
        name = str(key.value).strip("/")
        if name in found:
            raise UserError(f"{path} marks {name} twice (line {key.start_mark.line + 1}); make one line of both.")
        last = value.end_mark
        found[name] = value, key.start_mark.line, last.line + (last.column > 0)
    return found


def _mark(values: Any, key: str, path: Path) -> Mark:
    try:
        mark = Mark.model_validate(values or {}, strict=False)
    except ValidationError as error:
        odd = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()[:3])
        known = ", ".join(Mark.model_fields)
        raise UserError(f"{path}: the mark of {key} is refused ({odd}); it has {known}.") from None
    if mark.trim[0] >= mark.trim[1]:
        raise UserError(f"{path}: {key} starts at {mark.start_s:g} s and ends at {mark.end_s:g} s; nothing is left.")
    return mark
