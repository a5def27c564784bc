"""The offline twin, and what a prompt is before it is asked anything."""

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
    """From the folder alone, as MLflow's pyfunc does; the same answers as on a backbone that is already there."""
    folder = make_artifact("p", verbalizer={0: " ham", 1: " spam"})
    alone, given = (
        OfflineModel.from_artifact(folder),
        OfflineModel.from_artifact(str(folder), backbone),
    )
    rows = [{"text": "win a prize"}, {"text": ""}]
    for a, b in zip(alone.classify(rows), given.classify(rows), strict=True):
        assert (a["label"], a["probs"]) == (b["label"], pytest.approx(b["probs"]))


def test_many_rows_keep_their_order(spam: ServedPrompt, backbone: Backbone) -> None:
    """More rows than one batch holds come back in the order given; none is an empty list."""
    model = OfflineModel(backbone, spam)
    texts = [f"text {number}" for number in range(BATCH_ROWS + 3)]
    together = model.classify(texts)
    for text, row in zip(texts, together, strict=True):
        assert row["probs"] == pytest.approx(model.classify([text])[0]["probs"], abs=1e-5)
    assert model.classify([]) == []


def test_a_generation_prompt_has_no_labels(story: ServedPrompt, backbone: Backbone) -> None:
    """Asked to classify, it says what it does instead."""
    with pytest.raises(BadInput, match="generates text"):
        OfflineModel(backbone, story).classify(["x"])


def test_keys_of_labels() -> None:
    """JSON's own way of writing keys; a text keeps its quotes only where it would clash."""
    assert label_keys([0, "x", True]) == ["0", "x", "true"]
    assert label_keys([1, "1"]) == ["1", '"1"']


def test_stacked_prompts_share_one_copy_each(spam: ServedPrompt, trec: ServedPrompt) -> None:
    """Rows of the same prompt point to one place; shorter prompts are padded."""
    stacked, place = stack_prompts([trec, spam, trec])
    assert place == [0, 1, 0]
    assert (stacked.parts["cache"].lengths.tolist(), stacked.width) == ([11, 4], 11)


def test_the_longest_prompt_that_fits(make_artifact: Any, backbone: Backbone) -> None:
    """Room for one input token and the longest answer is the least that a prompt must leave."""
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
