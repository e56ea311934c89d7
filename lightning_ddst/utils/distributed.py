"""What the processes that train one GAN together agree on; with a single process nothing happens here."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over processes; each must call this with the same shape."""
    if not is_distributed():
        return value
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_gather(value: T) -> list[T]:
    """Every process's value, in order; anything that can be pickled, on the CPU."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """The first process's value; anything that can be pickled, on the CPU."""
    if not is_distributed():
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    first: T = held[0]
    return first


def check_same(what: str, value: object) -> None:
    """Compares a value over processes.

    Raises:
        RuntimeError: If it differs.
    """
    values = all_gather(value)
    if any(other != values[0] for other in values):
        shown = "; ".join(f"rank {number}: {other}" for number, other in enumerate(values))
        raise RuntimeError(f"{what} must be the same in every process, and is not: {shown}.")
