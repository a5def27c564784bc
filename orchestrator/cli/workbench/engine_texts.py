"""The texts in folders for other engines: what is in them, and a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.artifact.layout import Column, Layout, Virtual
from orchestrator.models.virtual_tokens import AVOIDED, Silence

TOKENS = """\
# Soft prompts as tokens

A copy of `{base}` (revision `{revision}`) whose vocabulary holds the virtual tokens of {names}.
It is a plain model folder: no code of its own, no adapter. The base model's license applies.

| prompt | virtual tokens | an input |
|---|---|---|
{rows}

## Use it

- **Chat**: send messages. The chat template writes the virtual tokens, and its variable
  `{variable}` names the prompt ({first} without it). In transformers
  `tokenizer.apply_chat_template(messages, {variable}="{first}", add_generation_prompt=True)`; with
  vLLM, `"chat_template_kwargs": {{"{variable}": "{first}"}}` in the request.
- **Text**: fill the columns of `input` in `prompts.json`, and send that text. The tokenizer adds no
  start token by itself; `input` has the one that the prompt was tuned with.
- Inputs are not cut to the length that the prompt was tuned with.
- Answers end with the tokens of `eos_token_id` in `generation_config.json`: those of the prompts.

The virtual tokens are special tokens: each is one id, and decoded texts leave them out. In a
user's message the chat template puts a space into words such as `{token}`, so that they stay text.
A text that is sent without the chat template is read as it is.

## The head

{silence}

`suppress_tokens` in `generation_config.json` also forbids them, which transformers obeys in every
`generate`. vLLM, TGI and llama.cpp do not read it.
"""

SILENCES = {
    "bias": (
        "A virtual token is never produced: its logit is {logit:.0f} whatever the input, by the "
        "bias of the head."
    ),
    "normalization": (
        "A virtual token is never produced: its logit is at most {logit:.0f} whatever the input, "
        "and the largest logit is always at least 50 above that."
    ),
    "avoided tokens": (
        "The head has no bias behind an RMS normalization, so no row of it is low for every input. "
        f"The row of a virtual token is the mean of the rows of {AVOIDED} tokens that the model "
        "avoids. Its logit is the mean of theirs whatever the input: it is never the largest, so "
        "greedy decoding never takes it, and its probability is at most the geometric mean of "
        "theirs. In a trial behind the prompts the largest was {probability:.1e}. Where that is "
        "not enough, vLLM takes `min_p` or, with each request, `logit_bias`."
    ),
}

EMBEDS = """\
# {id} as embeddings

`prompt.safetensors` holds `prompt` [{count}, {width}]: the virtual tokens of {id} as they enter
`{base}` (revision `{revision}`).

The embeddings of an input are, in this order:

{steps}

Texts are tokenised without special tokens (`add_special_tokens=False`), each by itself, and looked
up in the base model's embedding table. A text behind virtual tokens continues them: it gets the
tokens that it has behind a letter, so that no tokenizer puts a space in front of it.{chat}

```sh
vllm serve {base} --revision {revision} --enable-prompt-embeds
python client.py {arguments}
```

`client.py` needs torch, transformers and safetensors. It sends the embeddings as the server takes
them: a tensor [tokens, {width}] in the model's dtype, saved by torch and written in base64, as
`prompt_embeds` of `/v1/completions`. Let only clients that you trust send embeddings.
"""

CLIENT = '''\
"""Ask vLLM's own server with a soft prompt: python client.py COLUMN=TEXT ... (see README.md)."""

import base64
import io
import json
import sys
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SERVER, MODEL, REVISION = "http://127.0.0.1:8000", {model!r}, {revision!r}
PARTS = {parts!r}  # numbers: virtual tokens; lists: a column; texts
END = {end!r}

virtual = load_file(Path(__file__).with_name("prompt.safetensors"))["prompt"]
tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION)
model = AutoModelForCausalLM.from_pretrained(MODEL, revision=REVISION, dtype="auto")


def ids_of(text, follows):
    """Tokenise a text; one that follows virtual tokens is read behind a letter, as it continues."""
    read = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    letter, joined = read("a"), read("a" + text)
    continues = follows and joined[: len(letter)] == letter and len(joined) > len(letter)
    return joined[len(letter) :] if continues else read(text)


def embeddings(row):
    pieces, text, used = [], "", 0
    for part in [*PARTS, 0]:
        if not isinstance(part, int):
            text += part if isinstance(part, str) else row[part[0]]
            continue
        ids = ids_of(text, used > 0) if text else []
        table = model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
        pieces += [table, virtual[used : used + part].to(table.dtype)]
        text, used = "", used + part
    return torch.cat(pieces).detach()


def ask(row, **options):
    buffer = io.BytesIO()
    torch.save(embeddings(row), buffer)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    body = {{"model": MODEL, "prompt_embeds": encoded, "stop_token_ids": END}}
    data, kind = json.dumps(body | options).encode(), {{"Content-Type": "application/json"}}
    request = urllib.request.Request(SERVER + "/v1/completions", data, kind)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["text"]


if __name__ == "__main__":
    print(ask(dict(pair.split("=", 1) for pair in sys.argv[1:]), max_tokens=32, temperature=0))
'''


def tokens_readme(
    base: str,
    revision: str,
    prompts: Sequence[Mapping[str, Any]],
    silence: Silence,
    variable: str,
) -> str:
    """Return the README of a token folder."""
    rows = [
        f"| {prompt['name']}, version {prompt['version']} | `{prompt['tokens'][0]}` to "
        f"`{prompt['tokens'][-1]}` | {'chat' if prompt['chat'] else 'text'} of the columns "
        f"{', '.join(prompt['columns'])} |"
        for prompt in prompts
    ]
    told = SILENCES[silence.by].format(
        logit=silence.largest_logit or 0.0, probability=silence.largest_probability or 0.0
    )
    return TOKENS.format(
        base=base,
        revision=revision,
        names=", ".join(prompt["name"] for prompt in prompts),
        rows="\n".join(rows),
        variable=variable,
        first=prompts[0]["name"],
        token=prompts[0]["tokens"][0],
        silence=told,
    )


def embeds_readme(
    prompt_id: str, base: str, revision: str, layout: Layout, width: int, in_chat: bool
) -> str:
    """Return the README of a folder with embeddings."""
    steps = [f"{number}. {_step(part)}" for number, part in enumerate(layout.parts, start=1)]
    chat = " Texts around the columns are the base model's chat template." if in_chat else ""
    return EMBEDS.format(
        id=prompt_id,
        base=base,
        revision=revision,
        count=sum(part.count for part in layout.parts if isinstance(part, Virtual)),
        width=width,
        steps="\n".join(steps),
        chat=chat,
        arguments=" ".join(f"'{column}=...'" for column in layout.columns),
    )


def _step(part: str | Column | Virtual) -> str:
    if isinstance(part, Column):
        return f"the text of column `{part.name}`"
    if isinstance(part, Virtual):
        return f"virtual tokens {part.first} to {part.first + part.count - 1}"
    return f"the text `{part!r}`"


def client_page(model: str, revision: str, layout: Layout, end_ids: Sequence[int]) -> str:
    """Return a client for vLLM's server, a Python program."""
    parts = [
        [part.name]
        if isinstance(part, Column)
        else part.count
        if isinstance(part, Virtual)
        else part
        for part in layout.parts
    ]
    return CLIENT.format(model=model, revision=revision, parts=parts, end=list(end_ids))
