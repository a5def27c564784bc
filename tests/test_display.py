"""Results shown as text for people and as documents for programs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from small_jobs import Command, Finished

from orchestrator.cli.pages import registry as pages
from orchestrator.cli.pages.search import run_summary
from orchestrator.cli.pages.table import table
from orchestrator.registry import ModelSummary, Registry, VersionDetail, VersionSummary

ESCAPE = "\x1b[2J\u202espam"  # clears a terminal, and turns the text around


def version(**changes: Any) -> VersionSummary:
    fields: dict[str, Any] = {
        "name": "spam", "version": 3, "aliases": ("champion",),
        "created_at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        "status": "READY", "run_id": "r", "description": "", "tags": {}, "config": {},
        "metrics": {}, "baselines": {},
    }  # fmt: skip
    return VersionSummary(**{**fields, **changes})


def model(**changes: Any) -> ModelSummary:
    fields: dict[str, Any] = {
        "name": "spam", "latest": 2, "aliases": {"champion": 1, "challenger": 2},
        "champion_metrics": {"test": {"accuracy": 0.97}}, "is_prompt": True,
    }  # fmt: skip
    return ModelSummary(**{**fields, **changes})


def test_a_table_is_as_wide_as_its_content() -> None:
    """Columns are aligned, without trailing spaces."""
    assert table(("a", "bb"), [("xyz", 1), ("", 22)]) == ["a    bb", "xyz  1", "     22"]


def test_the_models_table() -> None:
    """The table has every model with its aliases and its champion's score, and the next step."""
    lines = pages.models_table(
        [model(), model(name="other", is_prompt=False, champion_metrics=None, aliases={})]
    )
    assert lines[0].split() == ["model", "newest", "aliases", "champion", "on", "test"]
    assert "challenger=2, champion=1" in lines[1] and "accuracy 0.970" in lines[1]
    assert "not a soft prompt" in lines[2]
    assert lines[-1] == "next: orchestrator models NAME"
    assert pages.models_table([])[-1].startswith("next: orchestrator demo")


def test_what_a_registry_holds_cannot_move_the_cursor() -> None:
    """Names, aliases, tags and texts from the store are escaped: writers are not trusted."""
    config = {"init": {"text": ESCAPE}, "num_virtual_tokens": 5, "learning_rate": 0.1, "seed": 0}
    lines = [
        *pages.models_table([model(name=ESCAPE, champion_metrics={"test": {ESCAPE: 1.0}})]),
        *pages.versions_table(ESCAPE, [version(name=ESCAPE, config=config)]),
        *pages.version_page(VersionDetail(version(name=ESCAPE), "s", None, ESCAPE)),
    ]
    for line in lines:
        assert line.isprintable(), line


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        {},
        {"test": None},
        {"test": {"accuracy": "high"}},
        {"test": [1]},
        {"validation": {"loss": 1.0}},
    ],
)
def test_a_listing_survives_facts_that_somebody_edited(metrics: Any) -> None:
    """A model whose tags were edited is still listed, without the invalid values."""
    lines = pages.versions_table("spam", [version(metrics=metrics, config={"init": 3})])
    assert lines[1].split() == ["3", "champion", "2026-01-02", "03:04"]


def test_a_version_that_cannot_be_read_says_why() -> None:
    """The version's page shows the problem and a next step."""
    page = pages.version_page(VersionDetail(version(), "source", None, "the files were deleted"))
    assert "the files were deleted" in page[1] and page[-1] == "next: orchestrator models spam"


def test_the_summary_of_a_search(finished: Finished) -> None:
    """The summary compares prompt and baselines, and has the version and the next step."""
    text = "\n".join(run_summary(finished.document, finished.job))
    for shown in (
        "8 trials in",
        f"best trial {finished.document['best']['trial']}",
        "without a prompt",
        "tuned prompt",
        "written instruction",
        "registered tiny version 1, alias champion",
        "next: orchestrator serve tiny",
    ):
        assert shown in text, text


def test_a_summary_without_champion_or_version(finished: Finished) -> None:
    """A challenger is offered for promotion; a search that registers nothing says so."""
    document = {**finished.document, "model": {"name": "tiny", "version": 2, "alias": "challenger"}}
    assert run_summary(document, finished.job)[-1].startswith("next: orchestrator promote tiny 2")
    assert "register_top" in run_summary({**document, "model": None}, finished.job)[-1]


def test_the_models_verb(
    finished: Finished, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``models`` shows the list, one model's versions or one full version, as text and as JSON."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.tracking_uri)
    assert "tiny" in command("models").out
    (listed,) = command("models", "--json").document
    assert listed["name"] == "tiny" and listed["aliases"]["champion"] == 1
    assert "champion" in command("models", "tiny").out
    versions = command("models", "tiny", "--json").document
    assert versions["versions"][-1]["version"] == 1
    page = command("models", "tiny@champion").out
    for text in (
        "tiny version 1",
        "prompt_tuning",
        "spam?",
        "0 = ' a quick no'",
        "orchestrator serve tiny:1",
    ):
        assert text in page, page
    document = command("models", "tiny:1", "--json").document
    assert document["manifest"]["search"] == finished.document["search"]
    assert json.dumps(document["manifest"]["metrics"]["test"]) == json.dumps(
        finished.document["best"]["metrics"]["test"]
    )


def test_promote_and_rollback(
    finished: Finished, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both verbs say where the alias was and what comes next, as text and as JSON."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.tracking_uri)
    registry = Registry(finished.tracking_uri, cache_dir=finished.folder / "cache")
    artifact = registry.fetch("tiny", 1)
    name = "copied"
    for _ in range(2):
        registry.register(artifact, name, finished.document["mlflow"]["run_id"])
    assert command("promote", name, 1).out.startswith("copied@champion is version 1.")
    refused = command("promote", name, 2)
    assert refused.code == 2 and "--force REASON" in refused.err  # the same prompt is no better
    said = command("promote", name, 2, "--force", "a trial")
    assert "it was on version 1" in said.out and "orchestrator rollback copied" in said.out
    assert command("rollback", name, "--json").document == {
        "name": name,
        "alias": "champion",
        "from": 2,
        "to": 1,
    }
    moves = command("models", name, "--json").document["history"]
    assert [(it["old"], it["new"], it["kind"], it["reason"]) for it in moves] == [
        (None, 1, "promoted", ""), (1, 2, "forced", "a trial"), (2, 1, "rollback", ""),
    ]  # fmt: skip
    assert "before that 1: forced past the gate by" in command("models", name).out
    refused = command("promote", name, 9)
    assert refused.code == 2 and "no version 9" in refused.err
