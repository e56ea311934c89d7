"""What every network with masks has: which weights are masked, the masks, and how they are saved."""

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.bitpack import choose_chunk, count_bits, pack_bits, view_as_integers
from lightning_ddst.sparsity.growth import GrowthRule
from lightning_ddst.sparsity.maskable import MaskableWeight, maskable_weights
from lightning_ddst.sparsity.patterns import matches, name_of_layer
from lightning_ddst.sparsity.selection import count_true
from lightning_ddst.sparsity.sharding import is_split, local_part, reshard, split_like
from lightning_ddst.utils.validation import check_choice, check_density

Initial = Literal["random", "magnitude"]
INITIAL = ("random", "magnitude")
Regrown = Literal["keep", "reset"]
REGROWN = ("keep", "reset")
Gradients = Mapping[str, Tensor]

_PIECE = 2**20


class MaskedNetwork(ABC):
    """A network whose maskable weights are partly inactive; subclasses say which, and how that changes.

    The network itself keeps its modules and parameter names; only values change. Weights that
    become inactive are set to 0. What keeps them at 0 while an optimizer runs is `MaskEnforcer`.

    Args:
        network: The module to sparsify.
        density: Active over maskable weights at the start, in (0, 1].
        initial: "random" draws the first masks; "magnitude" prunes the weights as they are (of a
            network that was trained dense), by the same rules as later.
        growth: What grows.
        regrown: What an exploration does with weights that it prunes and grows again: "keep" leaves them their value
            and optimizer state, as RigL's reference code does; "reset" has them start from 0.
        dense_layers: Layers that are left dense, and out of every density: patterns as in `matches`.
        name: The network's name, in front of its layers' where patterns are compared.
        seed: Of everything that is drawn here.

    Attributes:
        network: The module.
        weights: The maskable weights by name.
        masks: A bool mask by name, true where active, one byte a weight.
        growth: The growth rule.
        listeners: Called whenever weights were pruned, before others grow.
        target: The density last asked for, as far as it can be reached; `density` is what there is, a whole number
            of weights.
        coverage: The share of maskable weights that were ever active, in [density, 1].
        overlap: Of the mask before and after its last change: weights active in both over weights active in
            either, in [0, 1]; 1 before the first.

    Raises:
        ValueError: For an argument outside what is allowed, or a network with nothing to mask.
    """

    def __init__(
        self,
        network: nn.Module,
        density: float,
        *,
        initial: Initial,
        growth: GrowthRule,
        regrown: Regrown,
        dense_layers: Sequence[str],
        name: str,
        seed: int,
    ) -> None:
        check_density("density", density)
        check_choice("initial", initial, INITIAL)
        check_choice("regrown", regrown, REGROWN)
        self.network = network
        self.weights: dict[str, MaskableWeight] = {
            weight.name: weight for weight in maskable_weights(network) if not first_match(dense_layers, weight, name)
        }
        if not self.weights:
            raise ValueError(f"dense_layers={list(dense_layers)} leaves nothing to mask.")
        self.target = density
        self.growth = growth
        self._regrown = regrown
        # Not the seed itself: weights may have been drawn from it, and masks must not follow them.
        digest = hashlib.sha256(f"masks {seed}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)
        self.listeners: list[Callable[[], None]] = []
        self.masks: dict[str, Tensor]
        self._counts: dict[str, int]
        self._parts: dict[str, Tensor] = {}
        self._ever: dict[str, Tensor] = {}
        self.coverage = 0.0
        self.overlap = 1.0

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

    def local_mask(self, name: str) -> Tensor:
        """The mask of what this process holds of a weight: all of it, unless weights are split over processes."""
        return self._parts.get(name, self.masks[name])

    def to_weights(self) -> None:
        """Moves the masks to where their weights are."""
        for held in (self.masks, self._ever):
            held |= {name: values.to(self.weights[name].parameter.device) for name, values in held.items()}
        self._split(self.masks)

    # ---- the changes ---------------------------------------------------------------------------

    @abstractmethod
    def allocation(self, density: float) -> dict[str, int]:
        """How many weights are active at a density, by name.

        Raises:
            ValueError: If the density is outside (0, 1], or lower than what is possible.
        """

    @abstractmethod
    def reachable(self, density: float) -> float:
        """The density nearest to this one that is allowed."""

    @abstractmethod
    def resize(self, density: float, gradients: Gradients | None = None) -> None:
        """Grows or prunes, only one of them, to a new density.

        Args:
            density: The new density, in (0, 1].
            gradients: Dense gradients by name, for growth rules that use them.

        Raises:
            ValueError: If the density is outside (0, 1], or lower than what is possible.
        """

    @abstractmethod
    def explore(self, rate: float, gradients: Gradients | None = None) -> int:
        """Prunes a share of what is active and grows as much; the density stays.

        Args:
            rate: The share, in [0, 1].
            gradients: Dense gradients by name, for growth rules that use them.

        Returns:
            How many weights were pruned, and grown.

        Raises:
            ValueError: If the rate is outside [0, 1].
        """

    def apply_masks(self) -> None:
        """Sets what is inactive to 0, after something else gave the network other weights."""
        self._forget_pruned()
        self._refresh_spectral()

    def _forget_pruned(self) -> None:
        """Sets what is inactive to 0: weights here, gradients and optimizer state by the listeners."""
        self._zero_inactive()
        for listener in self.listeners:
            listener()

    def _cover(self, names: Iterable[str]) -> None:
        """Remembers what is active now."""
        for name in names:
            bits = pack_bits(self.masks[name])
            self._ever[name] = self._ever[name] | bits if name in self._ever else bits
        self.coverage = sum(count_bits(bits) for bits in self._ever.values()) / self.total

    def _split(self, names: Iterable[str]) -> None:
        for name in names:
            if is_split(parameter := self.weights[name].parameter):
                self._parts[name] = local_part(split_like(self.masks[name], parameter))

    def _refresh_spectral(self) -> None:
        for weight in self.weights.values():
            for spectral in weight.spectral:
                spectral.refresh()

    def _zero_inactive(self) -> None:
        for name, weight in self.weights.items():
            # Past autograd's version counter: a discriminator's loss from before a change that comes with a
            # generator update may still have to be differentiated.
            zero_where_inactive(weight.parameter.data, self.local_mask(name))
        reshard(self.network)

    # ---- saving --------------------------------------------------------------------------------

    @property
    def checksum(self) -> int:
        """Of the masks; 32 bits."""
        value = 0
        for mask in self.masks.values():
            value = zlib.crc32(mask.cpu().numpy().tobytes(), value)
        return value

    def state_dict(self) -> dict[str, Any]:
        """Masks and random state, on the CPU; loads with ``weights_only=True``."""
        masks, ever = (
            {name: values.to("cpu", copy=True) for name, values in held.items()} for held in (self.masks, self._ever)
        )
        rng = self._generator.get_state()
        return {"target": self.target, "rng": rng, "masks": masks, "ever": ever, "overlap": self.overlap}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: If it is of a network with other maskable weights.
        """
        saved = state["masks"]
        for name in sorted(self.weights.keys() | saved.keys()):
            if name not in self.weights or name not in saved or saved[name].shape != self.weights[name].parameter.shape:
                raise ValueError(f"the saved masks are another network's: {name!r} is missing or differs in shape.")
        self.masks = {name: saved[name].to(weight.parameter.device, copy=True) for name, weight in self.weights.items()}
        self._counts = {name: count_true(mask) for name, mask in self.masks.items()}
        ever = state.get("ever", {})
        self._ever = {name: bits.to(self.masks[name].device, copy=True) for name, bits in ever.items()}
        self._cover(self.masks)
        self.target, self.overlap = state["target"], state.get("overlap", 1.0)
        self._generator.set_state(state["rng"].cpu())
        self._split(self.masks)
        self._zero_inactive()  # spectral norm's vectors were saved with the weights and fit these masks


def first_match(patterns: Iterable[str], weight: MaskableWeight, network: str) -> str | None:
    """The first pattern that matches a layer of this weight."""
    for pattern in patterns:
        for name, layer in weight.layers.items():
            if matches(pattern, name_of_layer(network, name), layer):
                return pattern
    return None


def check_finite(what: str, values: Tensor) -> None:
    """Raises a `ValueError` where a value is not finite."""
    if not all(extreme.isfinite() for extreme in values.aminmax()):
        raise ValueError(f"{what} must be finite to compare, and some are not.")


@torch.no_grad()
def zero_where_inactive(tensor: Tensor, mask: Tensor) -> None:
    """Sets a tensor to 0 in place where the mask is false, whatever was there (NaN, too)."""
    # Bits times 0 or 1: several times faster than masked_fill_, which branches. In pieces, for what
    # mul_ makes of the mask to stay in a processor's cache.
    tensor = local_part(tensor)
    bits = view_as_integers(tensor)
    size = choose_chunk(tensor, _PIECE)
    if tensor.numel() <= size:
        bits.mul_(mask)
        return
    rows = max(1, size * len(tensor) // tensor.numel())
    for part, local_mask in zip(bits.split(rows), mask.split(rows), strict=True):
        part.mul_(local_mask)


def all_active(parameter: Tensor) -> Tensor:
    """A mask with every entry active."""
    return torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
