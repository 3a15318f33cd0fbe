"""What a sweep or a night asks for: named entries, each one `vla run`, and the space that Optuna draws from.

    vla sweep 04_train_async --grid lr=1e-4,5e-5 --search weight_decay=1e-4..1e-1:log --trials 20 --seeds 3
    vla night jobs.yaml          # - {name: wide, notebook: 04_train_async, parameters: {width: 256}}

A setting is one choice of parameters; its entries differ in their seed alone, because one training says little.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import MinLen
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, TypeAdapter, ValidationError

from vla_lib.core.errors import UserError
from vla_lib.workbench import runs
from vla_lib.workbench.parameters import notebook_path, read_parameters, refuse_unknown, resolve

OBJECTIVE = "val_action_loss"


@dataclass(frozen=True)
class Entry:
    """One run: a name, a notebook, its parameters as command-line words, and the setting that it repeats."""

    name: str
    notebook: str
    parameters: dict[str, str] = field(default_factory=dict)
    setting: str = ""


@dataclass(frozen=True)
class Plan:
    """All entries of a sweep or night (`kind`). space: what varies, of which Optuna draws the `searched` names;
    objective: the result that is made small, or large with `maximize`; prune: poor runs end early."""

    kind: str
    entries: list[Entry]
    space: dict[str, BaseDistribution] = field(default_factory=dict)
    searched: tuple[str, ...] = ()
    objective: str = OBJECTIVE
    maximize: bool = False
    prune: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """What run.json holds; `digest` is the same for the same command."""
        varied = {name: str(one) for name, one in self.space.items()}
        asked = {"objective": self.objective, "maximize": self.maximize, "prune": self.prune, "varied": varied}
        known = [asdict(entry) for entry in self.entries]
        notebooks = sorted({entry.notebook for entry in self.entries})
        return {"digest": runs.digest([known, asked]), "entries": len(known), "notebooks": notebooks, **asked}

    def check(self) -> int:
        """The most processes of an entry's torchrun. Raises UserError for an unknown notebook, parameter or value."""
        processes = 1
        ends: list[dict[str, str]] = [{}, {}]
        for name in self.searched:
            both = zip(ends, _ends(self.space[name]), strict=True)
            ends = [end | {name: word(value)} for end, value in both]
        for entry, end in itertools.product(self.entries, ends[: 2 if self.searched else 1]):
            try:
                values = resolve(notebook_path(entry.notebook), entry.parameters | end, text=True)
            except UserError as error:
                raise UserError(f"{self.kind}, {entry.name}: {error}") from None
            processes = max(processes, values.get("nproc_per_node", 1))
        return processes


def plan_sweep(
    notebook: str,
    grid: Sequence[str],
    fixed: dict[str, str],
    search: Sequence[str] = (),
    trials: int = 0,
    seeds: int = 1,
    **how: Any,
) -> Plan:
    """Every combination of `name=value,value` axes over the `fixed` parameters, each `seeds` times; with `search`,
    `trials` settings whose searched parameters Optuna draws, dealt over the grid. Raises UserError for anything else.
    """
    space: dict[str, BaseDistribution] = {}
    axes: dict[str, list[str]] = {}
    for axis in grid:
        name, words = _named(axis, "--grid", "NAME=VALUE,VALUE...", {**fixed, **space})
        axes[name] = _choices(words, f"--grid {axis}", name)
        space[name] = CategoricalDistribution(axes[name])
    for axis in search:
        name, words = _named(axis, "--search", "NAME=LOW..HIGH, with :log, or NAME=VALUE,VALUE...", {**fixed, **space})
        space[name] = _range(notebook, axis, name, words)
    if bool(search) != bool(trials):
        raise UserError("--search and --trials go together: say what is searched, and how many settings are tried.")
    if not space and seeds == 1:
        raise UserError("Nothing varies; give --grid, --search with --trials, or --seeds.")
    chosen = [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*axes.values())]
    if search and trials < len(chosen):
        raise UserError(f"--trials is {trials}, but the grid has {len(chosen)} points; give at least one trial each.")
    settings = [(" ".join(f"{key}={value}" for key, value in one.items()), one) for one in chosen]
    if search:
        dealt = [settings[number % len(settings)] for number in range(trials)]
        settings = [(f"{number:03d} {name}".strip(), one) for number, (name, one) in enumerate(dealt, 1)]
    entries = []
    for (name, one), seed in itertools.product(settings, _seeds(notebook, seeds, fixed)):
        title = " ".join([name, *(f"seed={value}" for value in seed.values())]).strip()
        entries.append(Entry(title, notebook, fixed | one | seed, name))
    return Plan("sweep", entries, space, tuple(name for name in space if name not in axes), **how)


def _ends(one: BaseDistribution) -> tuple[Any, Any]:
    if isinstance(one, CategoricalDistribution):
        return one.choices[0], one.choices[-1]
    assert isinstance(one, IntDistribution | FloatDistribution)
    return one.low, one.high


def _named(axis: str, flag: str, wanted: str, taken: dict[str, Any]) -> tuple[str, str]:
    name, _, words = axis.partition("=")
    if not name or not all(words.split(",")):
        raise UserError(f"{flag} wants {wanted}, not {axis!r}.")
    if name in taken:
        raise UserError(f"Parameter {name} is given twice; give it once.")
    return name, words


def _choices(words: str, where: str, name: str) -> list[str]:
    values = words.split(",")
    if len(set(values)) < len(values):
        raise UserError(f"{where}: a value of {name} is given twice; give each once.")
    return values


def _range(notebook: str, axis: str, name: str, words: str) -> BaseDistribution:
    """The distribution of a searched parameter, by its type in the notebook."""
    path = notebook_path(notebook)
    known = read_parameters(path)
    refuse_unknown(path, [name], known)
    found = re.fullmatch(r"(.+)\.\.(.+?)(:log)?", words)
    if not found:
        return CategoricalDistribution(_choices(words, f"--search {axis}", name))
    kinds: dict[str, Any] = {"int": (int, IntDistribution), "float": (float, FloatDistribution)}
    try:
        number, distribution = kinds[known[name].kind]
        return distribution(number(found[1]), number(found[2]), log=bool(found[3]))
    except (KeyError, ValueError) as error:
        why = f"{name} is {known[name].kind}, no number" if isinstance(error, KeyError) else str(error)
        raise UserError(f"--search {axis} is no range from low to high: {why}") from None


def _seeds(notebook: str, seeds: int, fixed: dict[str, str]) -> list[dict[str, str]]:
    """The seeds of a setting's repetitions: the given or default one, and the next ones."""
    if seeds == 1:
        return [{}]
    path = notebook_path(notebook)
    known = read_parameters(path)
    if seeds < 1 or "seed" not in known:
        raise UserError(f"--seeds {seeds}: give 1 or more, and a notebook with a parameter seed ({path.stem}).")
    first = resolve(path, {key: fixed[key] for key in fixed if key == "seed"}, text=True)["seed"]
    return [{"seed": str(first + number)} for number in range(seeds)]


class Listed(BaseModel, extra="forbid"):
    """An entry of a night's list, as its file has it."""

    notebook: str
    name: str = ""
    parameters: dict[str, str | list[str]] = {}


def read_list(path: Path) -> list[Entry]:
    """The entries of a YAML list of `{name, notebook, parameters}`; values mean what the same words mean on a command
    line. Raises UserError naming the file and the entry for anything else."""
    try:  # the base loader leaves text as it is: neither dates nor `no` for False
        listed = yaml.load(Path(path).read_text(), Loader=yaml.BaseLoader)
        rows = TypeAdapter(Annotated[list[Listed], MinLen(1)]).validate_python(listed)
    except ValidationError as error:
        (first, *_), example = error.errors(), "`- {name: wide, notebook: 04_train_async, parameters: {lr: 1e-4}}`"
        number, *place = (*first["loc"], "")
        where = f", entry {int(number) + 1}: {' '.join(map(str, place))}".rstrip(": ") if place else ""
        raise UserError(f"{path}{where}: {first['msg']}; the file holds a list of runs: {example}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    found: list[Entry] = []
    for number, row in enumerate(rows, 1):
        name = row.name or f"{number} {row.notebook}"
        if name in [entry.name for entry in found]:
            raise UserError(f"{path}: two entries are named {name!r}; name each once.")
        words = {key: one if isinstance(one, str) else json.dumps(one) for key, one in row.parameters.items()}
        found.append(Entry(name, row.notebook, words, name))
    return found


def word(value: Any) -> str:
    """A drawn value as a command-line word."""
    return value if isinstance(value, str) else repr(value)
