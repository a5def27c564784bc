"""A trial's resumable state as bytes: kilobytes, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from orchestrator.errors import BadInput

HEADER = "state"
PROMPT = "prompt."
BEST = "best."


@dataclass(frozen=True)
class TrialState:
    """Everything that a trial's next step depends on.

    ``tensors``: the prompt's own state (``prompt.*``: parameters, and where a reparameterisation starts), the best
    prompt as an artifact has it (``best.*``) and the optimiser's moments (``optimizer.*``). The data position is
    ``step``; the data order, the schedule and the init are functions of the spec and the step, so no random state is
    left to keep.
    """

    step: int
    best_step: int
    best_metrics: dict[str, float]
    waited: int
    base_model: str
    """Fingerprint of the frozen weights."""
    tensors: dict[str, Tensor] = field(compare=False)

    @classmethod
    def of(
        cls,
        *,
        step: int,
        best_step: int,
        best_metrics: dict[str, float],
        waited: int,
        base_model: str,
        prompt: Mapping[str, Tensor],
        best: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
    ) -> TrialState:
        tensors = {
            **{f"{PROMPT}{name}": tensor for name, tensor in prompt.items()},
            **{f"{BEST}{name}": tensor for name, tensor in best.items()},
            **optimizer,
        }
        return cls(step, best_step, best_metrics, waited, base_model, tensors)

    def best(self) -> dict[str, Tensor]:
        """The best prompt's tensors, by the names that an artifact stores them under."""
        return _under(BEST, self.tensors)

    def prompt(self) -> dict[str, Tensor]:
        """The prompt's own state, as its module has it."""
        return _under(PROMPT, self.tensors)

    def to_bytes(self) -> bytes:
        header = {
            one.name: getattr(self, one.name) for one in fields(self) if one.name != "tensors"
        }
        # Copies, where a tensor is a view of another: safetensors stores no tensor twice.
        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in self.tensors.items()
        }
        return bytes(save(tensors, metadata={HEADER: json.dumps(header)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> TrialState:
        """BadInput when the bytes were cut short or are none of ours."""
        try:
            size = int.from_bytes(data[:8], "little")
            header: dict[str, Any] = json.loads(
                json.loads(data[8 : 8 + size])["__metadata__"][HEADER]
            )
            return cls(tensors=load(data), **header)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"this checkpoint can't be read: {error}", "resume from an earlier one"
            ) from None


def restore_prompt(prompt: nn.Module, state: TrialState, base_model: str) -> None:
    """Load the prompt's own state. BadInput when it is of another base model, method or shape, or not finite."""
    if state.base_model != base_model:
        raise BadInput(
            f"this checkpoint was written on another base model (fingerprint {state.base_model[:12]}) than the one "
            f"loaded ({base_model[:12]})",
            "resume with the base model that it was written on",
        )
    if broken := [
        name for name, tensor in state.prompt().items() if not bool(tensor.isfinite().all())
    ]:
        raise BadInput(
            f"this checkpoint's {broken[0]} holds values that are not finite",
            "resume from an earlier one",
        )
    try:
        prompt.load_state_dict(state.prompt())
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise BadInput(
            f"this checkpoint is of another prompt: {first}",
            "resume with the job spec that it was written with",
        ) from None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
