"""One service for many tasks: prompts of ten job files on one model, in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import backbone_of, save_family
from test_artifact import manifest
from test_jobs import ROOT, SHORT, TINY, document, stand_ins
from test_serving_methods import GREEDY, ask_together

from orchestrator.artifact import BaseModelRecord, PromptArtifact
from orchestrator.job.spec import JobSpec
from orchestrator.job.yaml import load_job
from orchestrator.models.backbone import Backbone
from orchestrator.search.prepare import prepare, verbalizer_entries
from orchestrator.serving.engine.engine import EngineLimits
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.served_prompt import ServedPrompt, load_prompt
from orchestrator.tuning.checkpoint import Checkpoint
from tests.benchmarks.experiments import run_experiment

JOBS = (
    "quickstart", "sms-spam", "trec6", "init-ablation", "length-ablation", "low-data",
    "interpretability", "personal", "prefix-placement", "ensembling",
)  # fmt: skip
ONE_TRIAL = ("search.trials=1",)
TEXTS = ("the soup was cold and the waiter rude", "win a prize", "")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbone_of("llama")


@pytest.fixture(scope="module")
def prompts(
    backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ServedPrompt]:
    """Prompts with each job's template, words and method, tuned a few steps on its rows."""
    folder = tmp_path_factory.mktemp("jobs")
    model = save_family(folder / "model", "llama")
    found = {}
    for name in JOBS:
        file, place = ROOT / "jobs" / f"{name}.yaml", folder / name
        place.mkdir()
        changes = [
            it
            for it in stand_ins(document(file), place, models=True)
            if not it.startswith("base_model.id=")
        ]
        job = load_job(file, [*TINY, *SHORT, *changes, *ONE_TRIAL, f"base_model.id={model}"])
        found[name] = load_prompt(backbone, tuned(job, backbone, place / "prompt"), name, 1)
    return found


def tuned(job: JobSpec, backbone: Backbone, folder: Path) -> Path:
    """Tune the job's single trial and save its artifact."""
    (trial,) = run_experiment(job).trials
    tensors = {
        name: tensor.float().numpy()
        for name, tensor in Checkpoint.from_bytes(trial.checkpoint).best().items()
    }
    record = {name: getattr(backbone.info, name) for name in BaseModelRecord.model_fields}
    made = manifest(
        method=job.method,
        num_virtual_tokens=trial.config["num_virtual_tokens"],
        config=trial.config,
        template=job.data.template,
        verbalizer=verbalizer_entries(
            prepare(job).task.encoder
        ),  # the words of the labels that the rows have
        max_input_tokens=job.data.max_input_tokens,
        max_target_tokens=job.data.max_target_tokens,
        base_model=BaseModelRecord(**record),
    )
    return PromptArtifact(tensors, made).save(folder)


def asked(prompt: ServedPrompt, text: str) -> dict[str, str]:
    return dict.fromkeys(prompt.encoder.template.columns, text)


def test_ten_tasks_classify_in_one_batch(
    backbone: Backbone, prompts: dict[str, ServedPrompt]
) -> None:
    """Three rows of each task share one forward, and get what each gets alone, offline."""
    rows = {
        name: [it.encode(asked(it, text), it.longest_answer) for text in TEXTS]
        for name, it in prompts.items()
    }
    answers, batches = ask_together(
        backbone,
        lambda engine: [engine.classify(prompt, rows[name]) for name, prompt in prompts.items()],
        limits=EngineLimits(
            max_rows=1024
        ),  # an answer of several tokens takes a row for each label
    )
    assert batches[0] == ("classify", len(JOBS) * len(TEXTS))
    for prompt, probs in zip(prompts.values(), answers, strict=True):
        alone = OfflineModel(backbone, prompt).classify([asked(prompt, text) for text in TEXTS])
        for row, one in zip(probs, alone, strict=True):
            assert row == pytest.approx(list(one["probs"].values()), rel=1e-5)
    assert len({len(prompt.labels) for prompt in prompts.values()}) >= 4
    assert len({prompt.manifest.method for prompt in prompts.values()}) == 2


def test_ten_tasks_write_in_one_batch(backbone: Backbone, prompts: dict[str, ServedPrompt]) -> None:
    rows = {name: [it.encode(asked(it, text), 8) for text in TEXTS] for name, it in prompts.items()}
    answers, batches = ask_together(
        backbone,
        lambda engine: [
            engine.complete(prompt, rows[name], GREEDY) for name, prompt in prompts.items()
        ],
    )
    assert batches[0] == ("prefill", len(JOBS) * len(TEXTS))
    for prompt, texts in zip(prompts.values(), answers, strict=True):
        alone = OfflineModel(backbone, prompt).complete(
            [asked(prompt, text) for text in TEXTS], GREEDY
        )
        assert [it.text for it in texts] == [it.text for it in alone]
