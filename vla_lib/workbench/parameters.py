"""A notebook's parameters, read from its source: names, types, defaults and what each one is, and values checked before
a kernel starts.

A parameter is one line `name: type = literal  # what it is` of the cell tagged `parameters`. The cell is parsed, not
matched as papermill does it: a line of another form must be refused, not overlooked.
"""

import ast
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.core.run_folder import PROJECT

TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "list[str]": list[str]}


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, the name of its type (a key of TYPES), its default, and the comment that explains it."""

    name: str
    kind: str
    default: Any
    comment: str = ""

    def check(self, value: Any) -> Any:
        """The value as this parameter's type. Raises UserError where it is of another one (an int serves as a float,
        nothing else converts), or no finite number."""
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"parameter {self.name} wants a finite number, got {value!r}")
        try:
            return TypeAdapter(TYPES[self.kind]).validate_python(value, strict=True)
        except ValidationError:
            remedy = "; write True or False" if self.kind == "bool" else ""
            given = f"{value!r} ({type(value).__name__})"
            raise UserError(f"parameter {self.name} wants {self.kind}, got {given}{remedy}") from None

    def parse(self, text: str) -> Any:
        """A command-line word as a value of this type: text stays text, everything else is JSON (True and False count
        as well)."""
        if self.kind == "str":
            return text
        if self.kind == "bool" and text in ("True", "False"):
            return text == "True"
        try:
            return self.check(TypeAdapter(Any).validate_json(text))
        except ValidationError:
            words = [part for part in text.split(",") if part]
            return self.check(words if self.kind == "list[str]" else text)


def notebook_path(name: str | Path) -> Path:
    """A notebook by path (from here, or from the project) or by bare name ("04_train_async"). Raises UserError where
    there is none."""
    path, folder = Path(name), PROJECT / "notebooks"
    bare = [folder / path.name, folder / f"{path.name}.ipynb"] if path.parent == Path() else []
    for candidate in (path, PROJECT / path, *bare):
        if candidate.suffix == ".ipynb" and candidate.is_file():
            return candidate.resolve()
    have = ", ".join(sorted(found.stem for found in folder.glob("*.ipynb")))
    raise UserError(f"There is no notebook {name}; there are {have}.")


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, read from its source without running it.

    Raises UserError where the file is no notebook, or its parameters cell holds anything but `name: type = literal`
    lines.
    """
    cells = [cell for cell in read_json(path).get("cells", []) if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise UserError(f"{path.name} has {len(cells)} cells tagged 'parameters'; it needs exactly one.")
    return parse_cell("".join(cells[0]["source"]), path.name)


def parse_cell(source: str, where: str) -> dict[str, Parameter]:
    """The parameters that a parameters cell gives. Raises UserError, naming `where`, for any other line."""
    found = {}
    for node in ast.parse(source).body:
        try:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
                raise ValueError
            last_line = source.splitlines()[(node.end_lineno or 1) - 1].encode()  # offsets count bytes
            comment = last_line[node.end_col_offset :].decode().partition("#")[2].strip()
            kind, default = ast.unparse(node.annotation), ast.literal_eval(node.value)
            parameter = found[node.target.id] = Parameter(node.target.id, kind, default, comment)
            parameter.check(default)
        except (ValueError, KeyError, TypeError, UserError):
            wanted = f"is not `name: type = literal` with a type of {', '.join(TYPES)}"
            raise UserError(f"{where}: '{ast.unparse(node)}' in the parameters cell {wanted}.") from None
    return found


def run_last(sources: Sequence[str], file: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The parameters of the cell that a kernel ran last as a parameters cell, saved or not; those of the
    `file` where it ran none.

    sources: what it ran, as IPython's `In` holds it.
    """
    for source in reversed(sources):
        try:
            found = parse_cell(source, "")
            if found and (not file or file.keys() & found.keys()):
                return found
        except (UserError, SyntaxError):  # another cell
            continue
    return dict(file)


def names(path: Path) -> tuple[set[str], set[str]]:
    """The names that a notebook's code cells make and those that they use."""
    made: set[str] = set()
    used: set[str] = set()
    for cell in read_json(path).get("cells", []):
        source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
        for node in ast.walk(ast.parse("".join(line for line in source.splitlines(True) if line[:1] not in "%!"))):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
            elif isinstance(node, ast.alias):
                made.add((node.asname or node.name).partition(".")[0])
    return made, used


def describe(path: Path) -> str:
    """The parameters of a notebook as `--help` shows them: one a line, with its type, default and comment."""
    parameters = read_parameters(path).values()
    wide = max((len(one.name) for one in parameters), default=0)
    lines = [f"  {one.name:<{wide}}  {one.comment} ({one.kind}, default: {one.default!r})" for one in parameters]
    return "\n".join([f"parameters of {path.stem}, each given with -p NAME VALUE:", *lines])


def resolve(
    path: Path, given: Mapping[str, Any], text: bool = False, known: Mapping[str, Parameter] | None = None
) -> dict[str, Any]:
    """All parameters of a notebook with the given values over the defaults; `text`: the values are command-line words;
    `known`: the parameters, where they are not to be read from the file.

    Raises UserError for an unknown name or a wrong type.
    """
    parameters = read_parameters(path) if known is None else known
    refuse_unknown(path, given, parameters)
    values = {name: parameter.default for name, parameter in parameters.items()}
    for name, value in given.items():
        try:
            values[name] = parameters[name].parse(value) if text else parameters[name].check(value)
        except UserError as error:
            raise UserError(f"{path.stem}: {error}.") from None
    return values


def refuse_unknown(path: Path, names: Iterable[str], parameters: Mapping[str, Parameter]) -> None:
    """Raises UserError for the first name that is no parameter of the notebook."""
    for name in names:
        if name not in parameters:
            raise UserError(f"{path.stem} has no parameter {name}; it has {', '.join(parameters)}.")


def injected_names(sources: Iterable[str]) -> list[str]:
    """The names that papermill set, from the cells that ran: its cell begins with `# Parameters`. Empty without
    papermill."""
    cells = [source for source in sources if source.startswith("# Parameters\n")]
    found = [node for cell in cells[-1:] for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
    return [target.id for node in found for target in node.targets if isinstance(target, ast.Name)]
