"""Masks of whole channels, and the ways they change: drawn, resized, explored."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.channels.tracing import trace_channels
from lightning_ddst.sparsity.growth import GROWTH_RULES
from lightning_ddst.sparsity.maskable import maskable_weights
from lightning_ddst.sparsity.masked import (
    Gradients,
    Initial,
    MaskedNetwork,
    Regrown,
    all_active,
    check_finite,
    first_match,
)
from lightning_ddst.sparsity.selection import largest
from lightning_ddst.utils.validation import check_density, check_rate


class ChannelNetwork(MaskedNetwork):
    """A network whose channels are partly inactive: a weight is active where what it computes and what it reads is.

    Every group of channels (those that are in the same layers) has the same share of active ones, as near as whole
    channels allow. Of a group the channels of smallest magnitude are pruned: the sum, over the weights that compute or
    read it, of its part of their squares. Which of its inactive channels grow is drawn: with all weights at 0 nothing
    tells them apart, gradients neither. A channel that grows begins with random weights as large as the others' where
    it is computed, and with 0 where it is read, so that the network computes the same as before.

    What it has is said at `MaskedNetwork`.

    Args:
        network: The module to sparsify.
        density: Active over maskable weights at the start, in (0, 1], as near as whole channels allow.
        inputs: What the network is called with: an example, the batch first.
        initial: "random" draws the first channels; "magnitude" prunes those of the network as it is.
        regrown: What an exploration does with channels that it prunes and grows again, "keep" or "reset".
        dense_layers: Layers whose weights all stay, and are out of every density: patterns as in `matches`.
        name: The network's name, in front of its layers' where patterns are compared.
        seed: Of everything that is drawn here.
        state: What `state_dict` gave for a network of the same shapes, to go on from; its channels
            replace those that would be drawn.

    Attributes:
        kept: What stays of parameters and buffers, for `StructuredForward`; changed in place.

    Raises:
        ValueError: For an argument outside what is allowed, or a network whose channels cannot be traced.
    """

    def __init__(
        self,
        network: nn.Module,
        density: float,
        inputs: Sequence[Any],
        *,
        initial: Initial = "random",
        regrown: Regrown = "reset",
        dense_layers: Sequence[str] = (),
        name: str = "",
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            network,
            density,
            initial=initial,
            growth=GROWTH_RULES["random"],
            regrown=regrown,
            dense_layers=dense_layers,
            name=name,
            seed=seed,
        )
        dense = [weight.name for weight in maskable_weights(network) if first_match(dense_layers, weight, name)]
        self.kept: dict[str, dict[int, Tensor]] = {}
        self._channels = trace_channels(network, *inputs, whole=dense)
        self._path = _path(self._channels.sizes)
        self.masks = {name: all_active(parameter) for name, parameter in self.parameters.items()}
        self._active = torch.ones(sum(self._channels.sizes), dtype=torch.bool)
        if state is None:
            drawn = torch.rand(len(self._active), generator=self._generator)
            self._apply(self._best(drawn if initial == "random" else self._magnitudes(), self._numbers(density)))
            self._zero_inactive()
            self._cover(self.masks)
            self._refresh_spectral()
        else:
            self.load_state_dict(state)

    @property
    def channel_counts(self) -> list[tuple[int, int]]:
        """Active channels, and all, of each group."""
        return [(int(group.sum()), len(group)) for group in self._groups(self._active)]

    # ---- the changes ---------------------------------------------------------------------------

    def resize(self, density: float, gradients: Gradients | None = None) -> None:
        """Grows or prunes channels, only one of them, to the density nearest to a new one; see `MaskedNetwork`."""
        numbers = self._numbers(density)
        before = self._active
        now = self._now()
        self.target = density
        if (numbers > now).any():
            self._zero_inactive()  # in case something else wrote there
            self._grow(numbers - now, self._active)
        elif (numbers < now).any():
            self._prune(numbers)
            self._forget_pruned()
        else:
            return
        self._compare(before)
        self._refresh_spectral()

    def explore(self, rate: float, gradients: Gradients | None = None) -> int:
        """Prunes a share of every group's active channels and grows as many; see `MaskedNetwork`.

        One of a group at least stays. With ``regrown="reset"`` no more are pruned than there are inactive.
        """
        check_rate("rate", rate)
        before = self._active
        most = [size - n if self._regrown == "reset" else n for n, size in self.channel_counts]
        moved = [min(int(rate * n + 1e-9), m, n - 1) for (n, _), m in zip(self.channel_counts, most, strict=True)]
        if not any(moved):
            return 0
        weights = self.active
        keeps = self._regrown == "keep"
        if keeps:
            self._zero_inactive()  # in case something else wrote there
        self._prune(self._now() - torch.tensor(moved))
        pruned = weights - self.active
        if not keeps:
            self._forget_pruned()
        self._grow(torch.tensor(moved), before if keeps else self._active)
        if keeps:
            self._forget_pruned()
        self._compare(before)
        self._refresh_spectral()
        return pruned

    def allocation(self, density: float) -> dict[str, int]:
        """How many weights are active at a density, by name; see `MaskedNetwork`."""
        active = self._best(torch.zeros(len(self._active)), self._numbers(density))
        return self._entries(active)

    def reachable(self, density: float) -> float:
        """Every density from that of one channel a group on."""
        return max(density, self._weights_at(0) / self.total)

    # ---- how they are made ---------------------------------------------------------------------

    def _groups(self, values: Tensor) -> Sequence[Tensor]:
        groups: Sequence[Tensor] = values.split(list(self._channels.sizes))
        return groups

    def _now(self) -> Tensor:
        """Active channels of each group."""
        return torch.tensor([active for active, _ in self.channel_counts])

    def _entries(self, active: Tensor) -> dict[str, int]:
        """Active weights by name."""
        return {name: self._channels.entries(name, p.shape, active) for name, p in self.parameters.items()}

    def _weights_at(self, step: int) -> int:
        """Active weights at a step of the way from one channel a group to all."""
        return sum(self._entries(self._best(torch.zeros(len(self._active)), self._path[step])).values())

    def _numbers(self, density: float) -> Tensor:
        """The number of channels of each group at which the density is nearest; of two as near, the smaller."""
        check_density("density", density)
        wanted = density * self.total
        if wanted < (least := self._weights_at(0)) - 1e-6:
            raise ValueError(
                f"density={density} leaves less than one channel a group; it must be at least {least / self.total:.4g}."
            )
        low, high = 0, len(self._path) - 1
        while low < high:  # to the first step that is not below
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._weights_at(middle) < wanted else (low, middle)
        if low and wanted - self._weights_at(low - 1) <= self._weights_at(low) - wanted:
            low -= 1
        return self._path[low]

    def _best(self, scores: Tensor, numbers: Tensor) -> Tensor:
        """The channels of largest scores, so many of each group; bool ``(channels,)``."""
        groups = zip(self._groups(scores), numbers.tolist(), strict=True)
        return torch.cat([largest(group, number) for group, number in groups])

    def _magnitudes(self) -> Tensor:
        """Of every channel."""
        scores = torch.zeros(len(self._active) + 1)  # the last is of what belongs to none
        for name, parameter in self.parameters.items():
            weight = parameter.detach().float().cpu()
            check_finite(f"the weights of {name!r}", weight)
            squares = weight.square()
            for dim, channels in self._channels.axes.get(name, {}).items():
                part = squares.sum([i for i in range(weight.dim()) if i != dim]) / squares.sum().clamp(min=1e-30)
                scores.index_add_(0, channels.where(channels >= 0, len(self._active)), part)
        return scores[:-1]

    def _prune(self, numbers: Tensor) -> None:
        """Leaves so many channels of each group."""
        self._apply(self._best(self._magnitudes().masked_fill(~self._active, -1.0), numbers))

    def _grow(self, numbers: Tensor, known: Tensor) -> None:
        """Activates so many more channels of each group; those that are not among the known get their first weights."""
        drawn = torch.rand(len(self._active), generator=self._generator).masked_fill(self._active, -1.0)
        new = self._best(drawn, numbers)
        scales = {name: self._scale(name) for name in self.weights}
        self._apply(self._active | new)
        for name, parameter in self.parameters.items():
            self._begin_anew(name, parameter, new & ~known, scales[name])
        self._cover(self.masks)

    def _scale(self, name: str) -> float:
        """The root of the mean square of a weight's active entries."""
        weight = self.parameters[name].detach().float() * self.masks[name]
        return float((weight.square().sum() / self._counts[name]).sqrt())

    @torch.no_grad()
    def _begin_anew(self, name: str, parameter: nn.Parameter, new: Tensor, scale: float) -> None:
        """Gives new channels their first weights."""
        axes = self._channels.axes.get(name, {})
        gives = self.weights[name].out_dim
        values = parameter.data  # past autograd's version counter
        for dim in sorted(axes, key=lambda dim: dim != gives):  # what a channel is read by comes last
            index = ((axes[dim] >= 0) & new[axes[dim].clamp(min=0)]).nonzero().squeeze(1).to(values.device)
            fresh = torch.zeros_like(values.index_select(dim, index))
            if dim == gives:
                fresh = torch.randn(fresh.shape, generator=self._generator).mul_(scale).to(values)
            values.index_copy_(dim, index, fresh)
        values.mul_(self.masks[name])

    def _apply(self, active: Tensor) -> None:
        """Makes masks of channels."""
        self._active = active
        self._counts = self._entries(active)
        for name, mask in self.masks.items():
            mask.copy_(self._channels.mask(name, mask.shape, active))
        self._keep()

    def _keep(self) -> None:
        devices = {n: t.device for n, t in [*self.network.named_parameters(), *self.network.named_buffers()]}
        self.kept.clear()
        for name, dims in self._channels.kept(self._active).items():
            self.kept[name] = {dim: index.to(devices[name]) for dim, index in dims.items()}

    def _compare(self, before: Tensor) -> None:
        """Works out how much of the masks stayed."""
        both = sum(self._entries(before & self._active).values())
        was = sum(self._entries(before).values())
        self.overlap = both / (was + self.active - both)

    def to_weights(self) -> None:
        """Moves the masks, and what stays, to where their weights are."""
        super().to_weights()
        self._keep()

    # ---- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What `MaskedNetwork` has, and the active channels; loads with ``weights_only=True``."""
        return super().state_dict() | {"channels": self._active.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: If it is of masks of single weights, or of a network with other channels.
        """
        saved = state.get("channels")
        if saved is None or saved.shape != self._active.shape:
            raise ValueError("the saved masks are of single weights, or of a network with other channels.")
        super().load_state_dict(state)
        self._apply(saved.cpu().clone())


def _path(sizes: Sequence[int]) -> list[Tensor]:
    """Numbers of channels of each group from one to all, one more at every step, the emptiest group first."""
    numbers = torch.ones(len(sizes), dtype=torch.int64)
    path = [numbers.clone()]
    for _, group in sorted((number / size, group) for group, size in enumerate(sizes) for number in range(1, size)):
        numbers[group] += 1
        path.append(numbers.clone())
    return path
