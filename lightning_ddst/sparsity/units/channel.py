"""Masks of whole channels."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.channels.groups import describe_whole
from lightning_ddst.sparsity.channels.tracing import trace_channels
from lightning_ddst.sparsity.maskable import MaskableWeight, layer_weights
from lightning_ddst.sparsity.selection import largest
from lightning_ddst.sparsity.units.base import (
    UNITS,
    ByTensor,
    Gradients,
    Initial,
    Options,
    Units,
    all_active,
)
from lightning_ddst.utils.states import BOOL_TENSOR, Form
from lightning_ddst.utils.validation import check_choice, check_density


@UNITS.register("channel")
class ChannelUnits(Units):
    """Whole channels: an entry of a weight is active if the channels that it computes and reads are active.

    A group holds the channels that occur in the same layers. Each group is a pool and has the same share of active
    channels, as near as whole channels allow. In a group the channels of smallest magnitude are pruned. The magnitude
    is the channel's share of the squares of a weight, summed over the weights that compute or read it. Inactive
    channels grow at random: all their weights are 0, so neither magnitudes nor gradients can rank them. A grown channel
    starts with random weights as large as the others' where it is computed, and with 0 where it is read, so that the
    network's output does not change.

    Args:
        network: The network.
        weights: Its maskable weights by name; other maskable weights keep all channels.
        generator: Random generator of all random choices.
        inputs: Example inputs of the network, the batch first.
        name: Not used.
        growth: Only "random".
        narrow_features: Whether tensors that the network returns may have fewer channels, if its layers read them, too.

    Raises:
        ValueError: If the channels cannot be traced.
    """

    drop_fraction = 0.1  # one of the two best values tested (docs/results/channels.md)
    needs_inputs = True
    dense_kernels = False
    state_form: ClassVar[Form] = {"channels": BOOL_TENSOR}
    options: ClassVar[Options] = {
        "growth": partial(check_choice, allowed=("random",)),
        "narrow_features": partial(check_choice, allowed=(True, False)),
    }

    def __init__(
        self,
        network: nn.Module,
        weights: Mapping[str, MaskableWeight],
        generator: torch.Generator,
        *,
        inputs: Sequence[Any] = (),
        name: str = "",
        growth: str = "random",
        narrow_features: bool = False,
    ) -> None:
        super().__init__(network, weights, generator, inputs=inputs, name=name, growth=growth)
        dense = [weight.name for weight in layer_weights(network) if weight.name not in weights]
        self._channels = trace_channels(network, *inputs, whole=dense, narrow_features=narrow_features)
        self._path = _path(self._channels.sizes)
        self._all = torch.ones(sum(self._channels.sizes), dtype=torch.bool)
        self.active = self._by_group(self._all)  # views of `_all`
        self.pools = [[key] for key in self.active]
        self.masks |= {key: all_active(weight.parameter) for key, weight in weights.items()}
        self.update_masks()

    @classmethod
    def accepts(cls, weight: MaskableWeight) -> bool:
        """Returns whether it is a weight of Linear, Conv or ConvTranspose layers without weight norm."""
        return weight.is_of_layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes the groups' views anew: in a pickled copy they would be tensors of their own."""
        self.__dict__ |= state
        self.active = self._by_group(self._all)

    def begin(self, density: float, initial: Initial) -> None:
        """Draws the channels of each group, or keeps those of largest magnitude."""
        drawn = self.growth(None)
        scores = drawn if initial == "random" else self.magnitudes()
        for (key, active), number in zip(self.active.items(), self.numbers(density), strict=True):
            active.copy_(largest(scores[key], number))
        self.update_masks()

    # ---- densities -----------------------------------------------------------------------------

    def numbers(self, density: float) -> list[int]:
        """Returns the channels of each group whose density is nearest; if two are equally near, the smaller."""
        check_density("density", density)
        wanted = density * self._total
        if wanted < (least := self._weights_at(0)) - 1e-6:
            raise ValueError(
                f"density={density} leaves less than one channel per group; "
                f"it must be at least {least / self._total:.4g}. {self.remarks()}".strip()
            )
        low, high = 0, len(self._path) - 1
        while low < high:  # finds the first step that is not below
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._weights_at(middle) < wanted else (low, middle)
        if low and wanted - self._weights_at(low - 1) <= self._weights_at(low) - wanted:
            low -= 1
        return self._path[low]

    def allocation(self, density: float) -> dict[str, int]:
        """Returns the active weights at the nearest possible density."""
        return self._entries(self._first(self.numbers(density)))

    def reachable(self, density: float) -> float:
        """Returns the density, or the density of one channel per group if it is lower than that."""
        return max(density, self._weights_at(0) / self._total)

    def limits(self, numbers: Sequence[int]) -> dict[str, int]:
        """Returns limits that leave one channel to each group."""
        return {key: count - 1 for key, count in self.counts.items()}

    @property
    def _total(self) -> int:
        return sum(weight.parameter.numel() for weight in self.weights.values())

    def _weights_at(self, step: int) -> int:
        """Returns the number of active weights at a step of the path from one channel per group to all."""
        return sum(self._entries(self._first(self._path[step])).values())

    def _first(self, numbers: Sequence[int]) -> Tensor:
        """Marks the first channels of each group; any other choice has the same counts."""
        sizes = zip(self._channels.sizes, numbers, strict=True)
        return torch.cat([torch.arange(size) < number for size, number in sizes])

    def _entries(self, active: Tensor) -> dict[str, int]:
        """Returns the active weights by name."""
        return {
            name: self._channels.entries(name, weight.parameter.shape, active) for name, weight in self.weights.items()
        }

    # ---- changes -------------------------------------------------------------------------------

    def magnitudes(self) -> ByTensor:
        """Returns every channel's share of the squares of the weights that compute or read it."""
        # The last entry collects indices without a channel. Lightning changes the default precision in "64-true".
        scores = torch.zeros(len(self._all) + 1, dtype=torch.float32)
        places, parts = [], []
        for name, weight in self.weights.items():
            values = weight.parameter.detach().float().where(self.masks[name], 0.0)
            self._check_finite("the weights of", {name: values})
            squares = values.square()
            for dim, channels in self._channels.axes.get(name, {}).items():
                parts.append(squares.sum([i for i in range(values.dim()) if i != dim]) / squares.sum().clamp(min=1e-30))
                places.append(channels.where(channels >= 0, len(self._all)))
        self.settle()
        # On the CPU: sums on a GPU would depend on the order in which it adds.
        sums = torch.cat(parts).cpu().split([len(place) for place in places]) if parts else []
        for place, values in zip(places, sums, strict=True):
            scores.index_add_(0, place, values)
        return self._by_group(scores[:-1])

    def growth(self, gradients: Gradients | None) -> ByTensor:
        """Draws random scores."""
        return self._by_group(torch.rand(len(self._all), generator=self._generator))

    def grow(self, numbers: Sequence[int], scores: ByTensor) -> ByTensor:
        """Activates channels, and remembers the scale of each weight's active entries before."""
        self._scales = dict(zip(self.weights, torch.stack(list(map(self._scale, self.weights))).tolist(), strict=True))
        return super().grow(numbers, scores)

    @torch.no_grad()
    def born(self, new: ByTensor) -> None:
        """Sets weights that compute new channels to random values, and weights that read them to 0."""
        marked = torch.zeros_like(self._all)
        for key, group in self._by_group(marked).items():
            group.copy_(new.get(key, group))
        for name, weight in self.weights.items():
            axes = self._channels.axes.get(name, {})
            values = weight.parameter.data  # bypasses autograd's version counter
            for dim in sorted(axes, key=lambda dim: dim != weight.out_dim):  # weights that read a channel come last
                index = ((axes[dim] >= 0) & marked[axes[dim].clamp(min=0)]).nonzero().squeeze(1).to(values.device)
                fresh = torch.zeros_like(values.index_select(dim, index))
                if dim == weight.out_dim:
                    fresh = torch.randn(fresh.shape, generator=self._generator).mul_(self._scales[name]).to(values)
                values.index_copy_(dim, index, fresh)
            values.masked_fill_(~self.masks[name], 0)  # multiplied by the mask, negative values would become -0.0

    def update_masks(self) -> None:
        """Updates counts, masks and the remaining parts of parameters and buffers from the active channels."""
        self.counts |= {key: int(active.sum()) for key, active in self.active.items()}
        self.layer_counts = self._entries(self._all)
        for name, mask in self.masks.items():
            mask.copy_(self._channels.mask(name, mask.shape, self._all, mask.device))
        devices = {n: t.device for n, t in [*self.network.named_parameters(), *self.network.named_buffers()]}
        self.kept.clear()
        for name, dims in self._channels.kept(self._all).items():
            self.kept[name] = {dim: index.to(devices[name]) for dim, index in dims.items()}

    def count_weights(self, without: ByTensor) -> int:
        """Returns the number of weights that are active also without the marked channels."""
        groups = [active & ~without.get(key, ~active) for key, active in self.active.items()]
        return sum(self._entries(torch.cat(groups)).values())

    def _scale(self, name: str) -> Tensor:
        """Returns the root mean square of a weight's active entries."""
        weight = self.weights[name].parameter.detach().float() * self.masks[name]
        return (weight.square().sum() / self.layer_counts[name]).sqrt()

    def _by_group(self, values: Tensor) -> ByTensor:
        """Returns views of the values of each group's channels."""
        return {str(i): group for i, group in enumerate(values.split(list(self._channels.sizes)))}

    # ---- texts and saving ----------------------------------------------------------------------

    def describe(self) -> str:
        """Returns a text about the active channels and weights."""
        return f"{sum(self.now)} of {sum(self.sizes)} channels, {super().describe()}"

    def remarks(self) -> str:
        """Returns a text that names the layers whose channels all stay, with the reasons."""
        whole = describe_whole(self._channels.whole)
        return f"All channels of these layers stay: {whole}." if whole else ""

    def state_dict(self) -> dict[str, Any]:
        """Returns the active channels."""
        return {"channels": self._all.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the active channels.

        Raises:
            ValueError: If the state is of other masks, or of a network with other channels.
        """
        saved = state.get("channels")
        if saved is None or saved.shape != self._all.shape:
            raise ValueError("the saved masks are of single weights, or of a network with other channels.")
        before = self._all.clone()
        self._all.copy_(saved)
        self.update_masks()
        for name, mask in self.masks.items():
            if not torch.equal(mask.cpu(), state["masks"][name].cpu()):
                self._all.copy_(before)
                self.update_masks()
                raise ValueError(f"the saved channels are not those of the saved masks: {name!r} differs.")


def _path(sizes: Sequence[int]) -> list[list[int]]:
    """Returns steps from one channel per group to all channels: each step adds one to the emptiest group."""
    numbers = [1] * len(sizes)
    path = [numbers.copy()]
    for _, group in sorted((number / size, group) for group, size in enumerate(sizes) for number in range(1, size)):
        numbers[group] += 1
        path.append(numbers.copy())
    return path
