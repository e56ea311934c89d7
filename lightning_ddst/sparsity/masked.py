"""A network with masks, which it prunes, grows, saves and loads; `units` defines their unit."""

import hashlib
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.bitpack import view_as_integers
from lightning_ddst.sparsity.coverage import Coverage
from lightning_ddst.sparsity.growth import GrowthRule
from lightning_ddst.sparsity.launches import join, read, unjoin, zero_where_inactive
from lightning_ddst.sparsity.layer_patterns import first_match, name_of_layer
from lightning_ddst.sparsity.maskable import MaskableWeight, MaskedParameters, all_weights, maskable_weights
from lightning_ddst.sparsity.sharding import is_split, local_part, reshard, split_like
from lightning_ddst.sparsity.spectral import refresh_all
from lightning_ddst.sparsity.units import Units, find_units
from lightning_ddst.sparsity.units.base import INITIAL, ByTensor, Gradients, Initial
from lightning_ddst.utils.devices import is_launch_bound
from lightning_ddst.utils.states import BITS, DENSITY, MASK, SHARE, TORCH_STATE, Form, check_tensors, named
from lightning_ddst.utils.validation import check_choice, check_rate

Regrown = Literal["keep", "reset"]
REGROWN = get_args(Regrown)


class MaskedNetwork:
    """A network whose maskable weights are partly inactive.

    The network keeps its modules and parameter names; only values change. Weights that become inactive are set to 0.
    `MaskEnforcer` keeps them at 0 while an optimizer trains. Under weight norm v is masked, and g is scaled so that the
    effective weights of active entries stay what they are.

    Args:
        network: The module to sparsify.
        density: Active over maskable weights at the start, in (0, 1], as near as the units allow.
        granularity: Unit of the masks: "weight", "channel", a pattern N:M such as "2:4", or a key of `UNITS`.
        inputs: Example inputs of the network, the batch first; only "channel" needs them.
        initial: "random" draws the first masks; "magnitude" prunes the present weights (of a network trained dense) by
            the same rules as later.
        regrown: Treatment of units that an exploration prunes and grows again: "keep" keeps their value and optimizer
            state, as RigL's reference code does; "reset" restarts them.
        dense_layers: Layers that stay dense and do not count in any density: patterns as in `matches`. These layers may
            be computed in ways that cannot be masked.
        masked_parameters: Further parameters to mask, as in `maskable_weights`.
        name: The network's name, which precedes its layers' names when patterns are compared.
        seed: Seed of all random choices.
        state: A state returned by `state_dict` for a network of the same shapes; its masks replace the random ones.
        options: Arguments of the units; for "weight" those of `WeightUnits`.

    Attributes:
        network: The module.
        weights: The maskable weights by name.
        units: The units of the masks.
        masks: A bool mask by name, true where active, one byte per weight.
        listeners: Functions that are called whenever weights were pruned, before others grow.
        target: The density last requested, as near as it can be reached; `density` is the actual one, in whole units.

    Raises:
        ValueError: For an argument outside the allowed range, or a network without maskable weights.
    """

    state_form: ClassVar[Form] = {
        "target": DENSITY,
        "rng": TORCH_STATE,
        "masks": named(MASK),
        "ever": named(BITS),
        "overlap": SHARE,
    }
    """The form of `state_dict`, without the keys of the units."""

    def __init__(
        self,
        network: nn.Module,
        density: float,
        *,
        granularity: str = "weight",
        inputs: Sequence[Any] = (),
        initial: Initial = "random",
        regrown: Regrown = "reset",
        dense_layers: Sequence[str] = (),
        masked_parameters: MaskedParameters | None = None,
        name: str = "",
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        units = find_units(granularity)
        units.check_density("density", density)
        units.check_options(granularity, options)
        check_choice("initial", initial, INITIAL)
        check_choice("regrown", regrown, REGROWN)
        self.network = network
        self._name, self._dense_layers, self._masked_parameters = name, dense_layers, masked_parameters
        maskable = self._maskable()
        free = [weight for weight in maskable if not self._is_named_dense(weight.places)]
        if not free:
            raise ValueError(f"dense_layers={list(dense_layers)} leaves nothing to mask.")
        if any(weight.parameter.requires_grad for weight in free):  # else the whole network is frozen for the moment
            saved = () if state is None else state["masks"]  # with those that were frozen later
            free = [weight for weight in free if weight.parameter.requires_grad or weight.name in saved]
        self.weights: dict[str, MaskableWeight] = {weight.name: weight for weight in free if units.accepts(weight)}
        if not self.weights:
            raise ValueError(f"granularity={granularity!r} fits the shape of no layer, so there is nothing to mask.")
        _check_not_thawed(self.weights, () if state is None else state["masks"])
        self._left_dense = {weight.name for weight in maskable} - self.weights.keys()
        self.target = float(density)  # of NumPy, for example, which does not load with weights_only=True
        # Not the seed itself: weights may have been drawn from it, and masks must be independent of them.
        digest = hashlib.sha256(f"masks {seed}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)
        self.units: Units = units(network, self.weights, self._generator, inputs=inputs, name=name, **options)
        self.masks = self.units.masks
        self.listeners: list[Callable[[], None]] = []
        self._regrown = regrown
        self._parts: dict[str, Tensor] = {}
        self._multipliers: dict[str, Tensor] = {}
        self._ever = Coverage({name: weight.parameter for name, weight in self.weights.items()})
        self._covered: int | None = None
        self._changed: tuple[int | Tensor, int] | None = None
        self._overlap = 1.0
        if state is not None:
            self.load_state_dict(state)
            return
        self.units.begin(density, initial)
        self.units.settle()
        self._update_local()
        self._zero_inactive()
        self._cover()
        if self.active < self.total or not self.units.dense_kernels:  # a dense network stays unchanged
            self._refresh_spectral()

    # ---- properties ----------------------------------------------------------------------------

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
        return sum(self.layer_counts.values())

    @property
    def density(self) -> float:
        """Active over maskable weights."""
        return self.active / self.total

    @property
    def coverage(self) -> float:
        """The share of weights that were ever active, in [density, 1]: the in-time over-parameterization rate (ITOP).

        The first reading after a change waits for the device.
        """
        self._read_numbers()
        assert self._covered is not None
        return self._covered / self.total

    @property
    def overlap(self) -> float:
        """Intersection over union (IoU) of the masks before and after their last change, in [0, 1].

        It is 1 before the first change. The first reading after a change waits for the device.
        """
        self._read_numbers()
        return self._overlap

    def _read_numbers(self) -> None:
        """Reads the numbers of the last change in one transfer."""
        both, together = (0, 0) if self._changed is None else self._changed
        unread = [] if self._covered is not None else [self._ever.count().view(1)]
        unread += [both.view(1)] if isinstance(both, Tensor) else []
        numbers = [number for (number,) in read(unread)]
        if isinstance(both, Tensor):
            both = numbers.pop()
        if self._covered is None:
            (self._covered,) = numbers
        if self._changed is not None:
            self._overlap, self._changed = both / (together - both), None

    @property
    def layer_counts(self) -> dict[str, int]:
        """Active weights by name."""
        return dict(self.units.layer_counts)

    @property
    def layer_densities(self) -> dict[str, float]:
        """Density by name."""
        return {name: count / self.masks[name].numel() for name, count in self.layer_counts.items()}

    @property
    def growth(self) -> GrowthRule:
        """The growth rule."""
        return self.units.growth_rule

    @property
    def kept(self) -> Mapping[str, Mapping[int, Tensor]]:
        """Remaining parts of parameters and buffers, for `StructuredForward`; empty for units with dense kernels."""
        return self.units.kept

    @property
    def frozen(self) -> set[str]:
        """The names of weights that training does not change at present, whose masks stay as they are."""
        return self.units.frozen

    def describe(self) -> str:
        """Returns a text such as "12 of 40 channels, 57 of 570 weights active"."""
        return self.units.describe()

    def allocation(self, density: float) -> dict[str, int]:
        """Returns the number of active weights at a density, by name.

        Raises:
            ValueError: If the density is outside (0, 1], or lower than possible.
        """
        return self.units.allocation(density)

    def reachable(self, density: float) -> float:
        """Returns the allowed density that is nearest to this one."""
        return self.units.reachable(density)

    def full_name(self, name: str) -> str:
        """Returns the name of a weight or layer in the module that holds the network, as patterns match it."""
        return name_of_layer(self._name, name)

    def unmasked(self) -> list[str]:
        """Returns the names of maskable weights that came after the masks were made."""
        known = self.weights.keys() | self._left_dense
        return [weight.name for weight in self._maskable() if weight.name not in known]

    def dense_weights(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of two or more dimensions without a mask that `dense_layers` does not name, by name.

        The norms g of weight norm are left out: only effective weights count.
        """
        named = {weight.name for weight in self._maskable() if self._is_named_dense(weight.places)}
        return {
            name: parameter
            for name, parameter, places in all_weights(self.network)
            if name not in self.weights and name not in named and not self._is_named_dense(places)
        }

    def maskable_share(self) -> float:
        """Returns the maskable share of the weights, in (0, 1]; the others are those of `dense_weights`."""
        return self.total / (self.total + sum(parameter.numel() for parameter in self.dense_weights().values()))

    def _maskable(self) -> list[MaskableWeight]:
        return maskable_weights(self.network, self._masked_parameters, dense_layers=self._dense_layers, name=self._name)

    def _is_named_dense(self, places: Mapping[str, nn.Module]) -> bool:
        return first_match(self._dense_layers, places, self._name) is not None

    def written(self) -> list[str]:
        """Returns the names of weights that are not 0 somewhere where they are inactive; waits for the device."""
        parts = {name: local_part(weight.parameter.detach()) for name, weight in self.weights.items()}
        written = [(part != 0).gt(self.local_mask(name)).any() for name, part in parts.items()]
        return [name for name, found in zip(parts, torch.stack(written).tolist(), strict=True) if found]

    def local_mask(self, name: str) -> Tensor:
        """Returns the mask of this process's part of a weight, which is the full weight unless it is sharded."""
        return self._parts.get(name, self.masks[name])

    def multiplier(self, name: str) -> Tensor:
        """Returns the mask of this process's part of a weight, for `zero_where_inactive`.

        On devices bound by launches it consists of integers as wide as the weight's entries, elsewhere of bools.
        """
        return self._multipliers.get(name, self.local_mask(name))

    def to_weights(self) -> None:
        """Moves the masks to their weights' devices."""
        for name, mask in self.masks.items():
            self.masks[name] = mask.to(self.weights[name].parameter.device)
        self.units.update_masks()
        self._update_local()

    # ---- changes -------------------------------------------------------------------------------

    def resize(self, density: float, gradients: Gradients | None = None) -> None:
        """Either grows or prunes to a new density.

        Args:
            density: The new density, in (0, 1]; it is reached as nearly as the units allow.
            gradients: Dense gradients by name, for growth rules that use them.

        Raises:
            ValueError: If the density is outside (0, 1], or lower than possible.
        """
        numbers = self.units.numbers(density)
        limits = self._limits(numbers)
        room = [sum(limits[key] for key in pool) for pool in self.units.pools]  # less than planned if layers are frozen
        moves = [
            max(min(number - now, growable), -prunable)
            for number, now, growable, prunable in zip(numbers, self.units.now, self.units.growable, room, strict=True)
        ]
        before = self.active
        if any(move > 0 for move in moves):
            scores = self.units.growth(gradients)
            self._zero_inactive()  # in case other code wrote to inactive weights
            self._grow(moves, scores, pruned={})
        elif any(moves):
            self._prune([-move for move in moves], self.units.magnitudes(), limits)
            self._forget_pruned()
        self.target = float(self.reachable(density))
        if any(moves):
            self._changed = min(before, self.active), before + self.active
            self._refresh_spectral()

    def explore(self, rate: float, gradients: Gradients | None = None) -> int:
        """Prunes a share of the active units of each pool and grows as many; the density does not change.

        As in RigL, a unit that was just pruned may grow again. With ``regrown="keep"`` it then keeps its value and
        optimizer state, so a dense network does not change (Evci et al. 2020 and their reference code). With
        ``regrown="reset"`` it restarts, and no more units are pruned than there are inactive ones.

        Args:
            rate: The drop fraction: the share of active units to prune, in [0, 1].
            gradients: Dense gradients by name, for growth rules that use them.

        Returns:
            The number of weights that were pruned, and grown.

        Raises:
            ValueError: If the rate is outside [0, 1].
        """
        check_rate("rate", rate)
        units, keeps = self.units, self._regrown == "keep"
        limits = self._limits(units.now)
        numbers = []
        for pool, growable in zip(units.pools, units.growable, strict=True):
            now = sum(units.counts[key] for key in pool if key not in self.frozen)
            number = min(int(rate * now + 1e-9), sum(limits[key] for key in pool))
            numbers.append(number if keeps else min(number, growable))
        if not any(numbers):
            return 0
        magnitudes, scores = units.magnitudes(), units.growth(gradients)
        before = self.active
        if keeps:
            self._zero_inactive()  # in case other code wrote to inactive weights
        pruned = self._prune(numbers, magnitudes, limits)
        replaced = before - self.active
        if not keeps:
            self._forget_pruned()
        new = self._grow(numbers, scores, pruned)
        if keeps:
            self._forget_pruned()
        self._changed = units.count_weights(new), before + self.active
        self._refresh_spectral()
        return replaced

    def apply_masks(self) -> None:
        """Sets inactive weights to 0, after other code has changed the network's weights."""
        self._forget_pruned()
        self._refresh_spectral()

    def _forget_pruned(self) -> None:
        """Sets inactive weights to 0; the listeners do the same for gradients and optimizer state."""
        self._zero_inactive()
        for listener in self.listeners:
            listener()

    def _limits(self, numbers: Sequence[int]) -> dict[str, int]:
        """Returns the largest number of units to prune in each tensor: none in frozen weights."""
        return {key: 0 if key in self.frozen else limit for key, limit in self.units.limits(numbers).items()}

    def _prune(self, numbers: Sequence[int], magnitudes: ByTensor, limits: Mapping[str, int]) -> ByTensor:
        pruned = self.units.prune(numbers, magnitudes, limits)
        self.units.settle()
        self._update_local()
        return pruned

    def _grow(self, numbers: Sequence[int], scores: ByTensor, pruned: ByTensor) -> ByTensor:
        """Activates units, and sets first values of those that do not keep theirs.

        Returns:
            Marks of the units that grew and were not pruned just before.
        """
        grown = self.units.grow(numbers, scores)
        self.units.settle()
        self._update_local()
        new = _without(grown, pruned)
        self.units.born(new if self._regrown == "keep" else grown)
        self._cover()
        return new

    def _cover(self) -> None:
        """Adds the active weights to those that were ever active."""
        self._ever.add(self.masks)
        self._covered = None

    def _update_local(self) -> None:
        """Updates what `local_mask` and `multiplier` return from the masks."""
        for name, weight in self.weights.items():
            if is_split(weight.parameter):
                self._parts[name] = local_part(split_like(self.masks[name], weight.parameter))
        masks = {name: mask for name in self.masks if is_launch_bound((mask := self.local_mask(name)).device)}
        if not masks:
            self._multipliers.clear()
            return
        for name, mask in masks.items():
            if name not in self._multipliers or self._multipliers[name].device != mask.device:
                bits = view_as_integers(local_part(self.weights[name].parameter.detach()))
                self._multipliers[name] = torch.empty_like(bits, device=mask.device)
        torch._foreach_copy_([self._multipliers[name] for name in masks], list(masks.values()))

    def _refresh_spectral(self) -> None:
        refresh_all([spectral for weight in self.weights.values() for spectral in weight.spectral])

    def _zero_inactive(self) -> None:
        norms = [(weight.norm, weight.norm.lengths()) for weight in self.weights.values() if weight.norm is not None]
        # Bypasses autograd's version counter: a mask change at a generator update may precede the backward pass of a
        # discriminator loss computed earlier.
        values = [weight.parameter.data for weight in self.weights.values()]
        zero_where_inactive(values, [self.multiplier(name) for name in self.weights])
        for norm, before in norms:
            norm.rescale(before)
        reshard(self.network)

    # ---- saving --------------------------------------------------------------------------------

    @property
    def checksum(self) -> int:
        """The CRC-32 of all masks."""
        masks = list(self.masks.values())
        value = 0
        for mask in [join(masks)] if is_launch_bound(masks[0].device) else masks:
            value = zlib.crc32(mask.cpu().numpy().tobytes(), value)
        return value

    def state_dict(self) -> dict[str, Any]:
        """Returns masks and random state, on the CPU; loads with ``weights_only=True``."""
        masks, ever = (
            {name: values.to("cpu", copy=True) for name, values in held.items()}
            for held in (self.masks, self._ever.bits)
        )
        rng = self._generator.get_state()
        state = {"target": self.target, "rng": rng, "masks": masks, "ever": ever, "overlap": self.overlap}
        return state | self.units.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: If the state is of a network with other maskable weights, or of other units.
        """
        check_tensors("the saved masks", state["masks"], self.parameters)
        self.units.load_state_dict(state)
        self._ever.load(state.get("ever", {}))
        self._cover()
        self.target = state["target"]
        self._overlap, self._changed = state.get("overlap", 1.0), None
        self._generator.set_state(state["rng"].cpu())
        self._update_local()
        self._zero_inactive()  # spectral norm's vectors were saved with the weights and fit these masks


def _check_not_thawed(names: Iterable[str], saved: Collection[str]) -> None:
    """Checks that saved masks, if there are any, are not those of some of the weights alone."""
    if saved and set(saved) < set(names):
        new = ", ".join(repr(name) for name in names if name not in saved)
        raise ValueError(
            f"the saved masks have none of {new}: frozen, or not there, when the masks were made. To leave them dense, "
            'freeze them until training has started; to mask them, start another run with initial_masks="magnitude".'
        )


def _without(marks: ByTensor, others: ByTensor) -> ByTensor:
    """Returns marks without those that are also in others, which may have only some of the keys."""
    both = [key for key in marks if key in others]
    if both and is_launch_bound(marks[both[0]].device):
        here, there = ([held[key] for key in both] for held in (marks, others))
        return marks | dict(zip(both, unjoin(join(here) > join(there), here), strict=True))
    return marks | {key: marks[key] > others[key] for key in both}
