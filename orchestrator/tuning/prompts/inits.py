"""Where a soft prompt starts: each init yields [P, H] in float32 (Lester et al. 2021, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import Backbone, PromptTensors

UNIFORM_RANGE = 0.5  # Lester et al.: uniform in [-0.5, 0.5]
VOCABULARY = 5000  # Lester et al.: the 5,000 most frequent tokens


Artifacts = Mapping[str, Mapping[str, Tensor]]
"""Named tensors of registered prompts, by the reference that the job spec has."""


@dataclass(frozen=True)
class InitContext:
    """What an init may look at: tokens as they enter the model, the embedding table's shape (V, H) and spread, the
    tokenizer, the answers' token ids, prompts to start from, and the keys and values that a soft prompt has."""

    embed: Callable[[Tensor], Tensor]
    shape: tuple[int, int]
    tokenizer: Any
    answers: Sequence[Sequence[int]]
    spread: float = 1.0
    artifacts: Artifacts = field(default_factory=dict)
    activations: Callable[[Tensor], dict[str, Tensor]] | None = None
    prefix_shapes: Callable[[], Mapping[str, torch.Size]] = dict

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        answers: Sequence[Sequence[int]],
        artifacts: Artifacts | None = None,
    ) -> InitContext:
        rows, width = backbone.table.shape
        return cls(
            embed=lambda ids: backbone.embed(ids.to(backbone.device)),
            shape=(rows, width),
            tokenizer=backbone.tokenizer,
            answers=answers,
            spread=float(backbone.table.float().std()),
            artifacts=artifacts or {},
            activations=backbone.activations,
            prefix_shapes=lambda: backbone.prefix_shapes,
        )


def initial_prompt(spec: TrialSpec, context: InitContext) -> Tensor:
    """The trial's first soft prompt [P, H], float32 on the CPU; the seed alone decides what is drawn."""
    generator = torch.Generator().manual_seed(spec.seed)
    length, width = spec.num_virtual_tokens, context.shape[1]
    if spec.init == "random":
        return random_uniform((length, width), generator)
    if spec.init == "random_normal":
        return torch.randn(length, width, generator=generator) * context.spread
    if spec.init == "sample_vocab":
        return sample_vocab(length, context, generator, spec.init_population or VOCABULARY)
    if spec.init == "class_labels":
        return class_labels(length, context, generator)
    if spec.init == "text":
        return text(length, spec.init_text or "", context)
    if spec.init == "artifact":
        return artifact(length, spec.init_artifact or "", context)
    raise BadInput(
        f"init {spec.init!r} is unknown",
        "use random, random_normal, sample_vocab, class_labels, {text: ...} or {artifact: ...}",
    )


@torch.no_grad()
def initial_prefix(spec: TrialSpec, context: InitContext) -> dict[str, Tensor]:
    """The trial's first prefix, for each site [L, 2, kv heads, P, head width], float32 on the CPU.

    A registered prefix as it is; otherwise the keys and values that the soft prompt of the same init has in the model
    (Li & Liang 2021, section 7.4).
    """
    stored = context.artifacts.get(spec.init_artifact or "", {})
    if prefixes := PromptTensors.from_named(stored).prefixes:
        return {
            site: _fitted(tensor, spec.num_virtual_tokens, -2) for site, tensor in prefixes.items()
        }
    if context.activations is None:
        raise BadInput(
            "this model has no keys and values to start a prefix from", "use init random"
        )
    start = initial_prompt(spec, context)
    return {
        site: tensor.detach().float().cpu() for site, tensor in context.activations(start).items()
    }


def random_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform in [-0.5, 0.5]."""
    return (torch.rand(*shape, generator=generator) * 2 - 1) * UNIFORM_RANGE


def sample_vocab(
    length: int, context: InitContext, generator: torch.Generator, population_size: int = VOCABULARY
) -> Tensor:
    """[P, H] embeddings of frequent tokens, drawn without replacement (again from the start once all are used)."""
    population = frequent_ids(context, population_size)
    rounds = -(-length // len(population))
    drawn = torch.cat(
        [torch.randperm(len(population), generator=generator) for _ in range(rounds)]
    )[:length]
    return _rows(context, [population[place] for place in drawn.tolist()])


def frequent_ids(context: InitContext, population: int = VOCABULARY) -> list[int]:
    """The ``population`` most frequent ordinary tokens.

    Subword vocabularies are built from frequent to rare, so that the lowest ids are the most frequent ones; special and
    single-byte fallback tokens are left out.
    """
    special = set(context.tokenizer.all_special_ids)
    size = min(len(context.tokenizer), context.shape[0])
    names = context.tokenizer.convert_ids_to_tokens(list(range(size)))
    ordinary = [
        i for i, name in enumerate(names) if i not in special and name and not _is_byte(name)
    ]
    return ordinary[:population]


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def class_labels(length: int, context: InitContext, generator: torch.Generator) -> Tensor:
    """[P, H]: the mean embedding of each label's tokens; what remains of the length is sampled from the vocabulary."""
    means = [_rows(context, ids).mean(0, keepdim=True) for ids in context.answers][:length]
    rest = length - len(means)
    return torch.cat([*means, sample_vocab(rest, context, generator)] if rest else means)


def text(length: int, words: str, context: InitContext) -> Tensor:
    """[P, H]: embeddings of the text's tokens, special tokens left out, cut or repeated to the length."""
    ids = text_ids(words, context)
    return _rows(context, [ids[place % len(ids)] for place in range(length)])


def artifact(length: int, reference: str, context: InitContext) -> Tensor:
    """[P, H]: another task's prompt (Lester et al. 2021, section 3.2), cut or repeated to the length.

    BadInput when it is a prefix, which has no embeddings, or of another width.
    """
    stored = context.artifacts[reference].get("prompt")
    if stored is None:
        raise BadInput(
            f"init artifact {reference!r} is a prefix and can't start a soft prompt",
            "use method prefix_tuning",
        )
    if stored.shape[1] != context.shape[1]:
        raise BadInput(
            f"init artifact {reference!r} has width {stored.shape[1]}, the base model's is {context.shape[1]}",
            "start from a prompt of the same base model",
        )
    return _fitted(stored.float().cpu(), length, 0)


def _fitted(tensor: Tensor, length: int, dim: int) -> Tensor:
    """Cut or repeated along a dimension."""
    return tensor.index_select(dim, torch.arange(length) % tensor.shape[dim])


def text_ids(words: str, context: InitContext) -> list[int]:
    """Token ids of an init text. BadInput for a text without any."""
    ids = list(context.tokenizer(words, add_special_tokens=False)["input_ids"])
    if not ids:
        raise BadInput(f"init text {words!r} has no tokens", "write some words")
    return ids


def _rows(context: InitContext, ids: Sequence[int]) -> Tensor:
    return context.embed(torch.as_tensor(list(ids))).detach().float().cpu()
