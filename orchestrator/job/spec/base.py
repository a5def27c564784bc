"""What all sections of the job spec are built from: the class ``Section`` and types of values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Self, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
# MLflow's own rule, which is narrower than that for a model's name.
ALIAS_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"
RESERVED_ALIAS = re.compile(r"^(latest|v\d+)$", re.IGNORECASE)
BUILTIN = "builtin:"
"""Prefix of the names of models and data sets that are generated on the spot."""
QUICKSTART = f"{BUILTIN}quickstart"
# Far above the rates that prompts train with, far below the limits of torch's arithmetic.
MAX_LEARNING_RATE = 1000
MAX_SEED = 2**32 - 1  # the widest range that all random generators in use accept


def looks_like_path(text: str) -> bool:
    """Tell whether a name is meant as a path: hub ids are ``name`` or ``owner/name``."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("is not a range; write the smaller bound first")
    return bounds


AUTO = "auto"
T = TypeVar("T")
BEGUN = {"begun": "by an earlier release"}
"""Validation context for the job of a search that has already begun. Conflicts are ignored, because
this release may check for conflicts that the release that began the search did not know."""


def _without_repeats(values: list[T]) -> list[T]:
    seen: set[T] = set()
    for value in values:
        if value in seen:
            printable = value.model_dump() if isinstance(value, BaseModel) else value
            raise ValueError(f"lists {printable} twice; list each value once")
        seen.add(value)
    return values


Text: TypeAlias = Annotated[str, Field(min_length=1)]
Name: TypeAlias = Annotated[str, Field(pattern=NAME_PATTERN)]
Alias: TypeAlias = Annotated[str, Field(pattern=ALIAS_PATTERN)]
PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0)]
LearningRate: TypeAlias = Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=MAX_SEED)]
Fraction: TypeAlias = Annotated[float, Field(gt=0, lt=0.5)]
Bounds: TypeAlias = Annotated[
    tuple[LearningRate, LearningRate], Field(strict=False), AfterValidator(_ordered)
]
Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Choices: TypeAlias = Annotated[
    list[T],
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_without_repeats),
]
Label: TypeAlias = int | float | bool | str
Auto: TypeAlias = Literal["auto"]


class Conflict(NamedTuple):
    """Values that are each allowed but do not fit together.

    Keys are dotted and relative to the section that reports the conflict.
    """

    where: str  # the key that the user should change first
    message: str
    reads: tuple[str, ...]  # the other keys that the check looked at


class Section(BaseModel):
    """A part of the job spec: unknown keys fail, types are exact, values never change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def _conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts across keys; a section with such checks overrides this method."""
        return iter(())

    @model_validator(mode="after")
    def _values_fit_together(self, info: ValidationInfo) -> Self:
        if info.context is BEGUN:
            return self
        # One error with all conflicts: raising in the first check would hide the others.
        conflicts = tuple(self._conflicts())
        if conflicts:
            text = "; ".join(f"{conflict.where}: {conflict.message}" for conflict in conflicts)
            raise PydanticCustomError("conflict", "{text}", {"text": text, "conflicts": conflicts})
        return self
