"""The search space: how many points it has, and which of them become trials.

``spec.SPACES`` names the dimensions of each method; for prompts these are init, num_virtual_tokens,
learning_rate and seed. Each dimension is a list of values or, for the learning rate, a range. A
space may also consist of a space for each of several methods.

Draws are spread, not independent: a search of a dozen trials that happens to leave out an init says
nothing about that init. Every listed value is drawn as often as every other, give or take one. A
range is cut into as many equal bins as there are draws, and each bin gives one draw.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import BadInput
from orchestrator.job.spec import (
    BASELINE_SPACE,
    DEFAULT_TRIALS,
    DIMENSIONS,
    MAX_TRIALS,
    PROMPT_SPACE,
    SPACES,
    ArtifactInit,
    Init,
    LogUniform,
    SearchSpec,
    Section,
    SpaceSpec,
    TextInit,
    Uniform,
)
from orchestrator.utils.wording import counted

Row = list[Any]  # a value for each dimension, in the order of TrialSpec.config()

FRESH_SEEDS = 100_000  # fresh seeds are drawn from 0 up to this number, to be short to read
MIXING = 20  # swaps tried per value, many more than it takes to hide the draws' pattern


INIT_FIELDS = {"text": "init_text", "artifact": "init_artifact", "sample_vocab": "init_population"}
"""The field of ``TrialSpec`` that holds an init's value, by the key of that init in the spec."""


@dataclass(frozen=True)
class TrialSpec:
    """The settings that distinguish one trial of a search from another."""

    init: str  # a NamedInit, or a key of INIT_FIELDS
    init_text: str | None  # the text when init is text
    num_virtual_tokens: int
    learning_rate: float
    seed: int
    init_artifact: str | None = None  # the prompt when init is artifact
    init_population: int | None = None  # sample_vocab draws from this many most frequent tokens
    # The rest is for baselines. Their init is empty and their num_virtual_tokens is 0; the learning
    # rate of a method without training is 0 too.
    rank: int | None = None
    alpha: int | None = None
    bottleneck: int | None = None
    template: str | None = None
    shots: int | None = None
    demonstrations: str | None = None
    method: str = ""
    """The trial's method in a search that mixes several; empty where all trials have the job's."""
    confirms: str = ""
    """The trial whose configuration this one trains again under a fresh seed; empty for a trial of
    the search itself. It is no part of the configuration."""

    def config(self) -> dict[str, Any]:
        """Return the configuration as ``run --json`` prints it, with the method's own keys only.

        ``from_config`` reads it back.
        """
        values = {
            "init": self.init_config or None, "num_virtual_tokens": self.num_virtual_tokens or None,
            "rank": self.rank, "alpha": self.alpha, "bottleneck": self.bottleneck,
            "template": self.template, "shots": self.shots, "demonstrations": self.demonstrations,
            "learning_rate": self.learning_rate or None,
        }  # fmt: skip
        return {
            **({"method": self.method} if self.method else {}),
            **{name: value for name, value in values.items() if value is not None},
            "seed": self.seed,
        }

    @property
    def size(self) -> int:
        """The size of what is learned or written; larger trials take more memory and time."""
        return max(self.num_virtual_tokens, self.rank or 0, self.bottleneck or 0, self.shots or 0)

    @property
    def init_config(self) -> Any:
        """The init as the job spec writes it."""
        options = {name: getattr(self, field) for name, field in INIT_FIELDS.items()}
        set_options = {name: value for name, value in options.items() if value is not None}
        return set_options or self.init

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrialSpec:
        """Return the trial that ``config`` describes.

        Raises BadInput unless ``config`` has each key once, with one allowed value.
        """
        method = config.get("method", "")
        if method and method not in SPACES:
            raise BadInput(f"a trial's configuration has an unknown method: {dict(config)}")
        if missing := _missing(config):
            raise BadInput(f"a trial's configuration has no {', '.join(missing)}: {dict(config)}")
        point = {name: value for name, value in config.items() if name != "method"}
        try:
            # A single point is a space too, so validating it checks the spec's own limits.
            space = SpaceSpec.model_validate(
                {**dict.fromkeys(DIMENSIONS), **point}, context=BASELINE_SPACE
            )
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise BadInput(
                f"a trial's configuration has a bad {key}: {problem['msg']}: {dict(config)}"
            ) from None
        if any(isinstance(value, list | LogUniform | Uniform) for value in _dimensions(space)):
            raise BadInput(f"a trial's configuration has one value for each key: {dict(config)}")
        return replace(trial_at(_dimensions(space), _names(space)), method=method)

    def label(self) -> str:
        """Describe the trial in one short line for tables, beginning with a method of its own."""
        method = f"{self.method.replace('_', ' ')}: " if self.method else ""
        return f"{method}{self._values_label()}"

    def _values_label(self) -> str:
        if not self.init:
            return self._baseline_label()
        start = _excerpt(self.init_text or self.init_artifact) or self.init
        return (
            f"{start}, {self.num_virtual_tokens} tokens, lr {self.learning_rate:.3g}, seed "
            f"{self.seed}{self._confirms_label}"
        )

    @property
    def _confirms_label(self) -> str:
        return f", confirms {self.confirms}" if self.confirms else ""

    def _baseline_label(self) -> str:
        parts = [
            _excerpt(self.template),
            f"{self.shots} {self.demonstrations} demonstrations" if self.shots else "",
            "no demonstrations" if self.shots == 0 else "",
            f"rank {self.rank}, alpha {self.alpha}" if self.rank and self.alpha else "",
            f"bottleneck {self.bottleneck}" if self.bottleneck else "",
            f"lr {self.learning_rate:.3g}" if self.learning_rate else "",
        ]
        return ", ".join([*filter(None, parts), f"seed {self.seed}{self._confirms_label}"])


def _missing(config: Mapping[str, Any]) -> list[str]:
    """Return the keys that a configuration lacks for the method that it fits best."""

    def fit(names: Sequence[str]) -> tuple[int, int]:
        required = set(names) - {"template"}
        return len(required & config.keys()), -len(required)

    nearest = SPACES.get(config.get("method", "")) or max(SPACES.values(), key=fit)
    return [name for name in nearest if name != "template" and name not in config]


def _excerpt(text: str | None) -> str:
    """Return the beginning of a text in quotes, on one line; empty for an empty text."""
    line = " ".join((text or "").split())
    if not line:
        return ""
    return f'"{line}"' if len(line) <= 24 else f'"{line[:21]}..."'


def trials(search: SearchSpec) -> list[TrialSpec]:
    """Return the trials of a search: the grid, a sample of the grid, or draws from the space.

    The spec's ``trials`` sets how many there are; draws are 16 by default. There are fewer when the
    space has fewer points, since no trial is run twice. The list is empty with a searcher that
    proposes trials while the search runs. In a space of several methods, each method has the
    trials that a search of it alone would have, with its share of their number. Raises BadInput as
    ``grid`` does.
    """
    if search.proposes or search.space.method is None:
        return _own_trials(search)
    return _alternating(
        {method: _own_trials(part) for method, part in _searches(search).items() if part.trials}
    )


def _own_trials(search: SearchSpec) -> list[TrialSpec]:
    """Return the trials of a search of one method."""
    match search.searcher:
        case "random":
            return draw(search.space, search.trials or DEFAULT_TRIALS, search.seed)
        case "grid":
            return _grid_trials(search)
        case "optuna":
            return []


def _searches(search: SearchSpec) -> dict[str, SearchSpec]:
    """Return a search for each method of a space of several, with its share of the trials."""
    count = search.trials or (
        _grid_total(search.space) if search.searcher == "grid" else DEFAULT_TRIALS
    )
    parts = search.space.parts
    return {
        method: search.model_copy(update={"space": parts[method], "trials": share})
        for method, share in shares(search.space, count).items()
    }


def _grid_total(space: SpaceSpec) -> int:
    """Return the number of points of a grid. Raises BadInput as ``grid`` does."""
    size = grid_size(space)
    if size is None:
        raise BadInput(
            "a range of learning rates has no grid", "list learning rates, or use searcher random"
        )
    if size > MAX_TRIALS:
        raise BadInput(
            f"the grid has {size} points, and a search at most {MAX_TRIALS} trials",
            "set search.trials",
        )
    return size


def shares(space: SpaceSpec, count: int) -> dict[str, int]:
    """Divide ``count`` trials evenly among the methods of a space of several.

    A method whose space has fewer points leaves the rest of its share to the others.
    """
    sizes = {method: grid_size(part) for method, part in space.parts.items()}
    found = dict.fromkeys(sizes, 0)
    while count:
        open_methods = [name for name, size in sizes.items() if size is None or found[name] < size]
        if not open_methods:
            break
        for method in open_methods[:count]:
            found[method] += 1
        count -= len(open_methods[:count])
    return found


def _alternating(trials: Mapping[str, list[TrialSpec]]) -> list[TrialSpec]:
    """Take a trial of each method in turn, so that a search that ends early has tried all."""
    rows = itertools.zip_longest(
        *([replace(spec, method=name) for spec in found] for name, found in trials.items())
    )
    return [spec for row in rows for spec in row if spec is not None]


def _grid_trials(search: SearchSpec) -> list[TrialSpec]:
    """Return the whole grid, or a sample of ``search.trials`` of its points."""
    values = _listed(search.space)
    if values is None or search.trials is None or search.trials >= math.prod(map(len, values)):
        return grid(search.space)
    indices = random.Random(search.seed).sample(range(math.prod(map(len, values))), search.trials)
    names = _names(search.space)
    return [trial_at(_point(values, index), names) for index in indices]


def trial_count(search: SearchSpec) -> int:
    """Return how many trials the search will have unless it ends early.

    Raises BadInput as ``grid`` does.
    """
    if not search.proposes:
        return len(trials(search))
    count, size = search.trials or DEFAULT_TRIALS, grid_size(search.space)
    return count if size is None else min(count, size)


def confirming_total(search: SearchSpec) -> int:
    """Return the most trials that ``search.confirm`` adds: there may be fewer configurations."""
    if search.confirm is None:
        return 0
    if search.proposes:
        parts = search.space.parts.values()
        found = sum(_configurations(space) or search.confirm for space in parts)
    else:
        found = len({replace(trial, seed=0) for trial in trials(search)})
    return min(search.confirm, found) * search.confirm_seeds


def _configurations(space: SpaceSpec) -> int | None:
    """Count the points of the space that differ in more than the seed; None with a range."""
    others = [values for name, values in dimensions(space).items() if name != "seed"]
    listed = [values for values in others if isinstance(values, list)]
    return math.prod(map(len, listed)) if len(listed) == len(others) else None


def fresh_seeds(search: SearchSpec) -> list[int]:
    """Return the seeds of ``search.confirm``: a function of the spec, and none of the space's."""
    used = {seed for space in search.space.parts.values() for seed in _values(space.seed)}
    rng = random.Random(f"confirm {search.seed}")
    drawn = rng.sample(range(FRESH_SEEDS), len(used) + search.confirm_seeds)
    return [seed for seed in drawn if seed not in used][: search.confirm_seeds]


def why_fewer_trials(search: SearchSpec) -> str:
    """Explain why a search has fewer trials than the spec asks for; empty if it has as many."""
    points = grid_size(search.space)
    if search.trials is None or points is None or points >= search.trials:
        return ""
    return f"search.trials is {search.trials}, and search.space has {counted(points, 'point')}"


def no_result(search: SearchSpec, count: int) -> str:
    """Say that none of a search's trials has a result, and why there are fewer than asked for."""
    text = (
        "the only trial has no result" if count == 1 else f"none of the {count} trials has a result"
    )
    reason = why_fewer_trials(search)
    return f"{text} ({reason})" if reason else text


def grid_size(space: SpaceSpec) -> int | None:
    """Count the points of the space; None when a dimension is a range."""
    if space.method is not None:
        sizes = [size for part in space.parts.values() if (size := grid_size(part)) is not None]
        return sum(sizes) if len(sizes) == len(space.method) else None
    values = _listed(space)
    return None if values is None else math.prod(map(len, values))


def grid(space: SpaceSpec) -> list[TrialSpec]:
    """Return every point of the space, with points that differ only in the seed side by side.

    Raises BadInput when a dimension is a range, or when there are more points than a search may
    have trials.
    """
    size, values, names = _grid_total(space), _listed(space) or [], _names(space)
    return [trial_at(_point(values, index), names) for index in range(size)]


def draw(space: SpaceSpec, count: int, seed: int) -> list[TrialSpec]:
    """Draw ``count`` different points; the same seed gives the same points.

    A space with fewer points gives every point once. Each listed value is drawn as often as any
    other of its dimension, give or take one. A range is cut into ``count`` equal bins, on a
    logarithmic scale for loguniform, and each bin gives one value. Of several methods, each gets
    its share of the count.
    """
    if count < 1:
        raise ValueError(f"draw needs a count of at least 1, got {count}")
    if space.method is not None:
        counts = shares(space, count).items()
        return _alternating({name: draw(space.parts[name], n, seed) for name, n in counts if n})
    rng = random.Random(seed)
    columns = [_column(value, count, rng) for value in _dimensions(space)]
    count = min(count, math.prod(map(len, columns)))
    rows = _spread(columns, count)
    _mix(rows, rng)
    names = _names(space)
    return [trial_at(row, names) for row in rows]


def dimensions(space: SpaceSpec) -> dict[str, Any]:
    """Return the dimensions by name, in the order of a row: each a list of values or a range."""
    return {
        name: value if isinstance(value, LogUniform | Uniform) else _values(value)
        for name, value in zip(_names(space), _dimensions(space), strict=True)
    }


def trial_at(row: Row, names: Sequence[str] = PROMPT_SPACE) -> TrialSpec:
    """Return the trial with one value for each of the named dimensions."""
    values = dict(zip(names, row, strict=True))
    init: Init | None = values.pop("init", None)
    values["learning_rate"] = float(values.get("learning_rate") or 0.0)
    kind: dict[str, Any] = {"init": init or "", "init_text": None}
    if isinstance(init, Section):
        ((name, value),) = init.model_dump().items()
        kind |= {"init": name, INIT_FIELDS[name]: value}
    return TrialSpec(**{"num_virtual_tokens": 0, **kind, **values})


def longest(space: SpaceSpec) -> int:
    """Return the greatest num_virtual_tokens of the space; 0 for a space without them."""
    return max(_all_values(space, "num_virtual_tokens"), default=0)


def templates(space: SpaceSpec) -> list[str]:
    """Return the templates that trials try, in the order of the spec.

    The list is empty where all trials use the template of the data.
    """
    return _all_values(space, "template")


def init_texts(space: SpaceSpec) -> list[str]:
    """Return the texts that soft prompts start from, in the order of the spec."""
    inits = _all_values(space, "init")
    return [init.text for init in inits if isinstance(init, TextInit)]


def init_artifacts(space: SpaceSpec) -> list[str]:
    """Return the prompts that other prompts start from, in the order of the spec."""
    inits = _all_values(space, "init")
    return [init.artifact for init in inits if isinstance(init, ArtifactInit)]


def _all_values(space: SpaceSpec, name: str) -> list[Any]:
    """Return the different values of a dimension, of all methods of the space."""
    columns = [_values(getattr(part, name)) for part in space.parts.values()]
    values: list[Any] = []
    for value in itertools.chain(*columns):
        if value not in values:
            values.append(value)
    return values


def _names(space: SpaceSpec) -> list[str]:
    """Return the names of the dimensions that the space has."""
    return [name for name in DIMENSIONS if getattr(space, name) is not None]


def _dimensions(space: SpaceSpec) -> Row:
    return [getattr(space, name) for name in _names(space)]


def _values(value: Any) -> list[Any]:
    """Return the values of a dimension; empty for a dimension that the space lacks."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _listed(space: SpaceSpec) -> list[list[Any]] | None:
    dimensions = _dimensions(space)
    if any(isinstance(value, LogUniform | Uniform) for value in dimensions):
        return None
    return [_values(value) for value in dimensions]


def _point(values: list[list[Any]], index: int) -> Row:
    """Return point ``index`` of the grid; the last dimension runs fastest."""
    row = []
    for column in reversed(values):
        index, value_index = divmod(index, len(column))
        row.append(column[value_index])
    return row[::-1]


def _column(value: Any, count: int, rng: random.Random) -> list[Any]:
    """Return the different values of a dimension to draw from, in random order."""
    if isinstance(value, LogUniform):
        low, high = (math.log(bound) for bound in value.loguniform)
        values = [math.exp(point) for point in _strata(low, high, count, rng)]
        values = [min(max(point, value.loguniform[0]), value.loguniform[1]) for point in values]
    elif isinstance(value, Uniform):
        values = _strata(*value.uniform, count, rng)
    else:
        values = list(_values(value))
    # A range may be so narrow that neighbouring bins give the same number.
    values = list(dict.fromkeys(values))
    rng.shuffle(values)
    return values


def _strata(low: float, high: float, count: int, rng: random.Random) -> list[float]:
    step = (high - low) / count
    return [min(low + (index + rng.random()) * step, high) for index in range(count)]


def _spread(columns: list[list[Any]], count: int) -> list[Row]:
    """Return ``count`` rows of combinations that are balanced in every column.

    They are the first rows of an order of all combinations; every beginning of that order is
    balanced.

    Consider two columns of a and b values: row i takes value i of the first and i + (i div lcm(a,
    b)) of the second, both modulo their lengths. A block of lcm(a, b) rows meets each pair at most
    once and each value equally often, and the shift moves the next block to pairs that were not met
    yet. A further column treats the ones before it as one column of a * b values.
    """
    rows: list[Row] = [[] for _ in range(count)]
    period = 1
    for values in columns:
        block = math.lcm(period, len(values))
        total = period * len(values)
        for index, row in enumerate(rows):
            # The earlier columns repeat after ``period`` rows; with this column, after ``total``.
            turn = index % total
            row.append(values[(turn + turn // block) % len(values)])
        period = total
    return rows


def _mix(rows: list[Row], rng: random.Random) -> None:
    """Swap values of a column between rows at random.

    Rows stay different from each other, and each value occurs as often as before.
    """
    width = len(rows[0])
    points = {tuple(row) for row in rows}
    for _ in range(MIXING * len(rows) * width if len(rows) > 1 else 0):
        first, second = rng.sample(rows, 2)
        column = rng.randrange(width)
        swapped = [_swapped(first, second, column), _swapped(second, first, column)]
        old_points, new_points = {tuple(first), tuple(second)}, {tuple(row) for row in swapped}
        if points.isdisjoint(new_points - old_points):
            points -= old_points
            points |= new_points
            first[:], second[:] = swapped
    rng.shuffle(rows)


def _swapped(target: Row, source: Row, column: int) -> Row:
    return [*target[:column], source[column], *target[column + 1 :]]
