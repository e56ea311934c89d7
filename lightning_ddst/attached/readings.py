"""Public read-only properties of a sparse run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ddst.attached.hooks import AttachedTraining
from lightning_ddst.attached.options import RunOptions
from lightning_ddst.balance import Balance, Decision
from lightning_ddst.methods import Method, Plan, Role, SparseTraining
from lightning_ddst.methods.base import ROLES
from lightning_ddst.methods.masked_pair import MaskedPair, density_of, saved_masks
from lightning_ddst.methods.training import restore_decisions
from lightning_ddst.sparsity import LayerFlops, MaskedNetwork
from lightning_ddst.utils.networks import name_in
from lightning_ddst.utils.validation import check_choice


class RunReadings:
    """The properties of a sparse run that can be read before, during and after it."""

    _options: RunOptions
    _pair: MaskedPair | None = None
    _attached: AttachedTraining | None = None
    _saved: Mapping[str, Any] | None = None  # the state that fit will resume from

    @property
    def settings(self) -> Method:
        """The method with its arguments."""
        return self._options.method

    @property
    def method(self) -> str:
        """The name of the method; `settings` is the method with its arguments."""
        return self.settings.name

    @property
    def generator_density(self) -> float:
        """The generator's current density; its initial density before it is masked."""
        return self._density("generator")

    @property
    def discriminator_density(self) -> float:
        """The discriminator's current density; its initial density before it is masked."""
        return self._density("discriminator")

    def masks(self, network: Role) -> dict[str, Tensor]:
        """Returns the masks of a network.

        Args:
            network: "generator" or "discriminator".

        Returns:
            A bool tensor for every maskable weight, true where active, by its name in
            ``pl_module.named_parameters()``. Empty before fitting, unless `attach` was called.
        """
        check_choice("network", network, ROLES)
        if self._pair is not None:
            return self._pair.masks(network)
        return {} if self._saved is None else saved_masks(self._saved["networks"], network)

    @property
    def balance(self) -> Balance | None:
        """The balance in the current window, with its parts; None if it is not measured."""
        if self._training is None or not self._options.measured:
            return None
        return self._training.balance

    @property
    def balance_ratio(self) -> float | None:
        """BR of the current window, which holds the measurements of the last `interval`; None while undecided."""
        balance = self.balance
        return None if balance is None else balance.ratio

    @property
    def generator_updates(self) -> int:
        """Generator updates so far."""
        if self._training is None:
            return 0 if self._saved is None else int(self._saved["training"]["updates"])
        return self._training.updates

    @property
    def measurements(self) -> int:
        """Number of measurements of BR so far."""
        if self._training is None:
            return 0 if self._saved is None else int(self._saved["training"]["measurements"])
        return self._training.measurements

    @property
    def decisions(self) -> list[tuple[int, Decision]]:
        """All decisions on densities so far, each with its generator update.

        They concern the discriminator's density; with "posthoc" and "imp", both networks' densities.
        """
        if self._training is None:
            return [] if self._saved is None else restore_decisions(self._saved["training"]["decisions"])
        return list(self._training.decisions)

    @property
    def flops_ratio(self) -> float | None:
        """Training operations so far, relative to dense training; None until a generator update was measured."""
        if self._training is None or not (flops := self._training.flops.total).dense:
            return None
        return flops.ratio

    @property
    def flops_ledger(self) -> dict[str, LayerFlops]:
        """Training operations of each maskable weight, by its name in the module; empty until one was measured."""
        return {} if self._training is None else self._fitted.by_full_name(self._training.flops.layers)

    @property
    def mean_layer_densities(self) -> dict[str, float]:
        """Mean density of every maskable weight over the generator updates so far, by its name in the module."""
        return {} if self._training is None else self._fitted.by_full_name(self._training.flops.mean_densities)

    @property
    def plan(self) -> Plan:
        """The current intervals; None means never, or not known yet."""
        return Plan() if self._training is None else self._training.plan

    def module_name(self, role: Role) -> str:
        """Returns the dotted name of a masked network in its module; of several parts, their names with ``+``."""
        return name_in(self._fitted.module, self._fitted.networks[role].network)

    def networks(self) -> dict[Role, MaskedNetwork]:
        """Returns both sparse networks; empty before fitting, unless `attach` was called."""
        return {} if self._pair is None else dict(self._pair.networks)

    def _density(self, role: Role) -> float:
        if self._pair is not None:
            return self._pair.networks[role].density
        masks = self.masks(role)
        return density_of(masks) if masks else self.settings.initial_densities[role]

    @property
    def _training(self) -> SparseTraining | None:
        return None if self._attached is None else self._attached.training

    @property
    def _fitted(self) -> MaskedPair:
        assert self._pair is not None
        return self._pair
