"""A training step: ours against PEFT's prompt tuning on the same model, rows, prompt and threads.

Both sides compute the same loss and gradient (tests prove it). PEFT concatenates the prompt to every row and computes
every logit; ours runs the prompt once and computes the logits of the target. The packed step is compared with the same
trials one after another, on our own engine.
"""

from __future__ import annotations

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.backbone import Backbone
from orchestrator.base_model import BaseModelInfo
from orchestrator.data.encoding import Encoded
from orchestrator.tuning.step import packed_gradients
from tests.benchmarks.measure import Comparison, compare

WIDTH, LAYERS, VOCABULARY, INPUT, ROWS = 256, 6, 16_000, 32, 32


class Pads:
    """All of a tokenizer that a step needs."""

    pad_token_id = 0


def comparisons() -> list[Comparison]:
    torch.manual_seed(0)
    torch.set_num_threads(torch.get_num_threads())
    backbone = _backbone()
    against_peft = [_against_peft(backbone, length) for length in (1, 20, 100)]
    return [*against_peft, *(_packed(backbone, trials) for trials in (4, 8))]


def _config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip


def _backbone() -> Backbone:
    model = LlamaForCausalLM(_config())
    info = BaseModelInfo("bench", "main", "llama", WIDTH, VOCABULARY, 512, "", "")
    return Backbone(model, Pads(), info)


def _rows(count: int) -> Encoded:
    """Rows of one length, so that PEFT's left padding plays no part."""
    ids = torch.randint(1, VOCABULARY, (count, INPUT)).tolist()
    return Encoded([list(row) for row in ids], [[int(row[0]), 2] for row in ids], [0] * count)


def _against_peft(backbone: Backbone, length: int) -> Comparison:
    rows = _rows(ROWS)
    prompt = torch.randn(length, WIDTH).mul_(0.02).requires_grad_()
    tuned = LlamaForCausalLM(_config())
    tuned.load_state_dict(backbone.model.state_dict())
    peft = get_peft_model(tuned, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length))
    ids = torch.tensor([[*row, *target] for row, target in zip(rows.inputs, rows.targets, strict=True)])
    labels = ids.clone()
    labels[:, :INPUT] = -100

    def peer() -> None:
        peft.zero_grad()
        peft(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()

    def ours() -> None:
        prompt.grad = None
        packed_gradients(backbone, [prompt], [list(range(ROWS))], rows)

    return compare(f"step against PEFT, {length} virtual tokens", ours, peer)


def _packed(backbone: Backbone, trials: int) -> Comparison:
    rows = _rows(trials * 4)
    prompts = [torch.randn(20, WIDTH).mul_(0.02).requires_grad_() for _ in range(trials)]
    batches = [list(range(trial * 4, trial * 4 + 4)) for trial in range(trials)]

    def ours() -> None:
        packed_gradients(backbone, prompts, batches, rows)

    def peer() -> None:
        for prompt, batch in zip(prompts, batches, strict=True):
            packed_gradients(backbone, [prompt], [batch], rows)

    return compare(f"{trials} trials of 4 rows packed against one by one", ours, peer)
