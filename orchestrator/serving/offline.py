"""The offline version of the server: the same computation for one artifact, without HTTP.

It runs in the caller's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.artifact import read_manifest
from orchestrator.data.source_row import Row
from orchestrator.errors import BadInput
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import Backbone, default_device, load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.serving.engine.classify import answer_probs
from orchestrator.serving.engine.generation import (
    Completion,
    GenerationBatch,
    GenerationRow,
    Sampling,
)
from orchestrator.serving.prompts.served_prompt import ServedPrompt, classified, load_prompt

Input = str | Row
BATCH_ROWS = 32
NEEDS_LABELS = "tune one with data.verbalizer"


class OfflineModel:
    """A prompt and its base model, loaded in this process."""

    def __init__(self, backbone: Backbone, prompt: ServedPrompt) -> None:
        self.backbone = backbone
        self.prompt = prompt

    @classmethod
    def from_artifact(cls, folder: Path | str, backbone: Backbone | None = None) -> OfflineModel:
        """Load an artifact and, unless it is given, the base model that its manifest names.

        Raises BadInput when the artifact does not fit the base model.
        """
        folder = Path(folder)
        if backbone is None:
            record = read_manifest(folder).base_model
            source = resolve_model(
                BaseModelSpec.model_validate(
                    {
                        "id": record.id,
                        "revision": record.revision,
                        "quantization": record.quantization,
                    }
                )
            )
            backbone = load_backbone(source, default_device())
        return cls(backbone, load_prompt(backbone, folder, folder.name, 0))

    def classify(self, inputs: Sequence[Input]) -> list[dict[str, Any]]:
        """Classify each text or row; return a ``{"label", "probs"}`` dictionary for each.

        Raises BadInput for a prompt without a verbalizer.
        """
        if reason := self.prompt.why_no_labels:
            raise BadInput(
                f"this prompt {reason}", "use complete()" if self.prompt.generates else NEEDS_LABELS
            )
        encoded = self._encoded(inputs, self.prompt.longest_answer)
        probs = []
        for start in range(0, len(encoded), BATCH_ROWS):
            probs += self._probs(encoded[start : start + BATCH_ROWS])
        return [classified(self.prompt.labels, self.prompt.label_keys, row) for row in probs]

    def _probs(self, inputs: list[list[int]]) -> list[list[float]]:
        return answer_probs(self.backbone, [self.prompt] * len(inputs), inputs)

    def complete(
        self, inputs: Sequence[Input], sampling: Sampling | None = None
    ) -> list[Completion]:
        """Complete each text or row, one after another.

        By default, decoding is greedy and makes up to 64 tokens. Raises BadInput for a prompt on a
        masked model.
        """
        if reason := self.prompt.why_no_text:
            raise BadInput(
                f"this prompt {reason}", "use classify()" if self.prompt.answers else NEEDS_LABELS
            )
        sampling = sampling or Sampling(max_tokens=64, temperature=0.0)
        return [self._complete(ids, sampling) for ids in self._encoded(inputs, sampling.max_tokens)]

    def _encoded(self, inputs: Sequence[Input], answer_tokens: int) -> list[list[int]]:
        """Return the ids of each input; an error names the row that caused it."""
        encoded = []
        for number, entry in enumerate(inputs, start=1):
            try:
                encoded.append(self.prompt.encode(entry, answer_tokens))
            except BadInput as error:
                raise type(error)(f"row {number}: {error.message}", error.hint) from None
        return encoded

    def _complete(self, ids: list[int], sampling: Sampling) -> Completion:
        row = GenerationRow(self.prompt, ids, sampling)
        batch = GenerationBatch(self.backbone, [row])
        while row.completion is None:
            if row.failure is not None:
                raise row.failure
            batch.step()
        return row.completion
