"""The interface of units, the parts that masks keep or remove."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.growth import GROWTH_RULES, Layer
from lightning_ddst.sparsity.launches import all_finite, flip, invert, join, read
from lightning_ddst.sparsity.maskable import MaskableWeight
from lightning_ddst.sparsity.selection import Key, count_true, select
from lightning_ddst.utils import validation
from lightning_ddst.utils.devices import is_launch_bound
from lightning_ddst.utils.registry import Registry
from lightning_ddst.utils.states import Form

Initial = Literal["random", "magnitude"]
INITIAL = get_args(Initial)
Gradients = Mapping[str, Tensor]
ByTensor = dict[str, Tensor]
"""One value, score or mark for every unit, under the keys of `Units.active`."""
Options = Mapping[str, Callable[[str, Any], object]]

UNITS: Registry[type["Units"]] = Registry("granularity")
"""Every registered granularity by name; `find_units` makes the classes of patterns N:M."""


class Units(ABC):
    """Base class of units: the parts of a network that are pruned and grown as one.

    `MaskedNetwork` explores, resizes, saves and loads the same way for all units. A subclass defines a unit: which
    units compete, which are pruned first and which grow first, how active units become masks, and the first values of
    new ones. The methods that are not abstract suit units that are single weights.

    For single weights, `active` and `masks` are the same dict: one copy of one byte per weight, changed in place. That
    is why units hold the active units, and `prune` and `grow` change them and return marks of the changes, instead of
    taking and returning masks. Other units set `active`, `pools` and `masks` in `__init__`, and keep `counts`,
    `layer_counts` and `masks` up to date in `update_masks`.

    Args:
        network: The network.
        weights: Its maskable weights by name.
        generator: Random generator of all random choices.
        inputs: Example inputs of the network, for units with `needs_inputs`.
        name: The network's name, which precedes its layers' names when patterns are compared.
        growth: A key of `GROWTH_RULES`.

    Attributes:
        masks: A bool mask of every weight by name, true where active.
        active: Bool tensors of the units, true where active.
        counts: The number of active units in each tensor of `active`.
        layer_counts: The number of active weights by name.
        pools: Groups of keys of `active` whose units compete. Numbers of units are always given per pool.
        growth_rule: The growth rule.
        kept: The remaining parts of parameters and buffers, for `StructuredForward`; changed in place.
        frozen: Names of weights that training does not change at present, whose units stay as they are. (Whole channels
            belong to several weights, so they change.)
    """

    drop_fraction: ClassVar[float] = 0.5
    """Default exploration rate (drop fraction)."""
    needs_inputs: ClassVar[bool] = False
    """Whether finding the units requires example inputs of the network."""
    dense_kernels: ClassVar[bool] = True
    """Whether training computes with inactive units, which are 0; if not, layers are smaller without them."""
    fixed_density: ClassVar[float | None] = None
    """The only possible density; None if all are possible."""
    state_form: ClassVar[Mapping[str, Form]] = {}
    """The form of `state_dict`, as in `lightning_ddst.utils.states`."""
    options: ClassVar[Options] = {}
    """Arguments of these units by name, each with a function ``check(name, value)`` that raises ValueError."""

    def __init__(
        self,
        network: nn.Module,
        weights: Mapping[str, MaskableWeight],
        generator: torch.Generator,
        *,
        inputs: Sequence[Any] = (),
        name: str = "",
        growth: str = "gradient",
    ) -> None:
        self.network = network
        self.weights = weights
        self.growth_rule = GROWTH_RULES[growth]
        self.masks: dict[str, Tensor] = {}
        self.active: dict[str, Tensor] = self.masks
        self.counts: dict[str, int] = {}
        self.layer_counts = self.counts
        self.pools = [[weight] for weight in weights]
        self.kept: dict[str, dict[int, Tensor]] = {}
        self.frozen: set[str] = set()
        self._generator = generator
        self._checks: list[tuple[str, list[str], Tensor]] = []  # that wait for a transfer

    # ---- checks of arguments -------------------------------------------------------------------

    @classmethod
    def check_options(cls, granularity: str, given: Mapping[str, Any]) -> None:
        """Checks arguments for these units.

        Args:
            granularity: The name of these units, for the error.
            given: The arguments' values by name.

        Raises:
            ValueError: If these units do not have an argument, or its value is not allowed.
        """
        for name, value in given.items():
            if name not in cls.options:
                raise ValueError(f'{name}={value!r} is no option of masks with granularity="{granularity}".')
            try:
                cls.options[name](name, value)
            except ValueError as error:
                raise ValueError(f'{str(error).removesuffix(".")} with granularity="{granularity}".') from None

    @classmethod
    def check_density(cls, argument: str, value: float) -> None:
        """Checks a density.

        Args:
            argument: The argument's name, for the error.
            value: The density.

        Raises:
            ValueError: If the density is outside (0, 1], or impossible for these units.
        """
        validation.check_density(argument, value)

    @classmethod
    def accepts(cls, weight: MaskableWeight) -> bool:
        """Returns whether a weight can consist of these units; others stay dense and do not count in densities."""
        return True

    # ---- densities -----------------------------------------------------------------------------

    @property
    def sizes(self) -> list[int]:
        """Units in each pool."""
        return [sum(self.active[key].numel() for key in pool) for pool in self.pools]

    @property
    def now(self) -> list[int]:
        """Active units in each pool."""
        return [sum(self.counts[key] for key in pool) for pool in self.pools]

    @abstractmethod
    def numbers(self, density: float) -> list[int]:
        """Returns the active units in each pool at a density; from the current numbers, all pools grow or all shrink.

        Raises:
            ValueError: If the density is outside (0, 1], or lower than possible.
        """

    @abstractmethod
    def allocation(self, density: float) -> dict[str, int]:
        """Returns the number of active weights at a density by name; raises the errors of `numbers`."""

    def reachable(self, density: float) -> float:
        """Returns the allowed density that is nearest to this one."""
        return density

    def limits(self, numbers: Sequence[int]) -> dict[str, int]:
        """Returns the largest number of units to prune in each tensor on the way to these numbers."""
        least = {name: weight.least for name, weight in self.weights.items()}
        return {key: count - least.get(key, 0) for key, count in self.counts.items()}

    # ---- changes -------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, density: float, initial: Initial) -> None:
        """Sets the first masks, at random or by magnitude."""

    def magnitudes(self) -> ByTensor:
        """Returns values; units with the smallest absolute values are pruned first."""
        weights = {name: weight.effective() for name, weight in self.weights.items()}
        self._check_finite("the weights of", weights)
        return weights

    def growth(self, gradients: Gradients | None) -> ByTensor:
        """Returns scores; units with the largest scores (by magnitude, if the growth rule says so) grow first."""
        scores = {}
        for name, weight in self.weights.items():
            gradient = torch.empty(0)
            if self.growth_rule.gradient != "none":
                if gradients is None or name not in gradients:
                    raise ValueError(f"gradients must hold the dense gradient of {name!r} for this growth rule.")
                gradient = gradients[name]
            layer = Layer(weight.effective(), self.masks[name], gradient, self._generator)
            scores[name] = self.growth_rule.score(layer)
            if not isinstance(scores[name], Tensor) or not scores[name].is_floating_point():
                raise TypeError(
                    f"the growth rule's scores of {name!r} must be a floating-point tensor, and are {scores[name]!r}."
                )
            if scores[name].shape != layer.weight.shape:
                raise ValueError(
                    f"the growth rule's scores of {name!r} have shape {tuple(scores[name].shape)}; they must have the "
                    f"weight's, {tuple(layer.weight.shape)}."
                )
        self._check_finite("the growth rule's scores of", scores)
        return scores

    def prune(self, numbers: Sequence[int], magnitudes: ByTensor, limits: Mapping[str, int]) -> ByTensor:
        """Deactivates the active units of smallest magnitude in each pool.

        Args:
            numbers: Number of units to prune in each pool.
            magnitudes: The values returned by `magnitudes`.
            limits: Largest number of units to prune in each tensor.

        Returns:
            Marks of the pruned units; unchanged tensors are left out.
        """
        changes = []
        for pool, number in zip(self.pools, numbers, strict=True):
            if number:
                values, active = [magnitudes[key] for key in pool], [self._prunable(key) for key in pool]
                least = [limits[key] for key in pool]
                marks, counts = select(values, active, number, least, _smallness, self._read)
                changes.append((pool, marks, [-count for count in counts]))
        return self._flip_all(changes)

    def grow(self, numbers: Sequence[int], scores: ByTensor) -> ByTensor:
        """Activates the inactive units of highest score in each pool.

        Args:
            numbers: Number of units to grow in each pool.
            scores: The values returned by `growth`.

        Returns:
            Marks of the grown units; unchanged tensors are left out.
        """
        changes = []
        for pool, number in zip(self.pools, numbers, strict=True):
            if number:
                values, inactive = [scores[key] for key in pool], invert([self.active[key] for key in pool])
                limits = [self._growable(key) for key in pool]
                changes.append((pool, *select(values, inactive, number, limits, self._growth_key, self._read)))
        return self._flip_all(changes)

    def born(self, new: ByTensor) -> None:  # noqa: B027 - right for single weights
        """Sets the first values of the marked units, which have just grown; single weights are 0 already."""

    def update_masks(self) -> None:  # noqa: B027 - right for single weights
        """Updates the masks from the active units; does nothing if they are the same dict."""

    def _growable(self, key: str) -> int:
        return 0 if key in self.frozen else self.active[key].numel() - self.counts[key]

    @property
    def growable(self) -> list[int]:
        """Inactive units in each pool that may grow."""
        return [sum(map(self._growable, pool)) for pool in self.pools]

    def count_weights(self, without: ByTensor) -> int | Tensor:
        """Returns the number of weights that are active also without the marked units.

        It may be a tensor of one integer, which was not read from the device yet.
        """
        active, marks = sum(self.layer_counts.values()), list(without.values())
        if marks and is_launch_bound(marks[0].device):
            return active - join(marks).sum()
        return active - sum(map(count_true, marks))

    def _prunable(self, key: str) -> Tensor:
        """Marks the active units that may be pruned: under weight norm all but the largest of every norm."""
        weight, active = self.weights.get(key), self.active[key]
        return active if weight is None or weight.norm is None else active & ~weight.norm.best_active(active)

    def _random_scores(self, name: str) -> Tensor:
        """Draws scores of the first random mask of a weight; the highest of every norm of weight norm is above all."""
        scores = torch.rand(self.weights[name].parameter.shape, generator=self._generator)
        norm = self.weights[name].norm
        return scores if norm is None else scores + norm.best(scores)

    @property
    def _growth_key(self) -> Key:
        return torch.abs if self.growth_rule.magnitude else torch.detach

    def _flip_all(self, changes: Iterable[tuple[Iterable[str], Iterable[Tensor], Iterable[int]]]) -> ByTensor:
        """Flips marked units in place, so that all holders of the tensors see it, and updates the masks.

        Args:
            changes: For each pool its keys, marks, and how many units become active (or, negative, inactive).

        Returns:
            The marks of the tensors that changed.
        """
        self.settle()
        flipped: ByTensor = {}
        numbers: dict[str, int] = {}
        for keys, marks, counts in changes:
            for key, marked, count in zip(keys, marks, counts, strict=True):
                if count:
                    flipped[key], numbers[key] = marked, count
        flip([self.active[key] for key in flipped], list(flipped.values()))
        for key, count in numbers.items():
            self.counts[key] += count
        self.update_masks()
        return flipped

    # ---- checks of values ----------------------------------------------------------------------

    def _check_finite(self, what: str, values: ByTensor) -> None:
        """Checks that values are finite, at the latest when `settle` is called."""
        finite = all_finite(list(values.values()))
        self._checks.append((what, list(values), finite))
        if not is_launch_bound(finite.device):
            self.settle()

    def settle(self) -> None:
        """Reads the checks of finite values that wait for a transfer from the device.

        Raises:
            ValueError: If some are not finite.
        """
        if self._checks:
            self._read(torch.zeros(0, dtype=torch.int64, device=self._checks[0][2].device))

    def _read(self, numbers: Tensor) -> list[int]:
        """Reads integers from the device, and in the same transfer the checks that wait for one."""
        checks, self._checks = self._checks, []
        first, *flags = read([numbers, *(finite for _, _, finite in checks)])
        for (what, names, _), finite in zip(checks, flags, strict=True):
            if not all(finite):
                raise ValueError(f"{what} {names[finite.index(0)]!r} must be finite to compare, and some are not.")
        return first

    # ---- texts and saving ----------------------------------------------------------------------

    def describe(self) -> str:
        """Returns a text about the active weights."""
        total = sum(weight.parameter.numel() for weight in self.weights.values())
        return f"{sum(self.layer_counts.values()):,} of {total:,} weights active"

    def remarks(self) -> str:
        """Returns a text about parts of the network that cannot be pruned; empty if there is nothing to report."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that masks do not contain; loads with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the masks and the state returned by `state_dict`.

        Args:
            state: The state, with the masks under ``"masks"``, which have the weights' names and shapes.

        Raises:
            ValueError: If the masks are of other units; nothing has changed in that case.
        """
        for name, weight in self.weights.items():
            self.counts[name] = count_true(state["masks"][name])
            self.masks[name] = state["masks"][name].to(weight.parameter.device, copy=True)


def all_active(weight: Tensor) -> Tensor:
    """Returns a mask of a weight with every entry active."""
    return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)


def _smallness(values: Tensor) -> Tensor:
    return values.copysign(-1.0)
