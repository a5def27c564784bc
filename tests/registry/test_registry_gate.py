"""The gate, the history and the rollback, behind real MLflow servers on SQLite and on PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from typing import Any

import pytest

from orchestrator.artifact import GenerationRecord, VerbalizerEntry
from orchestrator.errors import BadInput, OrchestratorError
from orchestrator.registry import Move, Overtaken, Registry, ledger
from orchestrator.registry.history import who

Serve = Callable[..., int]


def steps(registry: Registry, name: str, alias: str = "champion") -> list[tuple[Any, ...]]:
    return [(it.old, it.new, it.kind) for it in registry.history(name) if it.alias == alias]


def test_every_move_is_kept_with_who_when_and_why(served: Registry, name: str, serve: Serve) -> None:
    """Promoted, forced past the gate, rolled back twice: the alias follows, the history says it all."""
    assert served.promote(name, serve(accuracy=0.8)) == (None, 1)
    assert served.promote(name, serve(accuracy=0.9)) == (1, 2)
    other = serve(fingerprint="e" * 64, hidden=16)
    with pytest.raises(BadInput, match=r"base model fingerprint is e+, not f+; hidden size is 16, not 8") as refusal:
        served.promote(name, other)
    assert "--force REASON" in refusal.value.hint
    assert served.aliases(name) == {"champion": 2}
    assert served.promote(name, other, force_reason="the server moves\ntoo") == (2, 3)
    assert served.rollback(name, reason="it was slow") == (3, 2)
    assert served.rollback(name) == (2, 1)
    with pytest.raises(BadInput, match="no former version"):
        served.rollback(name)
    assert served.aliases(name) == {"champion": 1}
    wanted = [(None, 1, "promoted"), (1, 2, "promoted"), (2, 3, "forced"), (3, 2, "rollback"), (2, 1, "rollback")]
    assert steps(served, name) == wanted
    moves = served.history(name)
    assert [move.reason for move in moves[1:4]] == [
        "its test accuracy is 0.9, the champion's 0.8", "the server moves\ntoo", "it was slow",
    ]  # fmt: skip
    assert {move.by for move in moves} == {who()} and all(move.at[:2] == "20" for move in moves)
    page = served._store.client.get_registered_model(name)
    assert page.tags["alias.champion"].startswith("version 1, before that 2: rollback by")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "worse": ({"accuracy": 0.7}, "its test accuracy is 0.7, the champion's 0.8"),
    "as good": ({"accuracy": 0.8}, "its test accuracy is 0.8, the champion's 0.8"),
    "never tested": ({"metrics": {}}, "it has no test accuracy"),
    "other rows": ({"data": "c" * 64}, "tested on other data"),
    "tokenizer": ({"tokenizer": "u" * 64}, "tokenizer digest is u+, not t+"),
    "columns": ({"template": "{title}: {text}"}, "template takes the columns text, title, not text"),
    "labels": ({"verbalizer": (VerbalizerEntry(label=0, text=" a"),)}, "answers are the labels 0, not 0, 1"),
    "generates": ({"verbalizer": None}, "answers are the labels none, not 0, 1"),
}


def test_a_champion_is_replaced_by_what_fits_and_is_better(served: Registry, name: str, serve: Serve) -> None:
    """Each refusal says what is against it and leaves the alias alone; another alias asks for the fit only."""
    served.promote(name, serve(accuracy=0.8))
    versions = {case: serve(**{"accuracy": 0.99, **changes}) for case, (changes, _) in REFUSED.items()}
    for case, (_, reason) in REFUSED.items():
        with pytest.raises(BadInput, match=reason):
            served.promote(name, versions[case])
    assert steps(served, name) == [(None, 1, "promoted")]
    served.promote(name, 1, alias="staging")
    assert served.promote(name, versions["worse"], alias="staging") == (1, versions["worse"])
    with pytest.raises(BadInput, match="tokenizer"):
        served.promote(name, versions["tokenizer"], alias="staging")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"generation": GenerationRecord(max_tokens=125, num_beams=1)}, "don't fit into the base model's context"),
        ({"verbalizer": ()}, "its verbalizer is empty"),
    ],
)
def test_what_no_server_could_use_is_never_promoted(
    local: Registry, name: str, make_artifact: Callable[..., Any], changes: dict[str, Any], reason: str
) -> None:
    """Not by a reason either, and a search's winner of that kind is no champion."""
    with local.start_search(name, {}, {}) as search:
        version = local.register(make_artifact(**changes), name, search.run_id)
    for force in (None, "because"):
        with pytest.raises(BadInput, match=reason):
            local.promote(name, version, force_reason=force)
    outcome = local.auto_alias(name, version)
    assert outcome.alias == "challenger" and reason in outcome.reason
    assert local.aliases(name) == {"challenger": 1}


def test_of_concurrent_promotions_one_wins_and_the_others_hear_of_it(served: Registry, name: str, serve: Serve) -> None:
    """Eight programs at once, each with a better prompt than the champion: the loser is told, nobody is overwritten."""
    served.promote(name, serve(accuracy=0.5))
    versions = [serve(accuracy=0.6 + number / 100) for number in range(8)]
    start = Barrier(len(versions))

    def promote(version: int) -> str:
        own = Registry(served.tracking_uri, cache_dir=served.cache_dir)
        own.aliases(name)
        start.wait()
        try:
            own.promote(name, version)
        except OrchestratorError as error:
            return type(error).__name__
        return "won"

    with ThreadPoolExecutor(len(versions)) as threads:
        found = list(threads.map(promote, versions))
    moves = steps(served, name)
    winners = [version for version, outcome in zip(versions, found, strict=True) if outcome == "won"]
    assert set(found) <= {"won", "Overtaken", "BadInput"} and winners
    assert [new for _, new, _ in moves] == [1, *(new for _, new, _ in moves[1:])]
    assert sorted(new for _, new, _ in moves[1:]) == winners
    assert all(later[0] == earlier[1] for earlier, later in pairwise(moves))
    assert served.aliases(name)["champion"] == moves[-1][1]


def test_concurrent_searches_leave_the_best_as_champion(served: Registry, name: str, serve: Serve) -> None:
    """Whoever is overtaken compares again: in whatever order they come, the best one stays."""
    versions = [serve(accuracy=accuracy) for accuracy in (0.7, 0.9, 0.6, 0.8, 0.5, 0.65)]
    start = Barrier(len(versions))

    def finish(version: int) -> None:
        own = Registry(served.tracking_uri, cache_dir=served.cache_dir)
        own.aliases(name)
        start.wait()
        own.auto_alias(name, version)

    with ThreadPoolExecutor(len(versions)) as threads:
        list(threads.map(finish, versions))
    assert served.aliases(name)["champion"] == versions[1]
    moves = steps(served, name)
    assert all(later[0] == earlier[1] for earlier, later in pairwise(moves))
    assert len(steps(served, name, "challenger")) == len(versions)


def test_whoever_is_overtaken_is_told_by_whom(
    served: Registry, name: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the champion and the claim somebody else comes: no promotion over an unknown champion."""
    served.promote(name, serve(accuracy=0.5))
    second, third = serve(accuracy=0.6), serve(accuracy=0.7)
    claim = ledger.Ledger.claim

    def slow(self: ledger.Ledger, move: Move) -> bool:
        monkeypatch.setattr(ledger.Ledger, "claim", claim)
        Registry(served.tracking_uri, cache_dir=served.cache_dir).promote(name, third)
        return claim(self, move)

    monkeypatch.setattr(ledger.Ledger, "claim", slow)
    with pytest.raises(Overtaken, match="was moved to version 3 by somebody else"):
        served.promote(name, second)
    assert served.aliases(name) == {"champion": 3}


def test_moves_that_keep_no_history_are_noticed(
    served: Registry, name: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's pages, or a program killed between the claim and the alias: what is there counts, and goes on record."""
    monkeypatch.setattr(ledger, "SETTLE_SECONDS", 0.2)
    for accuracy in (0.5, 0.6, 0.7):
        serve(accuracy=accuracy)
    served.promote(name, 1)
    client = served._store.client
    client.set_registered_model_alias(name, "champion", "2")
    assert served.rollback(name) == (2, 1)
    client.set_registered_model_alias(name, "champion", "2")
    assert served.promote(name, 3) == (2, 3)
    wanted = [(None, 1, "promoted"), (1, 2, "elsewhere"), (2, 1, "rollback"), (1, 2, "elsewhere"), (2, 3, "promoted")]
    assert steps(served, name) == wanted
    client.delete_registered_model_alias(name, "champion")
    assert served.promote(name, 1) == (None, 1)
    assert steps(served, name)[-2:] == [(3, None, "elsewhere"), (None, 1, "promoted")]


def test_a_move_that_fails_half_way_is_taken_back(
    served: Registry, name: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.promote(name, serve(accuracy=0.5))
    serve(accuracy=0.6)
    client = served._store.client
    monkeypatch.setattr(client, "set_registered_model_alias", refuse)
    with pytest.raises(OrchestratorError, match="disk full"):
        served.promote(name, 2)
    monkeypatch.undo()
    assert served.aliases(name) == {"champion": 1}
    assert steps(served, name)[-2:] == [(1, 2, "promoted"), (2, 1, "rollback")]
    started = time.monotonic()
    assert served.promote(name, 2) == (1, 2)
    assert time.monotonic() - started < ledger.SETTLE_SECONDS


def refuse(*_: Any) -> None:
    from mlflow.exceptions import MlflowException

    raise MlflowException("disk full")


def test_a_model_of_another_program_gets_a_history_with_its_first_move(
    served: Registry, name: str, serve: Serve
) -> None:
    serve()
    served._store.client.delete_registered_model_tag(name, ledger.LEDGER_TAG)
    assert served.history(name) == []
    assert served.promote(name, 1) == (None, 1)
    assert steps(served, name) == [(None, 1, "promoted")]


def test_a_deleted_history_says_how_to_bring_it_back(served: Registry, name: str, serve: Serve) -> None:
    served.promote(name, serve())
    run_id = served._store.client.get_registered_model(name).tags[ledger.LEDGER_TAG]
    served._store.client.delete_run(run_id)
    with pytest.raises(BadInput, match="was deleted") as refusal:
        served.set_alias(name, "challenger", 1)
    assert refusal.value.hint == f"mlflow runs restore --run-id {run_id}"
    assert served.history(name) == [] and served.aliases(name) == {"champion": 1}
