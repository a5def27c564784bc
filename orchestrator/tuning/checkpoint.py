"""Checkpoints: a trial's resumable state as bytes, without pickle; kilobytes for a prompt."""

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
class Checkpoint:
    """Everything that a trial's next step depends on.

    ``step`` is also the position in the data. The data order, the schedule and the init are
    functions of the spec and the step, so there is no random state to store.
    """

    step: int
    best_step: int
    best_metrics: dict[str, float]
    waited: int
    """Evaluations in a row without a better result."""
    base_model: str
    """Fingerprint of the frozen weights."""
    tensors: dict[str, Tensor] = field(compare=False)
    """All tensors of the state, by prefixed name.

    * ``prompt.*``: the prompt's own state, which is its parameters and the fixed start of a
      reparameterisation.
    * ``best.*``: the best prompt as an artifact stores it.
    * ``optimizer.*``: the optimiser's state."""

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
    ) -> Checkpoint:
        tensors = {
            **{f"{PROMPT}{name}": tensor for name, tensor in prompt.items()},
            **{f"{BEST}{name}": tensor for name, tensor in best.items()},
            **optimizer,
        }
        return cls(step, best_step, best_metrics, waited, base_model, tensors)

    def best(self) -> dict[str, Tensor]:
        """Return the best prompt's tensors by the names used in an artifact."""
        return _under(BEST, self.tensors)

    def prompt(self) -> dict[str, Tensor]:
        """Return the prompt's own state, as its module's ``state_dict``."""
        return _under(PROMPT, self.tensors)

    def to_bytes(self) -> bytes:
        header = {
            one.name: getattr(self, one.name) for one in fields(self) if one.name != "tensors"
        }
        # Copy tensors that are views of others: safetensors refuses tensors that share memory.
        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in self.tensors.items()
        }
        return bytes(save(tensors, metadata={HEADER: json.dumps(header)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Read a state from the bytes that ``to_bytes`` wrote.

        Raises BadInput when the bytes were cut short or are not such a state.
        """
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


def restore_prompt(prompt: nn.Module, state: Checkpoint, base_model: str) -> None:
    """Load the prompt's own state from a checkpoint.

    Raises BadInput when the state is of another base model, method or shape, or is not finite.
    """
    if state.base_model != base_model:
        raise BadInput(
            "this checkpoint was written on another base model "
            f"(fingerprint {state.base_model[:12]}) than the one loaded ({base_model[:12]})",
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
