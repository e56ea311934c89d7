"""Options of masking and measuring: they find and mask a module's two networks, and make the probe."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from torch import nn

from lightning_ddst.balance import BalanceProbe, ScoresItself
from lightning_ddst.balance.ratio import ESTIMATORS, Estimator
from lightning_ddst.methods import Method, Role
from lightning_ddst.methods.masked_pair import MaskedPair
from lightning_ddst.sparsity import MaskedNetwork, find_units, maskable_weights
from lightning_ddst.sparsity.enforcement import OptimizerState
from lightning_ddst.sparsity.layer_patterns import matches, name_of_layer
from lightning_ddst.sparsity.masked import REGROWN, Regrown
from lightning_ddst.sparsity.units import INITIAL, Initial
from lightning_ddst.utils.example_inputs import infer_inputs
from lightning_ddst.utils.nested import Place
from lightning_ddst.utils.networks import check_not_shared, find_network, name_in
from lightning_ddst.utils.validation import check_choice, plain_number


@dataclass(frozen=True)
class MaskingOptions:
    """Options of masking that do not depend on the method.

    Attributes:
        generator: Dotted name of the generator in the module; None tries the usual names.
        discriminator: Dotted name of the discriminator; None tries the usual names.
        granularity: Unit of the masks, a key of `lightning_ddst.sparsity.UNITS` or "N:M".
        initial_masks: "random" or "magnitude".
        regrown: "keep" or "reset".
        optimizer_state: "reset" or "keep".
        dense_layers: Patterns of layers that stay dense.
        units: Arguments of the granularity that were given, by name.

    Raises:
        ValueError: For an argument outside the allowed range, or one that the granularity does not have.
    """

    generator: str | None
    discriminator: str | None
    granularity: str
    initial_masks: Initial
    regrown: Regrown
    optimizer_state: OptimizerState
    dense_layers: Sequence[str]
    units: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Checks the arguments."""
        check_choice("initial_masks", self.initial_masks, INITIAL)
        check_choice("regrown", self.regrown, REGROWN)
        check_choice("optimizer_state", self.optimizer_state, get_args(OptimizerState))
        if isinstance(self.dense_layers, str):
            raise ValueError(f"dense_layers={self.dense_layers!r} must be a list of patterns.")
        find_units(self.granularity).check_options(self.granularity, self.units)

    @property
    def names(self) -> dict[Role, str | None]:
        """The given names of both networks; None where none was given."""
        return {"generator": self.generator, "discriminator": self.discriminator}

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
        if find_units(self.granularity).needs_inputs:
            inputs = infer_inputs(module, found["generator"])
        networks: dict[Role, MaskedNetwork] = {}
        for offset, (role, network) in enumerate(found.items()):
            density = method.initial_densities[role]
            # Several pairs get different masks.
            of_name = zlib.crc32((self.names[role] or "").encode())
            try:
                networks[role] = MaskedNetwork(
                    network,
                    density,
                    granularity=self.granularity,
                    inputs=inputs[offset],
                    initial=self.initial_masks,
                    regrown=self.regrown,
                    dense_layers=self.dense_layers,
                    name=name_in(module, network),
                    seed=seed % 2**62 + offset + 2 * of_name,
                    state=None if saved is None else saved[role],
                    **self.units,
                )
            except ValueError as error:
                raise ValueError(f"{role} with {role}_density={density}: {error}") from error
        for role, density in method.lowest_densities.items():
            try:
                networks[role].allocation(density)
            except ValueError as error:
                raise ValueError(f"{method.argument_of(role, density)}={density}: {error}") from error
        return MaskedPair(module, networks)

    def _check_patterns(self, module: nn.Module, found: Mapping[Role, nn.Module]) -> None:
        """Rejects patterns that match no layer."""
        patterns = {
            "dense_layers": self.dense_layers,
            "layer_densities": list(self.units.get("layer_densities") or {}),
        }
        if not any(patterns.values()):
            return
        layers = {
            name_of_layer(name_in(module, network), name): layer
            for network in found.values()
            for weight in maskable_weights(network)
            for name, layer in weight.layers.items()
        }
        for argument, given in patterns.items():
            for pattern in given:
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
        discriminator_output: Place of the scores in the discriminator's output; None means its first tensor.
        estimator: Estimator of the balance ratio over a window, one of `ESTIMATORS`.

    Raises:
        ValueError: For an unknown estimator.
    """

    real: Place | None
    discriminator_output: Place | None
    estimator: Estimator

    def __post_init__(self) -> None:
        """Checks the estimator."""
        check_choice("estimator", self.estimator, ESTIMATORS)

    def probe(self, pair: MaskedPair) -> BalanceProbe:
        """Makes a probe that records both networks' calls, or calls the module's own `balance_scores`."""
        return BalanceProbe(
            pair.networks["generator"].network,
            pair.networks["discriminator"].network,
            real=self.real,
            discriminator_output=self.discriminator_output,
            module=pair.module if isinstance(pair.module, ScoresItself) else None,
        )


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
    """Returns a value in types that load with ``weights_only=True``; an object as the words that show it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = plain_number(value)
    return value if isinstance(value, bool | int | float | str | None) else repr(value)
