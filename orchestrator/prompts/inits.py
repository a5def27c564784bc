"""Where a soft prompt starts: each init yields [P, H] in float32 (Lester et al. 2021, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.backbone import Backbone
from orchestrator.errors import BadInput
from orchestrator.space import TrialSpec

UNIFORM_RANGE = 0.5  # Lester et al.: uniform in [-0.5, 0.5]
VOCABULARY = 5000  # Lester et al.: the 5,000 most frequent tokens


@dataclass(frozen=True)
class InitContext:
    """What an init may look at: tokens as they enter the model, the embedding table's shape (V, H), the tokenizer, the
    answers' token ids."""

    embed: Callable[[Tensor], Tensor]
    shape: tuple[int, int]
    tokenizer: Any
    answers: Sequence[Sequence[int]]

    @classmethod
    def of(cls, backbone: Backbone, answers: Sequence[Sequence[int]]) -> InitContext:
        rows, width = backbone.table.shape
        return cls(lambda ids: backbone.embed(ids.to(backbone.device)), (rows, width), backbone.tokenizer, answers)


def initial_prompt(spec: TrialSpec, context: InitContext) -> Tensor:
    """The trial's first prompt [P, H], float32 on the CPU; the seed alone decides what is drawn."""
    generator = torch.Generator().manual_seed(spec.seed)
    length, width = spec.num_virtual_tokens, context.shape[1]
    if spec.init == "random":
        return random_uniform(length, width, generator)
    if spec.init == "sample_vocab":
        return sample_vocab(length, context, generator)
    if spec.init == "class_labels":
        return class_labels(length, context, generator)
    if spec.init == "text":
        return text(length, spec.init_text or "", context)
    raise BadInput(f"init {spec.init!r} is unknown", "use random, sample_vocab, class_labels or {text: ...}")


def random_uniform(length: int, width: int, generator: torch.Generator) -> Tensor:
    """[P, H] uniform in [-0.5, 0.5]."""
    return (torch.rand(length, width, generator=generator) * 2 - 1) * UNIFORM_RANGE


def sample_vocab(length: int, context: InitContext, generator: torch.Generator) -> Tensor:
    """[P, H] embeddings of frequent tokens, drawn without replacement (again from the start once all are used)."""
    population = frequent_ids(context)
    rounds = -(-length // len(population))
    drawn = torch.cat([torch.randperm(len(population), generator=generator) for _ in range(rounds)])[:length]
    return _rows(context, [population[place] for place in drawn.tolist()])


def frequent_ids(context: InitContext, population: int = VOCABULARY) -> list[int]:
    """The ``population`` most frequent ordinary tokens.

    Subword vocabularies are built from frequent to rare, so that the lowest ids are the most frequent ones; special and
    single-byte fallback tokens are left out.
    """
    special = set(context.tokenizer.all_special_ids)
    size = min(len(context.tokenizer), context.shape[0])
    names = context.tokenizer.convert_ids_to_tokens(list(range(size)))
    ordinary = [i for i, name in enumerate(names) if i not in special and name and not _is_byte(name)]
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


def text_ids(words: str, context: InitContext) -> list[int]:
    """Token ids of an init text. BadInput for a text without any."""
    ids = list(context.tokenizer(words, add_special_tokens=False)["input_ids"])
    if not ids:
        raise BadInput(f"init text {words!r} has no tokens", "write some words")
    return ids


def _rows(context: InitContext, ids: Sequence[int]) -> Tensor:
    return context.embed(torch.as_tensor(list(ids))).detach().float().cpu()
