"""The search space: how many points it has, and which of them become trials.

A space has four dimensions: init, num_virtual_tokens, learning_rate, seed. Each is listed, or, for the learning rate,
a range. Draws are spread, not independent: a search of a dozen trials that happens to leave out an init says nothing
about it, so every listed value is drawn as often as every other, give or take one, and a range is cut into as many
equal bins as there are draws, with one draw in each.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from .errors import BadInput
from .spec import (
    DEFAULT_TRIALS,
    MAX_TRIALS,
    ArtifactInit,
    Init,
    LogUniform,
    SampleVocabInit,
    SearchSpec,
    SpaceSpec,
    TextInit,
    Uniform,
)

Row = list[Any]  # a value for each dimension, in the order of TrialSpec.config()

MIXING = 20  # swaps tried for each value; the draws' pattern is gone long before


@dataclass(frozen=True)
class TrialSpec:
    """What tells one trial of a search from another."""

    init: str  # random, random_normal, sample_vocab, class_labels, text or artifact
    init_text: str | None  # the text when init is text
    num_virtual_tokens: int
    learning_rate: float
    seed: int
    init_artifact: str | None = None  # the prompt when init is artifact
    init_population: int | None = None  # the most frequent tokens that sample_vocab draws from

    def config(self) -> dict[str, Any]:
        """As ``run --json`` prints it; ``from_config`` reads it back."""
        return {
            "init": self.init_config,
            "num_virtual_tokens": self.num_virtual_tokens,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    @property
    def init_config(self) -> Any:
        """The init as the job spec writes it."""
        options = {"text": self.init_text, "artifact": self.init_artifact, "sample_vocab": self.init_population}
        given = {name: value for name, value in options.items() if value is not None}
        return given or self.init

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrialSpec:
        """The trial that ``config`` describes. Raises BadInput unless it has each key once, with one allowed value."""
        missing = [key for key in SpaceSpec.model_fields if key not in config]
        if missing:
            raise BadInput(f"a trial's configuration has no {', '.join(missing)}: {dict(config)}")
        try:
            # A single point is a space too, so the spec's own limits hold.
            space = SpaceSpec.model_validate(dict(config))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise BadInput(f"a trial's configuration has a bad {place}: {first['msg']}: {dict(config)}") from None
        if any(isinstance(value, list | LogUniform | Uniform) for value in _dimensions(space)):
            raise BadInput(f"a trial's configuration has one value for each key: {dict(config)}")
        return trial_at(_dimensions(space))

    def label(self) -> str:
        """One short line for tables."""
        text = " ".join((self.init_text or self.init_artifact or "").split())
        start = f'"{text if len(text) <= 24 else text[:21] + "..."}"' if text else self.init
        return f"{start}, {self.num_virtual_tokens} tokens, lr {self.learning_rate:.3g}, seed {self.seed}"


def trials(search: SearchSpec) -> list[TrialSpec]:
    """The trials of a search: the grid or so many of it, or draws, 16 unless ``trials`` says otherwise.

    Fewer when the space has fewer points: no trial is run twice. None with a searcher that proposes trials while the
    search runs. Raises BadInput as ``grid`` does.
    """
    if search.searcher == "optuna":
        return []
    if search.searcher == "random":
        return draw(search.space, search.trials or DEFAULT_TRIALS, search.seed)
    values = _listed(search.space)
    if values is None or search.trials is None or search.trials >= math.prod(map(len, values)):
        return grid(search.space)
    chosen = random.Random(search.seed).sample(range(math.prod(map(len, values))), search.trials)
    return [trial_at(_point(values, index)) for index in chosen]


def trial_count(search: SearchSpec) -> int:
    """How many trials the search will have, unless it ends early. Raises BadInput as ``grid`` does."""
    if search.searcher != "optuna":
        return len(trials(search))
    count, size = search.trials or DEFAULT_TRIALS, grid_size(search.space)
    return count if size is None else min(count, size)


def grid_size(space: SpaceSpec) -> int | None:
    """Points of the space; None when a dimension is a range."""
    values = _listed(space)
    return None if values is None else math.prod(map(len, values))


def grid(space: SpaceSpec) -> list[TrialSpec]:
    """Every point, seeds next to each other.

    Raises BadInput when a dimension is a range, or when there are more points than a search may have trials.
    """
    values = _listed(space)
    if values is None:
        raise BadInput("a range of learning rates has no grid", "list learning rates, or use searcher random")
    size = math.prod(map(len, values))
    if size > MAX_TRIALS:
        raise BadInput(f"the grid has {size} points, and a search at most {MAX_TRIALS} trials", "set search.trials")
    return [trial_at(_point(values, index)) for index in range(size)]


def draw(space: SpaceSpec, count: int, seed: int) -> list[TrialSpec]:
    """``count`` different points, the same ones for the same seed; every point once when the space has fewer.

    Each listed value is drawn as often as any other of its dimension, give or take one. A range is cut into ``count``
    equal bins, on a logarithmic scale for loguniform, and each bin gives one value.
    """
    if count < 1:
        raise ValueError(f"draw needs a count of at least 1, got {count}")
    rng = random.Random(seed)
    columns = [_column(value, count, rng) for value in _dimensions(space)]
    count = min(count, math.prod(map(len, columns)))
    rows = _spread(columns, count)
    _mix(rows, rng)
    return [trial_at(row) for row in rows]


def dimensions(space: SpaceSpec) -> dict[str, Any]:
    """What trials differ in, by name in the order of a row: a list of values, or a range."""
    return {
        name: value if isinstance(value, LogUniform | Uniform) else _values(value)
        for name, value in zip(SpaceSpec.model_fields, _dimensions(space), strict=True)
    }


def trial_at(row: Row) -> TrialSpec:
    """The trial with one value for each dimension."""
    init: Init = row[0]
    plain = (row[1], float(row[2]), row[3])
    if isinstance(init, TextInit):
        return TrialSpec("text", init.text, *plain)
    if isinstance(init, ArtifactInit):
        return TrialSpec("artifact", None, *plain, init_artifact=init.artifact)
    if isinstance(init, SampleVocabInit):
        return TrialSpec("sample_vocab", None, *plain, init_population=init.sample_vocab)
    return TrialSpec(init, None, *plain)


def longest(space: SpaceSpec) -> int:
    """The greatest num_virtual_tokens of the space."""
    lengths: list[int] = _values(space.num_virtual_tokens)
    return max(lengths)


def init_texts(space: SpaceSpec) -> list[str]:
    """The texts that soft prompts start from, in the order of the spec."""
    return [init.text for init in _values(space.init) if isinstance(init, TextInit)]


def init_artifacts(space: SpaceSpec) -> list[str]:
    """The prompts that others start from, in the order of the spec."""
    return [init.artifact for init in _values(space.init) if isinstance(init, ArtifactInit)]


def _dimensions(space: SpaceSpec) -> Row:
    return [space.init, space.num_virtual_tokens, space.learning_rate, space.seed]


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listed(space: SpaceSpec) -> list[list[Any]] | None:
    dimensions = _dimensions(space)
    if any(isinstance(value, LogUniform | Uniform) for value in dimensions):
        return None
    return [_values(value) for value in dimensions]


def _point(values: list[list[Any]], index: int) -> Row:
    """Point ``index`` of the grid, the last dimension running fastest."""
    row = []
    for column in reversed(values):
        index, place = divmod(index, len(column))
        row.append(column[place])
    return row[::-1]


def _column(value: Any, count: int, rng: random.Random) -> list[Any]:
    """The different values of a dimension to draw from, in random order."""
    if isinstance(value, LogUniform):
        low, high = (math.log(bound) for bound in value.loguniform)
        values = [math.exp(point) for point in _strata(low, high, count, rng)]
        values = [min(max(point, value.loguniform[0]), value.loguniform[1]) for point in values]
    elif isinstance(value, Uniform):
        values = _strata(*value.uniform, count, rng)
    else:
        values = list(_values(value))
    values = list(dict.fromkeys(values))  # a range may be so narrow that neighbouring bins give the same number
    rng.shuffle(values)
    return values


def _strata(low: float, high: float, count: int, rng: random.Random) -> list[float]:
    step = (high - low) / count
    return [min(low + (index + rng.random()) * step, high) for index in range(count)]


def _spread(columns: list[list[Any]], count: int) -> list[Row]:
    """The first ``count`` rows of an order of all combinations whose every beginning is balanced in every column.

    Two columns of a and b values: row i takes value i of the first and i + (i div lcm(a, b)) of the second, both
    around the clock. A block of lcm(a, b) rows meets each pair at most once and each value equally often, and the shift
    moves the next block to pairs not met yet. A further column sees the ones before it as one column of a * b values.
    """
    rows: list[Row] = [[] for _ in range(count)]
    period = 1
    for values in columns:
        block = math.lcm(period, len(values))
        total = period * len(values)
        for index, row in enumerate(rows):
            # What is before repeats after ``period`` rows; this column's turns start over after ``total``.
            turn = index % total
            row.append(values[(turn + turn // block) % len(values)])
        period = total
    return rows


def _mix(rows: list[Row], rng: random.Random) -> None:
    """Swap values of a column between rows at random, keeping rows different and how often each value occurs."""
    width = len(rows[0])
    seen = {tuple(row) for row in rows}
    for _ in range(MIXING * len(rows) * width if len(rows) > 1 else 0):
        one, other = rng.sample(rows, 2)
        column = rng.randrange(width)
        swapped = [_swapped(one, other, column), _swapped(other, one, column)]
        before, after = {tuple(one), tuple(other)}, {tuple(row) for row in swapped}
        if seen.isdisjoint(after - before):
            seen -= before
            seen |= after
            one[:], other[:] = swapped
    rng.shuffle(rows)


def _swapped(row: Row, other: Row, column: int) -> Row:
    return [*row[:column], other[column], *row[column + 1 :]]
