"""Full tensors and local parts of tensors that are sharded over processes (FSDP2).

All functions return other tensors unchanged.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_split(tensor: Tensor) -> bool:
    """Returns whether a tensor is sharded over processes."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers the full tensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards a full tensor like another one; every process must call this with the same tensor."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def copy_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Copies a full tensor to the device, dtype and sharding of another one."""
    return split_like(tensor.to(like.device, like.dtype, copy=True), like)


def reshard(network: nn.Module) -> None:
    """Makes the network's next forward pass gather its weights again, after they have changed."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
