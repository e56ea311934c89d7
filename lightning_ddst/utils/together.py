"""Copies and averages many tensors at once: on a GPU one kernel instead of one per tensor."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_Lists = tuple[list[Tensor], list[Tensor]]


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a detached tensor is dense and of no subclass: others (sharded, sparse) are handled alone."""
    return type(tensor) is Tensor and tensor.layout == torch.strided


def clone_together(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns copies without gradients, with the strides that `torch.clone` gives them."""
    sources = [tensor.detach() for tensor in tensors]
    copies = [torch.empty_like(source) if is_plain(source) else source.clone() for source in sources]
    new = [number for number, source in enumerate(sources) if is_plain(source)]
    copy_together([copies[number] for number in new], [sources[number] for number in new])
    return copies


@torch.no_grad()
def copy_together(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copies detached tensors into others, like `Tensor.copy_` one by one.

    Args:
        targets: The tensors to write to.
        sources: As many tensors of the same shapes, of any dtypes and devices; none of them is a target.
    """
    for some, others in _pair(targets, sources):
        if len(some) > 1:
            torch._foreach_copy_(some, others)
        else:
            some[0].copy_(others[0])


@torch.no_grad()
def lerp_together(targets: Iterable[Tensor], sources: Iterable[Tensor], weight: float) -> None:
    """Interpolates detached tensors, like `Tensor.lerp_` one by one.

    Args:
        targets: The tensors to change, of floating-point numbers.
        sources: As many tensors of the same shapes, dtypes and devices.
        weight: The weight of the sources.
    """
    for some, others in _pair(targets, sources):
        if len(some) > 1:
            torch._foreach_lerp_(some, others, weight)
        else:
            some[0].lerp_(others[0], weight)


def _pair(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Iterator[_Lists]:
    """Yields pairs of tensors of equal dtypes and devices together: torch handles mixed ones in one kernel each."""
    groups: dict[object, _Lists] = {}
    for pair in zip(targets, sources, strict=True):
        plain = all(map(is_plain, pair))
        kind = tuple((each.dtype, each.device) for each in pair) if plain else len(groups)
        some, others = groups.setdefault(kind, ([], []))
        some.append(pair[0])
        others.append(pair[1])
    yield from groups.values()
