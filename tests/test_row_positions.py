"""Models whose position factors depend on a row's length: batched rows are as if alone.

Such models use LongRoPE. The reference is the model as transformers runs it, one unpadded row at a
time, in float64.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import CONTEXT, random_ids, random_prompts, small_config, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, DynamicCache

from orchestrator.errors import BadInput
from orchestrator.models.backbone import CausalBackbone, PromptTensors
from orchestrator.models.backbone.rotary import RowwiseRotary, install_rowwise
from orchestrator.models.checks import check_positions
from orchestrator.models.decoding import decode, start
from orchestrator.models.rope import rope_switches
from orchestrator.models.scoring import answer_scores
from orchestrator.models.source import BaseModelInfo

SWITCH = 24
PROMPTS = [2, 5, 14]
INPUTS = random_ids([4, 11, 40, 18, 20, 9], seed=3)
"""With their prompts and targets: below, at, just above and far above the switch."""
OWNER = [0, 2, 0, 1, 1, 2]
TARGETS = random_ids([2, 1, 4, 2, 3, 1], seed=4)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {"original_max_position_embeddings": SWITCH},
    "phimoe": {"num_local_experts": 2},
}


def longrope(**more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 4.0, 7.0, 11.0],
        "original_max_position_embeddings": SWITCH,
        **more,
    }


def made(family: str, parameters: dict[str, Any] | None = None) -> tuple[CausalBackbone, nn.Module]:
    """Return a backbone, and the same model as transformers runs it."""
    more = {"short_mscale": 1.1, "long_mscale": 1.3} if family == "phimoe" else {}
    config = small_config(
        family, rope_parameters=parameters or longrope(**more), **FAMILIES.get(family, {})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        # Run experts one by one: their grouped product does not support float64.
        options = {"experts_implementation": "eager"} if "moe" in family else {}
        model = AutoModelForCausalLM.from_config(config, **options).double().eval()
    reference = copy.deepcopy(model)
    info = BaseModelInfo("tiny", "main", family, 32, len(tiny_tokenizer()), CONTEXT, "0", "0")
    return CausalBackbone(model, tiny_tokenizer(), info), reference


def alone(
    reference: nn.Module, prompt: Tensor, ids: Sequence[int], target: Sequence[int]
) -> Tensor:
    embed = reference.get_input_embeddings()  # type: ignore[operator]
    row = torch.cat([prompt.to(embed.weight), embed(torch.tensor([*ids, *target[:-1]]))])
    logits: Tensor = reference(inputs_embeds=row[None], use_cache=False).logits[0]
    return logits[-len(target) :]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_the_rows_lie_on_both_sides_of_the_switch() -> None:
    """The test rows are shorter than the switch, exactly as long, one longer, and much longer."""
    lengths = [
        PROMPTS[owner] + len(ids) + len(target) - 1
        for owner, ids, target in zip(OWNER, INPUTS, TARGETS, strict=True)
    ]
    assert {SWITCH - 1, SWITCH, SWITCH + 1} <= set(lengths)
    assert min(lengths) < SWITCH - 8 and max(lengths) > SWITCH + 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_as_if_alone(family: str) -> None:
    """Packed rows of several prompts have each row's own logits on both sides of the switch."""
    backbone, reference = made(family)
    prompts = random_prompts(backbone, PROMPTS)
    with torch.no_grad():
        logits, _ = backbone.teacher_forced(backbone.prepare(prompts), INPUTS, TARGETS, OWNER)
        for row, (ids, target, owner) in enumerate(zip(INPUTS, TARGETS, OWNER, strict=True)):
            close(logits[row, -len(target) :], alone(reference, prompts[owner], ids, target))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_learn_as_if_alone(family: str) -> None:
    """Each prompt's gradient is the sum of those of its rows alone."""
    backbone, reference = made(family)
    together = random_prompts(backbone, PROMPTS)
    apart = [prompt.detach().clone().requires_grad_() for prompt in together]
    logits, labels = backbone.teacher_forced(backbone.prepare(together), INPUTS, TARGETS, OWNER)
    nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").backward()
    for ids, target, owner in zip(INPUTS, TARGETS, OWNER, strict=True):
        own = alone(reference, apart[owner], ids, target)
        nn.functional.cross_entropy(own, torch.tensor(target), reduction="sum").backward()
    for one, other in zip(together, apart, strict=True):
        close(one.grad, other.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_across_the_switch(family: str) -> None:
    """Generated tokens equal those of a whole forward of the row alone, at every step.

    Some rows cross the switch as they grow; others join a running batch.
    """
    backbone, reference = made(family)
    prompts = random_prompts(backbone, PROMPTS)
    prepared = backbone.prepare(prompts)
    with torch.inference_mode():
        made_ids = decode(start(backbone, prepared, INPUTS, OWNER), -1, 9)
        state = start(backbone, prepared, INPUTS[:1], OWNER[:1])
        state = state.extend(torch.tensor(made_ids[0][:1]))
        joined = state.join(start(backbone, prepared, INPUTS[1:3], OWNER[1:3]))
        assert joined is not None
        later = decode(joined, -1, 8)
        for row, (ids, owner) in enumerate(zip(INPUTS, OWNER, strict=True)):
            grown: list[int] = []
            for _ in range(9):
                grown.append(int(alone(reference, prompts[owner], [*ids, *grown], [2])[0].argmax()))
            assert made_ids[row] == grown
        assert later == [made_ids[0][1:], made_ids[1][:8], made_ids[2][:8]]


def test_answers_are_scored_as_if_alone() -> None:
    """Answers of several tokens are scored right, also on different sides of the switch."""
    backbone, reference = made("phi3")
    prompts = random_prompts(backbone, PROMPTS)
    answers = [[random_ids([4])[0], random_ids([1])[0]]] * len(INPUTS)
    with torch.inference_mode():
        scores = answer_scores(backbone, backbone.prepare(prompts), INPUTS, OWNER, answers)
        for row, (ids, owner) in enumerate(zip(INPUTS, OWNER, strict=True)):
            for place, answer in enumerate(answers[row]):
                log_probs = alone(reference, prompts[owner], ids, answer).log_softmax(-1)
                wanted = log_probs[torch.arange(len(answer)), torch.tensor(answer)].sum()
                torch.testing.assert_close(scores[row][place].double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_prefix_counts_in_the_length(family: str) -> None:
    """A prefix counts towards a row's length, as transformers' cache does."""
    backbone, reference = made(family)
    shape = backbone.prefix_shapes["decoder"]
    generator = torch.Generator().manual_seed(1)
    prefixes = [
        torch.randn(*shape[:3], length, shape[4], generator=generator, dtype=torch.float64)
        for length in PROMPTS
    ]
    prepared = backbone.prepare([PromptTensors(None, {"decoder": prefix}) for prefix in prefixes])
    with torch.no_grad():
        logits, _ = backbone.teacher_forced(prepared, INPUTS, TARGETS, OWNER)
        for row, (ids, target, owner) in enumerate(zip(INPUTS, TARGETS, OWNER, strict=True)):
            cache = DynamicCache([(layer[0][None], layer[1][None]) for layer in prefixes[owner]])
            row_ids = torch.tensor([[*ids, *target[:-1]]])
            wanted = reference(input_ids=row_ids, past_key_values=cache, use_cache=True).logits[
                0, -len(target) :
            ]
            close(logits[row, -len(target) :], wanted)


def test_dynamic_factors_never_see_padding() -> None:
    """Padding never triggers dynamic NTK factors, which change beyond the context.

    A long prompt with a short row and a short prompt with a long row both fit the context. Padded
    together they exceed it, but keep the usual factors.
    """
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    backbone, reference = made("qwen3_moe", parameters)
    prompts = random_prompts(backbone, [CONTEXT - 20, 2])
    inputs, targets = random_ids([10, CONTEXT - 20]), [[3, 4], [5, 6]]
    with torch.no_grad():
        logits, _ = backbone.teacher_forced(backbone.prepare(prompts), inputs, targets, [0, 1])
        for row in (0, 1):
            close(logits[row], alone(reference, prompts[row], inputs[row], targets[row]))


def test_threads_do_not_mix_their_rows() -> None:
    """Short and long rows in two server threads each get the factors that they have alone."""
    backbone, _ = made("phi3")
    prompts = random_prompts(backbone, [2])
    with torch.no_grad():
        prepared = backbone.prepare(prompts)
        wanted = [
            backbone.teacher_forced(prepared, [ids], [[2]], [0])[0]
            for ids in (INPUTS[0], INPUTS[2])
        ]
    wrong: list[int] = []

    def run(place: int) -> None:
        ids = (INPUTS[0], INPUTS[2])[place]
        with torch.no_grad():
            for _ in range(150):
                logits = backbone.teacher_forced(prepared, [ids], [[2]], [0])[0]
                if not torch.allclose(logits, wanted[place], atol=1e-9):
                    wrong.append(place)

    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_which_models_have_a_switch() -> None:
    """LongRoPE has a switch under either name and for any layer type.

    This needs a context beyond the switch. No other kind has one.
    """
    assert rope_switches(small_config("llama", rope_parameters=longrope()), CONTEXT) == (SWITCH,)
    assert rope_switches(small_config("llama", rope_parameters=longrope()), SWITCH) == ()
    assert rope_switches(small_config("llama"), CONTEXT) == ()
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert rope_switches(small_config("llama", rope_parameters=dynamic), CONTEXT) == ()
    old = BertConfig(rope_scaling={"type": "su"}, original_max_position_embeddings=SWITCH)
    assert rope_switches(old, CONTEXT) == (SWITCH,)


def test_models_whose_rows_can_not_have_their_own_factors_are_refused() -> None:
    """Masked models and models with their own code are refused, with reason and fix."""
    config = small_config("llama", rope_parameters=longrope())
    with pytest.raises(
        BadInput, match=r"scales its positions by the longest row.* and this is a masked model"
    ):
        check_positions("m", config, "masked", CONTEXT, own_code=False)
    with pytest.raises(BadInput, match=r"in code of its own(.|\n)*allow_remote_code: false"):
        check_positions("m", config, "causal", CONTEXT, own_code=True)
    check_positions("m", config, "causal", CONTEXT, own_code=False)
    check_positions("m", small_config("llama"), "masked", CONTEXT, own_code=True)
    with pytest.raises(BadInput, match="its rotary module is not known"):
        install_rowwise(nn.Sequential(nn.Linear(2, 2)), [SWITCH])


def test_a_model_is_changed_once() -> None:
    """A second backbone on the same model leaves the rotary module as it is."""
    backbone, _ = made("llama")
    CausalBackbone(backbone.model, None, backbone.info)
    changed = [module for module in backbone.model.modules() if isinstance(module, RowwiseRotary)]
    assert len(changed) == 1
    assert not backbone.prompt_once and not backbone.continues
