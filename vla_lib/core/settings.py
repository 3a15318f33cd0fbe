"""The settings of a stage: flags, notebook parameters and run.json's record at once, checked where they are made.

    @settings
    class LearningSettings(Settings):
        lr: Annotated[float, Gt(0)] = 1e-4  # peak learning rate

A stage's record inherits from its groups (data, policy, learning, running), so that each flag is one line: its name,
its type with the range, its default, and what `--help` says of it.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import PROJECT

ROOT_VARIABLE = "VLA_DATASET_ROOT"
C = TypeVar("C")


def flag(name: str) -> str:
    """How a setting is written on the command line."""
    return f"--{name.replace('_', '-')}"


@dataclass_transform(frozen_default=True, kw_only_default=False)
def settings(cls: type[C]) -> type[C]:
    """Make a class of annotated fields a frozen dataclass whose values (types, ranges) are checked when it is made."""
    made = dataclass(cls, frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
    return cast(type[C], made)


@settings
class Settings:
    """Base of all settings. A value that is refused raises UserError, one sentence that names the flag."""

    written: ClassVar[Callable[[str], str]] = staticmethod(flag)
    """How a setting is written where it is given: here, on the command line."""
    unnamed: ClassVar[str] = ""
    """Names of settings that notebooks leave at their defaults; every other one stands in the parameters cell."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_a_sentence(cls, values: Any, make: Any) -> Any:
        try:
            return make(values)
        except ValidationError as error:
            raise UserError("; ".join(_sentence(one, cls.written) for one in error.errors()) + ".") from None

    @classmethod
    def of(cls, parameters: Mapping[str, Any], **more: Any) -> Self:
        """Settings from a notebook's parameters and `more`; those that are the notebook's own are left out.

        A notebook writes a path that is not given as "", and means a relative one from the project's folder, wherever
        it runs. `auto` stands for the setting's default.
        """
        kinds, names = get_type_hints(cls), {field.name for field in fields(cls)}
        given = {name: value for name, value in parameters.items() if name in names and value != "auto"} | more
        for name, value in given.items():
            if isinstance(value, str | Path) and Path in (kinds.get(name), *get_args(kinds.get(name))):
                given[name] = PROJECT / Path(value).expanduser() if str(value) else None
        return cls(**given)

    def record(self) -> dict[str, Any]:
        """Every value by its name, as JSON takes it: paths as text, tuples as lists."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")


def named_root() -> Path | None:
    """The dataset root for commands that are given none, from the environment; None where it names none."""
    return Path(found).expanduser() if (found := os.environ.get(ROOT_VARIABLE)) else None


def _sentence(error: Any, written: Callable[[str], str]) -> str:
    name = written(str(error["loc"][0])) if error["loc"] else "The settings"
    if error["type"] == "missing" or (error["type"] == "path_type" and error["input"] is None):  # "" in a notebook
        return f"{name} is missing; give it"
    if error["type"] == "unexpected_keyword_argument":
        return f"{name} is no setting; leave it out"
    return f"{name} is {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}".replace("; input", "; it")
