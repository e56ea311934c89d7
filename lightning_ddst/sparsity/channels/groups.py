"""The removable channels of a network, and the entries of parameters and buffers that belong to each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

Axes = Mapping[int, Tensor]
"""The channel of each index of a tensor, by dimension; -1 for indices that belong to no channel. int64, on the CPU."""

_MOST_NAMED = 6


@dataclass(frozen=True)
class Channels:
    """The removable channels of a network, with the entries of parameters and buffers that belong to them.

    A channel has rows of the weights that compute it, with their biases, an entry in every norm that it passes,
    and columns of the weights that read it. Channels that are added to each other, or that a GroupNorm normalizes
    together, count as one. They are numbered group by group.

    Attributes:
        sizes: The number of channels in each group. A group holds the channels that occur in the same layers.
        axes: The channels of parameters and buffers, by name.
        returned: The channels of the tensors that the network returns, by number; only with ``narrow_features``.
        whole: The reason for each layer whose computed channels all stay, by the layer's name. Layers that compute only
            the network's output are left out.
    """

    sizes: tuple[int, ...]
    axes: Mapping[str, Axes]
    returned: Mapping[int, Axes] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)

    def kept(self, active: Tensor) -> dict[str, dict[int, Tensor]]:
        """Returns the remaining indices of parameters and buffers for `StructuredForward`; full tensors are left out.

        Args:
            active: The active channels, bool ``(channels,)``, on the CPU.
        """
        kept = {name: _kept(axes, active) for name, axes in self.axes.items()}
        return {name: dims for name, dims in kept.items() if dims}

    def kept_outputs(self, active: Tensor) -> dict[int, dict[int, Tensor]]:
        """Returns the remaining indices of the tensors that the network returns; argument as in `kept`."""
        return {number: _kept(axes, active) for number, axes in self.returned.items()}

    def mask(self, name: str, shape: Sequence[int], active: Tensor, device: torch.device | None = None) -> Tensor:
        """Returns a mask of a parameter's remaining entries.

        Args:
            name: Name of the parameter.
            shape: Shape of the parameter.
            active: The active channels, bool ``(channels,)``, on the CPU.
            device: The mask's device; by default the CPU.
        """
        mask = torch.ones(tuple(shape), dtype=torch.bool, device=device)
        for dim, channels in self.axes.get(name, {}).items():
            mask &= _at(active, channels).to(mask.device).view([-1 if i == dim else 1 for i in range(len(shape))])
        return mask

    def entries(self, name: str, shape: Sequence[int], active: Tensor) -> int:
        """Returns the number of a parameter's remaining entries; arguments as in `mask`."""
        sizes = list(shape)
        for dim, channels in self.axes.get(name, {}).items():
            sizes[dim] = int(_at(active, channels).sum())
        return prod(sizes)


def describe_whole(whole: Mapping[str, str]) -> str:
    """Returns a text that names the layers whose channels stay, with the reasons; empty if there is none."""
    named = [f"{layer!r} ({reason})" for layer, reason in whole.items()]
    more = [f"{len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
    return ", ".join(named[:_MOST_NAMED] + more)


def _kept(axes: Axes, active: Tensor) -> dict[int, Tensor]:
    stays = {dim: _at(active, channels) for dim, channels in axes.items()}
    return {dim: kept.nonzero().squeeze(1) for dim, kept in stays.items() if not kept.all()}


def _at(active: Tensor, channels: Tensor) -> Tensor:
    """Returns which indices are active; indices that belong to no channel always are."""
    return active[channels.clamp(min=0)] | (channels < 0)
