"""The weights of a network that were ever active."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_ddst.sparsity.bitpack import count_bits, pack_bits
from lightning_ddst.utils.devices import is_launch_bound


class Coverage:
    """The weights that were ever active, one bit per weight.

    Args:
        masks: The masks by name, whose names and sizes stay the same.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._sizes = {name: -(-mask.numel() // 64) * 8 for name, mask in masks.items()}  # bytes
        self._bits = torch.zeros(sum(self._sizes.values()), dtype=torch.uint8)

    @property
    def bits(self) -> dict[str, Tensor]:
        """Views of the bits of each mask, as `pack_bits` returns them."""
        return dict(zip(self._sizes, self._bits.split(list(self._sizes.values())), strict=True))

    def count(self) -> Tensor:
        """Returns the number of weights that were ever active, which was not read from the device yet."""
        return count_bits(self._bits)

    def add(self, masks: Mapping[str, Tensor]) -> None:
        """Adds the active weights."""
        device = next(iter(masks.values())).device
        self._bits = self._bits.to(device)
        if is_launch_bound(device):
            padding = torch.zeros(63, dtype=torch.bool, device=device)
            parts = [part for mask in masks.values() for part in (mask.flatten(), padding[: -mask.numel() % 64])]
            self._bits.bitwise_or_(pack_bits(torch.cat(parts)))
        else:
            for name, bits in self.bits.items():
                bits.bitwise_or_(pack_bits(masks[name]))

    def load(self, bits: Mapping[str, Tensor]) -> None:
        """Replaces the bits by those of `bits`; masks without saved bits start with none."""
        self._bits = torch.zeros_like(self._bits)
        for name, own in self.bits.items():
            if name in bits:
                own.copy_(bits[name])
