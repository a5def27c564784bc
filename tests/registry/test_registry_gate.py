"""The gate, the history and the rollback, behind MLflow servers on SQLite and PostgreSQL."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from orchestrator.artifact import GenerationRecord, Manifest, VerbalizerEntry, read_manifest
from orchestrator.errors import BadInput, OrchestratorError
from orchestrator.registry import Move, Overtaken, Registry
from orchestrator.registry.aliases import ledger
from orchestrator.registry.aliases.gate import (
    EVALUATION_TAG,
    METRIC_TAG,
    ComparedVersion,
    comparison_metric,
    differences,
    verdict,
)
from orchestrator.registry.aliases.moves import who

Serve = Callable[..., int]
UNKNOWN = "the confidence is unknown, without both versions' outcomes on the same rows"


def steps(registry: Registry, name: str, alias: str = "champion") -> list[tuple[Any, ...]]:
    return [(it.old, it.new, it.kind) for it in registry.history(name) if it.alias == alias]


def test_every_move_is_kept_with_who_when_and_why(
    served: Registry, name: str, serve: Serve
) -> None:
    """Promotions, a forced one and two rollbacks move the alias and are in the history."""
    assert served.promote(name, serve(accuracy=0.8)) == (None, 1)
    assert served.promote(name, serve(accuracy=0.9)) == (1, 2)
    other = serve(fingerprint="e" * 64, hidden=16)
    with pytest.raises(
        BadInput, match=r"base model fingerprint is e+, not f+; hidden size is 16, not 8"
    ) as refusal:
        served.promote(name, other)
    assert "--force REASON" in refusal.value.hint
    assert served.aliases(name) == {"champion": 2}
    assert served.promote(name, other, force_reason="the server moves\ntoo") == (2, 3)
    assert served.rollback(name, reason="it was slow") == (3, 2)
    assert served.rollback(name) == (2, 1)
    with pytest.raises(BadInput, match="no former version"):
        served.rollback(name)
    assert served.aliases(name) == {"champion": 1}
    wanted = [
        (None, 1, "promoted"),
        (1, 2, "promoted"),
        (2, 3, "forced"),
        (3, 2, "rollback"),
        (2, 1, "rollback"),
    ]
    assert steps(served, name) == wanted
    moves = served.history(name)
    assert [move.reason for move in moves[1:4]] == [
        f"its test accuracy is 0.9, the champion's 0.8; {UNKNOWN}", "the server moves\ntoo",
        "it was slow",
    ]  # fmt: skip
    assert {move.by for move in moves} == {who()} and all(move.at[:2] == "20" for move in moves)
    page = served._store.client.get_registered_model(name)
    assert page.tags["alias.champion"].startswith("version 1, before that 2: rolled back by")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "worse": ({"accuracy": 0.7}, "its test accuracy is 0.7, the champion's 0.8"),
    "as good": ({"accuracy": 0.8}, "its test accuracy is 0.8, the champion's 0.8"),
    "never tested": ({"metrics": {}}, "it has no test accuracy"),
    "other rows": ({"data": "c" * 64}, "tested on other data"),
    "tokenizer": ({"tokenizer": "u" * 64}, "tokenizer digest is u+, not t+"),
    "columns": (
        {"template": "{title}: {text}"},
        "template takes the columns text, title, not text",
    ),
    "labels": (
        {"verbalizer": (VerbalizerEntry(label=0, text=" a"),)},
        "answers are the labels 0, not 0, 1",
    ),
    "generates": ({"verbalizer": None}, "answers are the labels none, not 0, 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_against_a_version(make_artifact: Callable[..., Path], case: str) -> None:
    """Each reason against a version is named; a better version of the same prompt has none."""
    changes, reason = REFUSED[case]
    old, new, better = (
        ComparedVersion(read_manifest(make_artifact(**it)), {})
        for it in ({"accuracy": 0.8}, {"accuracy": 0.99, **changes}, {"accuracy": 0.99})
    )
    assert (
        not differences(better.manifest, old.manifest)
        and verdict(better, old, "accuracy", "max")[0]
    )
    found = differences(new.manifest, old.manifest) or [verdict(new, old, "accuracy", "max")[1]]
    assert re.search(reason, "; ".join(found)) and not verdict(new, old, "accuracy", "max")[0]


@pytest.mark.parametrize("labels", [("0", "1"), (0.0, 1.0), ("1", 0)])
def test_labels_that_mean_the_same_fit(
    make_artifact: Callable[..., Path], labels: tuple[Any, Any]
) -> None:
    """Numbers, their texts and any order are the same labels; 1 and true are not."""

    def version(*labels: Any) -> Manifest:
        entries = tuple(
            VerbalizerEntry(label=label, text=f" {place}") for place, label in enumerate(labels)
        )
        return read_manifest(make_artifact(verbalizer=entries))

    assert differences(version(*labels), version(0, 1)) == []
    assert differences(version(0, True), version(0, 1)) == [
        "answers are the labels 0, true, not 0, 1"
    ]


def test_versions_are_compared_by_rows_that_both_were_evaluated_on(
    make_artifact: Callable[..., Path],
) -> None:
    """Versions are compared on rows that both were evaluated on.

    These are their own test rows if they are the same, else any others. A damaged tag counts as no
    evaluation.
    """
    old, new = (read_manifest(make_artifact(accuracy=it, data=str(it) * 16)) for it in (0.8, 0.7))
    assert (
        verdict(ComparedVersion(new, {}), ComparedVersion(old, {}), "accuracy", "max")[1]
        == "the champion was tested on other data"
    )
    tags = [{f"{EVALUATION_TAG}rows": f'{{"metrics": {{"accuracy": {it}}}}}'} for it in (0.6, 0.65)]
    versions = ComparedVersion(new, tags[1]), ComparedVersion(old, tags[0])
    assert verdict(*versions, "accuracy", "max")[:2] == (
        True, f"its test accuracy is 0.65, the champion's 0.6; {UNKNOWN}",
    )  # fmt: skip
    for damaged in ("", "[]", '{"metrics": 3}', '{"metrics": {"accuracy": "much"}}'):
        assert not verdict(
            ComparedVersion(new, {f"{EVALUATION_TAG}rows": damaged}),
            ComparedVersion(old, tags[0]),
            "accuracy",
            "max",
        )[0]
    assert comparison_metric(
        ComparedVersion(new, {METRIC_TAG: "loss"}), ComparedVersion(old, {})
    ) == (
        "loss",
        "min",
    )
    assert comparison_metric(
        ComparedVersion(new, {METRIC_TAG: "odd"}), ComparedVersion(old, {})
    ) == (
        "accuracy",
        "max",
    )


def test_an_alias_of_another_name_asks_for_the_fit_only(
    served: Registry, name: str, serve: Serve
) -> None:
    """Only the champion must be better; any other alias needs a version that fits."""
    served.promote(name, serve(accuracy=0.8))
    served.promote(name, 1, alias="staging")
    worse, other = serve(accuracy=0.7), serve(tokenizer="u" * 64)
    with pytest.raises(BadInput, match=r"its test accuracy is 0\.7, the champion's 0\.8"):
        served.promote(name, worse)
    assert served.promote(name, worse, alias="staging") == (1, worse)
    with pytest.raises(BadInput, match="tokenizer"):
        served.promote(name, other, alias="staging")
    assert steps(served, name) == [(None, 1, "promoted")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"generation": GenerationRecord(max_tokens=125, num_beams=1)},
            "don't fit into the base model's context",
        ),
        ({"verbalizer": ()}, "its verbalizer is empty"),
    ],
)
def test_what_no_server_could_use_is_never_promoted(
    local: Registry,
    name: str,
    make_artifact: Callable[..., Any],
    changes: dict[str, Any],
    reason: str,
) -> None:
    """A version that no server could use is refused even with a reason.

    A search makes such a version challenger, not champion.
    """
    with local.start_search(name, {}, {}) as search:
        version = local.register(make_artifact(**changes), name, search.run_id)
    for force in (None, "because"):
        with pytest.raises(BadInput, match=reason):
            local.promote(name, version, force_reason=force)
    outcome = local.auto_alias(name, version)
    assert outcome.alias == "challenger" and reason in outcome.reason
    assert local.aliases(name) == {"challenger": 1}


def test_of_concurrent_promotions_one_wins_and_the_others_hear_of_it(
    served: Registry, name: str, serve: Serve
) -> None:
    """Five concurrent promotions overwrite nothing, and the losers get an error.

    Each of the five versions is better than the champion.
    """
    served.promote(name, serve(accuracy=0.5))
    versions = [serve(accuracy=0.6 + number / 100) for number in range(5)]
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
    winners = [
        version for version, outcome in zip(versions, found, strict=True) if outcome == "won"
    ]
    assert set(found) <= {"won", "Overtaken", "BadInput"} and winners
    assert [new for _, new, _ in moves] == [1, *(new for _, new, _ in moves[1:])]
    assert sorted(new for _, new, _ in moves[1:]) == winners
    assert all(later[0] == earlier[1] for earlier, later in pairwise(moves))
    assert served.aliases(name)["champion"] == moves[-1][1]


def test_concurrent_searches_leave_the_best_as_champion(
    served: Registry, name: str, serve: Serve
) -> None:
    """An overtaken search compares again, so the best version wins in any order."""
    versions = [serve(accuracy=accuracy) for accuracy in (0.7, 0.9, 0.6, 0.8)]
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
    """A move between reading the champion and claiming the alias raises Overtaken.

    Nothing is promoted over a champion that was not compared with.
    """
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
    """Moves outside the history count, and are recorded with the next move.

    They come from MLflow's pages, or from a program killed between the claim and the alias.
    """
    monkeypatch.setattr(ledger, "SETTLE_SECONDS", 0.2)
    for accuracy in (0.5, 0.6, 0.7):
        serve(accuracy=accuracy)
    served.promote(name, 1)
    client = served._store.client
    client.set_registered_model_alias(name, "champion", "2")
    assert served.rollback(name) == (2, 1)
    client.set_registered_model_alias(name, "champion", "2")
    assert served.promote(name, 3) == (2, 3)
    wanted = [
        (None, 1, "promoted"),
        (1, 2, "elsewhere"),
        (2, 1, "rollback"),
        (1, 2, "elsewhere"),
        (2, 3, "promoted"),
    ]
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


def test_a_deleted_history_says_how_to_bring_it_back(
    served: Registry, name: str, serve: Serve
) -> None:
    served.promote(name, serve())
    run_id = served._store.client.get_registered_model(name).tags[ledger.LEDGER_TAG]
    served._store.client.delete_run(run_id)
    with pytest.raises(BadInput, match="was deleted") as refusal:
        served.set_alias(name, "challenger", 1)
    assert refusal.value.hint == f"mlflow runs restore --run-id {run_id}"
    assert served.history(name) == [] and served.aliases(name) == {"champion": 1}
