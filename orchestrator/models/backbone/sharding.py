"""Sharding of a backbone's blocks over the workers of torch's process group, with FSDP2.

Each worker keeps a part of every block's weights. A block is whole while it runs, forward or
backward, and all workers run it at the same time. Embeddings and head stay whole, because inits,
soft prompts and scores read them at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.errors import BadInput

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's transformer blocks: the members of its outermost lists of modules.

    The list is empty for a model without lists of modules.
    """
    return list(_blocks(model))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def shard_blocks(
    model: nn.Module, device: torch.device, before_gather: Callable[[], object]
) -> None:
    """Cut each block's weights into a part for each worker and keep only this worker's parts.

    All weights end on ``device``. Blocks go to the device one at a time, so that the device never
    holds a whole copy. ``before_gather`` is called before every gather of a block; it may raise.
    Raises BadInput if torch's FSDP is too old, or the model has no list of blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise BadInput(
            f"resources.sharding fsdp does not work with torch {torch.__version__}",
            "install a newer torch",
        )
    blocks = blocks_of(model)
    if not blocks:
        raise BadInput(
            f"a {type(model).__name__} has no list of blocks to shard",
            "set resources.sharding to none",
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        # Every block is an FSDP root of its own, because parts of the model (an encoder, the body
        # without its head) also run alone.
        sharded: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        sharded.set_custom_all_gather(_Gather(before_gather))
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_part(tensor):
            # Copy, because a view would keep the whole weights file in memory.
            tensor.data = tensor.data.to(device, copy=True)


# Before torch 2.12, all_gather_single was called all_gather_into_tensor.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Gather:
    """FSDP's all-gather of a block's weights, after a call of ``before``."""

    def __init__(self, before: Callable[[], object]) -> None:
        self._before = before

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self._before()
        work: dist.Work | None = _all_gather(
            output_tensor, input_tensor, group=group, async_op=async_op
        )
        return work


def gather_once(model: nn.Module) -> None:
    """Gather every block once and free it again, outside of inference mode.

    FSDP keeps the buffers that it allocates in the first gather. If they were allocated in
    inference mode, no later forward could be differentiated.
    """
    with torch.inference_mode(False):
        for block in blocks_of(model):
            cast("FSDPModule", block).unshard()
            cast("FSDPModule", block).reshard()


def reset_blocks(model: nn.Module) -> None:
    """Reset the blocks to their sharded state after a forward or backward that failed."""
    for block in blocks_of(model):
        cast("FSDPModule", block).reset_iter_state()


def bytes_elsewhere(model: nn.Module, workers: int) -> int:
    """Return how many bytes of a model's weights a worker would not hold if the model is sharded.

    The weights are spread over ``workers`` workers. The largest block counts as held, because a
    block is whole while it runs.
    """
    sizes = [sum(tensor.nbytes for tensor in block.parameters()) for block in blocks_of(model)]
    return (sum(sizes) - max(sizes, default=0)) * (workers - 1) // workers


def is_part(tensor: Tensor) -> bool:
    """Return whether a weight is sharded."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a weight that this worker holds."""
    part: Tensor = cast("DTensor", tensor).to_local() if is_part(tensor) else tensor
    return part


class _Needs(torch.autograd.Function):
    """Identity on ``tensors`` that also sends a zero gradient to ``last`` in the backward."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.zero = last.new_zeros(()).expand(last.shape)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (ctx.zero, *grads)


def through_last_block(last: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Make a backward from tensors inside the blocks gather the last block too.

    FSDP gathers a block when a gradient reaches the block's output. Keys and values leave the last
    block beside its output ``last``, which nothing else depends on.
    """
    apply: Any = _Needs.apply
    outputs: tuple[Tensor, ...] = apply(last, *tensors)
    return outputs
