"""Prompts as folders: the prompt artifact, and the adapter folders of PEFT."""

from orchestrator.artifact.prompt import (
    IMPORTED,
    MANIFEST,
    MAX_WEIGHTS_BYTES,
    SOFT,
    WEIGHTS,
    BaseModelRecord,
    CellsRecord,
    ChatRecord,
    DataRecord,
    GenerationRecord,
    Manifest,
    PromptArtifact,
    ReparameterizationRecord,
    VerbalizerEntry,
    file_sha256,
    read_manifest,
)

__all__ = [
    "BaseModelRecord",
    "CellsRecord",
    "ChatRecord",
    "DataRecord",
    "GenerationRecord",
    "IMPORTED",
    "MANIFEST",
    "MAX_WEIGHTS_BYTES",
    "Manifest",
    "PromptArtifact",
    "ReparameterizationRecord",
    "SOFT",
    "VerbalizerEntry",
    "WEIGHTS",
    "file_sha256",
    "read_manifest",
]
