"""A search's report page and pictures, made from the files in its folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from xml.etree import ElementTree

import pytest
from small_jobs import Command, Finished

from orchestrator.errors import BadInput
from orchestrator.job.metrics import names_of
from orchestrator.registry import Registry
from orchestrator.search.report import read_facts
from orchestrator.search.report.figures import FIGURES, draw
from orchestrator.search.report.page import page
from orchestrator.search.state.folder import SearchFolder


@pytest.fixture
def folder(finished: Finished) -> SearchFolder:
    return SearchFolder(
        finished.folder / ".orchestrator" / "searches" / finished.document["search"]
    )


def test_facts_are_the_searchs_own(finished: Finished, folder: SearchFolder) -> None:
    """All trials, curves and best evaluations equal those in the search's document."""
    facts = read_facts(folder)
    told = {trial["id"]: trial for trial in finished.document["trials"]}
    assert [trial.id for trial in facts.trials] == list(told)
    for trial in facts.trials:
        assert (
            trial.metrics == told[trial.id]["metrics"] and trial.status == told[trial.id]["status"]
        )
        assert trial.points == [(it.step, it.metrics) for it in finished.reports[trial.id]]
    assert facts.winner is not None and facts.winner.id == finished.document["best"]["trial"]
    assert facts.run_id == finished.document["mlflow"]["run_id"]


def test_the_winners_answers_are_counted(finished: Finished) -> None:
    """The confusion matrix counts each test row once; its diagonal gives the accuracy.

    It is not among the metrics.
    """
    best = finished.document["best"]
    counts = best["confusion"]["counts"]
    rows = sum(map(sum, counts))
    assert best["confusion"]["labels"] == [0, 1] and rows == 16
    assert (counts[0][0] + counts[1][1]) / rows == best["metrics"]["test"]["accuracy"]
    assert [figures["label"] for figures in best["classes"]] == [0, 1]
    assert [figures["support"] for figures in best["classes"]] == [sum(row) for row in counts]
    assert set(best["metrics"]["validation"]) == {"accuracy", "exact_match", "loss"}
    assert set(best["metrics"]["test"]) == {*names_of("labels"), *names_of("targets")}


def test_every_picture_is_drawn_and_logged_with_the_page(
    finished: Finished, folder: SearchFolder
) -> None:
    """The parent run has the page and each picture; the page is in the search's folder too."""
    import mlflow

    client = mlflow.MlflowClient(finished.tracking_uri)
    run_id = finished.document["mlflow"]["run_id"]
    logged = {file.path for file in client.list_artifacts(run_id, "figures")}
    assert logged == {f"figures/{name}.svg" for name in FIGURES}
    assert "report.html" in {file.path for file in client.list_artifacts(run_id)}
    text = folder.report.read_text()
    assert (Path(client.get_run(run_id).info.artifact_uri) / "report.html").read_text() == text


def test_the_page_stands_alone(folder: SearchFolder) -> None:
    """The page embeds valid SVG, loads nothing, runs no script, and lists every trial."""
    text = folder.report.read_text()
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(pictures) == len(FIGURES)
    for picture in pictures:
        assert ElementTree.fromstring(b64decode(picture)).tag.endswith("svg")
    assert not re.search(r'(src|href)="(?!data:)|<script|@import|url\(', text)
    assert 'name="viewport"' in text
    for trial in read_facts(folder).trials:
        assert f"<td>{trial.id}</td>" in text


def test_what_a_job_says_is_shown_and_not_rendered(folder: SearchFolder) -> None:
    facts = read_facts(folder)
    job = facts.job.model_copy(
        update={"data": facts.job.data.model_copy(update={"template": "<b>{text}</b>"})}
    )
    text = page(
        type(facts)("<i>x</i>", job, facts.run_id, facts.trials, facts.baselines, facts.result), {}
    )
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;{text}&lt;/b&gt;" in text


def test_a_search_that_is_not_finished_has_a_page_too(folder: SearchFolder, tmp_path: Path) -> None:
    """The page has what exists so far, without result, confusion matrix and cost."""
    copy = SearchFolder(tmp_path / "half")
    shutil.copytree(folder.path, copy.path)
    copy.result.unlink()
    lines = copy.journal.read_bytes().splitlines(keepends=True)
    first = next(place for place, line in enumerate(lines) if b'"reported"' in line)
    copy.journal.write_bytes(b"".join(lines[: first + 1]))
    facts = read_facts(copy)
    assert 0 < len(facts.trials) <= 8
    figures = draw(facts)
    assert "curves" in figures and {"confusion", "cost"}.isdisjoint(figures)
    assert "is not finished" in page(facts, figures)
    copy.description.unlink()
    with pytest.raises(BadInput, match="can't be resumed"):
        read_facts(copy)


def test_the_verb_writes_and_logs(
    finished: Finished, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.folder)
    said = command("report", "latest", "--out", "mine.html", "--json")
    assert said.code == 0 and said.document["logged"]
    assert (finished.folder / "mine.html").read_text().startswith("<!doctype html>")
    assert command("report", "nosuch").code == 2


def test_versions_say_what_they_are(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version has signature, example, nearest words and lineage; runs have their tags."""
    import mlflow

    registry = Registry(finished.tracking_uri)
    summary = registry.resolve("tiny:1")
    assert (
        len(summary.nearest) == summary.config["num_virtual_tokens"]
        and len(summary.nearest[0]) == 3
    )
    assert (
        "Nearest words of the vocabulary" in summary.description
        and "zero shot" in summary.description
    )
    assert (
        summary.tags["orchestrator.metric"] == "loss"
        and summary.tags["search"] == finished.document["search"]
    )
    client = mlflow.MlflowClient(finished.tracking_uri)
    location = client.get_model_version_download_uri("tiny", "1")
    example = json.loads((Path(location) / "input_example.json").read_text())
    first = json.loads((finished.folder / "test.jsonl").read_text().splitlines()[0])
    assert example["data"] == [[first["text"]]]
    for run_id in (finished.document["mlflow"]["run_id"], summary.run_id):
        tags = client.get_run(run_id).data.tags
        assert (
            tags["method"] == "prompt_tuning" and tags["base_model"] == finished.job.base_model.id
        )
        assert tags["base_model_revision"] == "main" and len(tags["data_fingerprint"]) == 64
        assert tags["orchestrator.version"]
    parent = client.get_run(finished.document["mlflow"]["run_id"]).data.tags
    assert float(parent["device_hours"]) > 0 and "| zero shot |" in parent["mlflow.note.content"]
    child = client.get_run(summary.run_id).data.tags
    assert (
        child["num_virtual_tokens"] == str(summary.config["num_virtual_tokens"]) and child["init"]
    )


def test_looking_at_help_imports_no_plotting() -> None:
    code = (
        "import sys, orchestrator.cli, orchestrator.search.report; "
        "print({'matplotlib', 'mlflow', 'ray'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"
