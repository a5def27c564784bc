"""The search space: well-spread draws without repeats, grids, and trials as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import BadInput
from orchestrator.job.space import (
    TrialSpec,
    draw,
    grid,
    grid_size,
    init_texts,
    longest,
    no_result,
    trial_count,
    trials,
)
from orchestrator.job.spec import LogUniform, SearchSpec, SpaceSpec, TextInit, Uniform

rates = st.floats(1e-6, 10, allow_nan=False)
inits = st.sampled_from(
    ["random", "sample_vocab", "class_labels", TextInit(text="a b"), TextInit(text="c")]
)
bounds = st.tuples(rates, rates).filter(lambda pair: pair[0] < pair[1])


def lists(values: st.SearchStrategy[Any], most: int = 5) -> st.SearchStrategy[Any]:
    """Either a single value or a list of different values."""
    return values | st.lists(values, min_size=1, max_size=most, unique=True)


ranges = bounds.map(lambda pair: LogUniform(loguniform=pair)) | bounds.map(
    lambda pair: Uniform(uniform=pair)
)


def spaces(learning_rate: st.SearchStrategy[Any]) -> st.SearchStrategy[SpaceSpec]:
    """Search spaces with such learning rates."""
    return st.builds(
        SpaceSpec,
        init=lists(inits),
        num_virtual_tokens=lists(st.integers(1, 200)),
        learning_rate=learning_rate,
        seed=lists(st.integers(0, 9)),
    )


finite_spaces = spaces(lists(rates))
any_spaces = spaces(lists(rates) | ranges)
counts = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def size_of(space: SpaceSpec) -> int:
    """Return the number of points of a listed space."""
    size = grid_size(space)
    assert size is not None
    return size


@given(any_spaces, counts, seeds)
@settings(deadline=None)
def test_the_same_seed_gives_the_same_draws(space: SpaceSpec, count: int, seed: int) -> None:
    """Draws depend only on the space, the count and the seed."""
    assert draw(space, count, seed) == draw(space, count, seed)


@given(any_spaces, counts, seeds)
@settings(deadline=None)
def test_draws_differ_from_each_other(space: SpaceSpec, count: int, seed: int) -> None:
    """No trial is drawn twice; only a smaller space gives fewer trials than requested."""
    drawn = draw(space, count, seed)
    assert len(set(drawn)) == len(drawn)
    size = grid_size(space)
    if size is None:
        assert 1 <= len(drawn) <= count  # fewer only if a range contains fewer numbers
    else:
        assert len(drawn) == min(count, size)


@given(finite_spaces, seeds)
@settings(deadline=None)
def test_more_draws_than_points_give_every_point_once(space: SpaceSpec, seed: int) -> None:
    """A count above a listed space's size gives the whole grid."""
    assert set(draw(space, size_of(space) + 5, seed)) == set(grid(space))


@given(any_spaces, counts, seeds)
@settings(deadline=None)
def test_every_listed_value_is_drawn_as_often_as_any_other(
    space: SpaceSpec, count: int, seed: int
) -> None:
    """In each dimension, the counts of any two values differ by at most one draw."""
    drawn = draw(space, count, seed)
    columns: list[list[Any]] = [
        [(t.init, t.init_text) for t in drawn],
        [t.num_virtual_tokens for t in drawn],
        [t.seed for t in drawn],
    ]
    listed: list[Any] = [space.init, space.num_virtual_tokens, space.seed]
    if not isinstance(space.learning_rate, LogUniform | Uniform):
        columns.append([t.learning_rate for t in drawn])
        listed.append(space.learning_rate)
    for column, values in zip(columns, listed, strict=True):
        often = Counter(column)
        choices = len(values) if isinstance(values, list) else 1
        assert len(often) == min(choices, len(drawn))
        # Values never drawn count as drawn zero times.
        assert max(often.values()) - (min(often.values()) if len(often) == choices else 0) <= 1


@given(counts, seeds)
@settings(deadline=None)
def test_a_range_gives_one_value_in_each_equal_bin(count: int, seed: int) -> None:
    """One draw is in each equal bin, logarithmic for loguniform and linear for uniform."""
    low, high = 0.003, 0.5
    log = draw(SpaceSpec(learning_rate=LogUniform(loguniform=(low, high))), count, seed)
    bins = [count * math.log(t.learning_rate / low) / math.log(high / low) for t in log]
    assert sorted(min(int(place), count - 1) for place in bins) == list(range(count))
    flat = draw(SpaceSpec(learning_rate=Uniform(uniform=(low, high))), count, seed)
    bins = [count * (t.learning_rate - low) / (high - low) for t in flat]
    assert sorted(min(int(place), count - 1) for place in bins) == list(range(count))


@given(spaces(ranges), counts, seeds)
@settings(deadline=None)
def test_draws_stay_in_the_range(space: SpaceSpec, count: int, seed: int) -> None:
    """Rounding never leaves the range, however narrow."""
    rate = space.learning_rate
    low, high = rate.loguniform if isinstance(rate, LogUniform) else rate.uniform  # type: ignore
    assert all(low <= trial.learning_rate <= high for trial in draw(space, count, seed))


def test_dimensions_are_drawn_independently_of_each_other() -> None:
    """Over many seeds, all pairs of values are about equally frequent.

    Balancing each dimension does not correlate them.
    """
    space = SpaceSpec(
        init=["random", "sample_vocab", "class_labels"],
        num_virtual_tokens=[5, 20, 100],
        seed=[0, 1, 2],
    )
    pairs = Counter(
        (t.num_virtual_tokens, t.seed) for seed in range(200) for t in draw(space, 9, seed)
    )
    assert len(pairs) == 9
    assert min(pairs.values()) > 0.7 * 200


def test_other_seeds_give_other_draws() -> None:
    """Another seed gives other draws."""
    space = SpaceSpec(learning_rate=LogUniform(loguniform=(0.003, 0.5)))
    assert draw(space, 4, 0) != draw(space, 4, 1)


def test_a_draw_needs_a_count() -> None:
    """Zero draws are an error of the caller."""
    with pytest.raises(ValueError, match="at least 1"):
        draw(SpaceSpec(), 0, 0)


@given(finite_spaces)
@settings(deadline=None)
def test_a_grid_has_every_point_once(space: SpaceSpec) -> None:
    """The grid has grid_size points, and no point repeats."""
    points = grid(space)
    assert len(points) == len(set(points)) == grid_size(space)


def test_a_range_has_no_grid() -> None:
    """grid_size is None and grid refuses."""
    space = SpaceSpec(learning_rate=Uniform(uniform=(0.1, 0.2)))
    assert grid_size(space) is None
    with pytest.raises(BadInput, match="range"):
        grid(space)


def test_a_grid_too_large_to_run_is_refused_before_it_is_built() -> None:
    """Ten billion points are counted without listing them; with ``trials`` some are drawn."""
    many = list(range(1, 100_001))
    space = SpaceSpec(num_virtual_tokens=many, seed=many)
    assert grid_size(space) == 10**10
    with pytest.raises(BadInput, match="10000000000 points"):
        grid(space)
    assert len(set(trials(SearchSpec(space=space, searcher="grid", trials=7)))) == 7


def test_the_random_searcher_draws_sixteen_trials_by_default() -> None:
    """Without ``trials`` there are 16 draws, or the whole space if it is smaller."""
    assert len(trials(SearchSpec(space=SpaceSpec(learning_rate=Uniform(uniform=(0.1, 0.2)))))) == 16
    assert len(trials(SearchSpec(space=SpaceSpec(seed=[0, 1, 2])))) == 3
    assert len(trials(SearchSpec(trials=3, space=SpaceSpec(seed=list(range(9)))))) == 3


def test_the_grid_searcher_takes_the_whole_grid_or_a_seeded_part() -> None:
    """Without ``trials`` the whole grid is used, else that many points, chosen by seed."""
    space = SpaceSpec(num_virtual_tokens=[5, 20, 100], seed=[0, 1, 2])
    assert trials(SearchSpec(space=space, searcher="grid")) == grid(space)
    assert trials(SearchSpec(space=space, searcher="grid", trials=99)) == grid(space)
    part = trials(SearchSpec(space=space, searcher="grid", trials=4, seed=1))
    assert len(set(part)) == 4
    assert set(part) <= set(grid(space))
    assert part == trials(SearchSpec(space=space, searcher="grid", trials=4, seed=1))
    assert part != trials(SearchSpec(space=space, searcher="grid", trials=4, seed=2))


@given(any_spaces, seeds)
@settings(deadline=None)
def test_a_trial_survives_json(space: SpaceSpec, seed: int) -> None:
    """config() is JSON, and from_config reads the same trial back."""
    for trial in draw(space, 3, seed):
        assert TrialSpec.from_config(json.loads(json.dumps(trial.config()))) == trial


def test_a_configuration_reads_as_run_prints_it() -> None:
    """Keys are those of ``run --json``; a text init is a mapping."""
    config = {
        "init": {"text": "Classify."},
        "num_virtual_tokens": 20,
        "learning_rate": 0.1,
        "seed": 0,
    }
    trial = TrialSpec("text", "Classify.", 20, 0.1, 0)
    assert trial.config() == config
    assert TrialSpec.from_config(config) == trial


@pytest.mark.parametrize(
    "change",
    [
        {"init": "no such init"},
        {"num_virtual_tokens": 0},
        {"learning_rate": [0.1]},
        {"seed": "0"},
        {"other": 1},
    ],
)
def test_a_bad_configuration_is_refused(change: dict[str, Any]) -> None:
    """Unknown keys, values out of range, wrong types and lists are refused by key."""
    good = TrialSpec("random", None, 20, 0.1, 0).config()
    with pytest.raises(BadInput, match=r"configuration has (a bad|one value)"):
        TrialSpec.from_config(good | change)


def test_an_incomplete_configuration_is_refused() -> None:
    """A missing key has no default, so that a stored trial can't change its meaning."""
    with pytest.raises(BadInput, match="has no learning_rate, seed"):
        TrialSpec.from_config({"init": "random", "num_virtual_tokens": 20})


def test_a_label_is_one_short_line() -> None:
    """Long texts and line breaks do not break a table."""
    assert (
        TrialSpec("random", None, 20, 0.30000001, 7).label() == "random, 20 tokens, lr 0.3, seed 7"
    )
    label = TrialSpec("text", "Classify\nthe message as spam or ham.", 5, 1e-5, 0).label()
    assert label == '"Classify the message ...", 5 tokens, lr 1e-05, seed 0'


def test_longest_and_init_texts_look_at_every_value() -> None:
    """Both handle single values and lists."""
    assert longest(SpaceSpec(num_virtual_tokens=7)) == 7
    assert longest(SpaceSpec(num_virtual_tokens=[5, 100, 20])) == 100
    assert init_texts(SpaceSpec()) == []
    assert init_texts(SpaceSpec(init=["random", TextInit(text="b"), TextInit(text="a")])) == [
        "b",
        "a",
    ]
    assert init_texts(SpaceSpec(init=TextInit(text="only"))) == ["only"]


@pytest.mark.parametrize(
    ("rates", "requested", "message"),
    [
        (0.1, 2, "the only trial has no result (search.trials is 2, and search.space has 1 point)"),
        (
            [0.1, 0.2],
            5,
            "none of the 2 trials has a result (search.trials is 5, and search.space has 2 points)",
        ),
        (0.1, 1, "the only trial has no result"),
        (0.1, None, "the only trial has no result"),
        ([0.1, 0.2], 2, "none of the 2 trials has a result"),
        ({"loguniform": [0.1, 1.0]}, 3, "none of the 3 trials has a result"),
    ],
)
@pytest.mark.parametrize("searcher", ["random", "grid", "optuna"])
def test_a_search_without_a_result_says_why_it_had_so_few_trials(
    rates: Any, requested: int | None, message: str, searcher: str
) -> None:
    """A space with fewer points than requested trials is the reason: no trial runs twice."""
    if searcher == "grid" and isinstance(rates, dict):
        return
    space = {"init": "random", "num_virtual_tokens": 4, "learning_rate": rates}
    search = SearchSpec.model_validate({"space": space, "trials": requested, "searcher": searcher})
    assert no_result(search, trial_count(search)) == message
