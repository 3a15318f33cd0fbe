"""What people decide: of datasets in `<dataset root>/datasets.yaml`, of episodes in `<dataset root>/marks.yaml`.

datasets.yaml maps a dataset's name (or `name/task`; `*` is a wildcard) to what shall differ from the built-in table:

    White_silicone_white_circle: {weight: 2, instruction: "Insert into the white square silicone"}
    New_dataset*: {weight: 3, instruction: "Perform {task} insertion task"}

The first entry of the file that matches (in any case) and names the field wins, then those of a datasets.yaml inside a
dataset's folder (an imported dataset brings one), then the built-in table, then weight 1.
A dataset is known by its own folder's name at whatever depth below the root: a folder that no entry names is said.
Weight w means: each step of the dataset is drawn w times as often as a step of weight 1; 0 leaves it out.

marks.yaml has one line an episode or a folder of episodes:

    White_silicone_white_circle/recv_all_20250904_101500: {exclude: true, note: the camera was moved}
    New_dataset/Needle/episode_20250911_090000: {start_s: 0.5, end_s: 12, label: success}
    part1: {exclude: true}

A key is a path below the root. What a folder's line says holds for all episodes below it, unless a longer path says
otherwise. An episode that is excluded, or of a dataset of weight 0, is neither prepared nor cached, trained on nor
evaluated. Its files stay. With --output-root both files lie there. Lines are sorted, and others stay as they are when
one is written, so that two people's marks merge.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge
from pydantic import BaseModel, TypeAdapter, ValidationError

from vla_lib.core.errors import UserError, needing_room
from vla_lib.core.files import file_lock, write_text

TABLE_NAME = "datasets.yaml"
MARKS_NAME = "marks.yaml"
HEAD = "# Decisions about episodes: exclude, start_s and end_s (trim), label, task, note\n"
Seconds = Annotated[float, Ge(0), "since the first robot row"]
DEFAULT = {"weight": 1.0, "instruction": "Perform the insertion task"}
BUILT_IN: dict[str, dict[str, Any]] = {
    "New_dataset*": {"weight": 3.0, "instruction": "Perform {task} insertion task"},
    "White_silicone_white_circle": {
        "weight": 2.0,
        "instruction": "Insert into the white square silicone with a white circle sticker attached",
    },
    "Needle_insertion_eye_trocar": {
        "weight": 2.0,
        "instruction": "Insert the needle through the trocar into the eye phantom model",
    },
    "OCT_insertion": DEFAULT,
    "part1": DEFAULT,
    "*": DEFAULT,
}


class Entry(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """What the file says of one dataset; what is not said is not set."""

    weight: Annotated[float, Ge(0)] = 1.0
    instruction: str = ""


ENTRIES = TypeAdapter(dict[Any, Entry])


@dataclass(frozen=True)
class DatasetTable:
    """Weights and instructions of all datasets below one root."""

    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The user's own entries, in the order of the file."""
    vl_model: str = ""
    """The VL model that the root's features are made with, where it is named: a line `vl_model: NAME` of the file."""

    @classmethod
    def load(cls, root: str | Path) -> "DatasetTable":
        """The table that holds below `root`. Raises UserError where datasets.yaml cannot be understood."""
        entries: dict[str, dict[str, Any]] = {}
        model = ""
        for path in (Path(root) / TABLE_NAME, *sorted(Path(root).glob(f"*/{TABLE_NAME}"))):
            if not path.is_file():
                continue
            content = _parsed(path, yaml.safe_load) or {}
            named = content.pop("vl_model", "") if isinstance(content, dict) else ""
            if not isinstance(named, str):
                raise UserError(f"{path}: vl_model must be a hub name or a folder, but it is {named!r}.")
            model = model or named
            try:
                checked = ENTRIES.validate_python(content)
            except ValidationError as error:
                known = "dataset names to {weight: a number of 0 or more, instruction: a text}"
                raise UserError(f"{path} is refused ({_odd(error)}); it must map {known}.") from None
            for name, one in checked.items():
                entries.setdefault(str(name), one.model_dump(exclude_unset=True))
        return cls(entries, model)

    def weight(self, dataset: str, task: str = "") -> float:
        """How often a step of the dataset is drawn, relative to weight 1."""
        return float(self._look_up("weight", dataset, task))

    def instruction(self, dataset: str, task: str = "") -> str:
        """The sentence that the policy is given; `{task}` stands for the task folder's words."""
        text = str(self._look_up("instruction", dataset, task))
        if "{task}" in text and not task:
            return str(DEFAULT["instruction"])
        return text.replace("{task}", " ".join(task.replace("_", " ").split()))

    def knows(self, folder: str) -> bool:
        """Whether an entry, other than one for all, names a dataset folder of this name."""
        patterns = (pattern.split("/")[0] for pattern in (*self.entries, *BUILT_IN))
        return any(_matches(folder, pattern) for pattern in patterns if pattern.strip("*"))

    def place_of(self, path: Path, root: Path) -> tuple[str, str]:
        """(dataset, task) of an episode at `path` below `root`.

        The dataset is the outermost folder that the table knows: below the root, else the root, else the one around it.
        Where none is known it is the first folder below the root. The task is what lies between dataset and episode.
        """
        inner = path.relative_to(root).parts[:-1] if root in path.parents else ()
        for number, name in enumerate(inner):
            if self.knows(name):
                return name, "/".join(inner[number + 1 :])
        above = root.resolve().parts[-2:] if root in path.parents else path.resolve().parts[-3:-1]
        for number, name in reversed(list(enumerate(above))):
            if self.knows(name):
                return name, "/".join((*above[number + 1 :], *inner))
        if not inner:  # the root is the dataset itself, or the episode
            return above[-1], ""
        return inner[0], "/".join(inner[1:])

    def unknown(self, places: Iterable[tuple[str, str]]) -> list[str]:
        """One sentence a dataset of the (dataset, task) pairs that no entry matches, with what it gets."""
        names = sorted({dataset for dataset, _ in places if not ("*" in self.entries or self.knows(dataset))})
        gets = f"weight {DEFAULT['weight']:g} and the instruction '{DEFAULT['instruction']}'"
        return [
            f"Dataset {name} is in no table: it gets {gets}; {TABLE_NAME} at the root changes it." for name in names
        ]

    def _look_up(self, name: str, dataset: str, task: str) -> Any:
        entries = (*self.entries.items(), *BUILT_IN.items())
        known = ((pattern, values[name]) for pattern, values in entries if name in values)
        return next(v for p, v in known if _matches(dataset, p) or _matches(f"{dataset}/{task}", p))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.casefold(), pattern.casefold())


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
        values = {key: yaml.SafeLoader("").construct_document(node) for key, (node, _, _) in _lines(path).items()}
        marks = {key: _mark(value, key, path) for key, value in values.items()}
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
        dataset, task = place or self.table.place_of(self.root / key, self.root)
        return "" if self.table.weight(dataset, mark.task or task) else f"weight 0 in {TABLE_NAME}"

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
    node = _parsed(path, partial(yaml.compose, Loader=yaml.SafeLoader))
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
        known = ", ".join(Mark.model_fields)
        raise UserError(f"{path}: the mark of {key} is refused ({_odd(error)}); it has {known}.") from None
    if mark.trim[0] >= mark.trim[1]:
        raise UserError(f"{path}: {key} starts at {mark.start_s:g} s and ends at {mark.end_s:g} s; nothing is left.")
    return mark


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({said}); correct it, since it is not ignored.") from error


def _odd(error: ValidationError) -> str:
    """What is refused, in words: the first three of it."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()[:3])
