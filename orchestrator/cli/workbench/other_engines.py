"""Exporting registered prompts for other engines.

``export_tokens`` writes a model folder whose vocabulary has the virtual tokens. ``export_embeds``
writes a prompt's vectors with a client for vLLM's own server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from orchestrator.artifact import SOFT, PromptArtifact
from orchestrator.artifact.chat_source import VARIABLE, ChatEntry, chat_entry, chat_source
from orchestrator.artifact.layout import (
    EXAMPLES,
    Layout,
    Virtual,
    expected_ids,
    fitting_layout,
    token_names,
)
from orchestrator.cli.workbench.engine_texts import client_page, embeds_readme, tokens_readme
from orchestrator.data.chat import has_chat_template
from orchestrator.data.encoding import Encoder
from orchestrator.data.source_row import Row
from orchestrator.data.template import continuation_ids
from orchestrator.errors import BadInput
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import Backbone, load_backbone
from orchestrator.models.source import resolve_model, usual_family
from orchestrator.models.tokenizer import Tokenizer
from orchestrator.models.virtual_tokens import Silence, add_virtual_tokens, embedding_scale
from orchestrator.registry import Registry, check_name
from orchestrator.serving.prompts.served_prompt import load_prompt
from orchestrator.utils.atomic import whole_folder
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.text import first_line

PROMPTS = "prompts.json"
VECTORS = "prompt.safetensors"
CLIENT = "client.py"
README = "README.md"
DTYPES = ("float32", "float16", "bfloat16")

SERVE = "serve it with orchestrator serve"
ALTERNATIVE = f"{SERVE}, or write a PEFT folder with --format peft"
EMBEDS = "export it with --format embeds"


@dataclass(frozen=True)
class Chosen:
    """A registered version that is to be exported."""

    name: str
    version: int
    folder: Path
    artifact: PromptArtifact

    @property
    def id(self) -> str:
        return f"{self.name}:{self.version}"

    @property
    def tokens(self) -> list[str]:
        return token_names(self.name, self.artifact.manifest.num_virtual_tokens)


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt in a token folder: an entry of ``prompts.json``, which other programs read."""

    name: str
    version: int
    tokens: list[str]
    ids: list[int]
    prefix: str
    """Text in front of every input; empty if the virtual tokens stand inside."""
    input: str
    """The input of a row, with {column} for each column."""
    columns: list[str]
    chat: bool
    end_token: str
    """The token that ends an answer."""
    labels: dict[str, str]
    """The texts of the labels, by label; empty if the prompt generates text."""


@dataclass(frozen=True)
class TokenFolder:
    """The prompts of a token folder, with what is known of each once the tokenizer has them."""

    backbone: Backbone
    chosen: list[Chosen]
    encoders: list[Encoder]
    ids: dict[str, list[int]]

    def vectors(self) -> dict[int, torch.Tensor]:
        """Return the vector of each virtual token, by its id."""
        return {
            token_id: torch.from_numpy(one.artifact.weights[number])
            for one in self.chosen
            for number, token_id in enumerate(self.ids[one.name])
        }

    def end_ids(self) -> list[int]:
        """Return the ids that end an answer."""
        ends = (encoder.end_id for encoder in self.encoders)
        return sorted({end_id for end_id in ends if end_id is not None})


def export_tokens(
    registry: Registry, models: Sequence[str], folder: Path, base_model: str | None = None
) -> JsonObject:
    """Write prompts on one base model as a model folder; return the document of ``export --json``.

    ``base_model`` is the base model's location, if it was moved. Raises BadInput for prompts that
    can't be tokens, and for a folder that exists.
    """
    _check_new(folder)
    chosen = _chosen(registry, models, "tokens")
    _check_names(chosen)
    backbone, encoders = _loaded(chosen, base_model, "tokens")
    tokenizer = _fresh_tokenizer(chosen, base_model)
    ids = _add_tokens(tokenizer, chosen)
    made = TokenFolder(backbone, chosen, encoders, ids)
    with _writing(folder) as staging:
        layouts = _write_tokenizer(staging, made, tokenizer)
        silence = _write_model(staging, made)
        _write_texts(staging, made, layouts, silence)
    return {
        "format": "tokens",
        "folder": str(folder.resolve()),
        "base_model": chosen[0].artifact.manifest.base_model.id,
        "prompts": [
            {"name": one.name, "version": one.version, "num_virtual_tokens": len(one.tokens)}
            for one in chosen
        ],
        "head": asdict(silence),
    }


def export_embeds(
    registry: Registry, model: str, folder: Path, base_model: str | None = None
) -> JsonObject:
    """Write a prompt's vectors and a client for vLLM; return the document of ``export --json``.

    Raises BadInput for a prompt that has no vectors, and for a folder that exists.
    """
    _check_new(folder)
    (chosen,) = _chosen(registry, [model], "embeds")
    backbone, (encoder,) = _loaded([chosen], base_model, "embeds")
    weights, record = chosen.artifact.weights, chosen.artifact.manifest.base_model
    if abs(embedding_scale(backbone.model) - 1) > 1e-3:
        raise BadInput(
            f"{chosen.id} is on a model that scales its embeddings ({record.model_type}), and vLLM "
            "scales embeddings that it is sent once more",
            f"export it with --format tokens, or {SERVE}",
        )
    layout = fitting_layout(
        encoder,
        [-(number + 1) for number in range(len(weights))],
        lambda layout, row: _joined_ids(encoder.tokenizer, layout, row),
    )
    if layout is None:
        raise _differs(chosen, "the texts between virtual tokens", SERVE)
    place, ends = base_model or record.id, [] if encoder.end_id is None else [encoder.end_id]
    in_chat = encoder.chat is not None
    with _writing(folder) as staging:
        save_file({SOFT: weights}, staging / VECTORS, metadata={"format": "pt"})
        client = client_page(place, record.revision, layout, ends)
        readme = embeds_readme(chosen.id, place, record.revision, layout, weights.shape[1], in_chat)
        (staging / CLIENT).write_text(client, encoding="utf-8")
        (staging / README).write_text(readme, encoding="utf-8")
    return {
        "format": "embeds",
        "name": chosen.name,
        "version": chosen.version,
        "folder": str(folder.resolve()),
        "num_virtual_tokens": len(weights),
        "base_model": record.id,
    }


# Checks before anything is loaded


def _check_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise BadInput(f"{folder} exists already", "name a folder that does not exist yet")


def _chosen(registry: Registry, models: Sequence[str], form: str) -> list[Chosen]:
    """Fetch the versions. Raises BadInput for one that the format can't hold."""
    chosen = []
    for model in models:
        version = registry.resolve(model)
        check_name(version.name)
        folder = registry.fetch(version.name, version.version)
        entry = Chosen(version.name, version.version, folder, PromptArtifact.load(folder))
        _check_soft(entry, form)
        chosen.append(entry)
    return chosen


def _check_soft(chosen: Chosen, form: str) -> None:
    """Raise BadInput for a prompt that is not embeddings in front of a causal model."""
    manifest = chosen.artifact.manifest
    if SOFT not in chosen.artifact.tensors:
        raise BadInput(
            f"{chosen.id} is a prefix: keys and values of each layer, which are no embeddings",
            ALTERNATIVE,
        )
    family = usual_family(manifest.base_model.model_type)
    if family != "causal":
        raise BadInput(
            f"{chosen.id} is on a {family} model ({manifest.base_model.model_type}); --format "
            f"{form} is for causal models",
            ALTERNATIVE,
        )


def _check_names(chosen: Sequence[Chosen]) -> None:
    """Raise BadInput for prompts that can't share a folder."""
    first = chosen[0]
    base = first.artifact.manifest.base_model
    versions: dict[str, int] = {}
    for one in chosen:
        other = one.artifact.manifest.base_model
        if (other.fingerprint, other.tokenizer_digest) != (base.fingerprint, base.tokenizer_digest):
            raise BadInput(
                f"{one.id} is on base model {other.id!r} and {first.id} on {base.id!r}",
                "export them into folders of their own",
            )
        if one.name in versions:
            raise BadInput(
                f"{one.id} and {one.name}:{versions[one.name]} would have the same tokens, "
                f"{one.tokens[0]} and so on",
                "export the versions of a name into folders of their own",
            )
        versions[one.name] = one.version


def _base_spec(chosen: Sequence[Chosen], base_model: str | None) -> BaseModelSpec:
    record = chosen[0].artifact.manifest.base_model
    return BaseModelSpec(id=base_model or record.id, revision=record.revision)


def _loaded(
    chosen: Sequence[Chosen], base_model: str | None, form: str
) -> tuple[Backbone, list[Encoder]]:
    """Load the base model in the dtype of its files, and make each prompt's encoder.

    Raises BadInput for a model other than the prompts', and for one that the format can't hold.
    """
    record = chosen[0].artifact.manifest.base_model
    if record.quantization != "none" and form == "tokens":
        raise BadInput(
            f"{chosen[0].id} was tuned on weights rounded to {record.quantization}, and a model "
            "folder holds weights that are not",
            f"{SERVE}, or {EMBEDS}",
        )
    source = resolve_model(_base_spec(chosen, base_model))
    stored = getattr(source.config, "quantization_config", None) is not None
    if stored or source.brings_model_code:
        how = "has weights that are stored quantised" if stored else "brings code of its own"
        raise BadInput(f"base_model.id {source.id!r} {how}; --format {form} can't use it", SERVE)
    name = str(getattr(source.config, "dtype", None)).removeprefix("torch.")
    backbone = load_backbone(source, "cpu", name if name in DTYPES else "float32")
    prompts = [load_prompt(backbone, one.folder, one.name, one.version) for one in chosen]
    return backbone, [prompt.encoder for prompt in prompts]


# Tokenizer


def _fresh_tokenizer(chosen: Sequence[Chosen], base_model: str | None) -> Any:
    """Read the tokenizer once more: the backbone's own has to stay as it is."""
    return resolve_model(_base_spec(chosen, base_model), weights=False).tokenizer()


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _add_tokens(tokenizer: Any, chosen: Sequence[Chosen]) -> dict[str, list[int]]:
    """Add the virtual tokens of all prompts; return their ids by prompt.

    They are special tokens: texts that are decoded leave them out, and engines that keep special
    tokens out of users' texts keep these out too.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    words = [word for one in chosen for word in one.tokens]
    if taken := [word for word in words if word in vocabulary]:
        raise BadInput(
            f"the base model's tokenizer has a token {taken[0]} already",
            f"register the prompt under another name, or {EMBEDS}",
        )
    added = [AddedToken(word, normalized=False, special=True) for word in words]
    tokenizer.add_tokens(added, special_tokens=True)
    return {one.name: tokenizer.convert_tokens_to_ids(one.tokens) for one in chosen}


def _drop_start(tokenizer: Any) -> None:
    """Have the tokenizer add no special tokens by itself: the exported inputs contain them.

    Engines would otherwise put a start token in front of the virtual tokens.
    """
    from tokenizers import processors

    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] == plain or not getattr(tokenizer, "is_fast", False):
        return
    for setting in ("add_bos_token", "add_eos_token"):
        if getattr(tokenizer, setting, False):
            setattr(tokenizer, setting, False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B:1", special_tokens=[]
    )


def _write_tokenizer(staging: Path, made: TokenFolder, tokenizer: Any) -> list[Layout]:
    """Write the tokenizer with its chat template, and read it again to check it.

    Returns the layout of each prompt's input.
    """
    _drop_start(tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(staging)
    written = _read_tokenizer(staging)
    pairs = list(zip(made.chosen, made.encoders, strict=True))
    layouts = [_layout(one, encoder, written, made.ids[one.name]) for one, encoder in pairs]
    entries = [
        chat_entry(one.name, one.tokens, encoder, layout)
        for (one, encoder), layout in zip(pairs, layouts, strict=True)
    ]
    _write_chat_template(staging, made.backbone, entries)
    written = _read_tokenizer(staging)
    for entry, encoder in zip(entries, made.encoders, strict=True):
        _check_chat(entry, encoder, written, made.ids[entry.name])
    return layouts


def _layout(chosen: Chosen, encoder: Encoder, tokenizer: Any, ids: list[int]) -> Layout:
    """Return the text of an input that the new tokenizer reads as the prompt's own encoder does."""
    layout = fitting_layout(
        encoder, ids, lambda layout, row: tokenizer(layout.text(chosen.tokens, row))["input_ids"]
    )
    if layout is None:
        raise _differs(chosen, "a text with virtual tokens", EMBEDS)
    return layout


def _differs(chosen: Chosen, what: str, hint: str) -> BadInput:
    return BadInput(
        f"{chosen.id}: the base model's tokenizer or chat template reads {what} otherwise than the "
        "prompt was tuned",
        hint,
    )


# Chat template


def _write_chat_template(staging: Path, backbone: Backbone, entries: Sequence[ChatEntry]) -> None:
    own: Any = backbone.tokenizer
    base = str(own.get_chat_template()) if has_chat_template(own) else None
    tokenizer = _read_tokenizer(staging)
    tokenizer.chat_template = chat_source(entries, base)
    tokenizer.save_pretrained(staging)


def _check_chat(entry: ChatEntry, encoder: Encoder, tokenizer: Any, ids: list[int]) -> None:
    """Raise BadInput unless the chat template gives the ids that the prompt's encoder gives."""
    if not entry.takes_messages:
        return
    column = encoder.template.columns[0]
    for example in EXAMPLES:
        expected = expected_ids(encoder, encoder.row_ids({column: example}), ids)
        messages = [{"role": "user", "content": example}]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **{VARIABLE: entry.name}
        )
        if tokenizer(rendered, add_special_tokens=False)["input_ids"] != expected:
            raise BadInput(
                f"{entry.name}: a chat template can't put the virtual tokens where they stood when "
                "the prompt was tuned, for instance because it strips white space beside them",
                EMBEDS,
            )


# Model


def _write_model(staging: Path, made: TokenFolder) -> Silence:
    """Write weights and configurations with the virtual tokens."""
    from transformers import GenerationConfig

    model: Any = made.backbone.model
    dtype = str(model.dtype).removeprefix("torch.")
    vectors = made.vectors()
    silence = add_virtual_tokens(model, vectors)
    settings = model.generation_config.to_diff_dict()
    # transformers refuses to save settings that contradict each other, as some base models' do.
    model.generation_config = GenerationConfig()
    model.save_pretrained(staging)
    settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), *vectors})
    settings["eos_token_id"] = made.end_ids()
    _write_json(staging / "generation_config.json", settings)
    # The table is float32 in any case; engines load the model in the dtype that is named here.
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    _write_json(staging / "config.json", {**config, "dtype": dtype})
    return silence


def _write_texts(
    staging: Path, made: TokenFolder, layouts: Sequence[Layout], silence: Silence
) -> None:
    """Write what programs and people need to know of the prompts."""
    prompts = [
        asdict(_token_prompt(one, encoder, layout, made.ids[one.name]))
        for one, encoder, layout in zip(made.chosen, made.encoders, layouts, strict=True)
    ]
    _write_json(staging / PROMPTS, {"format": 1, "prompts": prompts})
    record = made.chosen[0].artifact.manifest.base_model
    readme = tokens_readme(record.id, record.revision, prompts, silence, VARIABLE)
    (staging / README).write_text(readme, encoding="utf-8")


def _token_prompt(chosen: Chosen, encoder: Encoder, layout: Layout, ids: list[int]) -> TokenPrompt:
    """Describe a prompt for the programs that write its inputs."""
    inside = encoder.template.places_virtual_tokens
    labels = encoder.verbalizer
    end = (
        encoder.tokenizer.convert_ids_to_tokens(encoder.end_id)
        if encoder.end_id is not None
        else ""
    )
    return TokenPrompt(
        name=chosen.name,
        version=chosen.version,
        tokens=chosen.tokens,
        ids=ids,
        prefix="" if inside else "".join(chosen.tokens),
        input=layout.pattern(chosen.tokens),
        columns=list(layout.columns),
        chat=encoder.chat is not None,
        end_token=end,
        labels={}
        if labels is None
        else dict(zip(map(str, labels.labels), labels.texts, strict=True)),
    )


# Embeddings


def _joined_ids(tokenizer: Tokenizer, layout: Layout, row: Row) -> list[int]:
    """Tokenise a layout as the client does: each text between virtual tokens by itself.

    A text behind virtual tokens continues them, so it is tokenised behind a letter. Virtual token k
    is the entry -(k + 1).
    """
    ids: list[int] = []
    text = ""
    for part in [*layout.parts, Virtual(0, 0)]:
        if not isinstance(part, Virtual):
            text += part if isinstance(part, str) else row[part.name]
            continue
        if text:
            ids += continuation_ids(tokenizer, "", text) if ids else _plain_ids(tokenizer, text)
        text = ""
        ids += [-(part.first + number + 1) for number in range(part.count)]
    return ids


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Writing


def _write_json(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder``; BadInput where it can't be written."""
    try:
        with whole_folder(folder) as staging:
            yield staging
    except OSError as error:
        raise BadInput(
            f"{folder} can't be written ({error.strerror or first_line(error)})",
            "name a folder that you may write to",
        ) from None
