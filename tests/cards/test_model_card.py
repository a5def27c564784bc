"""Model cards: what they say about a version, and that no text of a job can break them."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import metadata_faults
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from models import backbone_of, model_folder, tiny_model
from small_jobs import Command, job_document
from test_artifact import manifest
from test_exchange import Store, moved_prompt

from orchestrator.artifact import BaseModelRecord, DataRecord, PromptArtifact, VerbalizerEntry
from orchestrator.cli.workbench.card import CardFacts, model_card
from orchestrator.cli.workbench.card.usage import job_text, peft_code
from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.job.labels import spelled
from orchestrator.job.yaml import load_job
from orchestrator.models.scoring import answer_scores
from orchestrator.registry import Move, VersionSummary, read_evaluations
from orchestrator.registry.aliases.gate import EVALUATION_TAG
from orchestrator.serving.offline import OfflineModel
from orchestrator.utils.markdown import code, quoted

HEADINGS = ["Task", "Data", "Results", "Use with PEFT", "Use with prompt-orchestrator", "Limits",
            "Licence"]  # fmt: skip


def parsed(body: str) -> Any:
    """Parse a card's text as the hub does: CommonMark with tables."""
    return MarkdownIt("commonmark").enable("table").parse(body)


def headings(body: str) -> list[str]:
    tokens = parsed(body)
    return [
        tokens[place + 1].content
        for place, token in enumerate(tokens)
        if token.type == "heading_open" and token.tag == "h2"
    ]


def blocks(body: str) -> dict[str, str]:
    """Return the card's blocks of code, by their languages."""
    return {token.info: token.content for token in parsed(body) if token.type == "fence"}


def tables(body: str) -> list[list[list[str]]]:
    """Return the cells of each table, row by row."""
    found: list[list[list[str]]] = []
    tokens = parsed(body)
    for place, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(tokens[place + 1].content)
    return found


def facts(**changes: Any) -> CardFacts:
    """Return facts about the manifest of test_artifact, whose ``changes`` are of its fields."""
    verbalizer = (VerbalizerEntry(label=0, text=" no"), VerbalizerEntry(label=1, text=" yes"))
    return CardFacts("spam", 3, "adapter", manifest(**{"verbalizer": verbalizer, **changes}))


def base_record(**changes: Any) -> BaseModelRecord:
    return manifest().base_model.model_copy(update=changes)


# Any text


TRICKY = ["```", "---", "\n---\n", "|", "`", "\r", "<script>", "# Licence", "{text}", "{{", "}",
          "\\", "'''", '"', "\u2028", "\x00", "- a: b", "${HOME}", "🙂", "{*}", "{_}"]  # fmt: skip
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(TRICKY)), max_size=6).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_any_text_gives_a_card_that_is_read_back(
    template: str, answer: str, label: str, reason: str
) -> None:
    """Templates, label texts and reasons of any characters leave metadata and sections whole.

    The code of the card compiles, and its job file has the very same template and label texts.
    """
    entries = (VerbalizerEntry(label=label, text=answer), VerbalizerEntry(label=7, text=" 7"))
    card_facts = replace(
        facts(template=template, verbalizer=entries),
        moves=[Move("champion", 1, None, 3, "promoted", reason)],
    )
    card = ModelCard(str(model_card(card_facts)))
    assert card.data.to_dict()["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.3
    assert headings(card.text) == HEADINGS
    found = blocks(card.text)
    assert set(found) == {"text", "python", "yaml", "sh"}
    compile(found["python"], "card", "exec")
    data = yaml.safe_load(job_text(card_facts))["data"]
    assert data["template"] == template and data["verbalizer"][label] == answer
    labels = tables(card.text)[0]
    assert labels[1] == [code(spelled(label)), code(quoted(answer))] and len(labels) == 3


@given(TEXTS)
@settings(max_examples=30, deadline=None)
def test_the_names_of_models_and_data_stay_metadata(name: str) -> None:
    """A name that the hub's rules refuse is left out of the metadata, which the hub accepts."""
    record = base_record(id=name or "x")
    card_facts = facts(base_model=record, data=DataRecord(path=name, fingerprint="d", rows={}))
    card = ModelCard(str(model_card(replace(card_facts, name=name or "x"))))
    assert metadata_faults(str(card)) == [] and card.data.library_name == "peft"
    assert headings(card.text) == HEADINGS


def test_the_metadata_name_what_is_on_the_hub() -> None:
    """Hub ids become base_model and datasets; folders, files and built-in models do not."""
    record = base_record(id="Qwen/Qwen2.5-0.5B")
    data = DataRecord(path="ucirvine/sms_spam", fingerprint="d", rows={"test": 5})
    card = model_card(facts(base_model=record, data=data))
    found = card.data.to_dict()
    assert found["base_model"] == "Qwen/Qwen2.5-0.5B" and found["datasets"] == ["ucirvine/sms_spam"]
    assert (found["library_name"], found["pipeline_tag"]) == ("peft", "text-classification")
    assert "base_model:adapter:Qwen/Qwen2.5-0.5B" in found["tags"]
    assert "prompt-tuning" in found["tags"]
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"]["type"] == "ucirvine/sms_spam" and result["dataset"]["split"] == "test"
    assert "https://huggingface.co/datasets/ucirvine/sms_spam" in card.text
    for base, place in (("/home/ann/model", '{"train": "/home/ann/rows/train.csv"}'),
                        ("builtin:quickstart", "builtin:quickstart")):  # fmt: skip
        record = base_record(id=base)
        made = model_card(
            facts(base_model=record, data=DataRecord(path=place, fingerprint="d", rows={}))
        )
        assert made.data.get("base_model") is None and made.data.get("datasets") is None
        assert "/home/ann" not in str(made)


def test_a_generating_prompt_is_tagged_as_text_generation() -> None:
    """Without a verbalizer the task is generation, and the code generates."""
    made = model_card(facts(verbalizer=None))
    assert made.data.get("pipeline_tag") == "text-generation"
    assert "model.generate(**inputs, max_new_tokens=8" in blocks(made.text)["python"]


def test_a_metric_that_is_no_number_is_left_out_of_the_metadata() -> None:
    """The hub takes numbers only, and a text without results names no model index."""
    made = model_card(facts(metrics={"test": {"accuracy": float("nan")}}))
    assert "model-index" not in made.data.to_dict() and "nan" in made.text


# Facts of a registry


def exported_card(command: Command, model: str, folder: Path) -> ModelCard:
    said = command("export", model, folder, "--card", "--json")
    assert said.code == 0, said.err
    assert said.document["card"] == str(folder / "README.md")
    return ModelCard.load(folder / "README.md")


def test_a_card_has_the_metrics_with_their_confidence_seeds_and_baselines(
    store: Store, command: Command, tmp_path: Path
) -> None:
    """Test metrics stand beside intervals and baselines; the seeds' spread and other data follow.

    Only the evaluation of all rows of the other data is shown, not that of a part of them.
    """
    card = exported_card(command, "prompt", tmp_path / "adapter")
    assert headings(card.text) == HEADINGS
    _, data, test, validation, seeds, others = tables(card.text)
    assert test == [
        ["", "`accuracy`", "`loss`, lower is better"],
        ["this prompt", "0.75", "0.5"],
        ["95 % interval", "0.5 to 0.938", ""],
        ["without a prompt", "0.25", ""],
    ]
    assert validation[1] == ["this prompt", "0.9", "0.4"]
    assert [row[1:] for row in seeds] == [["`accuracy`"], ["0.9"], ["0.9"], ["0.0125"]]
    assert "under seeds 0, 1, 2" in card.text and "The seeds are fresh" in card.text
    assert others == [
        ["data", "split", "rows", "`accuracy`"], ["`other.csv`", "`test`", "20", "0.5"],
    ]  # fmt: skip
    assert ["sha256 of all rows", f"`{'d' * 64}`"] in data
    assert ["sha256 of the test rows", f"`{'e' * 64}`"] in data
    assert "ranked its trials by `accuracy`" in card.text
    results = card.data.to_dict()["model-index"][0]["results"]
    values = {
        (it["dataset"]["name"], metric["type"]): metric["value"]
        for it in results
        for metric in it["metrics"]
    }
    assert values == {
        ("rows", "accuracy"): 0.75,
        ("rows", "loss"): 0.5,
        ("other.csv", "accuracy"): 0.5,
    }


def test_a_card_says_what_is_not_known(store: Store, command: Command, tmp_path: Path) -> None:
    """Without outcomes the confidence is unknown, and without a record the spread over seeds is."""
    prefix = exported_card(command, "prefix:1", tmp_path / "prefix")
    assert "so the confidence is unknown" in prefix.text and "95 % interval" not in prefix.text
    assert "was not measured on other data" in prefix.text
    assert "the alias" not in prefix.text.lower()
    lone = model_card(facts())
    assert "trained with seed `1`. Its spread over seeds is not recorded" in lone.text


def test_a_card_of_an_imported_prompt_says_that_it_has_no_metrics(
    store: Store, command: Command, tmp_path: Path
) -> None:
    """An import has no metrics until it is evaluated; its card has no model index."""
    folder = tmp_path / "adapter"
    assert command("export", "prompt", folder).code == 0
    assert not (folder / "README.md").exists()
    said = command("import", folder, "--name", "taken-in", "--job", store.job)
    assert said.code == 0, said.err
    card = exported_card(command, "taken-in:1", tmp_path / "again")
    assert "This version has no metrics of its own" in card.text
    assert "imported from a PEFT folder" in card.text and "seed" not in card.text
    assert "model-index" not in card.data.to_dict()


def test_no_secret_is_in_a_card(
    store: Store, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, logins and values of secret variables are hidden in templates, reasons and paths."""
    secrets = {"HF_TOKEN": "hf_abcdefghijklmnopqrstuv", "SOME_API_KEY": "tops3cret-value"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    artifact = moved_prompt(store.backbone, "prompt")
    hidden = "{text} tops3cret-value hf_zyxwvutsrqponmlkji s3://me:pass1234@host/x"
    changes = {
        "template": hidden,
        "data": DataRecord(path="s3://me:pass1234@host/a.csv", fingerprint="d", rows={}),
        "verbalizer": (VerbalizerEntry(label="hf_abcdefghijklmnopqrstuv", text=" a"),
                       VerbalizerEntry(label=1, text=" tops3cret-value")),
    }  # fmt: skip
    described = artifact.manifest.model_copy(update=changes)
    saved = PromptArtifact(artifact.tensors, described).save(tmp_path / "secretive")
    with store.registry.start_search("secretive", {}, {}) as search:
        store.registry.register(saved, "secretive", search.run_id)
    store.registry.set_alias("secretive", "staging", 1, reason="see https://u:pw123456@h/?key=abcd")
    text = str(exported_card(command, "secretive@staging", tmp_path / "adapter"))
    for secret in (*secrets.values(), "hf_zyxw", "pass1234", "pw123456", "key=abcd"):
        assert secret not in text
    assert "***" in text and "Why: `see https://***@h/?key=***`" in text


def test_the_licence_comes_from_the_base_models_own_card(
    store: Store, command: Command, tmp_path: Path
) -> None:
    """The licence is that of the README in the base model's folder; without one it is unknown."""
    assert "is not known here" in exported_card(command, "prompt", tmp_path / "one").text
    base = shutil.copytree(model_folder(), tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine-1.0\n---\n# Base\n")
    artifact = moved_prompt(store.backbone, "prompt")
    record = artifact.manifest.base_model.model_copy(update={"id": str(base)})
    described = artifact.manifest.model_copy(update={"base_model": record})
    saved = PromptArtifact(artifact.tensors, described).save(tmp_path / "licensed")
    with store.registry.start_search("licensed", {}, {}) as search:
        store.registry.register(saved, "licensed", search.run_id)
    card = exported_card(command, "licensed:1", tmp_path / "two")
    assert "The licence of the base model is `other mine-1.0`." in card.text


# Code and commands


def printed(code: str) -> str:
    """Run the code of a card and return what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), torch.no_grad():
        exec(compile(code, "card", "exec"), {})
    return out.getvalue().strip()


@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("text", ["great movie", "spam or ham", "a fox"])
def test_the_code_of_a_card_gives_our_answer(
    store: Store, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, text: str,
) -> None:  # fmt: skip
    """PEFT classifies a row as we do, with the code of the card and the exported folder."""
    card = exported_card(command, f"{name}:1", tmp_path / "adapter")
    code = blocks(card.text)["python"]
    assert f"base = {model_folder().name!r}" in code
    code = code.replace(repr(model_folder().name), repr(str(model_folder())))
    code = code.replace("Write the text here.", text)
    monkeypatch.chdir(tmp_path)
    ours = OfflineModel.from_artifact(store.artifact(name), store.backbone)
    (answer,) = ours.classify([text])
    assert printed(code) == str(answer["label"])
    losses = eval(printed(f"{code}\nprint([loss(answers[0]), loss(answers[1])])").splitlines()[1])
    shares = (-torch.tensor(losses)).softmax(0).tolist()
    assert shares == pytest.approx(list(answer["probs"].values()), rel=1e-3)


def test_the_job_file_of_a_card_imports_the_folder(
    store: Store, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the card's job file and rows of one's own, the folder becomes the same prompt again."""
    card = exported_card(command, "prompt", tmp_path / "adapter")
    found = blocks(card.text)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.folder}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    job_document(tmp_path)  # writes the rows of three files
    (tmp_path / model_folder().name).symlink_to(model_folder())
    (tmp_path / "job.yaml").write_text(found["yaml"])
    assert load_job(tmp_path / "job.yaml").data.template == "{text}\nspam?"
    words = found["sh"].splitlines()[0].replace("--name prompt", "--name carded").split()
    assert words[:3] == ["orchestrator", "import", "adapter"]
    said = command(*words[1:], "--renamed-base-model")
    assert said.code == 0, said.err
    again = PromptArtifact.load(store.artifact("carded")).manifest
    original = PromptArtifact.load(store.artifact("prompt")).manifest
    assert again.template == original.template and again.verbalizer == original.verbalizer


def scored(code: str, names: dict[str, Any]) -> dict[Any, float]:
    """Run a card's code from its row on; return the log-probability of each label's answer."""
    lines = code[code.index("row = ") :]
    exec(compile(re.sub(r"^print.*$", "", lines, flags=re.MULTILINE), "card", "exec"), names)
    return {label: -names["loss"](text) for label, text in names["answers"].items()}


@pytest.mark.parametrize(
    ("family", "template"),
    [("llama", "{text}\nspam?"), ("llama", "it was {text} : {_} ."), ("t5", "is {text} spam?")],
)
def test_the_code_of_a_card_scores_answers_as_our_encoder_does(family: str, template: str) -> None:
    """Blank, white space and end tokens are where tuning puts them, in causal models and T5."""
    backbone = backbone_of(family)
    texts = {0: " a quick no" if family == "llama" else "a quick no", 1: " yes"}
    kind = "seq2seq" if family == "t5" else "causal"
    verbalizer = Verbalizer(tuple(texts), tuple(texts.values()))
    encoder = Encoder(backbone.tokenizer, Template(template), verbalizer, 60, 8, kind)  # type: ignore[arg-type]
    ids = encoder.row_ids({"text": "the lazy dog"})
    (ours,) = answer_scores(backbone, None, [ids], [0], [encoder.scored_answers])
    entries = tuple(VerbalizerEntry(label=label, text=text) for label, text in texts.items())
    record = base_record(model_type=family)
    code = peft_code(facts(template=template, verbalizer=entries, base_model=record))
    with torch.no_grad():
        found = scored(
            code.replace("Write the text here.", "the lazy dog"),
            {"tokenizer": backbone.tokenizer, "model": copy.deepcopy(tiny_model(family)).eval()},
        )
    assert [found[0], found[1]] == pytest.approx(ours.tolist(), rel=1e-4)


def test_an_evaluation_that_somebody_edited_is_left_out() -> None:
    """Tags can be edited in MLflow; what is no record any more is not shown."""
    broken = ["", "[]", "{}", '{"metrics": {"accuracy": "high"}}', '{"metrics": null}']
    tags = {f"{EVALUATION_TAG}{place}": text for place, text in enumerate(broken)}
    version = VersionSummary("m", 1, (), datetime.now(UTC), "READY", None, "", tags, {}, {}, {})
    assert read_evaluations(version) == []
