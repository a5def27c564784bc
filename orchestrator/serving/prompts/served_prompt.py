"""A prompt as it is served: checked against the backbone, its keys and values computed once.

Shapes: B rows, K prompts, P virtual tokens, T input tokens, H width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from orchestrator.artifact import Manifest, PromptArtifact
from orchestrator.data.cells import cell_text, early_cell_text, is_missing
from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.errors import BadInput
from orchestrator.job.labels import Label, label_text, spelled
from orchestrator.models.backbone import Backbone, PreparedPrompts, PromptTensors, stack_prepared
from orchestrator.models.placeholders import text_ids

Given = str | Mapping[str, Any]


class ContextExceeded(BadInput):
    """Prompt, input and answer together are longer than the base model's context."""


@dataclass(frozen=True, eq=False)
class ServedPrompt:
    """One version of a registered model, ready to stand in front of rows. Never changes: a new version is a new one."""

    name: str
    version: int
    manifest: Manifest
    encoder: Encoder
    prepared: PreparedPrompts
    """The one prompt, K = 1."""
    answers: tuple[tuple[int, ...], ...]
    """Token ids of each label's text, in the verbalizer's order; empty for a generation task."""
    context_length: int

    @property
    def virtual_tokens(self) -> int:
        return self.manifest.num_virtual_tokens

    @property
    def labels(self) -> tuple[Label, ...]:
        return self.encoder.verbalizer.labels if self.encoder.verbalizer else ()

    @property
    def id(self) -> str:
        """name:version, which says which version answered."""
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
        """Whether it makes texts that end by themselves; a masked model fills a blank whose length is given."""
        return self.encoder.end_id is not None

    @property
    def why_no_labels(self) -> str:
        """Why it can't classify, or nothing."""
        if self.answers:
            return ""
        return (
            "generates text and has no labels"
            if self.generates
            else "was tuned without labels to choose from"
        )

    @property
    def why_no_text(self) -> str:
        """Why it can't complete, or nothing."""
        reason = (
            "is on a masked model, which fills in a blank of a given length and generates no text"
        )
        return "" if self.generates else reason

    def encode(self, given: Given, answer_tokens: int) -> list[int]:
        """Ids of an input through the template, cut to max_input_tokens as the offline evaluation does.

        ContextExceeded when the input as sent does not fit; BadInput when a row lacks a column of the template.
        """
        row = self._whole_row(self.encoder.template.row(given))
        ids = self.encoder.row_ids(row)
        self.check_room(len(text_ids(ids)), answer_tokens)
        return ids if len(ids) <= self.encoder.max_input_tokens else self.encoder.encode_input(row)

    def _whole_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row that has each column of the template. BadInput unless missing ones were tuned with."""
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
        """ContextExceeded when input and answer don't fit behind the prompt."""
        # An encoder-decoder model has this room twice, for the input and for the answer; the search counts as here.
        total = self.virtual_tokens + input_tokens + answer_tokens
        if total > self.context_length:
            raise ContextExceeded(
                f"This model's maximum context length is {self.context_length} tokens, but the request needs {total}: "
                f"{self.virtual_tokens} virtual tokens, {input_tokens} of input, {answer_tokens} for the answer"
            )


def label_keys(labels: Sequence[Label]) -> list[str]:
    """Labels as JSON writes keys: 0 is "0", True is "true", a text stands for itself."""
    keys = [label_text(label) for label in labels]
    if len(set(keys)) == len(keys):
        return keys
    return [
        spelled(label) for label in labels
    ]  # 1 and "1" in an early verbalizer: the text keeps its quotes


def classified(
    labels: Sequence[Label], keys: Sequence[str], probs: Sequence[float]
) -> dict[str, Any]:
    """One classified row, the same for served and offline answers: the first of equally likely labels wins."""
    best = max(range(len(labels)), key=lambda place: probs[place])
    return {"label": labels[best], "probs": dict(zip(keys, probs, strict=True))}


def load_prompt(backbone: Backbone, folder: Path, name: str, version: int) -> ServedPrompt:
    """Read an artifact, check that it fits this backbone, and run the prompt through it once.

    BadInput says why it can't be served; its first line holds no path, so that it may be shown to a client.
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
            f"{prompt.virtual_tokens} virtual tokens leave no room for an input in a context of {prompt.context_length}"
        )
    return prompt


def prompt_tensors(artifact: PromptArtifact) -> PromptTensors:
    """An artifact's tensors as the backbone takes them."""
    inside = Template(artifact.manifest.template).places_virtual_tokens
    tensors = {name: torch.from_numpy(array) for name, array in artifact.tensors.items()}
    return PromptTensors.from_named(tensors, inside)


def make_encoder(manifest: Manifest, backbone: Backbone) -> Encoder:
    """The encoder that the prompt was trained with. BadInput when the manifest's template or verbalizer is unusable."""
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
    limits = manifest.max_input_tokens, manifest.max_target_tokens
    return Encoder(
        backbone.tokenizer, template, verbalizer, *limits, backbone.family, manifest.sentinel,
        table_size=len(backbone.table),
    )  # fmt: skip


def stack_prompts(prompts: Sequence[ServedPrompt]) -> tuple[PreparedPrompts, list[int]]:
    """The different prompts of B rows as one K-prompt value, padded on the right, and each row's place in it."""
    distinct = list({id(prompt): prompt for prompt in prompts}.values())
    place = {id(prompt): index for index, prompt in enumerate(distinct)}
    return stack_prepared([prompt.prepared for prompt in distinct]), [
        place[id(prompt)] for prompt in prompts
    ]


def _check_base_model(manifest: Manifest, backbone: Backbone) -> None:
    tuned, here = manifest.base_model, backbone.info
    if tuned.fingerprint != here.fingerprint:
        raise BadInput(
            f"it was tuned on another base model ({tuned.id!r}, fingerprint {tuned.fingerprint[:12]}) than the one "
            f"loaded ({here.id!r}, {here.fingerprint[:12]})"
        )
    if tuned.tokenizer_digest != here.tokenizer_digest:
        raise BadInput(f"it was tuned with another tokenizer than the one of {here.id!r}")
    if manifest.base_model.hidden_size != backbone.table.shape[1]:
        raise BadInput(
            f"its width is {tuned.hidden_size}, the base model's is {backbone.table.shape[1]}"
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
    """Seconds since the epoch; 0 when the manifest's date can't be read."""
    try:
        return int(datetime.fromisoformat(manifest.created_at).timestamp())
    except (ValueError, OverflowError, OSError):
        return 0
