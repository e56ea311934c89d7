"""Tensors that are split over processes (FSDP2): the whole of one, and this process's part of it.

Everything here leaves other tensors as they are.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is split over processes."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Splits a whole tensor as another is; every process must call this, with the same tensor."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def copy_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor with the device, the type and the split of another."""
    return split_like(tensor.to(like.device, like.dtype, copy=True), like)


def reshard(network: nn.Module) -> None:
    """Has the network's next forward pass gather its weights anew, because they were changed."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
