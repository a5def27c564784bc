"""Masked models, which answer by filling in a blank (a cloze).

The answer's tokens are predicted at the row's blank, with one mask token for each. The models are
those of Devlin et al. 2019. Prompts in front of a cloze and inside it follow Liu et al. 2021
(P-tuning), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.errors import BadInput
from orchestrator.models.backbone.base import Ids
from orchestrator.models.backbone.encoder import EncodingBackbone
from orchestrator.models.backbone.prepared_prompts import PreparedPrompts
from orchestrator.models.backbone.rows import Rows, pad_right
from orchestrator.models.placeholders import BLANK, placed
from orchestrator.models.source import Family

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutput

# Marks the mask tokens that stand for the answer, as opposed to mask tokens in the text. No
# vocabulary is as large.
MARK = 1 << 62


class MaskedBackbone(EncodingBackbone):
    """A frozen masked language model with its tokenizer.

    A prefix stands in the model's only stack, which is the site ``decoder``.
    """

    family: ClassVar[Family] = "masked"

    @property
    def continues(self) -> bool:
        return False

    @cached_property
    def sites(self) -> dict[str, list[nn.Module]]:
        ids = torch.zeros(1, 3, dtype=torch.long, device=self.device)
        with torch.inference_mode():
            modules, _ = self._recorded_keys(lambda: self.model(input_ids=ids), self.model, 3)
        return {"decoder": modules}

    def activations(self, embeddings: Tensor) -> dict[str, Tensor]:
        inputs = embeddings.to(self.table)[None]
        _, keys = self._recorded_keys(
            lambda: self.body(inputs_embeds=inputs), self.model, len(embeddings)
        )
        return {"decoder": keys}

    def teacher_forced(
        self,
        prompts: PreparedPrompts | None,
        inputs: Sequence[Ids],
        targets: Sequence[Ids],
        prompt: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [B, Y, V] that predict the targets, and the padded targets [B, Y].

        A row without a blank gets one at its end. Targets start at the left edge.
        """
        rows = zip(inputs, self.inner_counts(prompts, prompt), targets, strict=True)
        filled = [
            placed(ids if BLANK in ids else [*ids, BLANK], count, [MARK] * len(target))
            for ids, count, target in rows
        ]
        blank_columns = [
            [column for column, entry in enumerate(row) if entry == MARK] for row in filled
        ]
        masked_rows = [
            [self.tokenizer.mask_token_id if entry == MARK else entry for entry in row]
            for row in filled
        ]
        columns = pad_right(blank_columns, 0, self.device)
        logits = self._logits_at(
            prompts, Rows.pad(masked_rows, prompt, self.device, left=False), columns
        )
        return logits, pad_right(targets, -100, self.device)

    def _logits_at(self, prompts: PreparedPrompts | None, rows: Rows, columns: Tensor) -> Tensor:
        """Return logits [B, Y, V] at the rows' columns [B, Y], running the head only there."""
        embeddings, mask, front = self.encoder_rows(prompts, rows)
        columns = (columns + front[:, None])[:, :, None]
        with self.prefix_of(prompts, rows.prompt, ["decoder"]):
            hidden = self.body(
                inputs_embeds=embeddings, attention_mask=mask.long()
            ).last_hidden_state
        logits: Tensor = self.head(hidden.gather(1, columns.expand(-1, -1, hidden.shape[2])))
        return logits

    def body(self, **inputs: Any) -> BaseModelOutput:
        return self.model.base_model(**inputs)  # type: ignore[operator]

    @cached_property
    def head(self) -> nn.Module:
        """The module that turns hidden states into logits: the model's only child besides its body.

        Raises BadInput for a model whose head is spread over several modules.
        """
        children = [child for child in self.model.children() if child is not self.model.base_model]
        if len(children) != 1:
            raise BadInput(
                f"a {self.info.model_type} model can't be tuned: its head is spread over several "
                "modules"
            )
        return children[0]
