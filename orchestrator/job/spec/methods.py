"""The tuning methods, the dimensions of each, and the networks that generate their prompts."""

from __future__ import annotations

from typing import Literal, TypeAlias

from orchestrator.job.spec.base import PositiveInt, Section

Reparameterization: TypeAlias = Literal["none", "mlp", "lstm"]


class ReparameterizationSpec(Section):
    """A network that generates the prompt during training, from fewer or freer parameters.

    Inference does not need it.
    """

    type: Reparameterization
    """none or mlp for prefix_tuning, lstm or mlp for p_tuning."""
    hidden_size: PositiveInt | None = None
    """Width of the network. The default is 512 for prefix_tuning, half the model's width per
    direction for lstm, and the model's width for the mlp of p_tuning."""


REPARAMETERIZATIONS: dict[str, tuple[Reparameterization, ...]] = {
    "prefix_tuning": ("mlp", "none"),
    "p_tuning": ("lstm", "mlp"),
}
"""Allowed networks of each method, the default first. Other methods allow only none."""
MethodName: TypeAlias = Literal[
    "prompt_tuning",
    "prefix_tuning",
    "p_tuning",
    "prompt_design",
    "model_tuning",
    "lomo",
    "lora",
    "qlora",
    "adapter",
]
PROMPT_SPACE = ("init", "num_virtual_tokens", "learning_rate", "seed")
LORA_SPACE = ("rank", "alpha", "learning_rate", "seed")
SPACES: dict[MethodName, tuple[str, ...]] = {
    "prompt_tuning": PROMPT_SPACE,
    "prefix_tuning": PROMPT_SPACE,
    "p_tuning": PROMPT_SPACE,
    "prompt_design": ("template", "shots", "demonstrations", "seed"),
    "model_tuning": ("learning_rate", "seed"),
    "lomo": ("learning_rate", "seed"),
    "lora": LORA_SPACE,
    "qlora": LORA_SPACE,
    "adapter": ("bottleneck", "learning_rate", "seed"),
}
"""Dimensions in which the trials of each method can differ."""
PROMPT_METHODS: tuple[MethodName, ...] = tuple(name for name in SPACES if "init" in SPACES[name])
"""Methods that learn a soft prompt or a prefix, which starts from an init."""
BASELINES: tuple[MethodName, ...] = tuple(name for name in SPACES if "init" not in SPACES[name])
"""Methods that learn no soft prompt. Soft prompts are compared with them."""
RATES = {
    "model_tuning": "[0.00001, 0.001]",
    "lomo": "[0.001, 0.1]",
    "adapter": "[0.0001, 0.01]",
}  # suggested ranges; lora and qlora take the one of adapter
