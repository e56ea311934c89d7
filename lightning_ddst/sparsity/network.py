"""The masks of one network and the ways they change: drawn, resized, explored."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.allocation import DISTRIBUTIONS, allocate, apportion
from lightning_ddst.sparsity.checks import check_choice, check_density, check_rate
from lightning_ddst.sparsity.growth import GROWTH_RULES, GrowthRule, Layer
from lightning_ddst.sparsity.maskable import MaskableWeight, maskable_weights
from lightning_ddst.sparsity.selection import count_true, largest, select

Scope = Literal["global", "layer"]
SCOPES = ("global", "layer")
Gradients = Mapping[str, Tensor]

_PIECE = 2**20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SparseNetwork:
    """A network whose maskable weights are partly inactive.

    The network itself keeps its modules and parameter names; only values change. Weights that
    become inactive are set to 0, and weights that grow start from 0. What keeps them at 0 while
    an optimizer runs is `Enforcement`.

    Args:
        network: The module to sparsify.
        density: Active over maskable weights at the start, in (0, 1]. Which weights are active is
            drawn at random.
        distribution: How the active weights are spread over layers, a key of `DISTRIBUTIONS`.
        scope: Where weights compete to stay or to grow: "global", over all layers together (as the
            paper does), or "layer", with the layers' counts given by the distribution.
        growth: A key of `GROWTH_RULES`.
        layer_floor: The share of what the distribution gives a layer that global pruning must leave
            it, in (0, 1]; at least one weight. Without it a layer of small weights would be emptied.
        seed: Of everything that is drawn here.
        state: What `state_dict` gave for a network of the same shapes, to go on from; its masks
            replace those that would be drawn.

    Attributes:
        network: The module.
        weights: The maskable weights by name.
        masks: A bool mask by name, true where active, one byte a weight.
        growth: The growth rule.
        listeners: Called whenever weights were pruned, before others grow.
        target: The density last asked for; `density` is what there is, a whole number of weights.

    Raises:
        ValueError: For an argument outside what is allowed, or a network with nothing to mask.
    """

    def __init__(
        self,
        network: nn.Module,
        density: float,
        *,
        distribution: str = "erk",
        scope: Scope = "global",
        growth: str = "gradient",
        layer_floor: float = 0.25,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_density("density", density)
        check_density("layer_floor", layer_floor)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_choice("scope", scope, SCOPES)
        check_choice("growth", growth, GROWTH_RULES)
        self.network = network
        self.weights: dict[str, MaskableWeight] = {weight.name: weight for weight in maskable_weights(network)}
        self.target = density
        self.growth: GrowthRule = GROWTH_RULES[growth]
        self._distribution = distribution
        self._scope = scope
        self._layer_floor = layer_floor
        # Not the seed itself: weights may have been drawn from it, and masks must not follow them.
        digest = hashlib.sha256(f"masks {seed}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)
        self.listeners: list[Callable[[], None]] = []
        self.masks: dict[str, Tensor]
        if state is None:
            self.masks = self._drawn(density)
            self._counts = {name: count_true(mask) for name, mask in self.masks.items()}
            self._zero_inactive()
            if density < 1:
                self._refresh_spectral()
        else:
            self._restore(state)

    # ---- what there is -------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that hold the maskable weights, by name."""
        return {name: weight.parameter for name, weight in self.weights.items()}

    @property
    def total(self) -> int:
        """Number of maskable weights."""
        return sum(weight.parameter.numel() for weight in self.weights.values())

    @property
    def active(self) -> int:
        """Number of active weights."""
        return sum(self._counts.values())

    @property
    def density(self) -> float:
        """Active over maskable weights."""
        return self.active / self.total

    @property
    def layer_counts(self) -> dict[str, int]:
        """Active weights by name."""
        return dict(self._counts)

    @property
    def layer_densities(self) -> dict[str, float]:
        """Density by name."""
        return {name: count / self.masks[name].numel() for name, count in self._counts.items()}

    def to_weights(self) -> None:
        """Moves the masks to where their weights are."""
        self.masks = {name: mask.to(self.weights[name].parameter.device) for name, mask in self.masks.items()}

    # ---- the changes ---------------------------------------------------------------------------

    def resize(self, density: float, gradients: Gradients | None = None) -> None:
        """Grows or prunes, only one of them, to a new density.

        Args:
            density: The new density, in (0, 1]; the count is exactly ``round(density * total)``.
            gradients: Dense gradients by name, for growth rules that use them.

        Raises:
            ValueError: If the density is outside (0, 1] or below what the layers' floors allow.
        """
        check_density("density", density)
        change = round(density * self.total) - self.active
        scores = self._growth_scores(gradients) if change > 0 else []
        if self._scope == "layer":
            targets = self._monotone_allocation(density)
            per_layer = [abs(target - count) for target, count in zip(targets, self._counts.values(), strict=True)]
        else:
            per_layer = None
        if change > 0:
            self._zero_inactive()  # in case something else wrote there
            self._grow(change, scores, per_layer)
        elif change < 0:
            self._prune(-change, density, per_layer)
        self.target = density
        if change:
            self._refresh_spectral()

    def explore(self, rate: float, gradients: Gradients | None = None) -> int:
        """Prunes a share of the active weights and grows as many; the density stays.

        As in RigL, what was pruned just now may grow again, though here from 0. No more is pruned
        than there is inactive, so a dense network stays as it is.

        Args:
            rate: The share of active weights, in [0, 1].
            gradients: Dense gradients by name, for growth rules that use them.

        Returns:
            How many weights were pruned, and grown.

        Raises:
            ValueError: If the rate is outside [0, 1].
        """
        check_rate("rate", rate)
        if self._scope == "layer":
            per_layer = [
                min(int(rate * count + 1e-9), self.masks[name].numel() - count, count - 1)
                for name, count in self._counts.items()
            ]
            number = sum(per_layer)
        else:
            per_layer = None
            prunable = sum(
                count - floor for count, floor in zip(self._counts.values(), self._floors(self.density), strict=True)
            )
            number = min(int(rate * self.active + 1e-9), self.total - self.active, prunable)
        if number:
            scores = self._growth_scores(gradients)
            self._prune(number, self.density, per_layer)
            self._grow(number, scores, per_layer)
            self._refresh_spectral()
        return number

    def allocation(self, density: float) -> dict[str, int]:
        """What the distribution gives each weight at a density.

        Raises:
            ValueError: If the density is outside (0, 1] or leaves less than one weight a layer.
        """
        shapes = [weight.parameter.shape for weight in self.weights.values()]
        return dict(zip(self.weights, allocate(shapes, density, self._distribution), strict=True))

    # ---- how they are made ---------------------------------------------------------------------

    def _prune(self, number: int, density: float, per_layer: list[int] | None) -> None:
        """Deactivates the active weights of smallest magnitude."""
        limits = per_layer or [
            count - floor for count, floor in zip(self._counts.values(), self._floors(density), strict=True)
        ]
        for name, parameter in self.parameters.items():
            _check_finite(f"the weights of {name!r}", parameter.detach())
        weights = [parameter.detach() for parameter in self.parameters.values()]
        self._flip(*select(weights, list(self.masks.values()), number, limits, _smallness), sign=-1)
        self._zero_inactive()
        for listener in self.listeners:
            listener()

    def _growth_scores(self, gradients: Gradients | None) -> list[Tensor]:
        """The growth rule's, taken before anything changes, so that an error leaves all as it was."""
        scores = []
        for name, weight in self.weights.items():
            gradient = torch.empty(0)
            if self.growth.gradient != "none":
                if gradients is None or name not in gradients:
                    raise ValueError(f"gradients must hold the dense gradient of {name!r} for this growth rule.")
                gradient = gradients[name]
            scores.append(
                self.growth.score(Layer(weight.parameter.detach(), self.masks[name], gradient, self._generator))
            )
            _check_finite(f"the growth rule's scores of {name!r}", scores[-1])
        return scores

    def _grow(self, number: int, scores: list[Tensor], per_layer: list[int] | None) -> None:
        """Activates the inactive weights of highest score."""
        limits = per_layer or [self.masks[name].numel() - count for name, count in self._counts.items()]
        inactive = [mask.logical_not() for mask in self.masks.values()]
        key = torch.abs if self.growth.magnitude else torch.detach
        self._flip(*select(scores, inactive, number, limits, key), sign=1)

    def _flip(self, chosen: list[Tensor], counts: list[int], *, sign: Literal[-1, 1]) -> None:
        for name, marks, count in zip(self.masks, chosen, counts, strict=True):
            self.masks[name].logical_xor_(marks)  # in place: what holds the mask goes on with the new one
            self._counts[name] += sign * count

    def _refresh_spectral(self) -> None:
        for weight in self.weights.values():
            for spectral in weight.spectral:
                spectral.refresh()

    def _zero_inactive(self) -> None:
        for name, weight in self.weights.items():
            # Past autograd's version counter: a discriminator's loss from before a change that comes with a
            # generator update may still have to be differentiated.
            zero_where_inactive(weight.parameter.data, self.masks[name])

    def _drawn(self, density: float) -> dict[str, Tensor]:
        masks = {}
        for name, number in self.allocation(density).items():
            parameter = self.weights[name].parameter
            if number < parameter.numel():
                masks[name] = largest(torch.rand(parameter.shape, generator=self._generator), number)
                masks[name] = masks[name].to(parameter.device)
            else:
                masks[name] = torch.ones_like(parameter, dtype=torch.bool)
        return masks

    def _floors(self, density: float) -> list[int]:
        """The least that pruning to a density leaves each layer."""
        floors = [max(1, int(self._layer_floor * count)) for count in self.allocation(density).values()]
        return [min(floor, count) for floor, count in zip(floors, self._counts.values(), strict=True)]

    def _monotone_allocation(self, density: float) -> list[int]:
        """The distribution at a new density, with every layer moving the same way or not at all."""
        counts = list(self._counts.values())
        sizes = [mask.numel() for mask in self.masks.values()]
        total = round(density * self.total)
        grows = total >= self.active
        lower, upper = (counts, sizes) if grows else ([1] * len(counts), counts)
        shares = [float(count) for count in self.allocation(density).values()]
        return apportion(shares, total, lower, upper)

    # ---- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks and random state; loads with ``weights_only=True``."""
        rng = self._generator.get_state()
        return {"target": self.target, "rng": rng, "masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def _restore(self, state: Mapping[str, Any]) -> None:
        saved = state["masks"]
        for name in sorted(self.weights.keys() | saved.keys()):
            if name not in self.weights or name not in saved or saved[name].shape != self.weights[name].parameter.shape:
                raise ValueError(f"the saved masks are another network's: {name!r} is missing or differs in shape.")
        self.masks = {name: saved[name].to(weight.parameter.device, copy=True) for name, weight in self.weights.items()}
        self._counts = {name: count_true(mask) for name, mask in self.masks.items()}
        self.target = state["target"]
        self._generator.set_state(state["rng"].cpu())
        self._zero_inactive()  # spectral norm's vectors were saved with the weights and fit these masks


def _smallness(weights: Tensor) -> Tensor:
    return weights.abs().neg_()


def _check_finite(what: str, values: Tensor) -> None:
    if not all(extreme.isfinite() for extreme in values.aminmax()):
        raise ValueError(f"{what} must be finite to compare, and some are not.")


@torch.no_grad()
def zero_where_inactive(tensor: Tensor, mask: Tensor) -> None:
    """Sets a tensor to 0 in place where the mask is false, whatever was there (NaN, too)."""
    # Bits times 0 or 1: several times faster than masked_fill_, which branches. In pieces, for what
    # mul_ makes of the mask to stay in a processor's cache.
    rows = max(1, _PIECE * len(tensor) // tensor.numel())
    for bits, piece in zip(_bits(tensor).split(rows), mask.split(rows), strict=True):
        bits.mul_(piece)


def zeroed_where_inactive(tensor: Tensor, mask: Tensor) -> Tensor:
    """A copy that is 0 where the mask is false, whatever was there (NaN, too); differentiable."""
    if tensor.requires_grad:
        return torch.where(mask, tensor, 0)
    return _bits(tensor).mul(mask).view(tensor.dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])
