"""Masks of single weights, and the ways they change: drawn, resized, explored."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.allocation import DISTRIBUTIONS, allocate, apportion
from lightning_ddst.sparsity.growth import GROWTH_RULES, Layer
from lightning_ddst.sparsity.maskable import MaskableWeight
from lightning_ddst.sparsity.masked import (
    Gradients,
    Initial,
    MaskedNetwork,
    Regrown,
    all_active,
    check_finite,
    first_match,
)
from lightning_ddst.sparsity.selection import count_true, largest, select
from lightning_ddst.sparsity.sharding import full_tensor
from lightning_ddst.utils.validation import check_choice, check_density, check_rate

Scope = Literal["global", "layer"]
SCOPES = ("global", "layer")
Moves = list[tuple[list[str], int]]
"""Numbers of weights to prune or to grow in pools of layers."""


class SparseNetwork(MaskedNetwork):
    """A network whose maskable weights are partly inactive, one by one; weights that grow start from 0.

    What it has is said at `MaskedNetwork`.

    Args:
        network: The module to sparsify.
        density: Active over maskable weights at the start, in (0, 1].
        initial: "random" draws the first masks; "magnitude" prunes the weights as they are (of a
            network that was trained dense), by the same rules as later.
        distribution: How the active weights are spread over layers, a key of `DISTRIBUTIONS`.
        scope: Where weights compete to stay or to grow: "global", over all layers together (as the
            paper does), or "layer", with the layers' counts given by the distribution.
        growth: A key of `GROWTH_RULES`.
        regrown: What an exploration does with weights that it prunes and grows again, "keep" or "reset".
        dense_layers: Layers that are left dense, and out of every density: patterns as in `matches`.
        layer_densities: Densities of single layers, in (0, 1], by pattern; the first that matches
            counts. They keep them, explore by themselves, and the other layers share what is left.
        name: The network's name, in front of its layers' where patterns are compared.
        layer_floor: The share of what the distribution gives a layer that global pruning must leave
            it, in (0, 1]; at least one weight. Without it a layer of small weights would be emptied.
        seed: Of everything that is drawn here.
        state: What `state_dict` gave for a network of the same shapes, to go on from; its masks
            replace those that would be drawn.

    Raises:
        ValueError: For an argument outside what is allowed, or a network with nothing to mask.
    """

    def __init__(
        self,
        network: nn.Module,
        density: float,
        *,
        initial: Initial = "random",
        distribution: str = "erk",
        scope: Scope = "global",
        growth: str = "gradient",
        regrown: Regrown = "reset",
        dense_layers: Sequence[str] = (),
        layer_densities: Mapping[str, float] | None = None,
        name: str = "",
        layer_floor: float = 0.25,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_density("layer_floor", layer_floor)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_choice("scope", scope, SCOPES)
        check_choice("growth", growth, GROWTH_RULES)
        super().__init__(
            network,
            density,
            initial=initial,
            growth=GROWTH_RULES[growth],
            regrown=regrown,
            dense_layers=dense_layers,
            name=name,
            seed=seed,
        )
        self._given = _given_counts(self.weights, layer_densities or {}, name)
        self._distribution = distribution
        self._scope = scope
        self._layer_floor = layer_floor
        if state is None:
            self._begin(density, initial)
        else:
            self.load_state_dict(state)

    # ---- the changes ---------------------------------------------------------------------------

    def resize(self, density: float, gradients: Gradients | None = None) -> None:
        """Grows or prunes, only one of them, to a new density.

        Args:
            density: The new density, in (0, 1]; the count is exactly ``round(density * total)``, or
                as near to it as layers of given densities allow.
            gradients: Dense gradients by name, for growth rules that use them.

        Raises:
            ValueError: If the density is outside (0, 1] or below what the layers' floors allow.
        """
        check_density("density", density)
        density = self.reachable(density)
        total = round(density * self.total)
        before = self.active
        grows = total > before
        moves = self._moves(self._monotone_allocation(density, total))
        if grows:
            scores = self._growth_scores(gradients)
            self._zero_inactive()  # in case something else wrote there
            self._grow(moves, scores)
        elif moves:
            self._prune(moves, self._prunable(density))
            self._forget_pruned()
        self.target = density
        if moves:
            self.overlap = min(before, self.active) / max(before, self.active)
            self._refresh_spectral()

    def explore(self, rate: float, gradients: Gradients | None = None) -> int:
        """Prunes a share of the active weights and grows as many; the density stays.

        As in RigL, what was pruned just now may grow again. With ``regrown="keep"`` it then keeps its value and
        optimizer state, so a dense network stays as it is (Evci et al. 2020 and their reference code). With
        ``regrown="reset"`` it starts from 0, and no more is pruned than there is inactive.

        Args:
            rate: The share of active weights, in [0, 1].
            gradients: Dense gradients by name, for growth rules that use them.

        Returns:
            How many weights were pruned, and grown.

        Raises:
            ValueError: If the rate is outside [0, 1].
        """
        check_rate("rate", rate)
        prunable = self._prunable(self.density)
        moves = []
        for pool in self._pools():
            active = sum(self._counts[name] for name in pool)
            size = sum(self.masks[name].numel() for name in pool)
            number = min(int(rate * active + 1e-9), sum(prunable[name] for name in pool))
            if self._regrown == "reset":
                number = min(number, size - active)
            if number:
                moves.append((pool, number))
        if moves:
            scores = self._growth_scores(gradients)
            if self._regrown == "keep":
                self._zero_inactive()  # in case something else wrote there
            pruned = self._prune(moves, prunable)
            if self._regrown == "reset":
                self._forget_pruned()
            grown = self._grow(moves, scores)
            if self._regrown == "keep":
                self._forget_pruned()
            replaced = sum(number for _, number in moves)
            replaced -= sum(count_true(pruned[name] & grown[name]) for name in pruned.keys() & grown.keys())
            self.overlap = (self.active - replaced) / (self.active + replaced)
            self._refresh_spectral()
        return sum(number for _, number in moves)

    def allocation(self, density: float) -> dict[str, int]:
        """What the distribution gives each weight at a density.

        Raises:
            ValueError: If the density is outside (0, 1] or leaves less than one weight a layer.
        """
        shapes = [weight.parameter.shape for weight in self.weights.values()]
        given = {i: self._given[name] for i, name in enumerate(self.weights) if name in self._given}
        return dict(zip(self.weights, allocate(shapes, density, self._distribution, given=given), strict=True))

    # ---- how they are made ---------------------------------------------------------------------

    def _pools(self) -> list[list[str]]:
        """Which layers' weights compete with each other to stay and to grow."""
        if self._scope == "layer":
            return [[name] for name in self.weights]
        free = [name for name in self.weights if name not in self._given]
        return [*([free] if free else []), *([name] for name in self._given)]

    def _moves(self, counts: Mapping[str, int]) -> Moves:
        """How many weights each pool gives or takes up on the way to new counts."""
        moves = []
        for pool in self._pools():
            number = abs(sum(counts[name] - self._counts[name] for name in pool))
            if number:
                moves.append((pool, number))
        return moves

    def _prune(self, moves: Moves, prunable: Mapping[str, int]) -> dict[str, Tensor]:
        """Deactivates the active weights of smallest magnitude, in each layer as many as are prunable at most.

        Returns:
            Marks of what was pruned, by name; layers without are left out.
        """
        whole_weights = {name: full_tensor(parameter.detach()) for name, parameter in self.parameters.items()}
        for name, weight in whole_weights.items():
            check_finite(f"the weights of {name!r}", weight)
        pruned: dict[str, Tensor] = {}
        for pool, number in moves:
            weights = [whole_weights[name] for name in pool]
            masks = [self.masks[name] for name in pool]
            limits = [prunable[name] for name in pool]
            pruned |= self._flip(pool, *select(weights, masks, number, limits, _smallness), sign=-1)
        return pruned

    def _growth_scores(self, gradients: Gradients | None) -> dict[str, Tensor]:
        """The growth rule's, taken before anything changes, so that an error leaves all as it was."""
        scores = {}
        for name, weight in self.weights.items():
            gradient = torch.empty(0)
            if self.growth.gradient != "none":
                if gradients is None or name not in gradients:
                    raise ValueError(f"gradients must hold the dense gradient of {name!r} for this growth rule.")
                gradient = gradients[name]
            layer = Layer(full_tensor(weight.parameter.detach()), self.masks[name], gradient, self._generator)
            scores[name] = self.growth.score(layer)
            check_finite(f"the growth rule's scores of {name!r}", scores[name])
        return scores

    def _grow(self, moves: Moves, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Activates the inactive weights of highest score.

        Returns:
            Marks of what grew, by name; layers without are left out.
        """
        key = torch.abs if self.growth.magnitude else torch.detach
        grown: dict[str, Tensor] = {}
        for pool, number in moves:
            inactive = [self.masks[name].logical_not() for name in pool]
            limits = [self.masks[name].numel() - self._counts[name] for name in pool]
            grown |= self._flip(pool, *select([scores[name] for name in pool], inactive, number, limits, key), sign=1)
        self._cover(grown)
        return grown

    def _flip(
        self, pool: list[str], chosen: list[Tensor], counts: list[int], *, sign: Literal[-1, 1]
    ) -> dict[str, Tensor]:
        for name, marks, count in zip(pool, chosen, counts, strict=True):
            self.masks[name].logical_xor_(marks)  # in place: what holds the mask goes on with the new one
            self._counts[name] += sign * count
        self._split(pool)
        return {name: marks for name, marks, count in zip(pool, chosen, counts, strict=True) if count}

    def _begin(self, density: float, initial: Initial) -> None:
        counts = self.allocation(density)
        if initial == "random":
            self.masks = {name: self._drawn(name, number) for name, number in counts.items()}
            self._counts = counts
            self._split(self.masks)
            self._zero_inactive()
        else:
            self.masks = {name: all_active(p) for name, p in self.parameters.items()}
            self._counts = {name: mask.numel() for name, mask in self.masks.items()}
            self._prune(self._moves(counts), self._prunable(density))
            self._forget_pruned()
        self._cover(self.masks)
        if self.active < self.total:
            self._refresh_spectral()

    def _drawn(self, name: str, number: int) -> Tensor:
        parameter = self.weights[name].parameter
        if number == parameter.numel():
            return all_active(parameter)
        return largest(torch.rand(parameter.shape, generator=self._generator), number).to(parameter.device)

    def _prunable(self, density: float) -> dict[str, int]:
        """The most that pruning to a density takes from each layer: one among others keeps its floor."""
        allocation = self.allocation(density)
        floors = {
            name: max(1, int(self._layer_floor * allocation[name])) if len(pool) > 1 else 1
            for pool in self._pools()
            for name in pool
        }
        return {name: max(0, count - floors[name]) for name, count in self._counts.items()}

    def reachable(self, density: float) -> float:
        """The density nearest to this one that layers of given densities allow."""
        if not self._given:
            return density
        given = sum(self._given.values())
        free = [mask.numel() for name, mask in self.masks.items() if name not in self._given]
        return min(max(density, (given + len(free)) / self.total), (given + sum(free)) / self.total)

    def _monotone_allocation(self, density: float, total: int) -> dict[str, int]:
        """The distribution at a new count, with every layer moving the same way or not at all."""
        grows = total >= self.active
        lower = [count if grows or name in self._given else 1 for name, count in self._counts.items()]
        upper = [
            self.masks[name].numel() if grows and name not in self._given else count
            for name, count in self._counts.items()
        ]
        shares = [float(count) for count in self.allocation(density).values()]
        return dict(zip(self._counts, apportion(shares, total, lower, upper), strict=True))


def _given_counts(
    weights: Mapping[str, MaskableWeight], densities: Mapping[str, float], network: str
) -> dict[str, int]:
    for pattern, density in densities.items():
        check_density(f"layer_densities[{pattern!r}]", density)
    found = {name: first_match(densities, weight, network) for name, weight in weights.items()}
    return {
        name: max(1, round(densities[pattern] * weights[name].parameter.numel()))
        for name, pattern in found.items()
        if pattern is not None
    }


def _smallness(weights: Tensor) -> Tensor:
    return weights.copysign(-1.0)
