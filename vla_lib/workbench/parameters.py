"""A notebook's parameters: an .ipynb file in; names, types and defaults out, and values checked against them before a kernel starts."""

import ast
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.core.run_folder import PROJECT

TYPES = {"int": int, "float": float, "bool": bool, "str": str, "list[str]": list[str]}


@dataclass(frozen=True)
class Parameter:
    """One line `name: type = literal` of the cell tagged `parameters`."""

    name: str
    type: Any
    default: Any

    def check(self, value: Any) -> Any:
        """The value as this parameter's type. Raises UserError where it is of another one (an int serves as a float, nothing else
        converts), or no finite number."""
        fits = {
            int: isinstance(value, int) and not isinstance(value, bool),
            float: isinstance(value, int | float) and not isinstance(value, bool),
            bool: isinstance(value, bool),
            str: isinstance(value, str),
        }.get(self.type, isinstance(value, list) and all(isinstance(item, str) for item in value))
        if not fits:
            remedy = "; write True or False" if self.type is bool else ""
            raise UserError(
                f"parameter {self.name} wants {_name(self.type)}, got {value!r} ({type(value).__name__}){remedy}"
            )
        if self.type is float and not math.isfinite(value):
            raise UserError(f"parameter {self.name} wants a finite number, got {value!r}")
        return float(value) if self.type is float else value

    def parse(self, text: str) -> Any:
        """A command-line word as a value of this type: text stays text, everything else is JSON (True and False count as well)."""
        if self.type is str:
            return text
        if self.type is bool and text in ("True", "False"):
            return text == "True"
        try:
            value = json.loads(text)
        except ValueError:
            value = [part for part in text.split(",") if part] if isinstance(self.type, types.GenericAlias) else text
        return self.check(value)


def notebook_path(name: str | Path) -> Path:
    """A notebook by path (from here, or from the project) or by bare name ("04_train_async"). Raises UserError where there is none."""
    path = Path(name)
    bare = (
        [PROJECT / "notebooks" / path.name, PROJECT / "notebooks" / f"{path.name}.ipynb"]
        if path.parent == Path()
        else []
    )
    for candidate in (path, PROJECT / path, *bare):
        if candidate.suffix == ".ipynb" and candidate.is_file():
            return candidate.resolve()
    have = ", ".join(sorted(found.stem for found in (PROJECT / "notebooks").glob("*.ipynb")))
    raise UserError(f"There is no notebook {name}; there are {have}.")


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, read from its source without running it.

    Raises UserError where the file is no notebook, or its parameters cell holds anything but `name: type = literal` lines.
    """
    notebook = read_json(path)
    cells = [cell for cell in notebook.get("cells", []) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise UserError(f"{path.name} has {len(cells)} cells tagged 'parameters'; it needs exactly one.")
    found = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        try:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                raise ValueError
            kind = TYPES[ast.unparse(node.annotation)]
            parameter = Parameter(node.target.id, kind, ast.literal_eval(node.value))
            parameter.check(parameter.default)
        except (ValueError, KeyError, TypeError, UserError):
            raise UserError(
                f"{path.name}: '{ast.unparse(node)}' in the parameters cell is not `name: type = literal` with a type of {', '.join(TYPES)}."
            ) from None
        found[parameter.name] = parameter
    return found


def resolve(path: Path, given: dict[str, Any], text: bool = False) -> dict[str, Any]:
    """All parameters of a notebook with the given values over the defaults; `text`: the values are command-line words.

    Raises UserError for an unknown name or a wrong type.
    """
    parameters = read_parameters(path)
    values = {name: parameter.default for name, parameter in parameters.items()}
    for name, value in given.items():
        refuse_unknown(path, [name], parameters)
        try:
            values[name] = parameters[name].parse(value) if text else parameters[name].check(value)
        except UserError as error:
            raise UserError(f"{path.stem}: {error}.") from None
    return values


def refuse_unknown(path: Path, names: Iterable[str], parameters: dict[str, Parameter]) -> None:
    """Raises UserError for the first name that is no parameter of the notebook."""
    for name in names:
        if name not in parameters:
            raise UserError(f"{path.stem} has no parameter {name}; it has {', '.join(parameters)}.")


def injected_names(sources: Iterable[str]) -> list[str]:
    """The names that papermill set, from the cells that ran: its cell begins with `# Parameters`. Empty without papermill."""
    cells = [source for source in sources if source.startswith("# Parameters\n")]
    found = [node for cell in cells[-1:] for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
    return [target.id for node in found for target in node.targets if isinstance(target, ast.Name)]


def _name(kind: Any) -> str:
    return kind.__name__ if not typing.get_args(kind) else str(kind)
