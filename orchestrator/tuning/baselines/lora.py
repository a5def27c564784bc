"""LoRA (Hu et al. 2021): low-rank changes of the attention's projections, through PEFT.

QLoRA (Dettmers et al. 2023) is the same on a model whose weights were quantised when it was loaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.baselines.change import WeightChange
from orchestrator.tuning.prompts.base import seeded
from orchestrator.utils.text import first_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

PEFT = "peft"
NAME = "default"  # PEFT's name for the only adapter

Place: TypeAlias = "tuple[nn.Module, str, nn.Module, LoraLayer]"
"""A LoRA layer's parent, its name there, the layer that it wraps, and the LoRA layer itself."""


def check_peft(method: str) -> None:
    """Raise BadInput if PEFT is not installed."""
    if find_spec(PEFT) is None:
        raise BadInput(
            f"method {method} needs the package {PEFT}, which is not installed",
            "pip install 'prompt-orchestrator[baselines]'",
        )


class Lora(WeightChange):
    """PEFT's LoRA layers, which replace the layers that they wrap while the change is applied."""

    def __init__(self, model: nn.Module, model_type: str, rank: int, alpha: int) -> None:
        self._places = _made_layers(model, lora_config(model_type, rank, alpha))
        learned: dict[str, nn.Parameter] = {}
        for name, (_, _, _, layer) in self._places.items():
            for part in ("lora_A", "lora_B"):
                linear = getattr(layer, part)[NAME]
                linear.float().requires_grad_(True)
                learned[f"{name}.{part}.weight"] = linear.weight
        super().__init__(learned)

    @classmethod
    def create(cls, spec: TrialSpec, backbone: Backbone) -> Lora:
        assert spec.rank is not None and spec.alpha is not None  # the spec's own defaults
        with seeded(spec.seed):
            return cls(backbone.model, backbone.model.config.model_type, spec.rank, spec.alpha)  # type: ignore[union-attr,arg-type]

    def _put_in(self) -> None:
        for parent, child, _, layer in self._places.values():
            setattr(parent, child, layer)

    def _take_out(self) -> None:
        for parent, child, original, _ in self._places.values():
            setattr(parent, child, original)


def lora_config(
    model_type: str,
    rank: int,
    alpha: int,
    targets: list[str] | None = None,
    task: str | None = None,
) -> LoraConfig:
    """Return PEFT's configuration.

    Without ``targets``, LoRA changes PEFT's usual projections for the model's type, or all linear
    layers for a type that PEFT does not know. PEFT draws A uniformly and sets B to zero, so that a
    trial starts from the unchanged model. There is no dropout.
    """
    from peft import LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    usual = None if model_type in KNOWN else "all-linear"
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets or usual,
        lora_dropout=0.0,
        bias="none",
        task_type=task,
    )


def _made_layers(model: nn.Module, config: LoraConfig) -> dict[str, Place]:
    """Create PEFT's LoRA layers and leave the model as it was.

    Returns, by the layer's full name: its parent module, its name in the parent, the original layer
    that it wraps, and the LoRA layer itself. Raises BadInput when LoRA does not fit the model.
    """
    from peft.tuners.lora import LoraLayer, LoraModel

    try:
        LoraModel(model, config, NAME)
    except ValueError as error:
        raise BadInput(
            f"method lora does not fit this model: {first_line(error)}",
            "use another base model",
        ) from None
    finally:
        layers = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        places: dict[str, Place] = {}
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            places[name] = model.get_submodule(parent), child, layer.get_base_layer(), layer
        for module, child, original, _ in places.values():
            setattr(module, child, original)
        if hasattr(model, "peft_config"):  # makes transformers treat the model as one with adapters
            del model.peft_config
    return places
