"""The table of datasets: name and task in, sampling weight and instruction out; a YAML file at the root overrides it.

`<dataset root>/datasets.yaml` maps a dataset's name (or `name/task`; `*` is a wildcard) to what shall differ:

    White_silicone_white_circle: {weight: 2, instruction: "Insert into the white square silicone"}
    New_dataset*: {weight: 3, instruction: "Perform {task} insertion task"}

The first entry of the file that matches and names the field wins, then the built-in table, then weight 1.
Weight w means: each step of the dataset is drawn w times as often as a step of weight 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from vla_lib.core.errors import UserError

TABLE_NAME = "datasets.yaml"
DEFAULT_WEIGHT = 1.0
DEFAULT_INSTRUCTION = "Perform the insertion task"
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
    "OCT_insertion": {"weight": 1.0, "instruction": DEFAULT_INSTRUCTION},
    "part1": {"weight": 1.0, "instruction": DEFAULT_INSTRUCTION},
}


@dataclass(frozen=True)
class DatasetTable:
    """Weights and instructions of all datasets below one root."""

    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The user's own entries, in the order of the file."""

    @classmethod
    def load(cls, root: str | Path) -> "DatasetTable":
        """The table that holds below `root`. Raises UserError where datasets.yaml cannot be understood."""
        path = Path(root) / TABLE_NAME
        if not path.is_file():
            return cls()
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct or remove it."
            ) from error
        return cls(_checked(content or {}, path))

    def weight(self, dataset: str, task: str = "") -> float:
        """How often a step of the dataset is drawn, relative to weight 1."""
        return float(self._look_up("weight", dataset, task, DEFAULT_WEIGHT))

    def instruction(self, dataset: str, task: str = "") -> str:
        """The sentence that the policy is given; `{task}` stands for the task folder's words."""
        text = str(self._look_up("instruction", dataset, task, DEFAULT_INSTRUCTION))
        if "{task}" in text and not task:
            return DEFAULT_INSTRUCTION
        return text.replace("{task}", " ".join(task.replace("_", " ").split()))

    def _look_up(self, name: str, dataset: str, task: str, default: Any) -> Any:
        for entries in (self.entries, BUILT_IN):
            for pattern, values in entries.items():
                if name in values and (fnmatchcase(dataset, pattern) or fnmatchcase(f"{dataset}/{task}", pattern)):
                    return values[name]
        return default


def _checked(content: Any, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must map dataset names to {{weight, instruction}}, but it holds a {type(content).__name__}."
        )
    for name, values in content.items():
        if not isinstance(values, dict) or not set(values) <= {"weight", "instruction"}:
            raise UserError(
                f"{path}: the entry {name!r} must be a mapping with the keys weight and instruction, nothing else."
            )
        weight = values.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"{path}: the weight of {name!r} must be a positive number, but it is {weight!r}.")
        if not isinstance(values.get("instruction", ""), str):
            raise UserError(f"{path}: the instruction of {name!r} must be a text, but it is {values['instruction']!r}.")
    return {str(name): dict(values) for name, values in content.items()}
