"""lm-evaluation-harness against the server: its log-likelihoods are our own scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_serving_api import listen, url  # noqa: F401

from orchestrator.models.backbone import Backbone
from orchestrator.models.scoring import answer_scores
from orchestrator.serving.engine.generation import Sampling
from orchestrator.serving.offline import OfflineModel

harness: Any = pytest.importorskip(
    "lm_eval.models.openai_completions", reason="lm-evaluation-harness is not installed"
)
PAIRS = [
    ("the quick brown", " fox"),
    ("great good bad", " terrible movie"),
    ("a question about a", " person, a place"),
]


def asked(kind: str, *arguments: Any) -> list[Any]:
    """Return the harness' form of requests of a kind."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, entry, index) for index, entry in enumerate(arguments)]


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer_backend": "huggingface"},
        {"tokenizer_backend": "huggingface", "num_concurrent": 4, "batch_size": 2},
        {"tokenizer_backend": "huggingface", "tokenized_requests": False},
        {"tokenizer_backend": "remote", "tokenizer": None},
    ],
)
def test_local_completions(
    url: str,  # noqa: F811
    backbone: Backbone,
    model_folder: Path,
    registry: Any,
    options: dict[str, Any],
) -> None:
    """Log-likelihoods and greedy texts are the offline model's, with either tokenizer."""
    settings = {"tokenizer": str(model_folder), "batch_size": 4, "max_length": 150, **options}
    client = harness.LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="story", **settings
    )
    told = client.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    twin = OfflineModel.from_artifact(registry.folders["story", 1], backbone)
    for (context, answer), (value, _) in zip(PAIRS, told, strict=True):
        ids = backbone.tokenizer(context)["input_ids"]
        target = backbone.tokenizer(context + answer)["input_ids"][len(ids) :]
        with torch.inference_mode():
            scores = answer_scores(backbone, twin.prompt.prepared, [ids], [0], [[target]])
        assert value == pytest.approx(float(scores[0][0]), abs=1e-3)
    until = {"until": ["\0"], "max_gen_toks": 8, "temperature": 0.0, "do_sample": False}
    contexts = [context for context, _ in PAIRS]
    requests = asked("generate_until", *((context, dict(until)) for context in contexts))
    texts = client.generate_until(requests, disable_tqdm=True)
    assert texts == [one.text for one in twin.complete(contexts, Sampling(8, 0.0))]
