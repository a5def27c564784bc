"""What a baseline learns of the model itself: parameters that stand in the model while it works, and nowhere else.

The model as it was is never written to: what is learned lies beside it and is taken out after every step and every
evaluation, so that trials, and whatever else asks the backbone, find the frozen model exactly as it was loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

DOT = "/"  # in the place of a name's dots, which torch takes no parameter's name with


class Change(nn.Module, ABC):
    """A trial's learnable state, float32, by the names that a stored result has."""

    def __init__(self, learned: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in learned.items():
            self.register_parameter(name.replace(".", DOT), parameter)

    def named(self) -> dict[str, Tensor]:
        """What is stored of it. Not copied."""
        return {
            name.replace(DOT, "."): parameter.detach()
            for name, parameter in self.named_parameters()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what ``named`` gave."""
        self.load_state_dict({name.replace(".", DOT): tensor for name, tensor in tensors.items()})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model works with it."""
        self._put_in()
        try:
            yield
        finally:
            self._take_out()

    @abstractmethod
    def _put_in(self) -> None: ...

    @abstractmethod
    def _take_out(self) -> None:
        """The model as it was. May come after a ``_put_in`` that broke off."""
