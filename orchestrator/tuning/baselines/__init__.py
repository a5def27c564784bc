"""Baselines that change the model itself: their learned parameters are put into the backbone."""

from collections.abc import Callable

from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.baselines.adapter import Adapters
from orchestrator.tuning.baselines.change import WeightChange
from orchestrator.tuning.baselines.lomo import Lomo
from orchestrator.tuning.baselines.lora import Lora, check_peft
from orchestrator.tuning.baselines.model_tuning import ModelTuning

CHANGES: dict[str, Callable[[TrialSpec, Backbone], WeightChange]] = {
    "model_tuning": ModelTuning.create,
    "lomo": Lomo.create,
    "lora": Lora.create,
    "qlora": Lora.create,
    "adapter": Adapters.create,
}


def make_change(method: str, spec: TrialSpec, backbone: Backbone) -> WeightChange:
    """Create a trial's change of the model before its first step, on the backbone's device.

    Random values depend on the spec and its seed alone. Raises BadInput when the method does not
    fit the model.
    """
    return CHANGES[method](spec, backbone).to(backbone.device)


__all__ = ["CHANGES", "WeightChange", "check_peft", "make_change"]
