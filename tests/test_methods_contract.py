"""The contract between prompt methods, backbones and engine, on every model family."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from models import MASKED, SEQ2SEQ, backbone_of, text_rows
from test_artifact import manifest
from torch import Tensor, nn

from orchestrator.artifact import PromptArtifact
from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import PROMPT_METHODS, SearchSpec, TrainSpec
from orchestrator.models.backbone import PROMPT_ONCE_FAMILIES, Backbone
from orchestrator.serving.prompts.served_prompt import prompt_tensors
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.prompts import METHODS as MAKERS
from orchestrator.tuning.prompts import InitContext, Method, Prompt, make_prompt
from orchestrator.tuning.step import packed_gradients

CAUSAL = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "gemma2", "gemma3_text", "mistral"]
WINDOWED = ("gemma2", "gemma3_text", "mistral")
FAMILIES = [*CAUSAL, *SEQ2SEQ, *MASKED]
METHODS = {
    "prompt tuning": Method("prompt_tuning"),
    "prompt tuning inside": Method("prompt_tuning", inside=True),
    "prefix": Method("prefix_tuning"),
    "prefix through an mlp": Method("prefix_tuning", "mlp", 7),
    "p-tuning with an lstm": Method("p_tuning", "lstm"),
    "p-tuning with an mlp inside": Method("p_tuning", "mlp", 9, inside=True),
}
TRIALS = [
    TrialSpec("text", "is this message spam", 5, 0.05, 0),
    TrialSpec("random", None, 2, 0.02, 1),
    TrialSpec("class_labels", None, 9, 0.03, 2),
]
VERBALIZER = Verbalizer((0, 1), (" quick", " yes no"))
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("name", METHODS)


def test_every_prompt_method_keeps_the_contract() -> None:
    """The job spec, the methods that can be made, and this file's tests have the same methods."""
    tested = {method.name for method in METHODS.values()}
    assert {*PROMPT_METHODS} == {*MAKERS} == tested


def precision(family: str) -> tuple[torch.dtype, float]:
    """Return number format and tolerance."""
    # transformers' eager attention sums in float32 and turns a float64 mask into NaN there.
    return (torch.float32, 5e-3) if family == "gemma2" else (torch.float64, 1e-6)


def model(family: str, prompt_once: bool | None = None) -> Backbone:
    return backbone_of(family, precision(family)[0], prompt_once)


@lru_cache
def task(family: str, method: Method, verbalized: bool = True) -> Task:
    backbone = model(family)
    template = Template("{*}a {text} {*}{_} spam?{*}" if method.inside else "{text}\nspam?")
    encoder = Encoder(
        backbone.tokenizer, template, VERBALIZER if verbalized else None, 40, 32, backbone.family
    )
    column = "label" if verbalized else "answer"
    splits = {"train": text_rows(12, 1), "validation": text_rows(5, 2), "test": text_rows(3, 3)}
    return Task(
        encoder,
        {name: encoder.encode(rows, column) for name, rows in splits.items()},
        method=method,
    )


def prompts(family: str, method: Method) -> list[Prompt]:
    """Return one prompt per trial, moved off its initial values so that none is zero by chance."""
    context = InitContext.of(model(family), task(family, method).encoder.answers)
    made = [make_prompt(method, spec, context) for spec in TRIALS]
    generator = torch.Generator().manual_seed(3)
    for prompt in made:
        for parameter in prompt.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.isfinite().all()
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(
        got.double(), wanted.double(), rtol=tolerance, atol=tolerance * max(scale, 1e-9)
    )


def gradients(prompt: nn.Module) -> dict[str, Tensor]:
    return {name: part.grad for name, part in prompt.named_parameters() if part.grad is not None}


def targets_only(logits: Tensor, targets: Tensor) -> list[Tensor]:
    return [row[wanted >= 0] for row, wanted in zip(logits, targets, strict=True)]


@every_family
@every_method
def test_shapes(family: str, name: str) -> None:
    """A method yields P virtual tokens of the embeddings' width, or P keys and values per layer."""
    backbone = model(family)
    for prompt, spec in zip(prompts(family, METHODS[name]), TRIALS, strict=True):
        made = prompt()
        assert made.num_virtual_tokens == spec.num_virtual_tokens
        if METHODS[name].name == "prefix_tuning":
            wanted = {
                site: (*shape[:3], made.num_virtual_tokens, shape[4])
                for site, shape in backbone.prefix_shapes.items()
            }
            assert {site: tuple(tensor.shape) for site, tensor in made.prefixes.items()} == wanted
            assert set(wanted) == (
                {"encoder", "decoder", "cross"} if family in SEQ2SEQ else {"decoder"}
            )
        else:
            assert made.embeddings is not None and made.embeddings.shape == (
                spec.num_virtual_tokens,
                32 if family != "opt" else 16,
            )
        assert all(part.dtype == torch.float32 for part in prompt.parameters())


@every_family
@every_method
def test_rows_in_a_batch_are_rows_alone(family: str, name: str) -> None:
    """A row's logits do not depend on its batch or its padding."""
    backbone, made = model(family), [prompt() for prompt in prompts(family, METHODS[name])]
    split = task(family, METHODS[name], verbalized=False).splits["train"]
    owner = [row % 3 for row in range(len(split))]
    with torch.no_grad():
        logits, targets = backbone.teacher_forced(
            backbone.prepare(made), split.inputs, split.targets, owner
        )
        for row, got in enumerate(targets_only(logits, targets)):
            one = backbone.teacher_forced(
                backbone.prepare([made[owner[row]]]), [split.inputs[row]], [split.targets[row]], [0]
            )
            assert one[1][one[1] >= 0].tolist() == split.targets[row]
            close(got, targets_only(*one)[0], precision(family)[1])


@every_family
@every_method
def test_packed_equals_alone_and_only_the_prompt_gets_gradients(family: str, name: str) -> None:
    """Packed trials have the same losses and gradients as each trial alone.

    Every parameter of a prompt gets a gradient; the backbone's weights get none.
    """
    backbone, split = model(family), task(family, METHODS[name]).splits["train"]
    rows = [[3, 8, 0], [3], [11, 2, 4, 6, 7]]
    together, apart = prompts(family, METHODS[name]), prompts(family, METHODS[name])
    losses = packed_gradients(backbone, [prompt() for prompt in together], rows, split)
    alone = [
        packed_gradients(backbone, [prompt()], [own], split)[0]
        for prompt, own in zip(apart, rows, strict=True)
    ]
    assert losses == pytest.approx(alone, rel=precision(family)[1])
    for one, other in zip(together, apart, strict=True):
        assert set(gradients(one)) == {part for part, _ in one.named_parameters()}
        # A window of six tokens may hide the prompt from a long row.
        assert family in WINDOWED or any(
            float(gradient.abs().max()) > 0 for gradient in gradients(one).values()
        )
        for part, gradient in gradients(one).items():
            close(gradient, gradients(other)[part], 100 * precision(family)[1])
    assert all(
        weight.grad is None and not weight.requires_grad for weight in backbone.model.parameters()
    )


@pytest.mark.parametrize("family", sorted(PROMPT_ONCE_FAMILIES & set(CAUSAL)))
@every_method
def test_the_prompt_once_is_the_plain_path(family: str, name: str) -> None:
    """Computing the prompt once for all rows gives the loss and gradients of whole rows."""
    split = task(family, METHODS[name]).splits["train"]
    rows = [[3, 8, 0], [3], [11, 2, 4, 6, 7]]
    found = []
    for prompt_once in (True, False):
        made = prompts(family, METHODS[name])
        losses = packed_gradients(
            model(family, prompt_once), [prompt() for prompt in made], rows, split
        )
        found.append((losses, [gradients(prompt) for prompt in made]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        for part, gradient in one.items():
            close(gradient, other[part], 1e-4)


@every_family
@every_method
def test_an_artifact_is_the_prompt(family: str, name: str, tmp_path: Path) -> None:
    """A prompt that is saved and loaded gives the same loss bit for bit.

    Parameters that only training needs are not saved.
    """
    backbone, method = model(family), METHODS[name]
    the_task = task(family, method)
    (prompt, *_) = prompts(family, method)
    tensors = {part: tensor.detach().numpy() for part, tensor in prompt().named().items()}
    record = manifest().base_model.model_copy(update={"hidden_size": backbone.table.shape[1]})
    template = the_task.encoder.template.text
    described = manifest(
        method=method.name, num_virtual_tokens=5, base_model=record, template=template
    )
    folder = PromptArtifact(tensors, described).save(tmp_path / "prompt")
    loaded = prompt_tensors(PromptArtifact.load(folder))
    results = [
        evaluate(backbone, [given], the_task.splits["validation"], the_task.encoder)
        for given in (prompt(), loaded)
    ]
    assert results[0] == results[1]
    assert sum(np.asarray(tensor).nbytes for tensor in tensors.values()) < 60_000


@every_family
@every_method
def test_a_resumed_trial_is_one_never_interrupted(family: str, name: str) -> None:
    """A trial resumed from a checkpoint ends like an uninterrupted one, up to rounding.

    Its best prompt is restored, too.
    """
    train = TrainSpec(steps=4, batch_size=3, evaluate_every=2, schedule="linear", clip_norm=1.0)
    search = SearchSpec(metric="loss")
    spec = TRIALS[0]

    def engine() -> Engine:
        return Engine(model(family), task(family, METHODS[name]), train, search, capacity=2)

    whole = engine()
    whole.seat("a", spec)
    first, last = whole.round()[0], whole.round()[0]
    again = engine()
    again.seat("a", spec, first.checkpoint)
    (resumed,) = again.round()
    assert (resumed.step, resumed.ending, resumed.best_step) == (
        last.step,
        last.ending,
        last.best_step,
    )
    assert resumed.metrics == pytest.approx(last.metrics, rel=10 * precision(family)[1])
    one, other = Checkpoint.from_bytes(resumed.checkpoint), Checkpoint.from_bytes(last.checkpoint)
    assert one.tensors.keys() == other.tensors.keys()
    for part, tensor in one.tensors.items():
        close(tensor, other.tensors[part], 1e-3)


@every_family
@every_method
def test_evaluation_is_packed_and_exact(family: str, name: str) -> None:
    """Metrics of several prompts in one forward equal those of each prompt alone."""
    backbone, the_task = model(family), task(family, METHODS[name])
    made = [prompt() for prompt in prompts(family, METHODS[name])]
    split = the_task.splits["train"]
    together = evaluate(backbone, made, split, the_task.encoder)
    for prompt, metrics in zip(made, together, strict=True):
        (alone,) = evaluate(backbone, [prompt], split, the_task.encoder)
        assert metrics == pytest.approx(alone, rel=10 * precision(family)[1])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gemma2",)])
def test_a_text_prefix_is_the_text(family: str) -> None:
    """A prefix that starts from a text has that text's keys and values.

    In a causal model this equals putting the text in front of the row.
    """
    backbone = model(family)
    context = InitContext.of(backbone, [])
    ids = backbone.tokenizer("is this message spam", add_special_tokens=False)["input_ids"]
    spec = TrialSpec("text", "is this message spam", len(ids), 0.1, 0)
    soft = make_prompt(Method(), spec, context)()
    prefix = make_prompt(Method("prefix_tuning", "mlp"), spec, context)()
    rows, targets = [[5, 6, 7], [9]], [[4, 8], [3, 2]]
    with torch.no_grad():
        one, _ = backbone.teacher_forced(backbone.prepare([soft]), rows, targets, [0, 0])
        other, _ = backbone.teacher_forced(backbone.prepare([prefix]), rows, targets, [0, 0])
    if backbone.family == "causal":
        close(other, one, 1e-4)  # the initial prefix is stored in float32
    else:
        assert not torch.allclose(other, one)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_methods_share_a_forward(family: str) -> None:
    """Trials of different methods, lengths and batch sizes share a step with unchanged results."""
    backbone, split = model(family), task(family, Method()).splits["train"]
    context = InitContext.of(backbone, task(family, Method()).encoder.answers)
    methods = [Method(), Method("prefix_tuning", "mlp"), Method("p_tuning", "lstm")]
    rows = [[3, 8, 0], [3], [11, 2, 4, 6, 7]]

    def made() -> list[Prompt]:
        return [
            make_prompt(method, spec, context) for method, spec in zip(methods, TRIALS, strict=True)
        ]

    together, apart = made(), made()
    losses = packed_gradients(backbone, [prompt() for prompt in together], rows, split)
    alone = [
        packed_gradients(backbone, [prompt()], [own], split)[0]
        for prompt, own in zip(apart, rows, strict=True)
    ]
    assert losses == pytest.approx(alone, rel=1e-6)
    for one, other in zip(together, apart, strict=True):
        for part, gradient in gradients(one).items():
            close(gradient, gradients(other)[part], 1e-4)
