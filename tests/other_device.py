"""A device other than the CPU, available on any machine.

Its tensors keep their numbers in the host's memory, so its results equal the CPU's bit for bit. As
on an accelerator, they do not mix with the host's tensors: an operation on both is an error. Tests
on this device show that every tensor is on the right device.

Importing this module changes torch for the whole process, so only processes with TEST_DEVICE=away
import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("away")

AWAY = torch.device("away", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Accelerators take the host's indices too."""


class Away(Tensor):
    """A tensor on the device; ``kept`` is the host tensor with its numbers."""

    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor) -> Away:
        made: Away = Tensor._make_wrapper_subclass(
            cls, kept.shape, strides=kept.stride(), storage_offset=kept.storage_offset(),
            dtype=kept.dtype, device=AWAY
        )  # fmt: skip
        made.kept = kept
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return computed(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["kept"], None

    def tolist(self) -> Any:  # torch implements it for its own tensor types only
        return self.detach().cpu().tolist()

    def __repr__(self, **options: Any) -> str:
        return f"{self.kept!r} away"


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the operation on the host's copies.

    Raises RuntimeError for tensors of both devices, as an accelerator does.
    """
    if func is aten._fused_sdp_choice.default:
        return 0  # plain operations
    there = {id(it.kept): it for it in tree_leaves((args, kwargs)) if isinstance(it, Away)}
    check_together(func, args, kwargs)
    if func is aten.copy_.default and not isinstance(args[0], Away):
        return args[0].copy_(args[1].kept)
    found = LSTM.get(func, func)(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    target = kwargs.get("device")
    if target is not None and torch.device(target).type != "away":
        return found
    moved = tree_map(lambda it: moved_or_new(it, there), found)
    return return_and_correct_aliasing(func, args, kwargs, moved)


def moved_or_new(value: Any, there: dict[int, Away]) -> Any:
    """Return the same tensor for one changed in place, and a new one otherwise."""
    if not isinstance(value, Tensor):
        return value
    known = there.get(id(value))
    return Away(value) if known is None else known


def check_together(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse operands of two devices; zero-dimensional tensors may be on either."""
    if func in MOVES or (func in INDEXED and isinstance(args[0], Away)):
        return
    for it in tree_leaves((args, kwargs)):
        if isinstance(it, Tensor) and not isinstance(it, Away) and it.dim():
            raise RuntimeError(
                f"{func} takes tensors of one device, and found away:0 and cpu of shape "
                f"{tuple(it.shape)}"
            )


def on_host(value: Any) -> Any:
    if isinstance(value, Away):
        return value.kept
    return torch.device("cpu") if isinstance(value, torch.device) else value


# An LSTM's step: one fused operation on accelerators, single operations on the CPU


def lstm_cell(
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gates = inputs + hidden
    for bias in (input_bias, hidden_bias):
        gates = gates if bias is None else gates + bias
    taken, kept, new, shown = gates.chunk(4, 1)
    taken, kept, new, shown = taken.sigmoid(), kept.sigmoid(), new.tanh(), shown.sigmoid()
    after = kept * cell + taken * new
    return shown * after.tanh(), after, torch.cat([taken, kept, new, shown], 1)


def lstm_cell_backward(
    of_hidden: Tensor | None,
    of_cell: Tensor | None,
    cell: Tensor,
    after: Tensor,
    gates: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    taken, kept, new, shown = gates.chunk(4, 1)
    bent = after.tanh()
    of_shown = (
        torch.zeros_like(after) if of_hidden is None else of_hidden * bent * shown * (1 - shown)
    )
    down = torch.zeros_like(after) if of_hidden is None else of_hidden * shown * (1 - bent * bent)
    down = down if of_cell is None else down + of_cell
    of_taken, of_kept = down * new * taken * (1 - taken), down * cell * kept * (1 - kept)
    of_gates = torch.cat([of_taken, of_kept, down * taken * (1 - new * new), of_shown], 1)
    return of_gates, down * kept, of_gates.sum(0) if has_bias else None


LSTM: dict[Any, Callable[..., Any]] = {
    aten._thnn_fused_lstm_cell.default: lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: lstm_cell_backward,
}


# Operations that create tensors on the device

library = torch.library.Library("aten", "IMPL", "PrivateUse1")


def empty(size: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Away:
    return Away(torch.empty(size, dtype=dtype))


def empty_strided(size: Any, stride: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Away:
    return Away(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    on_host(to).copy_(on_host(source))
    return to


kernels: dict[str, Callable[..., Tensor]] = {
    "empty.memory_format": empty, "empty_strided": empty_strided, "_copy_from": copy_from,
}  # fmt: skip
for name, kernel in kernels.items():
    library.impl(name, kernel)


# A tensor subclass can't be an inference tensor, so inference mode only turns gradients off.


def enter(mode: Any) -> None:
    mode.before = torch.is_grad_enabled()
    torch.set_grad_enabled(not mode.mode)


def leave(mode: Any, *error: Any) -> None:
    torch.set_grad_enabled(mode.before)


torch.inference_mode.__enter__ = enter  # type: ignore[method-assign]
torch.inference_mode.__exit__ = leave  # type: ignore[method-assign]
