"""Base models with weights in 8 or 4 bits are smaller, and prompts still train on them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from models import model_folder, random_prompts, save_model, small_task, tiny_backbone

import orchestrator.models.source
from orchestrator.errors import BadInput
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.tuning.step import packed_gradients

HERE = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough for blocks of 64 weights."""
    return save_model(
        tmp_path_factory.mktemp("wide") / "model", hidden_size=128, intermediate_size=256
    )


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("quantization", "layer"), [("int8", "Linear8bitLt"), ("int4", "Linear4bit")]
)
def test_a_quantised_backbone_trains_a_prompt(wide: Path, quantization: str, layer: str) -> None:
    """Linear layers are quantised, packed gradients match single trials, weights stay fixed."""
    source = resolve_model(BaseModelSpec(id=str(wide), quantization=quantization))
    backbone = load_backbone(source)
    assert layer in {type(module).__name__ for module in backbone.model.modules()}
    assert backbone.info.quantization == quantization
    before, split = backbone.digest(), small_task().splits["train"]
    together = [
        prompt.float().detach().requires_grad_() for prompt in random_prompts(backbone, [5, 2])
    ]
    apart = [prompt.detach().clone().requires_grad_() for prompt in together]
    rows = [[3, 8, 0], [5]]
    losses = packed_gradients(backbone, together, rows, split)
    alone = [
        packed_gradients(backbone, [prompt], [own], split)[0]
        for prompt, own in zip(apart, rows, strict=True)
    ]
    assert losses == pytest.approx(alone, rel=0.05)  # activations are rounded too, row by row
    for one, other in zip(together, apart, strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.abs().max() > 0
        assert (
            torch.nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0)
            > 0.98
        )
    assert backbone.digest() == before


@needs_bitsandbytes
def test_quantised_weights_take_less_memory(wide: Path) -> None:
    """Four bits take less than eight, and eight less than thirty-two."""
    sizes = []
    for quantization in ("int4", "int8", "none"):
        source = resolve_model(BaseModelSpec(id=str(wide), quantization=quantization))
        sizes.append(load_backbone(source).model.get_memory_footprint())  # type: ignore[operator]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


def test_without_the_package_quantization_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the package before any weight is read."""
    monkeypatch.setattr(orchestrator.models.source, "find_spec", lambda name: None)
    with pytest.raises(
        BadInput, match=r"int8 needs the package bitsandbytes(.|\n)*pip install bitsandbytes"
    ):
        resolve_model(BaseModelSpec(id=str(Path(model_folder())), quantization="int8"))


def test_plain_weights_are_recorded_as_such() -> None:
    """A backbone that is not quantised records that."""
    assert tiny_backbone().info.quantization == "none"
