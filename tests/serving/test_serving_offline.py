"""The offline model, and prompts as they are when loaded."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import BadInput
from orchestrator.models.backbone import Backbone
from orchestrator.serving.offline import BATCH_ROWS, OfflineModel
from orchestrator.serving.prompts.served_prompt import (
    ServedPrompt,
    label_keys,
    load_prompt,
    stack_prompts,
)


def test_it_loads_the_base_model_that_its_manifest_names(
    make_artifact: Any, backbone: Backbone
) -> None:
    """The folder alone gives the same answers as a backbone that is already loaded.

    MLflow's pyfunc model loads the folder in the same way.
    """
    folder = make_artifact("p", verbalizer={0: " ham", 1: " spam"})
    alone, given = (
        OfflineModel.from_artifact(folder),
        OfflineModel.from_artifact(str(folder), backbone),
    )
    rows = [{"text": "win a prize"}, {"text": ""}]
    for a, b in zip(alone.classify(rows), given.classify(rows), strict=True):
        assert (a["label"], a["probs"]) == (b["label"], pytest.approx(b["probs"]))


def test_many_rows_keep_their_order(spam: ServedPrompt, backbone: Backbone) -> None:
    """More rows than a batch holds keep their order; no rows give an empty list."""
    model = OfflineModel(backbone, spam)
    texts = [f"text {number}" for number in range(BATCH_ROWS + 3)]
    together = model.classify(texts)
    for text, row in zip(texts, together, strict=True):
        assert row["probs"] == pytest.approx(model.classify([text])[0]["probs"], abs=1e-5)
    assert model.classify([]) == []


def test_a_generation_prompt_has_no_labels(story: ServedPrompt, backbone: Backbone) -> None:
    """A request to classify is refused with what the prompt does instead."""
    with pytest.raises(BadInput, match="generates text"):
        OfflineModel(backbone, story).classify(["x"])


def test_keys_of_labels() -> None:
    """Keys are written as in JSON; a text keeps its quotes only where it would clash."""
    assert label_keys([0, "x", True]) == ["0", "x", "true"]
    assert label_keys([1, "1"]) == ["1", '"1"']


def test_stacked_prompts_share_one_copy_each(spam: ServedPrompt, trec: ServedPrompt) -> None:
    """Rows of the same prompt point to one copy; shorter prompts are padded."""
    stacked, place = stack_prompts([trec, spam, trec])
    assert place == [0, 1, 0]
    assert (stacked.parts["cache"].lengths.tolist(), stacked.width) == ([11, 4], 11)


def test_the_longest_prompt_that_fits(make_artifact: Any, backbone: Backbone) -> None:
    """A prompt must leave room for one input token and the longest answer."""
    context = backbone.info.context_length
    answer = load_prompt(
        backbone, make_artifact("p", verbalizer={0: " ham", 1: " spam"}), "p", 1
    ).longest_answer
    options = {"verbalizer": {0: " ham", 1: " spam"}}
    assert load_prompt(
        backbone, make_artifact("fits", tokens=context - 1 - answer, **options), "p", 1
    )
    with pytest.raises(BadInput, match="no room"):
        load_prompt(backbone, make_artifact("long", tokens=context - answer, **options), "p", 1)
