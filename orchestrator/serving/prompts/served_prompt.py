"""A prompt as it is served: checked against the backbone, with keys and values computed once.

Shapes: B rows, K prompts, P virtual tokens, T input tokens, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from orchestrator.artifact import Manifest, PromptArtifact
from orchestrator.data.cells import cell_text, early_cell_text, is_missing
from orchestrator.data.chat import ChatFormat
from orchestrator.data.conversations import Message
from orchestrator.data.encoding import Encoder
from orchestrator.data.source_row import Row
from orchestrator.data.template import Template, Verbalizer
from orchestrator.errors import BadInput
from orchestrator.job.labels import Label, label_text, spelled
from orchestrator.models.backbone import Backbone, PreparedPrompts, PromptTensors, stack_prepared
from orchestrator.models.placeholders import text_ids

Given = str | Row


class ContextExceeded(BadInput):
    """Prompt, input and answer together are longer than the base model's context."""


@dataclass(frozen=True, eq=False)
class ServedPrompt:
    """One version of a registered model, ready to be put in front of rows.

    Immutable: a new version is a new ``ServedPrompt``.
    """

    name: str
    version: int
    manifest: Manifest
    encoder: Encoder
    prepared: PreparedPrompts
    """The prompt's keys and values; K = 1."""
    answers: tuple[tuple[int, ...], ...]
    """Token ids of each label's text, in the verbalizer's order; empty without a verbalizer.

    They include the end token if one label's text is the beginning of another's.
    """
    context_length: int

    @property
    def virtual_tokens(self) -> int:
        return self.manifest.num_virtual_tokens

    @property
    def labels(self) -> tuple[Label, ...]:
        return self.encoder.verbalizer.labels if self.encoder.verbalizer else ()

    @property
    def id(self) -> str:
        """The ``name:version`` that tells clients which version answered."""
        return f"{self.name}:{self.version}"

    @property
    def label_keys(self) -> list[str]:
        """The labels as keys of a JSON object."""
        return label_keys(self.labels)

    @property
    def nbytes(self) -> int:
        return self.prepared.nbytes

    @property
    def longest_answer(self) -> int:
        return max(map(len, self.answers), default=0)

    @property
    def generates(self) -> bool:
        """Tell whether the model generates text that ends by itself.

        A masked model does not: it fills a blank of a given length.
        """
        return self.encoder.end_id is not None

    @property
    def why_no_labels(self) -> str:
        """The reason that the prompt can't classify; empty if it can."""
        if self.answers:
            return ""
        if self.generates:
            return "generates text and has no labels"
        return "was tuned without labels to choose from"

    @property
    def why_no_text(self) -> str:
        """The reason that the prompt can't complete a text; empty if it can."""
        reason = (
            "is on a masked model, which fills in a blank of a given length and generates no text"
        )
        return "" if self.generates else reason

    def encode(self, entry: Given, answer_tokens: int) -> list[int]:
        """Fill the template with an input and return its ids, cut to ``max_input_tokens``.

        The offline evaluation cuts in the same way. Conversations are not cut. Raises
        ContextExceeded when the input does not fit into the context before it is cut, and BadInput
        when a row lacks a column of the template.
        """
        row = self._whole_row(self.encoder.template.row(entry))
        ids = self.encoder.row_ids(row)
        self.check_room(len(text_ids(ids)), answer_tokens)
        if len(ids) <= self.encoder.max_input_tokens or self.encoder.conversation(row):
            return ids
        return self.encoder.encode_input(row)

    def encode_messages(self, messages: Sequence[Message], answer_tokens: int) -> list[int]:
        """Return the ids of a conversation, whose last message fills the template.

        A single message is encoded like any other input, so for a prompt that was tuned on bare
        text without the base model's chat template. Several messages are not cut. Raises
        ContextExceeded when they do not fit into the context, and BadInput for a conversation that
        the chat template refuses.
        """
        if len(messages) == 1:
            return self.encode(messages[0]["content"], answer_tokens)
        ids = self.encoder.conversation_ids(messages)
        self.check_room(len(text_ids(ids)), answer_tokens)
        return ids

    def _whole_row(self, row: Row) -> Row:
        """Return a row that has every column of the template.

        Raises BadInput for a missing value, unless the prompt was tuned with missing values kept.
        """
        columns, cells = self.encoder.template.columns, self.manifest.cells
        if cells is not None and cells.empty == "keep":
            return {column: row.get(column) for column in columns}
        absent = [column for column in columns if column not in row]
        if absent:
            raise BadInput(f"a row lacks {absent}; the prompt's template needs {list(columns)}")
        null = [column for column in columns if is_missing(row[column])]
        if null and cells is not None:
            raise BadInput(
                f"a row has no value in {null}; the prompt's template needs {list(columns)}"
            )
        return row

    def check_room(self, input_tokens: int, answer_tokens: int) -> None:
        """Raise ContextExceeded when prompt, input and answer don't fit into the context."""
        # An encoder-decoder model has the whole context for the input and again for the answer.
        # Counting them together is what the search does as well.
        total = self.virtual_tokens + input_tokens + answer_tokens
        if total > self.context_length:
            raise ContextExceeded(
                f"This model's maximum context length is {self.context_length} tokens, "
                f"but the request needs {total}: {self.virtual_tokens} virtual tokens, "
                f"{input_tokens} of input, {answer_tokens} for the answer"
            )


def label_keys(labels: Sequence[Label]) -> list[str]:
    """Return the labels as keys of a JSON object: 0 is "0", True is "true", a text stays as is."""
    keys = [label_text(label) for label in labels]
    if len(set(keys)) == len(keys):
        return keys
    # Verbalizers of early versions may hold both 1 and "1"; texts then keep their quotes.
    return [spelled(label) for label in labels]


def classified(
    labels: Sequence[Label], keys: Sequence[str], probs: Sequence[float]
) -> dict[str, Any]:
    """Return the most likely label of one row and the probabilities of all its labels.

    The first of equally likely labels wins. Served and offline answers are both made here.
    """
    best = max(range(len(labels)), key=lambda label_index: probs[label_index])
    return {"label": labels[best], "probs": dict(zip(keys, probs, strict=True))}


def load_prompt(backbone: Backbone, folder: Path, name: str, version: int) -> ServedPrompt:
    """Read an artifact, check that it fits this backbone, and compute its keys and values.

    Raises BadInput with the reason when the prompt can't be served. The first line of the message
    holds no path, so that it may be shown to a client.
    """
    artifact = PromptArtifact.load(folder)
    manifest = artifact.manifest
    _check_base_model(manifest, backbone)
    encoder = make_encoder(manifest, backbone)
    prepared = _prepare(backbone, prompt_tensors(artifact))
    prompt = ServedPrompt(
        name=name,
        version=version,
        manifest=manifest,
        encoder=encoder,
        prepared=prepared,
        answers=tuple(tuple(ids) for ids in encoder.scored_answers),
        context_length=backbone.info.context_length,
    )
    if prompt.virtual_tokens + 1 + max(1, prompt.longest_answer) > prompt.context_length:
        raise BadInput(
            f"{prompt.virtual_tokens} virtual tokens leave no room for an input "
            f"in a context of {prompt.context_length}"
        )
    return prompt


def prompt_tensors(artifact: PromptArtifact) -> PromptTensors:
    """Convert an artifact's tensors to the form that the backbone takes."""
    inside = Template(artifact.manifest.template).places_virtual_tokens
    tensors = {name: torch.from_numpy(array) for name, array in artifact.tensors.items()}
    return PromptTensors.from_named(tensors, inside)


def make_encoder(manifest: Manifest, backbone: Backbone) -> Encoder:
    """Build the encoder that the prompt was trained with.

    Raises BadInput when the manifest's template or verbalizer is unusable.
    """
    template = Template(manifest.template, early_cell_text if manifest.cells is None else cell_text)
    if not template.columns:
        raise BadInput(f"the template {manifest.template!r} names no column")
    verbalizer = None
    if manifest.verbalizer is not None:
        if not manifest.verbalizer:
            raise BadInput("the verbalizer is empty")
        entries = manifest.verbalizer
        verbalizer = Verbalizer(
            tuple(entry.label for entry in entries), tuple(entry.text for entry in entries)
        )
    chat = _chat_format(manifest, backbone)
    limits = manifest.max_input_tokens, manifest.max_target_tokens
    return Encoder(
        backbone.tokenizer, template, verbalizer, *limits, backbone.family, manifest.sentinel,
        table_size=len(backbone.table), chat=chat,
        special_tokens=manifest.special_tokens_in_text,
    )  # fmt: skip


def _chat_format(manifest: Manifest, backbone: Backbone) -> ChatFormat | None:
    """Build the format of conversations. Raises BadInput for another chat template."""
    if (record := manifest.chat) is None:
        return None
    rule = manifest.special_tokens_in_text
    chat = ChatFormat(backbone.tokenizer, record.system, rule, record.messages)
    if chat.digest != record.template_sha256:
        raise BadInput(f"it was tuned in another chat template than that of {backbone.info.id!r}")
    return chat


def stack_prompts(prompts: Sequence[ServedPrompt]) -> tuple[PreparedPrompts, list[int]]:
    """Stack the K distinct prompts of B rows, padded on the right.

    Returns the stacked prompts and, for each row, the index of its prompt among them.
    """
    distinct = list({id(prompt): prompt for prompt in prompts}.values())
    prompt_index = {id(prompt): index for index, prompt in enumerate(distinct)}
    return stack_prepared([prompt.prepared for prompt in distinct]), [
        prompt_index[id(prompt)] for prompt in prompts
    ]


def _check_base_model(manifest: Manifest, backbone: Backbone) -> None:
    tuned_on, loaded = manifest.base_model, backbone.info
    if tuned_on.fingerprint != loaded.fingerprint:
        raise BadInput(
            f"it was tuned on another base model ({tuned_on.id!r}, "
            f"fingerprint {tuned_on.fingerprint[:12]}) than the one "
            f"loaded ({loaded.id!r}, {loaded.fingerprint[:12]})"
        )
    if tuned_on.tokenizer_digest != loaded.tokenizer_digest:
        raise BadInput(f"it was tuned with another tokenizer than the one of {loaded.id!r}")
    if manifest.base_model.hidden_size != backbone.table.shape[1]:
        raise BadInput(
            f"its width is {tuned_on.hidden_size}, the base model's is {backbone.table.shape[1]}"
        )


@torch.inference_mode()
def _prepare(backbone: Backbone, prompt: PromptTensors) -> PreparedPrompts:
    prepared = backbone.prepare([prompt])
    if not all(bool(tensor.isfinite().all()) for tensor in prepared.tensors):
        raise BadInput(
            f"it overflows in {backbone.table.dtype}: its keys and values are not finite"
        )
    return prepared


def created_timestamp(manifest: Manifest) -> int:
    """Return the creation time in seconds since the epoch; 0 if the date can't be read."""
    try:
        return int(datetime.fromisoformat(manifest.created_at).timestamp())
    except (ValueError, OverflowError, OSError):
        return 0
