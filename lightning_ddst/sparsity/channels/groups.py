"""Which channels of a network can be taken out, and what of its parameters and buffers belongs to each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """The channels that can be taken out of a network, each with everything that is there because of it.

    A channel has rows of the weights that compute it, with their biases, an entry in every norm that it passes,
    and columns of the weights that read it. Channels that meet in a sum are one. They are numbered group by group.

    Attributes:
        sizes: The number of channels of each group: those that are in the same layers.
        axes: Of parameters and buffers by name, by dimension, the channel that each index belongs to; -1 where it
            belongs to none. int64, one dimension each, on the CPU.
    """

    sizes: tuple[int, ...]
    axes: Mapping[str, Mapping[int, Tensor]]

    def kept(self, active: Tensor) -> dict[str, dict[int, Tensor]]:
        """What stays of parameters and buffers, as `StructuredForward` takes it, without those that stay whole.

        Args:
            active: Bool ``(channels,)``, on the CPU.
        """
        kept: dict[str, dict[int, Tensor]] = {}
        for name, dims in self.axes.items():
            for dim, channels in dims.items():
                stays = _at(active, channels)
                if not stays.all():
                    kept.setdefault(name, {})[dim] = stays.nonzero().squeeze(1)
        return kept

    def mask(self, name: str, shape: Sequence[int], active: Tensor) -> Tensor:
        """What stays of a parameter, as a mask.

        Args:
            name: Of the parameter.
            shape: Of the parameter.
            active: Bool ``(channels,)``, on the CPU.
        """
        mask = torch.ones(tuple(shape), dtype=torch.bool)
        for dim, channels in self.axes.get(name, {}).items():
            mask &= _at(active, channels).view([-1 if i == dim else 1 for i in range(len(shape))])
        return mask

    def entries(self, name: str, shape: Sequence[int], active: Tensor) -> int:
        """How many entries of a parameter stay; arguments as in `mask`."""
        sizes = list(shape)
        for dim, channels in self.axes.get(name, {}).items():
            sizes[dim] = int(_at(active, channels).sum())
        return prod(sizes)


def _at(active: Tensor, channels: Tensor) -> Tensor:
    """Whether the channels are active; what belongs to none is."""
    return active[channels.clamp(min=0)] | (channels < 0)
