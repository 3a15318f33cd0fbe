"""The table of datasets: the sampling weight and the instruction of each; a YAML file at the root overrides it.

`<dataset root>/datasets.yaml` maps a dataset's name (or `name/task`; `*` is a wildcard) to what shall differ:

    White_silicone_white_circle: {weight: 2, instruction: "Insert into the white square silicone"}
    New_dataset*: {weight: 3, instruction: "Perform {task} insertion task"}

The first entry of the file that matches (in any case) and names the field wins, then those of a datasets.yaml inside a
dataset's folder (an imported dataset brings one), then the built-in table, then weight 1.
A dataset is known by its own folder's name at whatever depth below the root: a folder that no entry names is said.
Weight w means: each step of the dataset is drawn w times as often as a step of weight 1; 0 leaves it out (`marks`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from vla_lib.core.errors import UserError

TABLE_NAME = "datasets.yaml"
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
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                said = " ".join(str(error).split())
                raise UserError(f"{path} cannot be read as YAML ({said}); correct or remove it.") from error
            named = content.pop("vl_model", "") if isinstance(content, dict) else ""
            if not isinstance(named, str):
                raise UserError(f"{path}: vl_model must be a hub name or a folder, but it is {named!r}.")
            model = model or named
            entries |= {name: one for name, one in _checked(content or {}, path).items() if name not in entries}
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


def _checked(content: Any, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} must map dataset names to {{weight, instruction}}, but it holds a {kind}.")
    for name, values in content.items():
        if not isinstance(values, dict) or not set(values) <= {"weight", "instruction"}:
            keys = "with the keys weight and instruction, nothing else"
            raise UserError(f"{path}: the entry {name!r} must be a mapping {keys}.")
        weight = values.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"{path}: the weight of {name!r} must be a number of 0 or more, but it is {weight!r}.")
        if not isinstance(values.get("instruction", ""), str):
            raise UserError(f"{path}: the instruction of {name!r} must be a text, but it is {values['instruction']!r}.")
    return {str(name): dict(values) for name, values in content.items()}
