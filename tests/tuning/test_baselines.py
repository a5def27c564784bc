"""Baselines learn under the prompts' loss and evaluation; the frozen model is unchanged."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from models import VERBALIZERS, backbone_of, load, save_family, save_model, text_rows, tokenizer_of

from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import BaseModelSpec, MethodName, SearchSpec, TrainSpec
from orchestrator.models.backbone import Backbone, load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.tuning import step as step_module
from orchestrator.tuning.baselines import CHANGES, check_peft, make_change
from orchestrator.tuning.baselines.adapter import block_ends
from orchestrator.tuning.baselines.store import save_result
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.prompts import Method
from orchestrator.tuning.reports import EvaluationJob, Report

NOTHING = TrialSpec("", None, 0, 0.01, 0)
SPECS: dict[MethodName, TrialSpec] = {
    "model_tuning": replace(NOTHING, learning_rate=0.003),
    "lomo": replace(NOTHING, learning_rate=0.3),
    "lora": replace(NOTHING, learning_rate=0.03, rank=4, alpha=16),
    "adapter": replace(NOTHING, learning_rate=0.03, bottleneck=8),
}
FAMILIES = ["llama", "gpt2", "falcon", "t5", "bart", "bert"]
TRAIN = TrainSpec(steps=30, batch_size=8, evaluate_every=15)
SGD = TRAIN.model_copy(update={"optimizer": "sgd", "clip_norm": 3.0})
SEARCH = SearchSpec(metric="loss")


@lru_cache
def task(family: str, method: MethodName) -> Task:
    """Return a task that trains and evaluates on the same rows."""
    backbone = backbone_of(family, torch.float32)
    verbalizer = Verbalizer(
        tuple(VERBALIZERS["several tokens"]), tuple(VERBALIZERS["several tokens"].values())
    )
    encoder = Encoder(
        tokenizer_of(family), Template("{text}\nspam?"), verbalizer, 40, 32, backbone.family
    )
    rows = encoder.encode(text_rows(8, 1), "label")
    return Task(encoder, {"train": rows, "validation": rows, "test": rows}, method=Method(method))


def engine_of(
    family: str,
    method: MethodName,
    train: TrainSpec | None = None,
    backbone: Backbone | None = None,
) -> Engine:
    train = train or (SGD if method == "lomo" else TRAIN)
    made = backbone or backbone_of(family, torch.float32)
    return make_engine(made, task(family, method), train, SEARCH, capacity=4)


def run_out(engine: Engine) -> list[Report]:
    reports = []
    while engine.slots:
        reports += engine.round()
    return reports


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SPECS)
def test_a_baseline_learns_and_leaves_the_model_as_it_was(family: str, method: MethodName) -> None:
    """The loss falls far below the bare model's, and the model stays as it was.

    Digest, names and frozen parameters are the same, also between two rounds. The best checkpoint
    gives the reported loss again.
    """
    engine = engine_of(family, method)
    backbone = engine.backbone
    before, names = backbone.digest(), [name for name, _ in backbone.model.named_modules()]
    bare = engine.evaluate(EvaluationJob("validation"))["loss"]
    engine.seat("t", SPECS[method])
    assert not engine.free_slots  # baselines have one slot, whatever the capacity
    (first,) = engine.round()
    assert (
        backbone.digest() == before and engine.evaluate(EvaluationJob("validation"))["loss"] == bare
    )
    last = run_out(engine)[-1]
    assert last.ending == "steps" and last.best_metrics["loss"] < 0.6 * bare
    assert (
        backbone.digest() == before
        and [name for name, _ in backbone.model.named_modules()] == names
    )
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    again = engine.evaluate(EvaluationJob("test", last.checkpoint, spec=SPECS[method]))
    assert again["loss"] == pytest.approx(last.best_metrics["loss"], rel=1e-4)
    assert (
        last.costs.seconds > 0 and last.costs.evaluation_seconds > 0 and last.costs.peak_bytes > 0
    )
    assert (
        last.costs.parameters * 4 == last.costs.stored_bytes > 0
        and first.costs.parameters == last.costs.parameters
    )


@pytest.mark.parametrize("method", SPECS)
def test_a_baseline_starts_from_the_model_as_it_is(method: MethodName) -> None:
    """Before the first step the model's output is unchanged, or almost so with an adapter."""
    backbone = backbone_of("llama", torch.float32)
    ids = torch.arange(2, 12)[None]
    bare = backbone.model(input_ids=ids).logits
    with make_change(method, SPECS[method], backbone).applied():
        changed = backbone.model(input_ids=ids).logits
    assert torch.allclose(changed, bare, atol=1e-3 if method == "adapter" else 1e-6)


@pytest.mark.parametrize("method", SPECS)
def test_a_baseline_goes_on_from_its_checkpoint(method: MethodName) -> None:
    """A trial resumed from its first checkpoint ends as one that never stopped."""
    whole = engine_of("llama", method)
    whole.seat("t", SPECS[method])
    first, last = run_out(whole)
    again = engine_of("llama", method)
    again.seat("t", SPECS[method], first.checkpoint)
    (resumed,) = run_out(again)
    assert resumed.metrics["loss"] == pytest.approx(last.metrics["loss"], rel=1e-5)
    ended, wanted = (Checkpoint.from_bytes(one.checkpoint).best() for one in (resumed, last))
    assert ended.keys() == wanted.keys()
    assert all(torch.allclose(ended[name], wanted[name], atol=1e-6) for name in wanted)


def test_the_model_is_put_right_after_a_step_that_breaks_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error in the middle of a forward leaves the frozen model unchanged."""
    for method, spec in SPECS.items():
        engine = engine_of("llama", method)
        before, hooks = engine.backbone.digest(), hooks_of(engine)
        engine.seat("t", spec)
        with monkeypatch.context() as patch:
            patch.setattr(step_module, "target_log_probs", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.round()
        assert engine.backbone.digest() == before
        assert hooks_of(engine) == hooks


def hooks_of(engine: Engine) -> list[list[object]]:
    return [list(module._forward_hooks.values()) for module in engine.backbone.model.modules()]


def test_lora_counts_and_rank() -> None:
    """LoRA has two matrices for each of PEFT's default projections: query and value in a Llama."""
    found = {}
    for rank in (2, 4):
        change = make_change(
            "lora", replace(SPECS["lora"], rank=rank), backbone_of("llama", torch.float32)
        )
        found[rank] = sum(parameter.numel() for parameter in change.parameters())
    assert found == {
        2: 2 * 2 * (32 + 32 + 32 + 16),
        4: 4 * 2 * (32 + 32 + 32 + 16),
    }  # 2 layers; 2 of the 4 heads have keys and values
    assert {name.rsplit(".", 3)[1] for name in change.named()} == {"q_proj", "v_proj"}


def test_adapters_stand_behind_attention_and_feed_forward() -> None:
    """A block has Houlsby's two adapters, or three in a decoder with cross-attention.

    There are none outside of blocks.
    """
    counts = {family: len(block_ends(backbone_of(family).model, 32)) for family in FAMILIES}
    assert counts == {"llama": 4, "gpt2": 4, "falcon": 4, "t5": 10, "bart": 10, "bert": 4}


def test_a_model_without_such_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without known parts is refused; the message suggests another method."""
    monkeypatch.setattr("orchestrator.tuning.baselines.adapter.ENDS", frozenset({"elsewhere"}))
    text = "method adapter finds no attention or feed-forward part of width 32 in a llama"
    with pytest.raises(BadInput, match=text) as refused:
        make_change("adapter", SPECS["adapter"], backbone_of("llama"))
    assert "method lora" in refused.value.hint


def test_without_peft_lora_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how to install peft."""
    monkeypatch.setattr("orchestrator.tuning.baselines.lora.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="method lora needs the package peft") as refused:
        check_peft("lora")
    assert "prompt-orchestrator[baselines]" in refused.value.hint


def test_peft_reads_a_lora_result(tmp_path: Path) -> None:
    """PEFT's model from the saved folder has our logits.

    baseline.json, beside it, has the configuration.
    """
    from peft import PeftModel

    model = save_family(tmp_path / "model", "llama")
    backbone, spec = load(model), replace(SPECS["lora"], rank=3)
    change = make_change("lora", spec, backbone)
    torch.nn.init.normal_(next(p for name, p in change.named_parameters() if "lora_B" in name))
    ids = torch.arange(2, 12)[None]
    with change.applied():
        wanted = backbone.model(input_ids=ids).logits
    source = resolve_model(BaseModelSpec(id=str(model)))
    folder = save_result(tmp_path / "result", spec, change.named(), source, {"method": "lora"})
    assert json.loads((folder / "baseline.json").read_text())["config"]["rank"] == 3
    read = PeftModel.from_pretrained(load(model).model, str(folder))  # type: ignore[arg-type]
    assert torch.allclose(read(input_ids=ids).logits, wanted, atol=1e-5)
    assert not torch.allclose(wanted, backbone.model(input_ids=ids).logits, atol=1e-2)


def test_a_tuned_model_is_a_model_folder(tmp_path: Path) -> None:
    """The result of model tuning loads as a base model with the tuned logits."""
    model = save_family(tmp_path / "model", "t5")
    backbone, spec = load(model), SPECS["model_tuning"]
    change = make_change("model_tuning", spec, backbone)
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.mul_(1.1)
    rows = [[5, 6, 7]], [[8, 9]], [0]
    with change.applied():
        wanted, _ = backbone.teacher_forced(None, *rows)
    source = resolve_model(BaseModelSpec(id=str(model)))
    folder = save_result(
        tmp_path / "result", spec, change.named(), source, {"method": "model_tuning"}
    )
    tuned, _ = load(folder).teacher_forced(None, *rows)
    assert torch.allclose(tuned, wanted, atol=1e-5)
    assert not torch.allclose(wanted, backbone.teacher_forced(None, *rows)[0], atol=1e-3)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_qlora_learns_over_rounded_weights(tmp_path: Path, quantization: str) -> None:
    """The loss falls; the quantized weights stay unchanged."""
    folder = save_model(tmp_path / "model", hidden_size=128, intermediate_size=256)
    spec = BaseModelSpec.model_validate({"id": str(folder), "quantization": quantization})
    backbone = load_backbone(resolve_model(spec))
    engine = engine_of("llama", "qlora", backbone=backbone)
    before, bare = backbone.digest(), engine.evaluate(EvaluationJob("validation"))["loss"]
    engine.seat("t", SPECS["lora"])
    assert run_out(engine)[-1].best_metrics["loss"] < 0.6 * bare
    assert backbone.digest() == before


def test_every_baseline_that_changes_the_model_is_tested() -> None:
    """Every baseline in CHANGES has an entry in SPECS, so that it is tested."""
    assert set(CHANGES) == {*SPECS, "qlora"}
