"""A trial's resumable state as bytes: kilobytes, no pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from orchestrator.errors import BadInput

HEADER = "state"


@dataclass(frozen=True)
class TrialState:
    """Everything that a trial's next step depends on.

    ``tensors``: prompt [P, H], best prompt [P, H] and the optimiser's moments. The data position is ``step``, and the
    data order and the init are functions of the trial's seed, so no random state is left to keep.
    """

    step: int
    best_step: int
    best_metrics: dict[str, float]
    waited: int
    tensors: dict[str, Tensor] = field(compare=False)

    def to_bytes(self) -> bytes:
        header = asdict(self)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in header.pop("tensors").items()}
        return bytes(save(tensors, metadata={HEADER: json.dumps(header)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> TrialState:
        """BadInput when the bytes were cut short or are none of ours."""
        try:
            size = int.from_bytes(data[:8], "little")
            header: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][HEADER])
            return cls(tensors=load(data), **header)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"this checkpoint can't be read: {error}", "resume from an earlier one") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, prompt: Tensor) -> dict[str, Tensor]:
    """The optimiser's state of the prompt, flat."""
    return {f"optimizer.{name}": value for name, value in optimizer.state.get(prompt, {}).items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, prompt: Tensor, tensors: dict[str, Tensor]) -> None:
    state = {key.removeprefix("optimizer."): tensor for key, tensor in tensors.items() if key.startswith("optimizer.")}
    if state:
        optimizer.state[prompt] = {
            name: tensor.clone() if name == "step" else tensor.to(prompt.device) for name, tensor in state.items()
        }
