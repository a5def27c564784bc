"""Prompt inspection: nearest tokens, and drift from a rebuilt initial prompt where possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from models import backbone_of, encoder_for, tiny_backbone, tiny_tokenizer
from test_artifact import manifest
from torch import Tensor

from orchestrator.artifact import PromptArtifact, ReparameterizationRecord
from orchestrator.artifact.peft import export_peft
from orchestrator.cli.pages.registry import inspection_page
from orchestrator.cli.workbench import inspect as inspection
from orchestrator.cli.workbench.inspect import inspect_prompt, nearest_tokens, registered
from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import NamedInit
from orchestrator.models import nearest_words
from orchestrator.models.backbone import PromptTensors
from orchestrator.registry import Registry
from orchestrator.tuning.prompts import InitContext, Method, make_prompt
from orchestrator.tuning.prompts.inits import frequent_ids

ANSWERS = encoder_for().answers
METHODS = {
    "prompt_tuning": Method(),
    "p_tuning": Method("p_tuning", "lstm", 5),
    "prefix_tuning": Method("prefix_tuning", "mlp", 5),
}
STARTED = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))


def known(reference: str) -> Mapping[str, Tensor]:
    """Return the one prompt that others start from."""
    if reference != "first:1":
        raise BadInput(f"no registered model {reference!r}")
    return {"prompt": STARTED}


def context(family: str = "llama", artifacts: Mapping[str, Any] | None = None) -> InitContext:
    return InitContext.of(backbone_of(family, torch.float32), ANSWERS, artifacts)


def artifact_of(
    method: str, spec: TrialSpec, family: str = "llama", shift: float = 0.0, **changes: Any
) -> PromptArtifact:
    """Return the method's initial prompt with ``shift`` added to each number."""
    prompt = make_prompt(METHODS[method], spec, context(family, {"first:1": known("first:1")}))
    tensors = {name: (tensor.detach() + shift).numpy() for name, tensor in prompt().named().items()}
    network = ReparameterizationRecord(
        type=METHODS[method].reparameterization, hidden_size=METHODS[method].hidden_size
    )
    about = {
        "reparameterization": network,
        "method": method,
        "num_virtual_tokens": spec.num_virtual_tokens,
        "config": spec.config(),
        **changes,
    }
    return PromptArtifact(tensors, manifest(**about))


def inspected(
    artifact: PromptArtifact, family: str = "llama", nearest: int = 3
) -> inspection.Inspection:
    return inspect_prompt(
        backbone_of(family, torch.float32), artifact, context(family), known, nearest
    )


def by_definition(prompt: Tensor, table: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return all tokens by cosine, sorted, straight from the definition."""
    found = []
    for vector in prompt:
        distances = [
            (float(1 - torch.dot(vector, row) / (vector.norm() * row.norm())), place)
            for place, row in enumerate(table)
        ]
        found.append([(place, distance) for distance, place in sorted(distances)[:count]])
    return found


@pytest.mark.parametrize("chunk", [7, 100, 10_000])
def test_neighbours_by_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest tokens by cosine distance come first, whatever the chunk size."""
    monkeypatch.setattr(nearest_words, "CHUNK", chunk)
    backbone = tiny_backbone(dtype=torch.float32)
    prompt = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    wanted = by_definition(prompt, backbone.table[: len(tiny_tokenizer())], 6)
    for got, expected in zip(nearest_tokens(backbone, prompt, 6), wanted, strict=True):
        assert [one.id for one in got] == [place for place, _ in expected]
        assert [one.distance for one in got] == pytest.approx(
            [distance for _, distance in expected], abs=1e-5
        )
        assert all(one.token == tiny_tokenizer().decode([one.id]) for one in got)


def test_a_word_is_its_own_neighbour() -> None:
    """A prompt made of a text reads as that text at any norm, because cosine ignores norms."""
    backbone = tiny_backbone(dtype=torch.float32)
    ids = tiny_tokenizer()("the quick brown fox")["input_ids"]
    rows = backbone.table[ids] * torch.linspace(0.5, 9.0, len(ids))[:, None]
    near = nearest_tokens(backbone, rows, 1)
    assert "".join(one.token for (one,) in near) == "the quick brown fox"
    assert all(abs(one.distance) < 1e-5 for (one,) in near)


def test_more_neighbours_than_tokens() -> None:
    """A count above the vocabulary's size gives each token once."""
    (near,) = nearest_tokens(tiny_backbone(dtype=torch.float32), STARTED[:1], 10_000)
    assert sorted(one.id for one in near) == list(range(len(tiny_tokenizer())))


SPECS = {
    **{init: TrialSpec(init, None, 3, 0.1, 5) for init in get_args(NamedInit)},
    "sample_vocab of few": TrialSpec("sample_vocab", None, 3, 0.1, 5, init_population=20),
    "text": TrialSpec("text", "spam or ham", 3, 0.1, 5),
    "artifact": TrialSpec("artifact", None, 3, 0.1, 5, init_artifact="first:1"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", SPECS)
def test_an_untrained_prompt_has_not_drifted(method: str, init: str) -> None:
    """The initial prompt is rebuilt exactly, for every init and method.

    It is computed from the configuration, the network and the seed. A start of zeros has no
    direction that could be compared.
    """
    found = inspected(artifact_of(method, SPECS[init]))
    drifts = [part.drift for part in (*found.tokens, *found.layers)]
    assert found.no_drift == ""
    for drift in drifts:
        assert drift is not None and drift.norm == pytest.approx(0, abs=1e-5)
        assert drift.cosine == (pytest.approx(1, abs=1e-5) if drift.start_norm else None)


def test_a_vector_of_zeros_has_no_direction() -> None:
    """A virtual token of zeros has no cosine and no nearest token, and the page shows it so."""
    artifact = artifact_of("prompt_tuning", SPECS["text"])
    weights = artifact.weights.copy()
    weights[1] = 0
    found = inspected(PromptArtifact(weights, artifact.manifest))
    drifts = [token.drift for token in found.tokens]
    assert all(drift is not None for drift in drifts)
    assert [drift.cosine is None for drift in drifts if drift] == [False, True, False]
    assert [len(token.nearest) for token in found.tokens] == [3, 0, 3]
    facts = {"name": "m", "version": 1, "method": "prompt_tuning", "num_virtual_tokens": 3}
    page = inspection_page({**facts, "base_model": "b", **asdict(found)})
    assert page[3].split() == ["1", "0", "none", "1.00"]
    nothing = inspected(PromptArtifact(weights * 0, artifact.manifest))
    assert [token.nearest for token in nothing.tokens] == [()] * 3


def test_drift_is_measured() -> None:
    """A shift of 0.25 in each of 32 numbers gives a norm of 0.25 sqrt(32) and a matching cosine."""
    start = artifact_of("prompt_tuning", SPECS["text"]).weights
    found = inspected(artifact_of("prompt_tuning", SPECS["text"], shift=0.25))
    for token, row in zip(found.tokens, torch.from_numpy(start), strict=True):
        assert token.drift is not None
        assert token.drift.norm == pytest.approx(0.25 * 32**0.5, rel=1e-5)
        assert token.drift.start_norm == pytest.approx(float(row.norm()), rel=1e-5)
        now = row + 0.25
        assert token.norm == pytest.approx(float(now.norm()), rel=1e-5)
        assert token.drift.cosine == pytest.approx(
            float(now @ row / now.norm() / row.norm()), abs=1e-5
        )


LOST: dict[str, tuple[dict[str, Any], str]] = {
    "gone": (
        {"config": SPECS["artifact"].config() | {"init": {"artifact": "other:2"}}},
        "no registered model",
    ),
    "imported": ({"config": {"peft": {"peft_type": "PROMPT_TUNING"}}}, "imported from PEFT"),
    "no configuration": ({"config": {}}, "configuration has no learning_rate, seed"),
    "another length": (
        {"config": SPECS["text"].config() | {"num_virtual_tokens": 9}},
        "of another shape",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_a_start_that_nobody_knows(case: str) -> None:
    """With an unknown initial prompt there are neighbours but no drift, and a reason is given."""
    changes, reason = LOST[case]
    found = inspected(artifact_of("prompt_tuning", SPECS["text"], **changes))
    assert reason in found.no_drift
    assert [token.drift for token in found.tokens] == [None] * 3 and all(
        token.nearest for token in found.tokens
    )


@pytest.mark.parametrize(
    ("family", "sites"),
    [("llama", ["decoder"]), ("t5", ["encoder", "decoder", "cross"]), ("bert", ["decoder"])],
)
def test_a_prefix_is_measured_against_real_tokens(family: str, sites: list[str]) -> None:
    """Norms are means over a head's keys and values, per layer and site.

    A prefix that consists of real tokens' keys and values has exactly their norms.
    """
    found = inspected(artifact_of("prefix_tuning", SPECS["text"], family), family)
    assert found.tokens == ()
    assert sorted((layer.site, layer.layer) for layer in found.layers) == sorted(
        (site, layer) for site in sites for layer in (0, 1)
    )
    backbone = backbone_of(family, torch.float32)
    ids = frequent_ids(context(family), inspection.REAL_TOKENS)
    with torch.no_grad():
        real = backbone.activations(backbone.embed(torch.tensor(ids)))
    tensors = {
        name: tensor.numpy() for name, tensor in PromptTensors(prefixes=real).named().items()
    }
    same = inspected(
        PromptArtifact(tensors, manifest(method="prefix_tuning", num_virtual_tokens=len(ids))),
        family,
    )
    for layer in same.layers:
        assert layer.key_norm == pytest.approx(layer.real_key_norm, rel=1e-5)
        assert layer.value_norm == pytest.approx(layer.real_value_norm, rel=1e-5)
        keys = real[layer.site][layer.layer, 0]
        assert layer.key_norm == pytest.approx(
            float(torch.stack([head.norm(dim=1).mean() for head in keys]).mean()), rel=1e-5
        )


def test_what_a_start_was(tmp_path: Path) -> None:
    """Folders (PEFT's too) give the original start; a model name or alias may have moved since."""
    base = manifest().base_model.model_copy(update={"hidden_size": 32})
    artifact = artifact_of("prompt_tuning", SPECS["text"], base_model=base)
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db", cache_dir=tmp_path / "cache")
    for folder in (artifact.save(tmp_path / "own"), export_peft(artifact, tmp_path / "adapter")):
        assert torch.equal(
            registered(registry, str(folder))["prompt"], torch.from_numpy(artifact.weights)
        )
    for reference in ("spam", "spam@champion"):
        with pytest.raises(BadInput, match="may mean another version by now"):
            registered(registry, reference)
    with pytest.raises(BadInput, match=r"manifest\.json can't be read"):
        registered(registry, str(tmp_path / "gone"))


def test_pages_hold_nothing_that_moves_the_cursor() -> None:
    """Names and tokens are escaped; without a drift figure the page shows the reason."""
    escape = "\x1b[2J\u202e"
    token = {
        "place": 0,
        "norm": 1.0,
        "nearest": [{"id": 1, "token": escape, "distance": 0.5}],
        "drift": None,
    }
    drift = {"cosine": 0.5, "norm": 1.0, "start_norm": 0.0}
    layer = {
        "site": "decoder",
        "layer": 0,
        "key_norm": 1.0,
        "value_norm": 2.0,
        "real_key_norm": 3.0,
    }
    layer |= {"real_value_norm": 4.0, "drift": drift}
    common = {
        "version": 1,
        "method": "m",
        "num_virtual_tokens": 1,
        "base_model": "b" + escape,
        "vocabulary_norm": 1.0,
    }
    pages = [
        inspection_page(
            {**common, "name": escape, "tokens": [token], "layers": [], "no_drift": escape}
        ),
        inspection_page(
            {**common, "name": "spam", "tokens": [], "layers": [layer], "no_drift": ""}
        ),
    ]
    for line in (*pages[0], *pages[1]):
        assert line.isprintable(), line
    assert "no drift from the start: " in pages[0][-2] and "drift: cosine" in pages[1][-2]
    assert pages[1][2].split() == ["decoder", "0", "1", "3", "2", "4", "0.500", "from", "0"]
