"""Baselines that change the model: what a trial of them learns, put into the backbone and taken out again."""

from collections.abc import Callable

from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.baselines.adapter import Adapters
from orchestrator.tuning.baselines.change import Change
from orchestrator.tuning.baselines.lora import Lora, check_peft
from orchestrator.tuning.baselines.model_tuning import ModelTuning

CHANGES: dict[str, Callable[[TrialSpec, Backbone], Change]] = {
    "model_tuning": ModelTuning.create,
    "lora": Lora.create,
    "qlora": Lora.create,
    "adapter": Adapters.create,
}


def make_change(method: str, spec: TrialSpec, backbone: Backbone) -> Change:
    """What a trial learns, before its first step; the spec and the seed alone decide what is drawn. On the backbone's
    device. BadInput where the method does not fit the model."""
    return CHANGES[method](spec, backbone).to(backbone.device)


__all__ = ["CHANGES", "Change", "check_peft", "make_change"]
