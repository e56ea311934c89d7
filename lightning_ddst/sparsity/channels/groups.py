"""The removable channels of a network, and the entries of parameters and buffers that belong to each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """The removable channels of a network, with the entries of parameters and buffers that belong to them.

    A channel has rows of the weights that compute it, with their biases, an entry in every norm that it passes,
    and columns of the weights that read it. Channels that are added to each other count as one. They are numbered
    group by group.

    Attributes:
        sizes: The number of channels in each group. A group holds the channels that occur in the same layers.
        axes: The channel of each index, by the name of a parameter or buffer and by dimension; -1 for indices that
            belong to no channel. int64, one dimension each, on the CPU.
    """

    sizes: tuple[int, ...]
    axes: Mapping[str, Mapping[int, Tensor]]

    def kept(self, active: Tensor) -> dict[str, dict[int, Tensor]]:
        """Returns the remaining indices of parameters and buffers for `StructuredForward`; full tensors are left out.

        Args:
            active: The active channels, bool ``(channels,)``, on the CPU.
        """
        kept: dict[str, dict[int, Tensor]] = {}
        for name, dims in self.axes.items():
            for dim, channels in dims.items():
                stays = _at(active, channels)
                if not stays.all():
                    kept.setdefault(name, {})[dim] = stays.nonzero().squeeze(1)
        return kept

    def mask(self, name: str, shape: Sequence[int], active: Tensor) -> Tensor:
        """Returns a mask of a parameter's remaining entries.

        Args:
            name: Name of the parameter.
            shape: Shape of the parameter.
            active: The active channels, bool ``(channels,)``, on the CPU.
        """
        mask = torch.ones(tuple(shape), dtype=torch.bool)
        for dim, channels in self.axes.get(name, {}).items():
            mask &= _at(active, channels).view([-1 if i == dim else 1 for i in range(len(shape))])
        return mask

    def entries(self, name: str, shape: Sequence[int], active: Tensor) -> int:
        """Returns the number of a parameter's remaining entries; arguments as in `mask`."""
        sizes = list(shape)
        for dim, channels in self.axes.get(name, {}).items():
            sizes[dim] = int(_at(active, channels).sum())
        return prod(sizes)


def _at(active: Tensor, channels: Tensor) -> Tensor:
    """Returns which indices are active; indices that belong to no channel always are."""
    return active[channels.clamp(min=0)] | (channels < 0)
