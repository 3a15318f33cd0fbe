"""The settings of a stage: flags, notebook parameters and run.json's record at once, checked where they are made.

    @settings
    class Learning(Settings):
        lr: Annotated[float, Gt(0)] = 1e-4
        \"\"\"Learning rate.\"\"\"

A stage's record inherits from its groups (data, policy, learning, running), so that each flag is told in one line.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from vla_lib.core.errors import UserError

C = TypeVar("C")


@dataclass_transform(frozen_default=True, kw_only_default=False)
def settings(cls: type[C]) -> type[C]:
    """Make a class of annotated fields a frozen dataclass whose values are checked (types and ranges) when it is made."""
    return dataclass(cls, frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))


@settings
class Settings:
    """Base of all settings. A value that is refused raises UserError, one sentence that names the flag."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_a_sentence(cls, values: Any, make: Any) -> Any:
        try:
            return make(values)
        except ValidationError as error:
            raise UserError("; ".join(_sentence(one) for one in error.errors()) + ".") from None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Settings from a notebook's parameters or a record: names that the settings do not know raise UserError."""
        return cls(**values)

    def record(self) -> dict[str, Any]:
        """Every value by its name, as JSON takes it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def flag(name: str) -> str:
    """How a setting is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _sentence(error: Any) -> str:
    name = flag(str(error["loc"][0])) if error["loc"] else "The settings"
    return f"{name} {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
