"""Virtual tokens as rows of a model's embedding table, with a head that does not produce them.

A row of a prompt goes into the embedding table; the head gets a row too, which must not win. A tied
head is untied first: the prompt's own vector would score as it pleases. What can be promised then
depends on the head (``Silence``):

* A head with a bias: a row of zeros and a bias of -10,000. The logit is the same for every input.
* A head behind a layer normalization with a bias: the normalised values sum to zero, so a row that
  divides by the normalization's weight scores a constant, whatever the hidden state. Its largest
  possible logit is computed with the rounding of the stored dtype.
* Any other head, for instance behind an RMS normalization: a row without a bias scores an input x
  and -x with opposite signs, so no row is low for all inputs. The row is then the mean of the rows
  of tokens that the model avoids. Its logit is the mean of theirs for every input, so it is never
  the largest, and its probability is at most the geometric mean of theirs.

Shapes: N virtual tokens, H width of the table, D width of the head, V vocabulary, S states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from orchestrator.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOWEST = -10_000.0
"""Logit of a virtual token where it can be chosen; within float16."""

AVOIDED = 16
"""Number of tokens whose rows are averaged."""

MARGIN = 50.0
"""Distance of a virtual token's logit from the largest one: a probability below 1e-21."""

TRIAL_ROWS, TRIAL_TOKENS = 8, 32
OTHERWISE = "export it with --format embeds, or as a PEFT folder"


Means = Literal["bias", "normalization", "avoided tokens"]


@dataclass(frozen=True)
class Silence:
    """Why a head does not produce virtual tokens."""

    by: Means
    largest_logit: float | None = None
    """Bound on a virtual token's logit for any hidden state; None for avoided tokens."""
    largest_probability: float | None = None
    """Largest probability in a trial with random tokens; for avoided tokens only."""


@dataclass(frozen=True)
class _Trial:
    """A forward over random tokens behind the virtual ones."""

    states: Tensor
    """What entered the head, [S, D]."""
    log_probs: Tensor
    """[S, V]"""
    norm: nn.LayerNorm | None
    """The layer normalization with a bias whose output enters the head."""


def add_virtual_tokens(model: PreTrainedModel, vectors: Mapping[int, Tensor]) -> Silence:
    """Give a causal model the token ids ``vectors``, each with its vector [H] as it enters.

    The table is float32 afterwards, since rounded vectors would be another prompt; other weights
    keep their dtype. Raises BadInput for a model that this can't be done to.
    """
    head = _head(model)
    ids = list(vectors)
    rows = torch.stack([vectors[token_id].float() for token_id in ids])
    scale = embedding_scale(model)
    row, bias, silence = _silent_row(head, _tried(model, head, rows), ids)
    _enlarge(model, head, max(len(head.weight), max(ids) + 1))
    table: Any = model.get_input_embeddings()
    table.weight.data[ids] = rows / scale
    head.weight.data[ids] = row.to(head.weight)
    if (biases := _bias(head)) is not None:
        biases.data[ids] = bias
    return silence


def _head(model: PreTrainedModel) -> nn.Linear:
    """Return the model's head, a linear layer with a row for each token."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        not isinstance(head, nn.Linear)
        or not isinstance(table, nn.Embedding)
        or not head.weight.is_floating_point()
        or len(head.weight) != len(table.weight)
    ):
        raise BadInput(
            f"a {model.config.model_type} model can't get further tokens: its head is not a matrix "
            "with a row for each row of the embedding table",
            OTHERWISE,
        )
    return head


def _bias(head: nn.Linear) -> Tensor | None:
    bias: Tensor | None = head.bias  # torch's type leaves None out
    return bias


@torch.no_grad()
def embedding_scale(model: PreTrainedModel) -> float:
    """Return the factor between a row of the table and what enters the model."""
    table: Any = model.get_input_embeddings()
    ids = torch.arange(min(64, len(table.weight)))
    stored, entering = table.weight[ids].double(), table(ids).double()
    scale = float((stored * entering).sum() / stored.square().sum())
    if not torch.allclose(stored * scale, entering, rtol=1e-2, atol=1e-6):
        raise BadInput(
            f"a {model.config.model_type} model does more to its embeddings than scale them, so "
            "a virtual token can't be a row of the table",
            OTHERWISE,
        )
    return scale


@torch.no_grad()
def _tried(model: PreTrainedModel, head: nn.Linear, virtual: Tensor) -> _Trial:
    """Run random tokens behind the virtual ones and see what enters the head."""
    seen: dict[str, Tensor] = {}
    outputs: list[tuple[nn.LayerNorm, Tensor]] = []
    norms = [module for module in model.modules() if type(module) is nn.LayerNorm]
    hooks = [head.register_forward_pre_hook(lambda _, given: seen.update(states=given[0]))]
    hooks += [
        norm.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
        for norm in norms
    ]
    table: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(table.weight), (TRIAL_ROWS, TRIAL_TOKENS), generator=generator)
    in_front = virtual[:TRIAL_TOKENS].to(table.weight).expand(TRIAL_ROWS, -1, -1)
    embeddings = torch.cat([in_front, table(ids)], dim=1)
    try:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    states = seen["states"]
    norm = next(
        (module for module, output in outputs if torch.equal(output, states) and _centres(module)),
        None,
    )
    log_probs = logits.flatten(0, 1).float().log_softmax(-1)
    return _Trial(states.flatten(0, 1).float(), log_probs, norm)


def _centres(norm: nn.LayerNorm) -> bool:
    """Tell whether a normalization has a bias, which makes a constant score possible."""
    return norm.weight is not None and norm.bias is not None


@torch.no_grad()
def _silent_row(
    head: nn.Linear, trial: _Trial, ids: Sequence[int]
) -> tuple[Tensor, float, Silence]:
    """Return a row of the head [D], its bias, and what is promised of them."""
    if _bias(head) is not None:
        return torch.zeros(head.in_features), LOWEST, Silence("bias", LOWEST)
    if trial.norm is not None:
        row, bound = _constant_row(trial.norm, head.weight.dtype)
        if bound < _least_top_logit(head, trial.norm) - MARGIN:
            return row, 0.0, Silence("normalization", bound)
    worst = trial.log_probs.max(dim=0).values
    worst[[token_id for token_id in ids if token_id < len(worst)]] = math.inf
    avoided = worst.topk(min(AVOIDED, len(worst) // 8), largest=False).indices
    probability = float(trial.log_probs[:, avoided].mean(dim=1).max().exp())
    silence = Silence("avoided tokens", largest_probability=probability)
    return head.weight[avoided].float().mean(dim=0), 0.0, silence


@torch.no_grad()
def _least_top_logit(head: nn.Linear, norm: nn.LayerNorm) -> float:
    """Return a number that the largest logit exceeds for every hidden state.

    It is the least possible mean of all logits.
    """
    mean = head.weight.double().mean(dim=0)
    product = mean * norm.weight.double()
    spread = product - product.mean()
    return float((mean * norm.bias.double()).sum() - spread.norm() * math.sqrt(len(mean)))


@torch.no_grad()
def _constant_row(norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return a row that scores close to LOWEST behind a normalization, and the largest score.

    With a weight g and a bias b the head gets h = g x + b, where x has mean 0 and length at most
    sqrt(D). The row r = c / g scores c sum(b / g). Rounding the row leaves r g = c + e, which adds
    at most |e| sqrt(D); rounding h to the same dtype adds as much again. A bound of 0 or more means
    that there is no such row.
    """
    weight, bias = norm.weight.double(), norm.bias.double()
    inverse = torch.where(weight == 0, torch.zeros_like(weight), 1 / weight)
    total = float((bias * inverse).sum())
    if not math.isfinite(total) or total == 0:
        return inverse.float(), math.inf
    largest_entry = torch.finfo(torch.float16).max / 2
    factor = min(abs(LOWEST / total), largest_entry / float(inverse.abs().max()))
    row = (-math.copysign(factor, total) * inverse).to(dtype)
    product = row.double() * weight
    spread = product - product.mean()
    rounding = torch.finfo(dtype).eps * float(
        product.norm() * math.sqrt(len(row)) + (row.double() * bias).abs().sum()
    )
    score = float((row.double() * bias).sum())
    return row.float(), score + float(spread.norm()) * math.sqrt(len(row)) + rounding


def _enlarge(model: PreTrainedModel, head: nn.Linear, count: int) -> None:
    """Untie head and table, and give both ``count`` rows."""
    table: Any = model.get_input_embeddings()
    table.weight = nn.Parameter(_longer(table.weight, count).float(), requires_grad=False)
    table.num_embeddings = count
    head.weight = nn.Parameter(_longer(head.weight, count), requires_grad=False)
    head.out_features = count
    if (bias := _bias(head)) is not None:
        head.bias = nn.Parameter(_longer(bias, count), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.config.get_text_config().vocab_size = count


def _longer(tensor: Tensor, count: int) -> Tensor:
    """Copy a tensor and append rows of zeros up to ``count`` rows."""
    longer = tensor.new_zeros(count, *tensor.shape[1:])
    longer[: len(tensor)] = tensor
    return longer
