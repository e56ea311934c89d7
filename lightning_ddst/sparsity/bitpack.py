"""Bits: bool tensors in an eighth of their memory, numbers as integers."""

import torch
from torch import Tensor
from torch.nn import functional as F

_GATHERS = 0x0102040810204080
"""Multiplied by eight bytes of 0 or 1, it has them side by side in the highest byte."""
_PIECE = 2**16
"""Words looked at together."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


def view_as_integers(tensor: Tensor) -> Tensor:
    """A view of a tensor in which every entry is the integer that its bits are; only of 0 it is 0, and not of -0.0."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def choose_chunk(tensor: Tensor, size: int) -> int:
    """How many of a tensor's entries to work on together.

    Args:
        tensor: Where they are.
        size: How many on a CPU, for what is between the operations to stay in its cache; elsewhere launching operations
            costs more, and it is all of them.
    """
    return size if tensor.device.type == "cpu" else max(size, tensor.numel())


def pack_bits(mask: Tensor) -> Tensor:
    """One bit for every entry.

    Args:
        mask: Bool, of any shape.

    Returns:
        uint8, one dimension, eight bytes for every 64 entries; the last are filled up with zeros.
    """
    flat = mask.reshape(-1)
    if flat.numel() % 64:
        flat = F.pad(flat, (0, -flat.numel() % 64))
    bits = torch.empty(flat.numel() // 8, dtype=torch.uint8, device=mask.device)
    size = choose_chunk(bits, _PIECE)
    for eights, part in zip(flat.view(torch.int64).split(size), bits.split(size), strict=True):
        part.copy_(eights.mul(_GATHERS).bitwise_right_shift_(56).bitwise_and_(255))
    return bits


def count_bits(bits: Tensor) -> int:
    """The number of ones in what `pack_bits` gave; waits for the device."""
    return int(sum(_ones(words) for words in bits.view(torch.int64).split(choose_chunk(bits, _PIECE))))


def _ones(words: Tensor) -> Tensor:
    # In words of 64 bits: counts of two bits each, of four, of eight.
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words.view(torch.uint8).sum()
