"""The engine: trials that share it end as each would alone, and resume exactly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import alone_nll, small_task, tiny_backbone
from torch import nn

from orchestrator.data.batches import step_rows
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning import engine as engine_module
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.prompts import Method
from orchestrator.tuning.prompts.inits import InitContext, initial_prompt
from orchestrator.tuning.reports import EvaluationJob, Report
from orchestrator.tuning.step import Limits
from orchestrator.tuning.updater import Updater, apply_all

TASK = small_task()
TRAIN = TrainSpec(steps=6, batch_size=4, evaluate_every=2)
TRIALS = {
    "uniform": TrialSpec("random", None, 3, 0.02, 0),
    "vocabulary": TrialSpec("sample_vocab", None, 7, 0.3, 1),
    "labels": TrialSpec("class_labels", None, 1, 0.1, 2),
    "text": TrialSpec("text", "is this message spam", 5, 0.05, 3),
}
Reports = dict[str, list[Report]]


def make_engine(
    train: TrainSpec = TRAIN,
    capacity: int = 3,
    task: Task = TASK,
    backbone: Backbone | None = None,
    search: SearchSpec = SearchSpec(),
    limits: Limits = Limits(),
) -> Engine:
    return Engine(backbone or tiny_backbone(), task, train, search, capacity, limits)


def run_out(engine: Engine, reports: Reports | None = None) -> Reports:
    """Run rounds until no trial is left; return the reports by trial."""
    reports = {} if reports is None else reports
    while engine.slots:
        for report in engine.round():
            reports.setdefault(report.trial, []).append(report)
    return reports


def alone(name: str, spec: TrialSpec | None = None, **options: Any) -> list[Report]:
    engine = make_engine(capacity=1, **options)
    engine.seat(name, spec or TRIALS[name])
    return run_out(engine)[name]


def prompts_in(report: Report) -> dict[str, torch.Tensor]:
    return Checkpoint.from_bytes(report.checkpoint).tensors


def assert_same(got: list[Report], wanted: list[Report], rel: float) -> None:
    """Compare reports and their checkpoints up to rounding."""
    assert [(r.step, r.ending, r.best_step) for r in got] == [
        (r.step, r.ending, r.best_step) for r in wanted
    ]
    for one, other in zip(got, wanted, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=rel, nan_ok=True)
        assert one.train_loss == pytest.approx(other.train_loss, rel=rel, nan_ok=True)
        assert one.score == pytest.approx(other.score, rel=rel)
        tensors, others = prompts_in(one), prompts_in(other)
        assert tensors.keys() == others.keys()
        for name in ("prompt.prompt", "best.prompt"):
            torch.testing.assert_close(
                tensors[name], others[name], rtol=rel, atol=rel * float(others[name].abs().max())
            )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
def test_packed_trials_end_where_they_end_alone(optimizer: str, prompt_once: bool) -> None:
    """Packed trials report what each reports alone.

    They differ in init, length, learning rate and seed.
    """
    train = TrainSpec(
        steps=6, batch_size=4, evaluate_every=2, optimizer=optimizer, weight_decay=1e-3
    )
    options = {"train": train, "backbone": tiny_backbone(prompt_once=prompt_once)}
    engine = make_engine(capacity=4, **options)
    for name, spec in TRIALS.items():
        engine.seat(name, spec)
    together = run_out(engine)
    assert {name: len(reports) for name, reports in together.items()} == dict.fromkeys(TRIALS, 3)
    for name in TRIALS:
        assert_same(together[name], alone(name, **options), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_trial_is_a_plain_training_loop(optimizer: str) -> None:
    """A trial equals a plain training loop without an engine.

    The loop takes one row at a time, the mean over the batch's target tokens, and one update.
    """
    train = TrainSpec(
        steps=7, batch_size=4, evaluate_every=7, optimizer=optimizer, weight_decay=1e-3
    )
    spec, split, backbone = TRIALS["vocabulary"], TASK.splits["train"], tiny_backbone()
    prompt = nn.Parameter(initial_prompt(spec, InitContext.of(backbone, TASK.encoder.answers)))
    updates = Updater([prompt], spec.learning_rate, train)
    losses, seen = [], []
    for step in range(7):
        rows = step_rows(len(split), 4, spec.seed, step)
        nll = [alone_nll(backbone, prompt, split.inputs[row], split.targets[row]) for row in rows]
        loss = sum(nll) / sum(len(split.targets[row]) for row in rows)
        loss.backward()
        updates.apply(step)
        losses.append(float(loss.detach()))
        seen += rows
    assert sorted(seen[:20]) == list(range(20))  # the first epoch ends within a batch
    (report,) = alone("vocabulary", train=train)
    assert report.train_loss == pytest.approx(sum(losses) / 7, rel=1e-4)
    torch.testing.assert_close(
        prompts_in(report)["prompt.prompt"], prompt.detach(), rtol=1e-4, atol=1e-4
    )


def test_packed_trials_end_where_they_end_alone_in_float32() -> None:
    """Packed float32 trials have the losses of each alone, to 1e-3 after six steps."""
    backbone = tiny_backbone(dtype=torch.float32)
    engine = make_engine(capacity=4, backbone=backbone)
    for name, spec in TRIALS.items():
        engine.seat(name, spec)
    together = run_out(engine)
    for name in TRIALS:
        for one, other in zip(together[name], alone(name, backbone=backbone), strict=True):
            assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
            assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("max_tokens", [None, 60], ids=["one forward", "micro-batches"])
def test_slots_change_hands_without_a_trace(max_tokens: int | None) -> None:
    """Freeing a trial half-way and seating another changes no trial's results."""
    engine = make_engine(limits=Limits(max_tokens=max_tokens))
    for name in ("uniform", "vocabulary", "labels"):
        engine.seat(name, TRIALS[name])
    reports: Reports = {report.trial: [report] for report in engine.round()}
    engine.free("vocabulary")
    engine.free("vocabulary")  # a trial may be stopped twice
    engine.seat("text", TRIALS["text"])
    run_out(engine, reports)
    assert_same(reports["vocabulary"], alone("vocabulary")[:1], rel=1e-4)
    for name in ("uniform", "labels", "text"):
        assert_same(reports[name], alone(name), rel=1e-4)


@pytest.mark.parametrize("rate", [1e30, 3e37])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_diverging_trial_touches_no_other(optimizer: str, rate: float) -> None:
    """A learning rate that ruins one trial changes nothing for the others."""
    train = TrainSpec(steps=6, batch_size=4, evaluate_every=2, optimizer=optimizer)
    engine = make_engine(train)
    engine.seat("uniform", TRIALS["uniform"])
    engine.seat("ruined", replace(TRIALS["vocabulary"], learning_rate=rate))
    engine.seat("labels", TRIALS["labels"])
    reports = run_out(engine)
    for name in ("uniform", "labels"):
        assert_same(reports[name], alone(name, train=train), rel=1e-4)


def test_divergence_ends_a_trial_and_keeps_its_best_prompt() -> None:
    """A prompt that is not finite is never evaluated or taken as best.

    The trial ends as diverged and keeps its earlier best prompt.
    """
    engine = make_engine(TrainSpec(steps=8, batch_size=4, evaluate_every=2))
    engine.seat("ruined", TRIALS["uniform"])
    (sound,) = engine.round()
    engine.slots["ruined"].prompt.get_parameter("prompt").data[0, 0] = math.nan
    (report,) = engine.round()
    assert (report.ending, report.step, report.metrics) == ("diverged", 3, {}) and not engine.slots
    assert math.isnan(report.train_loss)
    assert (report.best_step, report.best_metrics, report.score) == (
        2,
        sound.best_metrics,
        sound.score,
    )
    assert torch.equal(prompts_in(report)["best.prompt"], prompts_in(sound)["best.prompt"])


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_divergence_in_the_last_step_before_an_evaluation(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation detects an overflow in the last update, which shows in no training loss.

    The score stays comparable.
    """
    engine = make_engine(search=SearchSpec(metric=metric))
    engine.seat("sound", TRIALS["labels"])
    engine.seat("ruined", TRIALS["uniform"])
    prompt = engine.slots["ruined"].prompt.get_parameter("prompt")

    def overflowing(updaters: Any, steps: list[int]) -> list[float]:
        norms = apply_all(updaters, steps)
        prompt.data.fill_(math.inf if steps[0] == 1 else 0.1)
        return norms

    monkeypatch.setattr(engine_module, "apply_all", overflowing)
    sound, ruined = engine.round()
    assert (ruined.ending, ruined.step, ruined.metrics, ruined.best_metrics) == (
        "diverged",
        2,
        {},
        {},
    )
    assert math.isfinite(ruined.train_loss) and ruined.score == (
        0.0 if metric == "accuracy" else 1e30
    )
    monkeypatch.undo()
    assert_same([sound], alone("labels", search=SearchSpec(metric=metric))[:1], rel=1e-4)


def test_divergence_that_only_the_evaluation_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation loss that is not finite ends the trial and never becomes its best."""
    *_, last = scripted(monkeypatch, [(0.5, 1.0), (0.9, math.nan), (0.9, 0.1)])
    assert (last.ending, last.step, last.metrics) == ("diverged", 2, {})
    assert (last.best_step, last.best_metrics["accuracy"], last.score) == (1, 0.5, 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("name", ["vocabulary", "labels"])
def test_resuming_equals_never_stopping(optimizer: str, name: str) -> None:
    """A trial resumed in another engine, from any checkpoint, has the same reports exactly."""
    train = TrainSpec(
        steps=8, batch_size=6, evaluate_every=2, optimizer=optimizer, weight_decay=1e-4, patience=9
    )
    whole = alone(name, train=train)
    assert len(whole) == 4  # 48 rows in epochs of 20: batches cross the end of an epoch twice
    for done in range(1, 4):
        engine = make_engine(train, capacity=1)
        engine.seat(name, TRIALS[name], whole[done - 1].checkpoint)
        assert run_out(engine)[name] == whole[done:]


def test_resuming_beside_others_equals_never_stopping() -> None:
    """A trial resumed among other trials ends as it would have alone."""
    whole = alone("vocabulary")
    engine = make_engine()
    engine.seat("uniform", TRIALS["uniform"])
    engine.round()
    engine.seat("vocabulary", TRIALS["vocabulary"], whole[0].checkpoint)
    reports = run_out(engine)
    assert_same(reports["vocabulary"], whole[1:], rel=1e-4)
    assert_same(reports["uniform"], alone("uniform")[1:], rel=1e-4)


@pytest.mark.parametrize(
    "method", [Method(), Method("prefix_tuning", "mlp", 8), Method("p_tuning", "lstm")], ids=str
)
def test_a_copy_goes_on_from_anothers_checkpoint(method: Method) -> None:
    """A copy takes the source's prompt, moments, best result and step.

    Its learning rate and seed are its own; it may stay in the engine in which it has trained.
    """
    task, other = replace(TASK, method=method), TRIALS["vocabulary"]
    engine = make_engine(TRAIN, task=task)
    engine.seat("source", other)
    engine.seat("copy", TRIALS["uniform"])
    source = next(report for report in engine.round() if report.trial == "source")
    engine.free("copy")
    copied = replace(other, learning_rate=other.learning_rate * 1.2, seed=5)
    engine.seat("copy", copied, source.checkpoint)
    state = engine.slots["copy"].state()
    assert (
        state == Checkpoint.from_bytes(source.checkpoint) and state.to_bytes() == source.checkpoint
    )
    reports = run_out(engine)
    assert (
        [report.step for report in reports["copy"]]
        == [report.step for report in reports["source"]]
        == [4, 6]
    )
    assert reports["copy"][0].train_loss != reports["source"][0].train_loss


def test_the_same_trial_twice_gives_the_same_bits() -> None:
    """Spec and seed determine the checkpoint, byte for byte; another seed changes it."""
    assert alone("vocabulary") == alone("vocabulary")
    assert (
        alone("vocabulary")[-1].checkpoint
        != alone("vocabulary", replace(TRIALS["vocabulary"], seed=5))[-1].checkpoint
    )


def test_the_backbone_is_never_trained() -> None:
    """The backbone's weights keep their digest and have no gradient."""
    backbone = tiny_backbone()
    before = backbone.digest()
    engine = make_engine(backbone=backbone)
    engine.seat("uniform", TRIALS["uniform"])
    engine.seat("vocabulary", TRIALS["vocabulary"])
    run_out(engine)
    assert backbone.digest() == before
    assert all(
        weight.grad is None and not weight.requires_grad for weight in backbone.model.parameters()
    )


def test_tuning_lowers_the_loss() -> None:
    """Thirty steps on six rows lower the training loss by at least a fifth."""
    task = small_task(train=6)
    train = TrainSpec(steps=30, batch_size=6, evaluate_every=10, optimizer="adamw")
    first, *_, last = alone(
        "uniform", replace(TRIALS["uniform"], learning_rate=0.3), task=task, train=train
    )
    assert last.train_loss < 0.8 * first.train_loss


@pytest.mark.parametrize(
    ("steps", "every", "at"), [(5, 2, [2, 4, 5]), (4, 2, [2, 4]), (3, 3, [3]), (1, 1, [1])]
)
def test_evaluations_come_every_so_often_and_at_the_end(
    steps: int, every: int, at: list[int]
) -> None:
    """The last step is evaluated even if it is no multiple of evaluate_every."""
    reports = alone("labels", train=TrainSpec(steps=steps, batch_size=2, evaluate_every=every))
    assert [report.step for report in reports] == at
    assert [report.ending for report in reports] == [None] * (len(at) - 1) + ["steps"]


def test_a_resumed_trial_keeps_the_evaluation_steps() -> None:
    """A trial resumed between two multiples is evaluated at the next multiple."""
    short = alone("labels", train=TrainSpec(steps=5, batch_size=2, evaluate_every=2))
    engine = make_engine(TrainSpec(steps=8, batch_size=2, evaluate_every=2), capacity=1)
    engine.seat("labels", TRIALS["labels"], short[-1].checkpoint)
    assert [report.step for report in run_out(engine)["labels"]] == [6, 8]


class Scripted:
    """Replaces the evaluation: returns the given validation metrics, one pair per call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, metrics: list[tuple[float, float]]) -> None:
        self.todo = iter(metrics)
        monkeypatch.setattr(engine_module, "evaluate", self)

    def __call__(
        self, backbone: Backbone, prompts: list[Any], *rest: Any
    ) -> list[dict[str, float]]:
        accuracy, loss = next(self.todo)
        return [{"accuracy": accuracy, "exact_match": 0.0, "loss": loss} for _ in prompts]


def scripted(
    monkeypatch: pytest.MonkeyPatch, metrics: list[tuple[float, float]], **options: Any
) -> list[Report]:
    Scripted(monkeypatch, metrics)
    train = {
        "steps": len(metrics),
        "batch_size": 2,
        "evaluate_every": 1,
        **options.pop("train", {}),
    }
    return alone("uniform", train=TrainSpec(**train), **options)


def test_patience_ends_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience ends a trial after so many evaluations without improvement.

    An improvement restarts the count.
    """
    metrics = [(0.5, 1.0), (0.4, 1.0), (0.6, 1.0), (0.6, 1.0), (0.5, 0.1), (0.9, 1.0)]
    reports = scripted(monkeypatch, metrics, train={"patience": 2})
    assert [report.ending for report in reports] == [None, None, None, None, "patience"]
    assert [report.best_step for report in reports] == [1, 1, 3, 3, 3]
    assert len(scripted(monkeypatch, metrics)) == 6


def test_patience_counts_on_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of evaluations without improvement is part of the checkpoint."""
    metrics = [(0.5, 1.0), (0.4, 1.0), (0.3, 1.0)]
    whole = scripted(monkeypatch, metrics, train={"patience": 2, "steps": 9})
    assert [report.ending for report in whole] == [None, None, "patience"]
    Scripted(monkeypatch, metrics[2:])
    engine = make_engine(TrainSpec(steps=9, batch_size=2, evaluate_every=1, patience=2), capacity=1)
    engine.seat("uniform", TRIALS["uniform"], whole[1].checkpoint)
    assert run_out(engine)["uniform"] == whole[2:]


def test_the_best_prompt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later checkpoints keep the prompt of the best evaluation while training goes on."""
    reports = scripted(monkeypatch, [(0.5, 1.0), (0.8, 1.0), (0.7, 0.5), (0.1, 0.1)])
    best = prompts_in(reports[1])["prompt.prompt"]
    for report in reports[1:]:
        assert torch.equal(prompts_in(report)["best.prompt"], best)
        assert (report.best_step, report.best_metrics["accuracy"], report.score) == (2, 0.8, 0.8)
    assert not torch.equal(prompts_in(reports[-1])["prompt.prompt"], best)


def test_ties_are_decided_by_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal accuracies are ranked by the validation loss; an equal loss is no improvement."""
    reports = scripted(monkeypatch, [(0.5, 1.0), (0.5, 0.9), (0.5, 0.9), (0.5, 1.1), (0.4, 0.1)])
    assert [report.best_step for report in reports] == [1, 2, 2, 2, 2]


def test_a_loss_is_better_when_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search by loss keeps the lowest loss, whatever the accuracy."""
    metrics = [(0.5, 1.0), (0.9, 1.2), (0.1, 0.7)]
    reports = scripted(monkeypatch, metrics, search=SearchSpec(metric="loss"))
    assert [report.best_step for report in reports] == [1, 1, 3]
    assert [report.score for report in reports] == [1.0, 1.0, 0.7]


def test_train_loss_is_of_the_steps_since_the_last_report() -> None:
    """A report's training loss is the mean over the steps since the last report."""
    each = alone("uniform", train=TrainSpec(steps=2, batch_size=4, evaluate_every=1))
    both = alone("uniform", train=TrainSpec(steps=2, batch_size=4, evaluate_every=2))
    assert both[0].train_loss == pytest.approx(sum(report.train_loss for report in each) / 2)


def test_slots_are_limited() -> None:
    """A full engine refuses a further trial; an empty one reports nothing."""
    engine = make_engine(capacity=1)
    assert engine.round() == [] and engine.free_slots == 1
    engine.seat("uniform", TRIALS["uniform"])
    assert engine.free_slots == 0
    with pytest.raises(RuntimeError, match="no slot is free for trial text: 1 are taken"):
        engine.seat("text", TRIALS["text"])
    engine.free("uniform")
    assert engine.free_slots == 1


def test_evaluation_jobs() -> None:
    """A checkpoint is evaluated with its best prompt, and an instruction on its own rows.

    Without either, the bare model is evaluated.
    """
    task = small_task()
    rows = [{"text": "great movie", "label": 1}, {"text": "bad movie", "label": 0}]
    task.instructed["Judge."] = {
        "validation": task.encoder.encode(rows, "label", before="Judge.\n")
    }
    reports = alone("vocabulary", task=task)
    engine = make_engine(task=task)
    on_best = engine.evaluate(EvaluationJob("validation", reports[-1].checkpoint))
    assert on_best == pytest.approx(reports[-1].best_metrics)
    bare, instructed = (
        engine.evaluate(EvaluationJob("test")),
        engine.evaluate(EvaluationJob("validation", instruction="Judge.")),
    )
    assert set(bare) == set(instructed) == {"accuracy", "exact_match", "loss"}
    assert bare["loss"] != instructed["loss"]


def test_a_generation_task_is_tuned_too() -> None:
    """Without a verbalizer there is no accuracy; exact match ranks."""
    search = SearchSpec(metric="exact_match")
    reports = alone("uniform", task=small_task(None), search=search)
    assert set(reports[0].metrics) == {"exact_match", "loss"}
    assert json.loads(json.dumps(reports[0].metrics)) == reports[0].metrics


def test_the_frozen_models_dropout_is_a_setting() -> None:
    """frozen_dropout turns on the model's own dropout, in training steps only.

    With or without it, a resumed trial repeats the run that was not interrupted.
    """
    backbone = tiny_backbone("gpt2")  # gpt2 has a dropout of 0.1 while it trains
    losses = {}
    for dropout in (False, True):
        train = TrainSpec(steps=4, batch_size=4, evaluate_every=2, frozen_dropout=dropout)
        first, last = alone("labels", train=train, backbone=backbone)
        losses[dropout] = (first.train_loss, last.train_loss)
        again = make_engine(train, capacity=1, backbone=backbone)
        again.seat("labels", TRIALS["labels"], first.checkpoint)
        (resumed,) = again.round()
        assert resumed.train_loss == last.train_loss and resumed.metrics == last.metrics
        assert not backbone.model.training
    assert losses[False] != losses[True]


@pytest.mark.parametrize("reduction", ["token_mean", "sum_per_row", "sum"])
def test_how_token_losses_become_one(reduction: str) -> None:
    """The training loss is divided as loss_reduction says.

    This is by the batch's tokens, by its rows, or not at all.
    """
    train = TrainSpec.model_validate(
        {"steps": 1, "batch_size": 4, "evaluate_every": 1, "loss_reduction": reduction}
    )
    spec, split, backbone = TRIALS["vocabulary"], TASK.splits["train"], tiny_backbone()
    prompt = initial_prompt(spec, InitContext.of(backbone, TASK.encoder.answers))
    rows = step_rows(len(split), 4, spec.seed, 0)
    nll = sum(
        float(alone_nll(backbone, prompt, split.inputs[row], split.targets[row])) for row in rows
    )
    whole = {
        "token_mean": sum(len(split.targets[row]) for row in rows),
        "sum_per_row": 4,
        "sum": 1,
    }[reduction]
    (report,) = alone("vocabulary", train=train)
    assert report.train_loss == pytest.approx(nll / whole, rel=1e-5)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_nothing(micro: int) -> None:
    """The number of rows in a forward does not change the result."""
    small = TrainSpec(steps=6, batch_size=4, evaluate_every=2, micro_batch_size=micro)
    assert_same(alone("text", train=small), alone("text"), rel=1e-4)
