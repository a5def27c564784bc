"""A backbone whose blocks are spread over the workers of torch's process group, with torch's FSDP2.

Each worker keeps a part of every block's weights. A block is whole while it runs, forwards and backwards, and all
workers run it at the same time. Embeddings and head stay whole: inits, soft prompts and scores read them at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.errors import BadInput


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks: members of its outermost lists of modules. Empty for a model without any."""
    return list(_blocks(model))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def shard_blocks(model: nn.Module, device: torch.device, before_gather: Callable[[], Any]) -> None:
    """Cut each block's weights into a part for each worker, and drop the others' parts; everything ends on ``device``.

    A block goes to the device alone, so that the device never holds a whole copy. ``before_gather`` is called whenever
    a block is about to be put together; it may raise.
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
        # Every block is a root of its own: parts of the model (an encoder, the body without its head) run alone too.
        sharded: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        sharded.set_custom_all_gather(_Gather(before_gather))
    for kept in (*model.parameters(), *model.buffers()):
        if not is_part(kept):
            kept.data = kept.data.to(
                device, copy=True
            )  # a view would keep the whole file in memory


_all_gather: Any = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # its name before 2.12


class _Gather:
    """FSDP's all-gather of a block's weights, after a call of ``before``."""

    def __init__(self, before: Callable[[], Any]) -> None:
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
    """Put every block together and take it apart again. What is kept for that was then not made in inference mode,
    where nothing later could be differentiated with it."""
    with torch.inference_mode(False):
        for block in blocks_of(model):
            cast(Any, block).unshard()
            cast(Any, block).reshard()


def reset_blocks(model: nn.Module) -> None:
    """Forget a forward or backward that broke off: every block is in its parts again."""
    for block in blocks_of(model):
        cast(Any, block).reset_iter_state()


def bytes_elsewhere(model: nn.Module, workers: int) -> int:
    """Bytes of a model's weights that a worker would not hold with the model sharded among so many, while one block,
    the largest, is whole."""
    sizes = [sum(tensor.nbytes for tensor in block.parameters()) for block in blocks_of(model)]
    return (sum(sizes) - max(sizes, default=0)) * (workers - 1) // workers


def is_part(tensor: Tensor) -> bool:
    """Whether a weight is sharded."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this worker holds of a weight."""
    held: Tensor = cast(Any, tensor).to_local() if is_part(tensor) else tensor
    return held


class _Needs(torch.autograd.Function):
    """Tensors as they are, whose gradients wait for that of ``last``, which is zero."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.zero = last.new_zeros(()).expand(last.shape)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (ctx.zero, *grads)


def through_last_block(last: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors from inside the blocks, so that a backward from them puts the last block together too.

    FSDP does that when a gradient reaches the block's output. Keys and values leave a block beside its output, and
    nothing else follows from ``last``, what the last block puts out.
    """
    apply: Any = _Needs.apply
    held: tuple[Tensor, ...] = apply(last, *tensors)
    return held
