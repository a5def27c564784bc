"""Initial values of prompts (Lester et al. 2021, section 3.2).

Each init of a soft prompt yields [P, H] in float32.

Shapes: P virtual tokens, H width, V rows of the embedding table, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import Backbone, PromptTensors
from orchestrator.models.tokenizer import Tokenizer

UNIFORM_RANGE = 0.5  # Lester et al.: uniform in [-0.5, 0.5]
VOCABULARY = 5000  # Lester et al.: the 5,000 most frequent tokens


Artifacts = Mapping[str, Mapping[str, Tensor]]
"""Named tensors of registered prompts, by the reference written in the job spec."""


@dataclass(frozen=True)
class InitContext:
    """The facts about the model and the task that an init may use."""

    embed: Callable[[Tensor], Tensor]
    """Maps token ids to the embeddings that enter the model."""
    shape: tuple[int, int]
    """Shape (V, H) of the embedding table."""
    tokenizer: Tokenizer
    answers: Sequence[Sequence[int]]
    """Token ids of each label's text."""
    spread: float = 1.0
    """Standard deviation of the embedding table."""
    artifacts: Artifacts = field(default_factory=dict)
    """Registered prompts to start from."""
    activations: Callable[[Tensor], dict[str, Tensor]] | None = None
    """Maps a soft prompt [P, H] to its keys and values in the model, by attention site.

    None if the model has none."""
    prefix_shapes: Callable[[], Mapping[str, torch.Size]] = dict
    """Returns the shape of a prefix of one token, by attention site."""

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
    """Create the trial's initial soft prompt [P, H], float32 on the CPU.

    Random values depend on the seed alone. Raises BadInput for an unknown init.
    """
    init = INITS.get(spec.init)
    if init is None:
        raise BadInput(f"init {spec.init!r} is unknown", f"use one of {', '.join(INITS)}")
    return init(spec, context, torch.Generator().manual_seed(spec.seed))


@torch.no_grad()
def initial_prefix(spec: TrialSpec, context: InitContext) -> dict[str, Tensor]:
    """Create the trial's initial prefix, for each site [L, 2, kv heads, P, head width].

    The tensors are float32. A registered prefix is used as it is, cut or repeated to the trial's
    length. Any other init first makes a soft prompt and takes the keys and values that it has in
    the model (Li & Liang 2021, section 7.4); they are on the CPU. Raises BadInput for a model
    without keys and values.
    """
    artifact_tensors = context.artifacts.get(spec.init_artifact or "", {})
    if prefixes := PromptTensors.from_named(artifact_tensors).prefixes:
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


def random(spec: TrialSpec, context: InitContext, generator: torch.Generator) -> Tensor:
    """Return uniform values from [-0.5, 0.5], as [P, H]."""
    return random_uniform((spec.num_virtual_tokens, context.shape[1]), generator)


def random_normal(spec: TrialSpec, context: InitContext, generator: torch.Generator) -> Tensor:
    """Return normal values with the standard deviation of the embedding table, as [P, H]."""
    shape = (spec.num_virtual_tokens, context.shape[1])
    return torch.randn(*shape, generator=generator) * context.spread


def random_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw values uniformly from [-0.5, 0.5]."""
    return (torch.rand(*shape, generator=generator) * 2 - 1) * UNIFORM_RANGE


def sample_vocab(spec: TrialSpec, context: InitContext, generator: torch.Generator) -> Tensor:
    """Return the embeddings [P, H] of frequent tokens, drawn at random."""
    population_size = spec.init_population or VOCABULARY
    return _sampled(spec.num_virtual_tokens, context, generator, population_size)


def _sampled(
    length: int, context: InitContext, generator: torch.Generator, population_size: int = VOCABULARY
) -> Tensor:
    """Return the embeddings [P, H] of frequent tokens, drawn at random.

    Tokens are drawn without replacement; once all are used, the draw starts again with all of them.
    """
    population = frequent_ids(context, population_size)
    rounds = -(-length // len(population))
    indices = torch.cat(
        [torch.randperm(len(population), generator=generator) for _ in range(rounds)]
    )[:length]
    return _rows(context, [population[index] for index in indices.tolist()])


def frequent_ids(context: InitContext, population: int = VOCABULARY) -> list[int]:
    """Return the ids of the ``population`` most frequent ordinary tokens.

    Subword vocabularies are ordered from frequent to rare, so these are the lowest ids. Special
    tokens and single-byte fallback tokens are left out.
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


def class_labels(spec: TrialSpec, context: InitContext, generator: torch.Generator) -> Tensor:
    """Return the mean embedding of each label's tokens, as [P, H].

    If there are fewer labels than virtual tokens, the rest is sampled from the vocabulary. Labels
    beyond the length are left out.
    """
    length = spec.num_virtual_tokens
    means = [_rows(context, ids).mean(0, keepdim=True) for ids in context.answers][:length]
    rest = length - len(means)
    return torch.cat([*means, _sampled(rest, context, generator)] if rest else means)


def text(spec: TrialSpec, context: InitContext, generator: torch.Generator) -> Tensor:
    """Return the embeddings [P, H] of a text's tokens, cut or repeated to the length.

    Special tokens are left out.
    """
    ids = text_ids(spec.init_text or "", context)
    return _rows(context, [ids[index % len(ids)] for index in range(spec.num_virtual_tokens)])


def artifact(spec: TrialSpec, context: InitContext, generator: torch.Generator) -> Tensor:
    """Return another task's prompt as [P, H], cut or repeated to the length.

    Lester et al. 2021, section 3.2. Raises BadInput when the artifact is a prefix, which has no
    embeddings, or when its width is not the model's.
    """
    reference = spec.init_artifact or ""
    stored_prompt = context.artifacts[reference].get("prompt")
    if stored_prompt is None:
        raise BadInput(
            f"init artifact {reference!r} is a prefix and can't start a soft prompt",
            "use method prefix_tuning",
        )
    if stored_prompt.shape[1] != context.shape[1]:
        raise BadInput(
            f"init artifact {reference!r} has width {stored_prompt.shape[1]}, "
            f"the base model's is {context.shape[1]}",
            "start from a prompt of the same base model",
        )
    return _fitted(stored_prompt.float().cpu(), spec.num_virtual_tokens, 0)


INITS: dict[str, Callable[[TrialSpec, InitContext, torch.Generator], Tensor]] = {
    "random": random,
    "random_normal": random_normal,
    "sample_vocab": sample_vocab,
    "class_labels": class_labels,
    "text": text,
    "artifact": artifact,
}
"""The inits by the names that ``NamedInit`` and ``Init`` of the job spec give them."""


def _fitted(tensor: Tensor, length: int, dim: int) -> Tensor:
    """Cut or repeat a tensor along a dimension to the given length."""
    return tensor.index_select(dim, torch.arange(length) % tensor.shape[dim])


def text_ids(words: str, context: InitContext) -> list[int]:
    """Return the token ids of an init text. Raises BadInput for a text without tokens."""
    ids = list(context.tokenizer(words, add_special_tokens=False)["input_ids"])
    if not ids:
        raise BadInput(f"init text {words!r} has no tokens", "write some words")
    return ids


def _rows(context: InitContext, ids: Sequence[int]) -> Tensor:
    return context.embed(torch.as_tensor(list(ids))).detach().float().cpu()
