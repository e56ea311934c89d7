"""Bool tensors packed into bits, and views of floats as integers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ddst.utils.devices import is_launch_bound

_GATHERS = 0x0102040810204080
"""The product of this and eight bytes of 0 or 1 holds them as adjacent bits in the highest byte."""
_PIECE = 2**16
"""Number of words processed at once."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by bytes per entry."""


def view_as_integers(tensor: Tensor) -> Tensor:
    """Returns a view of a tensor whose entries are the integers of the same bits; 0.0 is 0, but -0.0 is not."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def choose_chunk(tensor: Tensor, size: int) -> int:
    """Returns how many of a tensor's entries to process at once.

    Args:
        tensor: The tensor.
        size: Number on a CPU, so that intermediate results stay in its cache. Elsewhere the number is at least all of
            the tensor's entries, because launching operations costs more.
    """
    return max(size, tensor.numel()) if is_launch_bound(tensor.device) else size


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a mask into one bit per entry.

    Args:
        mask: Bool, of any shape.

    Returns:
        uint8 of one dimension, eight bytes for every 64 entries; the last ones are padded with zeros.
    """
    flat = mask.reshape(-1)
    if flat.numel() % 64:
        flat = F.pad(flat, (0, -flat.numel() % 64))
    bits = torch.empty(flat.numel() // 8, dtype=torch.uint8, device=mask.device)
    size = choose_chunk(bits, _PIECE)
    for eights, part in zip(flat.view(torch.int64).split(size), bits.split(size), strict=True):
        part.copy_(eights.mul(_GATHERS).bitwise_right_shift_(56).bitwise_and_(255))
    return bits


def count_bits(bits: Tensor) -> Tensor:
    """Returns the number of ones in bits that `pack_bits` returned: a tensor without dimensions."""
    return torch.stack([_ones(words) for words in bits.view(torch.int64).split(choose_chunk(bits, _PIECE))]).sum()


def _ones(words: Tensor) -> Tensor:
    # In words of 64 bits: counts in groups of two bits, then four, then eight.
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words.view(torch.uint8).sum()
