"""Operations on many tensors at once; on devices bound by launches each launches little and never waits."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from lightning_ddst.sparsity.bitpack import choose_chunk, view_as_integers
from lightning_ddst.sparsity.sharding import local_part
from lightning_ddst.utils.devices import is_launch_bound

_PIECE = 2**20


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Copies the entries of tensors into one tensor of one dimension."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def join_views(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the entries of tensors in one dimension: a view if they lie as `unjoin` leaves them, else a copy."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and tensor.is_contiguous()
        if not same or tensor.dtype != first.dtype or tensor.storage_offset() != end:
            return join(tensors)
        end += tensor.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def unjoin(joined: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of a tensor that `join` returned, of the shapes of the tensors."""
    parts = joined.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Returns whether all entries of each tensor are finite.

    Args:
        tensors: Tensors on one device; DTensors count with their local part, which may be empty.

    Returns:
        A bool tensor with one entry per tensor, on the tensors' device.
    """
    parts = [local_part(tensor.detach()) for tensor in tensors]
    held = [part for part in parts if part.numel()]
    if not held:
        return torch.ones(len(parts), dtype=torch.bool)
    if is_launch_bound(held[0].device):
        finite = torch.stack(torch._foreach_norm(held, float("inf"))) < float("inf")  # false for NaN
    else:
        finite = torch.stack([torch.stack(part.aminmax()).isfinite().all() for part in held])  # many times as fast
    if len(held) < len(parts):
        flags = iter(finite.unbind())
        finite = torch.stack([next(flags) if part.numel() else finite.new_ones(()) for part in parts])
    return finite


@torch.no_grad()
def zero_where_inactive(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Sets tensors to 0 in place where their masks are false, also where they are NaN.

    Args:
        tensors: Floating-point tensors on one device; of DTensors, the local parts are set.
        masks: A mask for each tensor or local part. It is bool, or integers 0 and 1: on devices bound by launches, all
            tensors are one launch if the integers have as many bytes as the tensor's entries.
    """
    # Multiplies bits by 0 or 1, which is several times faster than masked_fill_, which branches.
    bits = [view_as_integers(local_part(tensor)) for tensor in tensors]
    if bits and is_launch_bound(bits[0].device):
        torch._foreach_mul_(bits, list(masks))
        return
    for values, mask in zip(bits, masks, strict=True):
        # In chunks, so that the mask that mul_ converts stays in the processor's cache.
        size = choose_chunk(values, _PIECE)
        if values.numel() <= size:
            values.mul_(mask)
            continue
        rows = max(1, size * len(values) // values.numel())
        for part, part_mask in zip(values.split(rows), mask.split(rows), strict=True):
            part.mul_(part_mask)


def read(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Reads integers and bools of tensors of one dimension; one transfer if all are on one device."""
    if len({tensor.device for tensor in tensors}) != 1:
        return [tensor.tolist() for tensor in tensors]
    values = map(int, torch.cat(list(tensors)).tolist())
    return [list(islice(values, len(tensor))) for tensor in tensors]


def invert(masks: Sequence[Tensor]) -> list[Tensor]:
    """Returns masks that are true where the given ones are false."""
    if is_launch_bound(masks[0].device):
        return unjoin(join(masks).logical_not_(), masks)
    return [mask.logical_not() for mask in masks]


def flip(masks: Sequence[Tensor], marks: Sequence[Tensor]) -> None:
    """Inverts masks in place where they are marked."""
    if masks and is_launch_bound(masks[0].device):
        numbers = [mask.view(torch.int8) for mask in masks]
        torch._foreach_sub_(numbers, [mark.view(torch.int8) for mark in marks])
        torch._foreach_abs_(numbers)  # |mask - mark| is the exclusive or, which has no such operation
    else:
        for mask, mark in zip(masks, marks, strict=True):
            mask.logical_xor_(mark)
