"""Load a frozen backbone, embed tokens and run forwards.

This package is the place for code that differs between model families.
"""

from orchestrator.models.backbone.base import Backbone, RowState
from orchestrator.models.backbone.causal import (
    PROMPT_ONCE_FAMILIES,
    CausalBackbone,
    CausalState,
    runs_prompt_once,
)
from orchestrator.models.backbone.loading import (
    check_exact,
    default_device,
    device_for,
    load_backbone,
    make_backbone,
    read_backbone,
    set_threads,
    weights_fingerprint,
    why_not_exact,
)
from orchestrator.models.backbone.masked import MaskedBackbone
from orchestrator.models.backbone.prepared_prompts import (
    SITES,
    PreparedPrompts,
    PromptTensors,
    stack_prepared,
)
from orchestrator.models.backbone.rows import Rows
from orchestrator.models.backbone.seq2seq import Seq2SeqBackbone
from orchestrator.models.backbone.sharding import bytes_elsewhere

__all__ = [
    "PROMPT_ONCE_FAMILIES", "SITES", "Backbone", "CausalBackbone", "CausalState",
    "MaskedBackbone", "PreparedPrompts", "PromptTensors", "RowState", "Rows", "Seq2SeqBackbone",
    "bytes_elsewhere", "check_exact", "default_device", "device_for", "load_backbone",
    "make_backbone", "read_backbone", "runs_prompt_once", "set_threads", "stack_prepared",
    "weights_fingerprint", "why_not_exact",
]  # fmt: skip
