"""Parts of the whole-search benchmarks: peers train as we do, and figures are correct.

One of our searches runs through them at toy size. The other programs that they start only run in
real measurements.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.job.spec import BaseModelSpec
from orchestrator.job.yaml import load_job
from orchestrator.models.backbone import Backbone, PromptTensors, load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.search.prepare import Prepared, prepare
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.prompts.inits import InitContext, initial_prompt
from orchestrator.tuning.step import packed_gradients
from tests.benchmarks import (
    jobs,
    methods,
    nodes,
    paces,
    plans,
    population,
    processes,
    search,
    trials,
)
from tests.benchmarks.measure import Skipped
from tests.benchmarks.our_search import plain_backbone
from tests.benchmarks.peer_training import (
    IGNORED,
    Data,
    PlainTrial,
    chosen,
    padded,
    start_ids,
    trainer,
)
from tests.benchmarks.processes import Broken, Ran

CONFIG = {"seed": 3, "num_virtual_tokens": 5, "learning_rate": 0.5}
SEARCH = {
    "search": {
        "space": {"num_virtual_tokens": [2, 3], "seed": [0, 1]},
        "trials": 4,
        "scheduler": "fifo",
    },
    "train": {"steps": 2, "batch_size": 4, "evaluate_every": 1},
    "resources": {"trials_per_worker": 2},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("peer")
    file = folder / "job.yaml"
    file.write_text(json.dumps({**jobs.random_model(folder), **SEARCH}))
    return prepare(load_job(file))


@pytest.fixture
def backbone(prepared: Prepared) -> Backbone:
    return load_backbone(resolve_model(prepared.job.base_model))


@pytest.fixture
def peer(prepared: Prepared, backbone: Backbone) -> PlainTrial:
    return PlainTrial(backbone.model, Data.of(prepared.task), CONFIG, batch=4)


def prompt_of(peer: PlainTrial) -> torch.Tensor:
    (prompt,) = (one for one in peer._tuned.parameters() if one.requires_grad)
    return prompt


def test_a_peer_has_our_loss_and_gradient(
    prepared: Prepared, backbone: Backbone, peer: PlainTrial
) -> None:
    """Rows of different lengths with the same prompt give the peer our loss and gradient."""
    train = prepared.task.splits["train"]
    ours = prompt_of(peer).detach().clone().requires_grad_()
    (loss,) = packed_gradients(backbone, [PromptTensors(ours)], [[5, 6, 7]], train)
    theirs = peer._tuned(**padded(train, [5, 6, 7], 0)).loss
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, prompt_of(peer).grad, rtol=1e-4, atol=1e-6)


def test_a_peer_trains_its_prompt_and_has_our_accuracy(
    prepared: Prepared, backbone: Backbone, peer: PlainTrial
) -> None:
    """Training changes the peer's prompt but not the frozen model; accuracies are equal."""
    digest, before = backbone.digest(), prompt_of(peer).detach().clone()
    peer.train(3)
    assert (
        peer.step == 3 and not torch.equal(before, prompt_of(peer)) and backbone.digest() == digest
    )
    prompt = PromptTensors(prompt_of(peer).detach())
    (ours,) = evaluate(
        backbone, [prompt], prepared.task.splits["validation"], prepared.task.encoder
    )
    assert peer.accuracy() == ours["accuracy"]


def test_a_peer_s_trial_is_ours(prepared: Prepared, backbone: Backbone) -> None:
    """Whole trials agree in losses and scores, from the same initial prompt and rows.

    So if two searches reach different accuracies, their schedulers stopped trials at different
    times.
    """
    engine = make_engine(backbone, prepared.task, prepared.job.train, prepared.job.search, 1)
    for spec in prepared.trials:
        config = {**spec.config(), "start": start_ids(spec, prepared.task.encoder.tokenizer)}
        model = load_backbone(resolve_model(prepared.job.base_model)).model
        theirs = PlainTrial(model, Data.of(prepared.task), config, batch=4)
        torch.testing.assert_close(
            prompt_of(theirs).detach(),
            initial_prompt(spec, InitContext.of(backbone, [])),
            rtol=0,
            atol=0,
        )
        engine.seat("ours", spec)
        while engine.slots:
            for report in engine.round():
                assert theirs.train(1) == pytest.approx(report.train_loss, rel=1e-4)
                assert theirs.accuracy() == report.metrics["accuracy"]


def test_a_model_with_copied_words_says_what_it_said(tmp_path: Path) -> None:
    """Copies of a word share its probability, and a prompt's gradient stays the same."""
    try:
        story = load_backbone(
            resolve_model(BaseModelSpec(id=str(jobs.shared("models", "stories3M"))))
        )
    except Skipped as reason:
        pytest.skip(str(reason))
    copied = load_backbone(
        resolve_model(BaseModelSpec(id=str(jobs.copied_words(tmp_path / "copied", 3))))
    )
    words = len(story.table)
    assert len(copied.table) == 3 * words
    ids = story.tokenizer("Once upon a time there was a")["input_ids"]
    gradients, chances = [], []
    for backbone in (story, copied):
        prompt = story.table[100:105].clone().requires_grad_()
        logits, targets = backbone.teacher_forced(
            backbone.prepare([prompt]), [ids[:-2]], [ids[-2:]], [0]
        )
        log_probs = logits.log_softmax(-1)
        log_probs.gather(2, targets[:, :, None]).sum().backward()
        gradients.append(prompt.grad)
        chances.append(log_probs.exp().view(1, 2, -1, words).sum(2))
    torch.testing.assert_close(*chances, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_trainer_reports_every_evaluation(
    prepared: Prepared, backbone: Backbone, peer: PlainTrial, tmp_path: Path
) -> None:
    """The transformers Trainer takes the same rows and ends near the plain loop's result.

    It writes no checkpoint.
    """
    reports: list[tuple[int, float]] = []
    setting = {"steps": 4, "batch": 4, "every": 2, "folder": tmp_path / "trainer"}
    made = trainer(
        backbone.model,
        Data.of(prepared.task),
        CONFIG,
        setting,
        lambda *found: reports.append(found),
    )
    made.train()
    assert [step for step, _ in reports] == [2, 4] and all(
        0 <= accuracy <= 1 for _, accuracy in reports
    )
    rows = {row["row"] for row in made.train_dataset}
    assert len(made.train_dataset) == 16 and max(rows) < len(prepared.task.splits["train"])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_chosen_answer_is_read_where_the_target_begins() -> None:
    """The answer is read behind a one-column prompt, in rows padded on the right."""
    labels = torch.tensor([[IGNORED, 7, 0, IGNORED], [IGNORED, IGNORED, 8, 0]])
    logits = torch.zeros(2, 5, 9)
    # With one column of prompt, the target's first token is predicted in these places.
    logits[0, 1, 7] = logits[1, 2, 8] = 1.0
    assert chosen(logits, labels, (8, 7)).tolist() == [1, 0]


def test_the_step_without_its_gains_is_the_same_step(
    prepared: Prepared, backbone: Backbone
) -> None:
    """Logits in all positions and the prompt in every row give the same loss."""
    train = prepared.task.splits["train"]
    prompt = PromptTensors(
        torch.randn(3, backbone.table.shape[1], generator=torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        prompt.embeddings.mul_(0.02)  # type: ignore[union-attr]
    prompt.embeddings.requires_grad_()  # type: ignore[union-attr]
    seen: list[int] = []
    backbone.model.lm_head.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape[1])
    )
    losses = [packed_gradients(backbone, [prompt], [[0, 1]], train)[0]]
    plain_backbone(backbone)
    losses.append(packed_gradients(backbone, [prompt], [[0, 1]], train)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert seen[0] == 2 and seen[-1] > 8  # two target tokens; the whole row and the prompt


def report(at: float, trial: str, step: int, score: float) -> dict[str, Any]:
    return {
        "at": at,
        "trial": trial,
        "step": step,
        "score": score,
        "driver": 3 * processes.MEGABYTE,
    }


def test_a_side_s_time_to_the_target() -> None:
    """The time counts from the program's start to the first report that is good enough.

    Ratios are taken seed by seed. A target that is not reached is shown as "never".
    """
    reports = [
        report(103.0, "t000", 1, 0.2),
        report(105.0, "t001", 1, 0.5),
        report(106.0, "t000", 2, 0.6),
    ]
    ours = search.side_of(Ran(100.0, 10.0, 2**20, [], {"reports": reports, "steps": 3}), 0.4)
    assert (ours.seconds, ours.to_target, ours.best, ours.steps) == (10.0, 5.0, 0.6, 3)
    slow = search.side_of(Ran(100.0, 50.0, 2**20, [], {"reports": reports[:1], "steps": 1}), 0.4)
    shown = search.line("slow", [slow, ours], [ours, ours]).shown
    assert (shown["times ours"], shown["spread"], shown["to target, s"]) == (
        3.0,
        "1.00 to 5.00",
        "never",
    )


def test_all_sides_have_the_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its real data a benchmark is skipped, and the reason names the data."""
    monkeypatch.setattr(jobs, "SHARED", tmp_path)
    with pytest.raises(Skipped, match="BENCH_SHARED"):
        search.job(search.SMALL, tmp_path, 0)
    with pytest.raises(Skipped, match="trec6"):
        population.lines(population.Setting())


def test_a_population_s_curve_counts_whole_rounds() -> None:
    """Trials of a round train side by side, so the best one is known at the round's end."""
    reports = [report(0, "t000", 5, 0.1), report(0, "t001", 5, 0.5), report(1, "t000", 10, 0.7)]
    reports.append(report(1, "t001", 10, 0.5))
    curve = population.curve(reports)
    assert curve == [(10, 0.5), (20, 0.7)]
    assert [population.steps_to(curve, target) for target in (0.5, 0.6, 0.8)] == [10, 20, None]
    shown = population.target_line(
        {"pbt": [curve, curve], "random": [[(40, 0.9)], [(10, 0.1)]]}, 0.6
    ).shown
    assert shown == {"steps, pbt": "20, 20", "steps, random": "40, never", "random / pbt": 2.0}


def test_a_plan_is_compared_part_by_part() -> None:
    """The outcome leaves out the time for planning and for creating the model."""
    seconds = {"total": 60.0, "plan": 9.0, "model": 1.0, "prepare": 3.0, "ray": 4.0, "workers": 8.0,
        "trials": 30.0,
               "test": 1.0, "registry": 4.0}  # fmt: skip
    planned = {
        "startup": 12.0,
        "baselines": 2.0,
        "search": 31.0,
        "test": 1.0,
        "end": 2.0,
        "total": 48.0,
    }
    memory = {"usual": 2 * processes.MEGABYTE, "worker": 6 * processes.MEGABYTE}
    document = {"seconds": seconds, "plan": {"seconds": planned, "memory": memory}}
    work = {"w0": [{"kind": "peak", "value": 4 * processes.MEGABYTE}]}
    ran = Ran(
        0.0,
        1.0,
        0,
        [(1.0, 2), (2.0, 4), (3.0, 8)],
        {"document": document, "work": work, "started": [3.0]},
    )
    found = plans.of("job", ran)
    shown = [(line.name, line.shown["planned"], line.shown["outcome"]) for line in found]
    assert shown == [
        ("job: total, s", 48.0, 50.0), ("job: startup, s", 12.0, 15.0),
        ("job: search, s", 33.0, 30.0),
        ("job: end, s", 3.0, 5.0), ("job: worker, MB", 2.0, 4.0),
        ("job: worker at the most, MB", 6.0, 4.0),
    ]  # fmt: skip
    assert found[0].shown["off, %"] == pytest.approx(-4.0)
    assert (found[0].shown["load, planning"], found[0].shown["load, running"]) == (3.0, 8.0)


@pytest.mark.long
@pytest.mark.slow
def test_a_search_of_ours_is_watched(tmp_path: Path) -> None:
    """A toy search in its own program yields reports, the worker's work and its memory.

    All figures of the benchmarks are made from these.
    """
    ran = processes.run_in(
        str(tmp_path), "our_search", {"job": {**jobs.random_model(tmp_path), **SEARCH}}
    )
    assert [(one["trial"], one["step"]) for one in ran.found["reports"]] == [
        ("t000", 1), ("t001", 1), ("t000", 2), ("t001", 2), ("t002", 1), ("t003", 1), ("t002", 2),
        ("t003", 2),
    ]  # fmt: skip
    assert ran.found["steps"] == 8 and ran.peak > ran.found["work"]["w0"][-1]["value"] > 0
    kinds = [one["kind"] for one in ran.found["work"]["w0"]]
    assert kinds.count("round") == 4 and kinds[0] == "load" and kinds[-1] == "peak"
    overhead = trials.overhead_line("toy", ran, trials=4).shown
    whole, running = float(overhead["with start and end"]), float(overhead["overhead a trial, s"])
    assert 0 < running < whole < ran.seconds / 4
    quarters = trials.quarters(ran)
    assert [line.name for line in quarters] == [
        f"results {first} to {first + 1}" for first in (1, 3, 5, 7)
    ]
    assert all(float(line.shown["driver, MB"]) > 100 for line in quarters)
    line = nodes.line(1, 4, ran).shown
    assert (
        line["trained on"] == 1 and float(line["first ready, s"]) == float(line["all ready, s"]) > 0
    )


@pytest.mark.long
@pytest.mark.slow
def test_parts_of_ours_can_be_taken_away_and_nodes_added(tmp_path: Path) -> None:
    """Two nodes, the plain step and a new actor per trial give the same search.

    Each node has a worker, and both train.
    """
    changes = {"nodes": 2, "plain_step": True, "fresh_actors": True}
    resources = {"workers": 2, "cpus_per_worker": 1, "trials_per_worker": 1}
    job = {
        **jobs.random_model(tmp_path),
        **SEARCH,
        "resources": resources,
        "registry": {"register_top": 0},
    }
    ran = processes.run_in(str(tmp_path), "our_search", {"job": job, **changes})
    assert ran.found["steps"] == 8 and sorted(ran.found["work"]) == ["w0", "w1"]
    line = nodes.line(2, 2, ran).shown
    assert (
        line["trained on"] == 2 and float(line["all ready, s"]) >= float(line["first ready, s"]) > 0
    )


@pytest.mark.long
@pytest.mark.slow
def test_methods_are_compared_at_toy_size(ray_cluster: None, tmp_path: Path) -> None:
    """Each method searches with the same steps and seeds.

    There is a line for each method and for the baselines without training, and a page.
    """
    found = methods.lines(methods.SETTINGS["small"], "random ", tmp_path)
    names = [line.name.removeprefix("random, ") for line in found]
    assert names == [
        "zero shot",
        "few shot",
        *(method.replace("_", " ") for method in methods.SPACES),
    ]
    trained = {
        line.name.removeprefix("random, "): int(str(line.shown["parameters"])) for line in found
    }
    assert trained["prompt design"] == 0 < trained["prompt tuning"] < trained["model tuning"]
    assert (tmp_path / "methods-random.html").read_text().startswith("<!doctype html>")


def test_a_program_that_fails_says_how(tmp_path: Path) -> None:
    """The error has the end of the program's output."""
    with pytest.raises(Broken, match=r"(?s)exit code 1.*base_model"):
        processes.run_in(str(tmp_path), "our_search", {"job": {"name": "x"}})


def test_paces_are_measured_at_toy_size() -> None:
    """Every method that trains has a line, compared with prompt tuning."""
    found = paces.lines(paces.SETTINGS["small"])
    assert [line.name for line in found] == [f"random, {method}" for method in methods.RATES]
    assert found[0].shown["times prompt tuning's"] == 1 and all(
        line.kept["steps, s"] for line in found
    )
