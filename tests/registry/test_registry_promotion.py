"""The comparison of two prompts, as a pure decision."""

from __future__ import annotations

from typing import Any

import pytest
from test_artifact import manifest

from orchestrator.artifact import GenerationRecord
from orchestrator.registry.aliases.gate import ComparedVersion, verdict

GREEDY, BEAMS = (GenerationRecord(max_tokens=32, num_beams=beams) for beams in (1, 5))


def scored(bleu: float, generation: GenerationRecord) -> ComparedVersion:
    changes: dict[str, Any] = {
        "metrics": {"test": {"bleu": bleu, "loss": 1 - bleu}},
        "generation": generation,
    }
    return ComparedVersion(manifest(**changes), {})


@pytest.mark.parametrize(("generation", "won"), [(GREEDY, True), (BEAMS, False)])
def test_texts_are_compared_where_they_were_generated_alike(
    generation: GenerationRecord, won: bool
) -> None:
    """BLEU is compared only under equal decoding settings; a loss always can be.

    BLEU with five beams may be higher than with greedy decoding for no better prompt.
    """
    new, champion = scored(0.4, generation), scored(0.3, GREEDY)
    found = verdict(new, champion, "bleu", "max")
    assert found.won == won and ("other settings" in found.reason) == (not won)
    assert verdict(new, champion, "loss", "min")[0]
