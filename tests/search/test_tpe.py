"""Trials proposed by Optuna's TPE, without a search."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.job.space import TrialSpec, draw, grid
from orchestrator.job.spec import SearchSpec
from orchestrator.search.study.tpe import FIRST, Proposer

SPACE = {
    "init": [
        "random",
        {"text": "good"},
        {"text": "bad"},
        {"sample_vocab": 100},
        {"artifact": "other"},
    ],
    "num_virtual_tokens": [100, 5, 20],
    "learning_rate": {"loguniform": [0.001, 10.0]},
    "seed": [0, 1],
}
LISTED = {
    "init": "random",
    "num_virtual_tokens": [5, 20],
    "learning_rate": [0.1, 0.2, 0.4],
    "seed": 3,
}


def search(space: Any = SPACE, trials: int = 40, seed: int = 0, **others: Any) -> SearchSpec:
    return SearchSpec.model_validate(
        {"space": space, "searcher": "optuna", "trials": trials, "seed": seed, **others}
    )


def distance(spec: TrialSpec) -> float:
    """Return the distance from the optimum: the good text, 20 tokens, learning rate 0.1."""
    wrong = (spec.init_text != "good") + (spec.num_virtual_tokens != 20)
    return wrong + abs(math.log10(spec.learning_rate / 0.1))


def run(proposer: Proposer, until: int | None = None, sign: float = -1.0) -> list[TrialSpec]:
    """Alternate proposals and results; return the proposals."""
    found: list[TrialSpec] = []
    while len(found) != until and (spec := proposer.propose()) is not None:
        found.append(spec)
        proposer.learn(len(found) - 1, sign * distance(spec))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", -1.0), ("loss", 1.0)])
def test_proposals_go_where_results_were_good(metric: str, sign: float) -> None:
    """Late proposals are nearer to the optimum than the first, spread ones, on average over seeds.

    This holds for metrics that should rise and for those that should fall.
    """
    early, late = [], []
    for seed in range(4):
        distances = [
            distance(spec) for spec in run(Proposer(search(seed=seed, metric=metric)), sign=sign)
        ]
        early.append(mean(distances[:FIRST]))
        late.append(mean(distances[-FIRST:]))
    assert mean(late) < 0.75 * mean(early)


def test_the_first_proposals_are_spread() -> None:
    """The first proposals are those of the random searcher, for at most half of the trials."""
    assert run(Proposer(search()))[:FIRST] == draw(search().space, FIRST, 0)
    assert run(Proposer(search(trials=6)))[:3] == draw(search().space, 3, 0)


def test_every_proposal_is_a_point_of_the_space() -> None:
    """Proposals stay within ranges and lists, and have a text only if their init is text."""
    found = run(Proposer(search(trials=60)))
    assert {spec.num_virtual_tokens for spec in found} == {5, 20, 100} and {
        spec.seed for spec in found
    } == {0, 1}
    assert all(0.001 <= spec.learning_rate <= 10.0 for spec in found)
    assert len({spec.learning_rate for spec in found}) == 60
    options = {
        (spec.init, spec.init_text, spec.init_population, spec.init_artifact) for spec in found
    }
    assert options == {
        ("random", None, None, None), ("text", "good", None, None), ("text", "bad", None, None),
        ("sample_vocab", None, 100, None), ("artifact", None, None, "other"),
    }  # fmt: skip


def test_the_same_seed_gives_the_same_proposals_and_another_others() -> None:
    """The same seed and results give the same proposals; another seed gives others."""
    first = run(Proposer(search(seed=5)))
    assert run(Proposer(search(seed=5))) == first
    assert run(Proposer(search(seed=6))) != first


def test_no_point_is_proposed_twice() -> None:
    """A space with fewer points than trials is covered completely, then proposals end."""
    proposer = Proposer(search(LISTED))
    found = run(proposer)
    assert proposer.total == len(found) == 6
    assert set(found) == set(grid(search(LISTED).space))
    assert proposer.propose() is None


def test_proposals_need_no_results() -> None:
    """All slots can be filled before any trial has reported."""
    proposer = Proposer(search(trials=20))
    assert len({proposer.propose() for _ in range(20)}) == 20


def test_a_failed_trial_counts_as_the_worst() -> None:
    """TPE avoids regions in which trials failed."""
    proposer = Proposer(
        search({"init": "random", "learning_rate": {"loguniform": [0.001, 10.0]}}, 40)
    )
    rates = []
    while (spec := proposer.propose()) is not None:
        rates.append(spec.learning_rate)
        proposer.learn(len(rates) - 1, None if spec.learning_rate > 0.1 else 0.5)
    assert mean([rate > 0.1 for rate in rates[-20:]]) < 0.3


@pytest.mark.parametrize("at", [3, 15, 39])
def test_a_written_history_goes_on_as_it_would_have(at: int) -> None:
    """Proposals after a restart are those of a search that was never interrupted."""
    whole = run(Proposer(search()))
    before, after = Proposer(search()), Proposer(search())
    begun = run(before, until=at)
    after.replay(dict(enumerate(begun)))
    for number, spec in enumerate(begun):
        after.learn(number, -distance(spec))
    rest = []
    while (spec := after.propose()) is not None:
        rest.append(spec)
        after.learn(at + len(rest) - 1, -distance(spec))
    assert begun + rest == whole
