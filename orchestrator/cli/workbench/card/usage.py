"""The code and the commands of a model card: how to run the prompt with PEFT and with our server.

Texts of the job stand in the code as literals, so no text can change what the code does.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from orchestrator.artifact import Manifest
from orchestrator.cli.workbench.card.facts import CardFacts
from orchestrator.data.encoding import SENTINEL
from orchestrator.data.template import Mark, Template
from orchestrator.job.spec import NAME_PATTERN
from orchestrator.models.source import Family

EXAMPLE = "Write the text here."
ANY_NAME = "my-prompt"
AUTO_CLASSES: dict[Family, str] = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
}
CAUSAL_LOSS = """\
start = len(tokenizer(text{special})["input_ids"])

def loss(answer):
    ids = tokenizer(text + answer{special}, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :start] = -100
    return model(input_ids=ids, labels=labels).loss.item() * (ids.shape[1] - start)
"""
SEQ2SEQ_LOSS = """\
def loss(answer):
    labels = tokenizer(text_target=answer, return_tensors="pt")["input_ids"][:, :-1]
    inputs = tokenizer(text, return_tensors="pt")
    return model(**inputs, labels=labels).loss.item() * labels.shape[1]
"""
BEST_ANSWER = "print(min(answers, key=lambda label: loss(answers[label])))"
CHAT = """\
text = tokenizer.apply_chat_template(
    {messages}, tokenize=False, add_generation_prompt=True
)
"""


class _Column(str):
    """The place of a column in a filled template."""


def peft_code(facts: CardFacts) -> str:
    """Return Python code that runs the prompt with PEFT on one row, and prints the answer.

    For a masked model, the code ends after loading.
    """
    lines = [*_loading(facts)]
    if facts.family != "masked":
        lines += [*_input(facts), *_answer(facts)]
    return "\n".join(lines)


def _loading(facts: CardFacts) -> Iterator[str]:
    auto_class = AUTO_CLASSES[facts.family]
    base = repr(facts.base.name)
    if facts.base.kind == "hub":
        revision = f", revision={facts.manifest.base_model.revision!r}"
        place = f"base = {base}"
    else:
        revision = ""
        place = f"base = {base}  # write the path of the base model's folder"
    yield "from peft import PeftModel"
    yield f"from transformers import {auto_class}, AutoTokenizer"
    yield ""
    yield place
    yield f"tokenizer = AutoTokenizer.from_pretrained(base{revision})"
    yield f"model = {auto_class}.from_pretrained(base{revision})"
    yield f"model = PeftModel.from_pretrained(model, {facts.adapter!r}).eval()"


def _input(facts: CardFacts) -> Iterator[str]:
    template = Template(facts.manifest.template)
    row = dict.fromkeys(template.columns, EXAMPLE)
    pieces, _ = _pieces(template)
    terms = [f"row[{str(it)!r}]" if isinstance(it, _Column) else repr(it) for it in pieces]
    yield f"row = {row!r}"
    yield f"text = {' + '.join(terms) or repr('')}"
    if (chat := facts.manifest.chat) is not None:
        system = (
            "" if chat.system is None else f'{{"role": "system", "content": {chat.system!r}}}, '
        )
        messages = f'[{system}{{"role": "user", "content": text}}]'
        yield CHAT.format(messages=messages).rstrip()


def _pieces(template: Template) -> tuple[list[str], str]:
    """Return the input's texts and columns in order, and the white space that opens an answer.

    An input ends before the template's blank, without the white space there.
    """
    pieces: list[str] = []
    for part in template.parts({column: _Column(column) for column in template.columns}):
        if isinstance(part, Mark):
            if part.is_blank:
                break
            continue
        pieces.append(part if isinstance(part, _Column) else str(part))
    if not template.has_blank or not pieces or isinstance(pieces[-1], _Column):
        return pieces, ""
    tail = pieces.pop()
    stripped = tail.rstrip()
    return [*pieces, *([stripped] if stripped else [])], tail[len(stripped) :]


def _answer(facts: CardFacts) -> Iterator[str]:
    manifest, family = facts.manifest, facts.family
    special = ", add_special_tokens=False" if manifest.chat else ""
    if (texts := manifest.verbalizer_map()) is not None:
        opening = SENTINEL if manifest.sentinel else ""
        if family == "causal" and not manifest.chat:
            opening = _pieces(Template(manifest.template))[1]
        answers = {label: opening + text for label, text in texts.items()}
        yield f"answers = {answers!r}"
        yield SEQ2SEQ_LOSS if family == "seq2seq" else CAUSAL_LOSS.format(special=special)
        yield BEST_ANSWER
        return
    limit = manifest.generation.max_tokens if manifest.generation else manifest.max_target_tokens
    start = '[inputs["input_ids"].shape[1] :]' if family == "causal" else ""
    yield f'inputs = tokenizer(text{special}, return_tensors="pt")'
    yield f"output = model.generate(**inputs, max_new_tokens={limit}, do_sample=False)[0]"
    yield f"print(tokenizer.decode(output{start}, skip_special_tokens=True))"


def server_commands(facts: CardFacts) -> str:
    """Return the commands that take the prompt into another registry, serve it and ask it."""
    name = facts.name if re.fullmatch(NAME_PATTERN, facts.name) else ANY_NAME
    folder = shlex.quote(facts.adapter)
    lines = []
    if "/" in facts.adapter:
        folder = shlex.quote(facts.adapter.split("/")[-1])
        lines.append(f"hf download {shlex.quote(facts.adapter)} --local-dir {folder}")
    columns = Template(facts.manifest.template).columns
    row = EXAMPLE if len(columns) == 1 else json.dumps(dict.fromkeys(columns, EXAMPLE))
    return "\n".join(
        [
            *lines,
            f"orchestrator import {folder} --name {name} --job job.yaml --alias champion",
            f"orchestrator serve {name}",
            f"orchestrator query {name} {shlex.quote(row)}",
        ]
    )


def job_text(facts: CardFacts) -> str:
    """Return the job file that ``import`` needs, in ASCII."""
    manifest = facts.manifest
    document: dict[str, Any] = {
        "name": facts.name if re.fullmatch(NAME_PATTERN, facts.name) else ANY_NAME,
        "base_model": _base_section(facts),
        "data": _data_section(facts),
        "method": manifest.method,
    }
    return yaml.dump(document, Dumper=_JobDumper, sort_keys=False, width=math.inf).rstrip()


class _JobDumper(yaml.SafeDumper):
    """Writes texts with line breaks or outer white space in double quotes, on one line."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if text == text.strip() and text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_JobDumper.add_representer(str, _JobDumper.represent_text)


def _base_section(facts: CardFacts) -> dict[str, Any]:
    base = facts.manifest.base_model
    section = {"id": facts.base.name, "revision": base.revision}
    if facts.base.kind == "local":
        section = {"id": f"./{facts.base.name}"}
    if base.quantization != "none":
        section["quantization"] = base.quantization
    return section


def _data_section(facts: CardFacts) -> dict[str, Any]:
    manifest, data = facts.manifest, facts.data
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    texts, special_tokens = manifest.verbalizer_map(), manifest.special_tokens_in_text
    optional = {
        "verbalizer": texts,
        "max_target_tokens": manifest.max_target_tokens if texts is None else None,
        "special_tokens_in_text": special_tokens if special_tokens != "text" else None,
        "chat": _chat_section(manifest),
        "sentinel": manifest.sentinel or None,
        "empty": "keep" if manifest.cells and manifest.cells.empty == "keep" else None,
    }
    return {
        "path": files if data.kind == "local" else data.name,
        **_columns(manifest),
        **{key: value for key, value in optional.items() if value is not None},
        "max_input_tokens": manifest.max_input_tokens,
    }


def _columns(manifest: Manifest) -> dict[str, str]:
    """Return the keys that name the rows' columns; conversations have a single column."""
    if manifest.chat is not None and manifest.chat.messages is not None:
        return {"messages": manifest.chat.messages}
    return {"template": manifest.template, "target": manifest.target}


def _chat_section(manifest: Manifest) -> Any:
    """Return the value of data.chat; None where it is left out."""
    if (chat := manifest.chat) is None:
        return None
    if chat.system is not None:
        return {"system": chat.system}
    return True if chat.messages is None else None
