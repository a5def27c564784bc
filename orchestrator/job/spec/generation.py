"""The section ``generation``: how texts are generated that metrics compare."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.job.spec.base import PositiveInt, Section

MAX_BEAMS = 64  # each beam occupies a row in memory


class GenerationSpec(Section):
    """Generation of texts for bleu, rouge_l and f1."""

    max_tokens: PositiveInt | None = None
    """Maximum length of a generated text, end token included; data.max_target_tokens by default."""
    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] = 1
    """Number of beams of the beam search; 1 is greedy decoding."""
