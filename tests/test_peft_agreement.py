"""With equal parameters, PEFT and we compute equal target logits and gradients.

This holds on every model family where PEFT defines the method. Where PEFT differs, a test shows the
difference.

PEFT 0.21.2, float64. PEFT runs one unpadded row at a time, because it pads rows on the left,
between prompt and input. Our gradients are those of one batch.

Differences:

* A prefix in front of an encoder's row (bert, roberta) shifts the row's positions in PEFT. Ours has
no position, since no position precedes a row's start token. Otherwise both are equal.

* A prefix of an encoder-decoder model is only in the decoder's self-attention. The paper's is also
in the encoder and in the cross-attention.

* There, decoder layer i gets the keys and values of layer 2i modulo the number of layers, so half
of the parameters of an even number of layers have no effect.

* bart's positions shift behind the prefix; t5's keys get the relative positions of preceding
tokens.

* With ``num_transformer_submodules=1`` both attentions of a layer share one cache, so the
cross-attention also sees the self-attention's keys.

* There is no task type for masked models. FEATURE_EXTRACTION around the model with its head runs
and is compared here.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import MASKED, SEQ2SEQ, backbone_of, random_ids, tiny_model
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from orchestrator.models.backbone import Backbone, PromptTensors, make_backbone
from orchestrator.tuning.prompts import Prompt
from orchestrator.tuning.prompts.p_tuning import EncodedPrompt, LstmEncoder, MlpEncoder
from orchestrator.tuning.prompts.prefix import DirectSite, MlpSite, Prefix
from orchestrator.tuning.prompts.soft import SoftPrompt

CAUSAL = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "mistral"]
SOFT_FAMILIES = [*CAUSAL, *SEQ2SEQ, *MASKED]
TASK_TYPES = {
    **dict.fromkeys(SEQ2SEQ, "SEQ_2_SEQ_LM"),
    **dict.fromkeys(MASKED, "FEATURE_EXTRACTION"),
}
P, HIDDEN, LAYERS = 5, 7, 2
INPUTS, TARGETS = random_ids([6, 3, 9], 1), random_ids([2, 4, 1], 2)
# Relative to the largest value. The norms of Llama and its relatives always compute in float32.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Pair:
    """The same values in our prompt and in PEFT's model.

    For each of our parameters it has PEFT's parameter and the conversion of its layout.
    """

    ours: Prompt
    peft: nn.Module
    same: dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]


def peft_model(model: nn.Module, config: Any) -> nn.Module:
    """Wrap a copy of the model, in evaluation mode, with PEFT and random prompt values.

    Attention is the library's own.
    """
    alone = copy.deepcopy(model).eval()
    alone.set_attn_implementation("sdpa")
    if alone.config.model_type in ("gpt2", "opt"):
        # Every tiny configuration sets shared key heads, but these families have none.
        del alone.config.num_key_value_heads
    made = get_peft_model(alone, config).double().eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in made.prompt_encoder.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return made


def keys_values(heads: int, width: int) -> Callable[[Tensor], Tensor]:
    """Convert PEFT's [P, L x 2 x kv heads x head width] to [L, 2, kv heads, P, head width]."""
    return lambda flat: flat.view(P, LAYERS, 2, heads, width).permute(1, 2, 3, 0, 4)


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def soft(backbone: Backbone, family: str) -> Pair:
    width = backbone.table.shape[1]
    config = PromptTuningConfig(
        task_type=TASK_TYPES.get(family, "CAUSAL_LM"), num_virtual_tokens=P, token_dim=width,
        num_transformer_submodules=1,
    )  # fmt: skip
    peft = peft_model(tiny_model(family), config)
    weight = peft.prompt_encoder["default"].embedding.weight
    return Pair(SoftPrompt(torch.zeros(P, width)), peft, {"prompt": (weight, as_it_is)})


def encoded(kind: str) -> Callable[[Backbone, str], Pair]:
    def make(backbone: Backbone, family: str) -> Pair:
        width = backbone.table.shape[1]
        config = PromptEncoderConfig(
            task_type=TASK_TYPES.get(family, "CAUSAL_LM"), num_virtual_tokens=P, token_dim=width,
            num_transformer_submodules=1, encoder_reparameterization_type=kind,
            encoder_hidden_size=HIDDEN,
        )  # fmt: skip
        peft = peft_model(tiny_model(family), config)
        theirs = peft.prompt_encoder["default"]
        names = {"first": "mlp_head.0", "last": "mlp_head.2", "lstm": "lstm_head"}
        if kind == "MLP":
            names = {"first": "mlp_head.0", "middle": "mlp_head.2", "last": "mlp_head.4"}
        encoder = LstmEncoder(width, HIDDEN) if kind == "LSTM" else MlpEncoder(width, HIDDEN)
        same = {"tokens": (theirs.embedding.weight, as_it_is)}
        for name, parameter in theirs.named_parameters():
            for mine, other in names.items():
                if name.startswith(f"{other}."):
                    same[f"encoder.network.{mine}{name.removeprefix(other)}"] = (
                        parameter,
                        as_it_is,
                    )
        return Pair(EncodedPrompt(None, torch.zeros(P, width), encoder, False), peft, same)

    return make


def prefix(projection: bool) -> Callable[[Backbone, str], Pair]:
    def make(backbone: Backbone, family: str) -> Pair:
        shape = backbone.prefix_shapes["decoder"]
        config = PrefixTuningConfig(
            task_type=TASK_TYPES.get(family, "CAUSAL_LM"), num_virtual_tokens=P,
            prefix_projection=projection,
            encoder_hidden_size=HIDDEN,
        )  # fmt: skip
        peft = peft_model(tiny_model(family), config)
        theirs = peft.prompt_encoder["default"]
        layout = keys_values(shape[2], shape[4])
        if not projection:
            start = torch.zeros(*shape[:3], P, shape[4])
            same = {"sites.decoder.keys_values": (theirs.embedding.weight, layout)}
            return Pair(Prefix({"decoder": DirectSite(start)}), peft, same)
        # PEFT's tokens have the width of a layer's keys, ours the width of the model. The two
        # differ where key heads are shared.
        site = MlpSite(shape, P, theirs.embedding.weight.shape[1], HIDDEN, None)
        same = {"sites.decoder.tokens": (theirs.embedding.weight, as_it_is)}
        for name, parameter in theirs.transform.named_parameters():
            same[f"sites.decoder.mlp.network.{name}"] = (parameter, as_it_is)
        return Pair(Prefix({"decoder": site}), peft, same)

    return make


METHODS: dict[str, Callable[[Backbone, str], Pair]] = {
    "prompt tuning": soft,
    "p-tuning, lstm": encoded("LSTM"),
    "p-tuning, mlp": encoded("MLP"),
    "prefix tuning": prefix(False),
    "prefix tuning, projected": prefix(True),
}
SOFT = [name for name in METHODS if not name.startswith("prefix")]
PREFIXES = [name for name in METHODS if name.startswith("prefix")]


def with_values(pair: Pair) -> Prompt:
    """Return our prompt in float64 with PEFT's values; each of our parameters gets one."""
    ours = pair.ours.double()
    parameters = dict(ours.named_parameters())
    assert set(parameters) == set(pair.same)
    assert len(parameters) == len(list(pair.peft.prompt_encoder.parameters()))
    for name, (theirs, layout) in pair.same.items():
        parameters[name].data.copy_(layout(theirs.data))
    return ours


def peft_logits(peft: nn.Module, backbone: Backbone, ids: list[int], target: list[int]) -> Tensor:
    """Return PEFT's logits [Y, V] of one row's target."""
    if backbone.family == "seq2seq":
        decoder = torch.tensor([[backbone.start_id, *target[:-1]]])
        row = torch.tensor([ids])
        return peft(
            input_ids=row, attention_mask=torch.ones_like(row), decoder_input_ids=decoder
        ).logits[0]
    if backbone.family == "masked":
        row = torch.tensor([[*ids, *[backbone.tokenizer.mask_token_id] * len(target)]])
        return peft(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -len(target) :]
    row = torch.tensor([[*ids, *target[:-1]]])
    return peft(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -len(target) :]


def our_logits(
    backbone: Backbone, prompt: PromptTensors, ids: list[int], target: list[int]
) -> Tensor:
    logits, _ = backbone.teacher_forced(backbone.prepare([prompt]), [ids], [target], [0])
    return logits[0]


def rows() -> Iterator[tuple[list[int], list[int]]]:
    return zip(INPUTS, TARGETS, strict=True)


def close(got: Tensor | None, wanted: Tensor | None) -> None:
    assert got is not None and wanted is not None and got.isfinite().all()
    scale = float(wanted.abs().max())
    assert scale > 0
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE * scale)


def assert_agreement(backbone: Backbone, pair: Pair) -> None:
    """Compare logits row by row, the mean loss, and the gradient of every parameter."""
    ours, tokens, total = with_values(pair), sum(map(len, TARGETS)), 0.0
    for ids, target in rows():
        wanted = peft_logits(pair.peft, backbone, ids, target)
        with torch.no_grad():
            close(our_logits(backbone, ours(), ids, target), wanted)
        loss = nn.functional.cross_entropy(wanted, torch.tensor(target), reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    logits, targets = backbone.teacher_forced(
        backbone.prepare([ours()]), INPUTS, TARGETS, [0, 0, 0]
    )
    # The mean is over the rows' target tokens.
    mean = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    mean.backward()
    assert mean.item() == pytest.approx(total, rel=TOLERANCE)
    for name, parameter in ours.named_parameters():
        theirs, layout = pair.same[name]
        assert theirs.grad is not None
        close(parameter.grad, layout(theirs.grad))


@pytest.mark.parametrize("family", SOFT_FAMILIES)
@pytest.mark.parametrize("method", SOFT)
def test_virtual_tokens_agree(family: str, method: str) -> None:
    """Prompt tuning and P-tuning agree in logits, loss and gradients on every family."""
    backbone = backbone_of(family)
    assert_agreement(backbone, METHODS[method](backbone, family))


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("method", PREFIXES)
def test_prefixes_agree(family: str, method: str) -> None:
    """Prefix tuning agrees on causal families, also with shared heads or a sliding window."""
    backbone = backbone_of(family)
    assert_agreement(backbone, METHODS[method](backbone, family))


def moved(family: str) -> Backbone:
    """Return the family's model with learned positions shifted by one prefix length."""
    model = copy.deepcopy(tiny_model(family)).eval()
    (name,) = {"bart": ["decoder.embed_positions"]}.get(family, ["embeddings.position_embeddings"])
    (table,) = [
        module.weight.data for place, module in model.named_modules() if place.endswith(name)
    ]
    table[:-P] = table[P:].clone()
    original = backbone_of(family)
    return make_backbone(model, original.tokenizer, original.info)


@pytest.mark.parametrize("family", MASKED)
@pytest.mark.parametrize("method", PREFIXES)
def test_a_prefix_before_an_encoder_differs_in_positions_only(family: str, method: str) -> None:
    """PEFT agrees with ours on a model whose positions are shifted by the prefix's length.

    It does not agree on the model itself, because PEFT counts a prefix as positions.
    """
    backbone = backbone_of(family)
    assert_agreement(moved(family), METHODS[method](backbone, family))
    pair = METHODS[method](backbone, family)
    ours = with_values(pair)
    with torch.no_grad():
        ids, target = INPUTS[0], TARGETS[0]
        apart = our_logits(backbone, ours(), ids, target) - peft_logits(
            pair.peft, backbone, ids, target
        )
    assert float(apart.abs().max()) > 0.1


def as_peft_reads_it(tensor: Tensor) -> PromptTensors:
    """Return a decoder prefix with the layers that PEFT's encoder-decoder cache reads."""
    return PromptTensors(
        prefixes={"decoder": tensor[[2 * layer % LAYERS for layer in range(LAYERS)]]}
    )


def seq2seq_prefix(family: str) -> tuple[nn.Module, PromptTensors]:
    """Return PEFT's encoder-decoder prefix and the decoder prefix that it is equivalent to."""
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    peft = peft_model(tiny_model(family), config)
    weight = peft.prompt_encoder["default"].embedding.weight
    return peft, as_peft_reads_it(keys_values(4, 8)(weight.detach()))


def test_a_prefix_of_bart_is_half_a_decoder_prefix() -> None:
    """On bart, PEFT's prefix is our decoder prefix with half of its parameters unused.

    PEFT's layer i reads the keys and values of layer 2i, and positions shift by the prefix. There
    is no prefix in the encoder or the cross-attention. Half of the parameters get no gradient.
    """
    peft, read = seq2seq_prefix("bart")
    backbone = moved("bart")
    for ids, target in rows():
        wanted = peft_logits(peft, backbone, ids, target)
        close(our_logits(backbone, read, ids, target), wanted.detach())
        wanted.logsumexp(1).sum().backward()
    gradient = keys_values(4, 8)(peft.prompt_encoder["default"].embedding.weight.grad)
    assert float(gradient[1].abs().max()) == 0 and float(gradient[0].abs().max()) > 0


def test_a_prefix_of_t5_has_relative_positions_in_peft() -> None:
    """On t5, PEFT applies relative positions to the prefix and we do not.

    Without the decoder's position bias both agree; with it they do not.
    """
    peft, read = seq2seq_prefix("t5")
    backbone = make_backbone(
        copy.deepcopy(tiny_model("t5")), backbone_of("t5").tokenizer, backbone_of("t5").info
    )
    with torch.no_grad():
        apart = [
            float(
                (our_logits(backbone, read, *row) - peft_logits(peft, backbone, *row)).abs().max()
            )
            for row in rows()
        ]
        assert max(apart) > 1e-4
        for name, weight in itertools.chain(
            backbone.model.named_parameters(), peft.base_model.named_parameters()
        ):
            if name.startswith("decoder.") and "relative_attention_bias" in name:
                weight.zero_()
        for row in rows():
            close(our_logits(backbone, read, *row), peft_logits(peft, backbone, *row))


def test_one_submodule_is_another_prefix() -> None:
    """With num_transformer_submodules=1 the same values give other logits.

    Prompt tuning needs this setting, but it does not make encoder-decoder prefixes agree.
    """
    for family in SEQ2SEQ:
        both, read = seq2seq_prefix(family)
        config = PrefixTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1
        )
        one = peft_model(tiny_model(family), config)
        whole = keys_values(4, 8)(one.prompt_encoder["default"].embedding.weight.detach())
        backbone = moved("bart") if family == "bart" else backbone_of(family)
        with torch.no_grad():
            got = peft_logits(one, backbone, *next(rows()))
            for other in (read, PromptTensors(prefixes={"decoder": whole})):
                assert not torch.allclose(
                    got, our_logits(backbone, other, *next(rows())), rtol=1e-2
                )
            assert not torch.allclose(got, peft_logits(both, backbone, *next(rows())), rtol=1e-2)


def test_masked_models_have_no_task_type() -> None:
    """Without a task type PEFT can't build a masked model's prompt."""
    config = PromptTuningConfig(num_virtual_tokens=P, num_transformer_submodules=1)
    with pytest.raises(KeyError):
        peft_model(tiny_model("bert"), config)(input_ids=torch.tensor([[3, 4]]))
