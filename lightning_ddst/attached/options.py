"""Options of a run: its method, and how two networks of a module are found, masked and measured."""

import inspect
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import nn

from lightning_ddst.balance import BalanceProbe, ScoresItself
from lightning_ddst.balance.ratio import ESTIMATORS, Estimator
from lightning_ddst.balance.scores import ScorePlaces, ScoreReader
from lightning_ddst.methods import Intervals, Method, Role, make_method
from lightning_ddst.methods.base import ROLES
from lightning_ddst.methods.masked_pair import MaskedPair
from lightning_ddst.sparsity import MaskableWeight, MaskedNetwork, find_units, maskable_weights
from lightning_ddst.sparsity.enforcement import OptimizerState
from lightning_ddst.sparsity.layer_patterns import matches, name_of_layer
from lightning_ddst.sparsity.maskable import MaskedParameters, all_weights, matched_parameters
from lightning_ddst.sparsity.masked import REGROWN, Regrown
from lightning_ddst.sparsity.units import INITIAL, Initial
from lightning_ddst.utils import distributed
from lightning_ddst.utils.example_inputs import infer_inputs
from lightning_ddst.utils.nested import Place
from lightning_ddst.utils.networks import Name, SeveralParts, check_not_shared, find_network, name_in, prefix_in
from lightning_ddst.utils.validation import check_choice, plain_number

METHOD_ARGUMENTS = (
    *("generator_density", "discriminator_density", "signal", "bounds", "delta"),
    *("min_discriminator_density", "max_discriminator_density", "exploration_rate", "schedule"),
)
"""Arguments of the method; None means the method's own default."""
UNITS_ARGUMENTS = ("growth", "distribution", "scope", "layer_floor", "layer_densities")
"""Arguments of the granularity; None means its own default."""


@dataclass(frozen=True)
class MaskingOptions:
    """Options of masking that do not depend on the method.

    Attributes:
        generator: Dotted name of the generator in the module, or the names of its parts; None tries the usual names.
        discriminator: Dotted name of the discriminator, or the names of its parts; None tries the usual names.
        granularity: Unit of the masks, a key of `lightning_ddst.sparsity.UNITS` or "N:M".
        initial_masks: "random" or "magnitude".
        regrown: "keep" or "reset".
        optimizer_state: "reset" or "keep".
        dense_layers: Patterns of layers that stay dense.
        masked_parameters: Dimensions of outputs and of inputs by patterns of further parameters that are masked.
        units: Arguments of the granularity that were given, by name.

    Raises:
        ValueError: For an argument outside the allowed range, or one that the granularity does not have.
    """

    generator: Name | None
    discriminator: Name | None
    granularity: str
    initial_masks: Initial
    regrown: Regrown
    optimizer_state: OptimizerState
    dense_layers: Sequence[str]
    masked_parameters: MaskedParameters | None
    units: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Checks the arguments."""
        check_choice("initial_masks", self.initial_masks, INITIAL)
        check_choice("regrown", self.regrown, REGROWN)
        check_choice("optimizer_state", self.optimizer_state, get_args(OptimizerState))
        if isinstance(self.dense_layers, str) or not isinstance(self.dense_layers, Collection):
            raise ValueError(f"dense_layers={self.dense_layers!r} must be a list of patterns.")
        by_pattern = {"masked_parameters": self.masked_parameters, "layer_densities": self.units.get("layer_densities")}
        for argument, given in by_pattern.items():
            if not isinstance(given, Mapping | None):
                raise ValueError(f"{argument}={given!r} must be a mapping from patterns.")
        for role, name in (("generator", self.generator), ("discriminator", self.discriminator)):
            parts = name if isinstance(name, Sequence) else (name,)
            if name is not None and not all(isinstance(part, str) for part in parts):
                raise ValueError(f"{role}={name!r} must be the name of a submodule, or a list of names.")
        find_units(self.granularity).check_options(self.granularity, self.units)

    @property
    def names(self) -> dict[Role, str | list[str] | None]:
        """The given names of both networks, a list for several parts; None where none was given."""
        given: dict[Role, Name | None] = {"generator": self.generator, "discriminator": self.discriminator}
        return {role: name if name is None or isinstance(name, str) else list(name) for role, name in given.items()}

    def check_method(self, method: Method) -> None:
        """Checks that a method's densities suit the granularity.

        Raises:
            ValueError: If the granularity cannot have one of these densities.
        """
        if method.starts_dense and (given := self.units.get("layer_densities")):
            raise ValueError(
                f'layer_densities={dict(given)} with method="{method.name}": its networks are dense at the start.'
            )
        units = find_units(self.granularity)
        if units.fixed_density is not None and any(update.resizes for update in method.mask_updates()):
            raise ValueError(
                f'granularity="{self.granularity}" has only the density {units.fixed_density:g}, and '
                f'method="{method.name}" changes densities.'
            )
        for densities in (method.initial_densities, method.lowest_densities, method.final_densities):
            for role, density in densities.items():
                units.check_density(method.argument_of(role, density), density)

    def find_networks(self, module: nn.Module) -> dict[Role, nn.Module]:
        """Finds the two networks of a module.

        Raises:
            ValueError: If a network is not found, or both are the same.
        """
        found = {role: find_network(module, role, name) for role, name in self.names.items()}
        if found["generator"] is found["discriminator"]:
            raise ValueError(f"generator and discriminator are the same module, {self.discriminator!r}.")
        return found

    def mask(self, module: nn.Module, method: Method, seed: int, saved: Mapping[str, Any] | None) -> MaskedPair:
        """Masks the two networks of a module at the initial densities of a method.

        Args:
            module: The module that holds both networks.
            method: The method.
            seed: Seed of the random masks.
            saved: The state returned by `MaskedPair.state_dict`, to resume from; None for new masks.

        Raises:
            ValueError: If a network is not found, or cannot be masked at its densities.
        """
        found = self.find_networks(module)
        check_not_shared(found)
        self._check_patterns(module, found)
        inputs: Sequence[Sequence[Any]] = ((), ())
        units = find_units(self.granularity)
        if units.needs_inputs:
            for role, network in found.items():
                if isinstance(network, SeveralParts):
                    raise ValueError(
                        f'{role}={list(network.part_names)} with granularity="{self.granularity}": such masks need a '
                        "network of one module, which can be called."
                    )
            inputs = infer_inputs(module, found["generator"], found["discriminator"])
        networks: dict[Role, MaskedNetwork] = {}
        for offset, (role, network) in enumerate(found.items()):
            density = method.initial_densities[role]
            # Several pairs get different masks.
            name = self.names[role] or ""
            of_name = zlib.crc32((name if isinstance(name, str) else "+".join(name)).encode())
            # Images keep their channels; features that a discriminator returns do not.
            narrows = {"narrow_features": role == "discriminator"} if "narrow_features" in units.options else {}
            try:
                networks[role] = MaskedNetwork(
                    network,
                    density,
                    granularity=self.granularity,
                    inputs=inputs[offset],
                    initial=self.initial_masks,
                    regrown=self.regrown,
                    dense_layers=self.dense_layers,
                    masked_parameters=self._declared(network, prefix_in(module, network)),
                    name=prefix_in(module, network),
                    seed=seed % 2**62 + offset + 2 * of_name,
                    state=None if saved is None else saved[role],
                    **self.units,
                    **narrows,
                )
            except ValueError as error:
                raise ValueError(f"{role} with {role}_density={density}: {error}") from error
            if remarks := networks[role].units.remarks():
                rank_zero_info(f"{role}: {remarks}")
        for role, density in method.lowest_densities.items():
            try:
                networks[role].allocation(density)
            except ValueError as error:
                raise ValueError(f"{method.argument_of(role, density)}={density}: {error}") from error
        return MaskedPair(module, networks)

    def _check_patterns(self, module: nn.Module, found: Mapping[Role, nn.Module]) -> None:
        """Rejects patterns that match nothing."""
        networks = [(prefix_in(module, network), network) for network in found.values()]
        for pattern in self.masked_parameters or {}:
            if not any(pattern in self._declared(network, name) for name, network in networks):
                raise ValueError(f"masked_parameters: {pattern!r} matches no parameter of either network.")
        if self.dense_layers:
            named = [(name, places) for name, each in networks for _, _, places in all_weights(each)]
            _check_match("dense_layers", self.dense_layers, named)
        if densities := self.units.get("layer_densities"):
            named = [(name, w.places) for name, each in networks for w in self._maskable(each, name)]
            _check_match("layer_densities", densities, named)

    def _declared(self, network: nn.Module, name: str) -> MaskedParameters:
        """Returns the part of `masked_parameters` that is about a network of this name."""
        return matched_parameters(self.masked_parameters or {}, network, name)

    def _maskable(self, network: nn.Module, name: str) -> list[MaskableWeight]:
        return maskable_weights(network, self._declared(network, name), dense_layers=self.dense_layers, name=name)


def _check_match(argument: str, patterns: Iterable[str], named: Iterable[tuple[str, Mapping[str, nn.Module]]]) -> None:
    """Checks that every pattern matches a layer, given layers by name for each name of a network."""
    layers = {name_of_layer(name, layer_name): layer for name, places in named for layer_name, layer in places.items()}
    for pattern in patterns:
        if not any(matches(pattern, name, layer) for name, layer in layers.items()):
            raise ValueError(
                f"{argument}: {pattern!r} matches no layer; there are {', '.join(layers)}, and classes "
                f"{', '.join(sorted({type(layer).__name__ for layer in layers.values()}))}."
            )


@dataclass(frozen=True)
class MeasuringOptions:
    """Options of measuring the balance ratio.

    Attributes:
        real: Place of the real images in the batch; None finds them by their shape.
        discriminator_output: Place of the scores in the discriminator's output, or places by kind of image; None means
            its only floating-point tensor.
        estimator: Estimator of the balance ratio over a window, one of `ESTIMATORS`.

    Raises:
        ValueError: For an unknown estimator, or unknown kinds of images.
    """

    real: Place | None
    discriminator_output: ScorePlaces | None
    estimator: Estimator

    def __post_init__(self) -> None:
        """Checks the arguments."""
        ScoreReader.of_argument(self.discriminator_output)
        check_choice("estimator", self.estimator, ESTIMATORS)

    def probe(self, pair: MaskedPair) -> BalanceProbe:
        """Makes a probe that records both networks' calls, or calls the module's own `balance_scores`.

        Raises:
            ValueError: If a network's calls must be recorded, and it is a container that cannot be called.
        """
        if not isinstance(pair.module, ScoresItself):
            for role, masked in pair.networks.items():
                _check_is_called(pair.module, role, masked.network)
        return BalanceProbe(
            pair.networks["generator"].network,
            pair.networks["discriminator"].network,
            real=self.real,
            discriminator_output=self.discriminator_output,
            module=pair.module if isinstance(pair.module, ScoresItself) else None,
        )


def _check_is_called(module: nn.Module, role: Role, network: nn.Module) -> None:
    forward = getattr(network.forward, "__func__", None)  # not that of the class, which a compiled module replaces
    if forward is nn.Module.forward and not isinstance(network, SeveralParts):
        name = name_in(module, network)
        parts = [f"{name}.{part}" for part, _ in network.named_children()]
        raise ValueError(
            f"{role}={name!r} is a {type(network).__name__}, which is not called itself, so the balance ratio cannot "
            f"be measured: name its parts, {role}={parts}."
        )


@dataclass(frozen=True)
class RunOptions:
    """The options of a run.

    Attributes:
        method: The method with its arguments.
        masking: Options of masking.
        measuring: Options of measuring.
        intervals: The requested intervals.
        seed: Seed of the masks; None means torch's initial seed.
        verbose: Whether to print every decision.

    Raises:
        ValueError: If options do not suit each other.
    """

    method: Method
    masking: MaskingOptions
    measuring: MeasuringOptions
    intervals: Intervals
    seed: int | None
    verbose: bool = False

    def __post_init__(self) -> None:
        """Checks the options together."""
        if self.verbose not in (False, True):
            raise ValueError(f"verbose={self.verbose!r} must be True or False.")
        self.masking.check_method(self.method)
        if not self.measured and self.method.needs_balance:
            raise ValueError(f'probe_interval=None measures no balance ratio, which method="{self.method.name}" needs.')

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> "RunOptions":
        """Makes the options from the flat arguments of `DynamicSparsityCallback`.

        Args:
            arguments: All arguments by name.

        Raises:
            ValueError: For an argument outside the allowed range, or one that the method or granularity does not have.
        """
        of_method = {name: arguments[name] for name in METHOD_ARGUMENTS}
        if of_method["generator_density"] is None and isinstance(arguments["method"], str):
            of_method["generator_density"] = find_units(arguments["granularity"]).fixed_density  # of N:M masks
        method = make_method(arguments["method"], of_method)
        units = {name: arguments[name] for name in UNITS_ARGUMENTS if arguments[name] is not None}
        masking = {field.name: arguments[field.name] for field in fields(MaskingOptions) if field.name != "units"}
        measuring = {field.name: arguments[field.name] for field in fields(MeasuringOptions)}
        intervals = {field.name: arguments[field.name] for field in fields(Intervals)}
        if (stops := arguments["stop_on_divergence"]) not in (False, True):
            raise ValueError(f"stop_on_divergence={stops!r} must be True or False.")
        seed = plain_number(arguments["seed"])
        if seed is not None and not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} must be an integer.")
        return cls(
            method,
            MaskingOptions(**masking, units=units),
            MeasuringOptions(**measuring),
            Intervals(**intervals),
            seed,
            arguments["verbose"],
        )

    @property
    def measured(self) -> bool:
        """Whether the balance ratio is measured."""
        return self.intervals.probe_interval is not None

    def mask(self, module: nn.Module, saved: Mapping[str, Any] | None = None) -> MaskedPair:
        """Masks the two networks of a module.

        Args:
            module: The module that holds both networks.
            saved: The state returned by `MaskedPair.state_dict`, to resume from; None for new masks.

        Raises:
            ValueError: If a network is not found, or cannot be masked at its density.
        """
        # All processes use one seed: they hold the same weights, and must set the same ones to 0.
        seed = distributed.broadcast(torch.initial_seed() if self.seed is None else self.seed)
        return self.masking.mask(module, self.method, seed, saved)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments that a resumed run is compared with; loads with ``weights_only=True``."""
        options = (self.method, self.masking, self.measuring, self.intervals)
        return {name: value for each in options for name, value in list_arguments(each).items()}

    def changed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments that differ from their defaults; loads with ``weights_only=True``.

        Args:
            given: The given flat arguments, as `given_arguments` returns them.

        Returns:
            Arguments by name, of the method first, without its name. Densities that the method ignores are left out.
        """
        method = self.method
        own = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
        for role in ROLES:
            used = (method.initial_densities[role], method.final_densities[role])
            if own.get(f"{role}_density", used[0]) not in used:
                del own[f"{role}_density"]
        others = {name: value for name, value in given.items() if name not in ("method", *METHOD_ARGUMENTS)}
        return {name: _plain(value) for name, value in {**own, **others}.items()}


def given_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a function that differ from its defaults, in its order.

    Args:
        function: The function, or a class.
        arguments: All arguments by name, and maybe others.
    """
    parameters = inspect.signature(function).parameters
    return {
        name: arguments[name]
        for name, parameter in parameters.items()
        if name in arguments and _plain(arguments[name]) != _plain(parameter.default)  # YAML gives lists for tuples
    }


def list_arguments(options: Any) -> dict[str, Any]:
    """Returns the fields of options by name, as values that load with ``weights_only=True``.

    Args:
        options: A dataclass; the fields of a mapping in it are listed as its own.
    """
    listed: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "units":
            listed |= {name: _plain(each) for name, each in value.items()}
        elif field.name not in ("generator", "discriminator", "initial_masks"):  # which resuming does not ask for
            listed[field.name] = _plain(value)
    return listed


def _plain(value: Any) -> Any:
    """Returns a value in types that load with ``weights_only=True``; an object as its representation.

    Addresses are left out, which differ from run to run.
    """
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = plain_number(value)
    return value if isinstance(value, bool | int | float | str | None) else re.sub(r" at 0x\w+", "", repr(value))
