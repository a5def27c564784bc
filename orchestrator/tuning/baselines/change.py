"""The base class of baselines that change the model itself.

The learned parameters are stored beside the model, and the model's own weights are never written
to. The parameters are put into the model for a step or an evaluation and are taken out after it.
All other users of the backbone therefore find the frozen model exactly as it was loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

DOT = "/"  # replaces dots, which torch does not allow in a parameter's name


class WeightChange(nn.Module, ABC):
    """A trial's learnable state, by the names used in a stored result.

    It is in float32; only ``Lomo`` keeps the model's own number format.
    """

    def __init__(self, learned: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in learned.items():
            self.register_parameter(name.replace(".", DOT), parameter)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors that a result stores, by name. They are not copied."""
        return {
            name.replace(DOT, "."): parameter.detach()
            for name, parameter in self.named_parameters()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of tensors that ``named`` returned."""
        self.load_state_dict({name.replace(".", DOT): tensor for name, tensor in tensors.items()})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the change into the model for the duration of the block."""
        self._put_in()
        try:
            yield
        finally:
            self._take_out()

    @abstractmethod
    def _put_in(self) -> None: ...

    @abstractmethod
    def _take_out(self) -> None:
        """Restore the model, also after a ``_put_in`` that failed halfway."""
