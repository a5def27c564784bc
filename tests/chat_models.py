"""Short chat templates in the style of published families, each with a small tokenizer and model.

The templates are written for the tests. They have the features in which such families differ:
default system messages, stripping of contents, refusal of system messages, thinking blocks, and the
tokens that end a turn.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from models import SMALL, spaced_tokenizer, train_tokenizer
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.models.backbone import Backbone

GENERATION = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + GENERATION
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    + GENERATION
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles have to alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    + GENERATION
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    + GENERATION
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    + GENERATION
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Style:
    """A chat template, its control tokens, and the token that ends a turn.

    ``added`` are control tokens that the tokenizer does not call special.
    """

    template: str
    special: tuple[str, ...]
    end: str
    added: tuple[str, ...] = ()
    is_spaced: bool = False
    strips_after: bool = False
    """Whether control tokens swallow the white space behind them."""


IM = ("<|im_start|>", "<|im_end|>")
STYLES = {
    "chatml": Style(CHATML, IM, "<|im_end|>"),
    "llama3": Style(
        LLAMA_3, ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "mistral": Style(MISTRAL, ("[INST]", "[/INST]"), "<end>", is_spaced=True),
    "gemma": Style(GEMMA, ("<s>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "qwen": Style(QWEN, IM, "<|im_end|>", added=("<think>", "</think>")),
    "phi": Style(
        PHI, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>", strips_after=True
    ),
}
WITHOUT_SYSTEM = ("gemma",)


@lru_cache
def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the chat template of a style."""
    style = STYLES[name]
    if style.is_spaced:
        folder = Path(tempfile.mkdtemp())
        spaced_tokenizer().save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        shutil.rmtree(folder)
    else:
        tokenizer = train_tokenizer()
    if "<s>" in style.special:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [
        AddedToken(text, rstrip=style.strips_after, normalized=False, special=True)
        for text in style.special
    ]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(list(style.added))
    tokenizer.chat_template = style.template
    return tokenizer


@lru_cache
def chat_folder(name: str) -> Path:
    """A tiny random Llama with the tokenizer of a style, as a model folder."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = chat_tokenizer(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), **SMALL, bos_token_id=None, eos_token_id=tokenizer.eos_token_id
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@lru_cache
def chat_backbone(name: str) -> Backbone:
    from models import load

    return load(chat_folder(name))
