"""Full tensors and local parts of tensors that are sharded over processes (FSDP2).

All functions return other tensors unchanged.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # public from torch 2.5 on
    from torch.distributed.tensor import DTensor


def is_split(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Returns whether a tensor is sharded over processes."""
    return hasattr(tensor, "placements")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers the full tensor; every process must call this."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor, which shares its memory."""
    if not is_split(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards a full tensor like another one; every process must call this with the same tensor."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def copy_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Copies a full tensor to the device, dtype and sharding of another one."""
    return split_like(tensor.to(like.device, like.dtype, copy=True), like)


def reshard(network: nn.Module) -> None:
    """Makes the network's next forward pass gather its weights again, after they have changed."""
    for module in network.modules():
        if hasattr(module, "unshard") and callable(reshard_module := getattr(module, "reshard", None)):
            reshard_module()  # torch's FSDPModule
