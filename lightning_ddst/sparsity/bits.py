"""Bool tensors in an eighth of their memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

_GATHERS = 0x0102040810204080
"""Multiplied by eight bytes of 0 or 1, it has them side by side in the highest byte."""
_COUNTS = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


def packed(mask: Tensor) -> Tensor:
    """One bit for every entry.

    Args:
        mask: Bool, of any shape.

    Returns:
        uint8, one dimension, a byte for every eight entries; the last byte is filled up with zeros.
    """
    flat = mask.reshape(-1)
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    bytes_of_eight = flat.view(torch.int64).mul(_GATHERS).bitwise_right_shift_(56)
    return bytes_of_eight.bitwise_and_(255).to(torch.uint8)


def count_bits(bits: Tensor) -> int:
    """The number of ones in what `packed` gave; waits for the device."""
    return int(_COUNTS.to(bits.device)[bits.long()].sum())
