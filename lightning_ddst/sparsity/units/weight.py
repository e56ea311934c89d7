"""Masks of single weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from lightning_ddst.sparsity.allocation import DISTRIBUTIONS, allocate, apportion
from lightning_ddst.sparsity.growth import GROWTH_RULES
from lightning_ddst.sparsity.layer_patterns import first_match
from lightning_ddst.sparsity.maskable import MaskableWeight
from lightning_ddst.sparsity.selection import largest
from lightning_ddst.sparsity.units.base import UNITS, Initial, Options, Units, all_active
from lightning_ddst.utils.validation import check_choice, check_density

Scope = Literal["global", "layer"]
SCOPES = get_args(Scope)


def check_densities(name: str, densities: Mapping[str, float]) -> None:
    """Checks that the densities of patterns are in (0, 1]."""
    for pattern, density in densities.items():
        check_density(f"{name}[{pattern!r}]", density)


@UNITS.register("weight")
class WeightUnits(Units):
    """Single weights: those of smallest magnitude are pruned; the growth rule chooses those that grow, from 0.

    Args:
        network: The network.
        weights: Its maskable weights by name.
        generator: Random generator of all random choices.
        inputs: Not used.
        name: The network's name, which precedes its layers' names when patterns are compared.
        growth: A key of `GROWTH_RULES`.
        distribution: Distribution of active weights over layers, a key of `DISTRIBUTIONS`.
        scope: Scope of the competition between weights: "global", over all layers together (as in the paper), or
            "layer", with the layers' counts given by the distribution.
        layer_floor: Share of a layer's count in the distribution that global pruning must leave, in (0, 1]; at least
            one weight. Without it, a layer of small weights could be emptied.
        layer_densities: Densities of single layers, in (0, 1], by pattern; the first match counts. These layers keep
            their densities and explore separately; the other layers share the rest.
    """

    options: ClassVar[Options] = {
        "growth": GROWTH_RULES.find,
        "distribution": DISTRIBUTIONS.find,
        "scope": partial(check_choice, allowed=SCOPES),
        "layer_floor": check_density,
        "layer_densities": check_densities,
    }

    def __init__(
        self,
        network: nn.Module,
        weights: Mapping[str, MaskableWeight],
        generator: torch.Generator,
        *,
        inputs: Sequence[Any] = (),
        name: str = "",
        growth: str = "gradient",
        distribution: str = "erk",
        scope: Scope = "global",
        layer_floor: float = 0.25,
        layer_densities: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(network, weights, generator, inputs=inputs, name=name, growth=growth)
        self._sizes = {key: weight.parameter.numel() for key, weight in weights.items()}
        self._total = sum(self._sizes.values())
        self._distribution = distribution
        self._layer_floor = layer_floor
        self._given: dict[str, int] = {}
        self._least = {key: max(1, weight.least) for key, weight in weights.items()}
        densities = layer_densities or {}
        for key, weight in weights.items():
            if (pattern := first_match(densities, weight.places, name)) is not None:
                self._given[key] = max(1, round(densities[pattern] * self._sizes[key]))
                if self._given[key] < self._least[key]:
                    raise ValueError(
                        f"layer_densities[{pattern!r}]={densities[pattern]} leaves {self._given[key]} active weights "
                        f"to {key!r}; its weight norm needs {self._least[key]}, one for every norm."
                    )
        if scope == "global":
            free = [key for key in weights if key not in self._given]
            self.pools = [*([free] if free else []), *([key] for key in self._given)]

    def begin(self, density: float, initial: Initial) -> None:
        """Draws masks with the counts of the distribution, or prunes the dense network to their total."""
        counts = self.allocation(density)
        for name, weight in self.weights.items():
            mask = all_active(weight.parameter)
            if initial == "random" and counts[name] < mask.numel():
                mask = largest(self._random_scores(name), counts[name]).to(mask.device)
            self.masks[name] = mask
        if initial == "random":
            self.counts |= counts
        else:
            self.counts |= self._sizes
            numbers = [sum(counts[key] for key in pool) for pool in self.pools]
            excess = [now - number for now, number in zip(self.now, numbers, strict=True)]
            self.prune(excess, self.magnitudes(), self.limits(numbers))

    def numbers(self, density: float) -> list[int]:
        """Returns numbers whose sum is ``round(density * total)``, or as near as layers of given densities allow."""
        check_density("density", density)
        density = self.reachable(density)
        total = round(density * self._total)
        grows = total >= sum(self.counts.values())
        lower = [count if grows or key in self._given else self._least[key] for key, count in self.counts.items()]
        upper = [self._sizes[key] if grows and key not in self._given else n for key, n in self.counts.items()]
        shares = [float(count) for count in self.allocation(density).values()]
        counts = dict(zip(self.counts, apportion(shares, total, lower, upper), strict=True))
        return [sum(counts[key] for key in pool) for pool in self.pools]

    def allocation(self, density: float) -> dict[str, int]:
        """Returns the counts of the distribution."""
        shapes = [weight.fans for weight in self.weights.values()]
        given = {i: self._given[key] for i, key in enumerate(self.weights) if key in self._given}
        floors = list(self._least.values())
        return dict(zip(self.weights, allocate(shapes, density, self._distribution, floors, given), strict=True))

    def reachable(self, density: float) -> float:
        """Returns the nearest density that layers with given densities allow."""
        if not self._given:
            return density
        given = sum(self._given.values())
        least, size = (
            sum(number for key, number in numbers.items() if key not in self._given)
            for numbers in (self._least, self._sizes)
        )
        return min(max(density, (given + least) / self._total), (given + size) / self._total)

    def limits(self, numbers: Sequence[int]) -> dict[str, int]:
        """Returns limits that leave the floor to layers that compete, and one weight (for each norm) to the others."""
        allocation = self.allocation(sum(numbers) / self._total)
        floors = {
            key: max(self._least[key], int(self._layer_floor * allocation[key]) if len(pool) > 1 else 0)
            for pool in self.pools
            for key in pool
        }
        return {key: max(0, count - floors[key]) for key, count in self.counts.items()}
