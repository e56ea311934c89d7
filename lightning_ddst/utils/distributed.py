"""Communication between the processes that train a GAN; with a single process, these functions do nothing."""

import warnings
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Returns whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_rank() -> int:
    """Returns the rank of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_mean(value: Tensor) -> Tensor:
    """Returns the mean of a tensor over processes; each must call this with the same shape."""
    if not is_distributed():
        return value
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_gather(value: T) -> list[T]:
    """Returns every process's value, in order of rank; any picklable object, on the CPU."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Returns the first process's value; any picklable object, on the CPU."""
    if not is_distributed():
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    first: T = held[0]
    return first


def check_same(what: str, value: object) -> None:
    """Checks that a value is the same in all processes.

    Raises:
        RuntimeError: If the value differs between processes.
    """
    values = all_gather(value)
    if any(other != values[0] for other in values):
        shown = "; ".join(f"rank {number}: {other}" for number, other in enumerate(values))
        raise RuntimeError(f"{what} must be the same in every process, and is not: {shown}.")


def warn(message: str) -> None:
    """Warns in the first process only."""
    if get_rank() == 0:
        warnings.warn(message, stacklevel=2)
