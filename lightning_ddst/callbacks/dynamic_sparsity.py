"""The callback that trains a GAN sparsely."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.balance import (
    SIGNALS,
    Balance,
    BalanceProbe,
    Controller,
    Decision,
    DensityController,
    DensityRamp,
    RelativeController,
    ScoresItself,
)
from lightning_ddst.balance.controller import ACTIONS
from lightning_ddst.balance.ratio import ESTIMATORS, Estimator
from lightning_ddst.callbacks._support.folders import check_folders
from lightning_ddst.callbacks._support.pending_gradients import PendingGradients
from lightning_ddst.callbacks._support.reporting import hparams, summary_markdown, write_custom_scalars
from lightning_ddst.callbacks._support.rng import random_states, resume_randomness
from lightning_ddst.callbacks._support.run_length import RunLength
from lightning_ddst.callbacks._support.strategies import check_backward_passes, check_strategy, loads_late
from lightning_ddst.callbacks.ema import GeneratorEMA
from lightning_ddst.methods import DropFractionSchedule, Plan, SparseTraining
from lightning_ddst.methods.pruning import MagnitudePruning
from lightning_ddst.sparsity import (
    DISTRIBUTIONS,
    GROWTH_RULES,
    SCHEDULES,
    LayerFlops,
    MaskedNetwork,
    find_units,
    maskable_weights,
)
from lightning_ddst.sparsity.masked import REGROWN, Regrown
from lightning_ddst.sparsity.patterns import matches, name_of_layer
from lightning_ddst.sparsity.selection import count_true
from lightning_ddst.sparsity.units import INITIAL, SCOPES, Initial, Scope
from lightning_ddst.utils import distributed
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.example_inputs import infer_inputs
from lightning_ddst.utils.logging import log_scalars, logs_at, tensorboards
from lightning_ddst.utils.nested import Place
from lightning_ddst.utils.networks import find_network, name_in, refuse_other_averages
from lightning_ddst.utils.validation import check_choice, check_count, check_density, check_rate

Method = Literal["dense", "static", "sdst", "dda", "ddst", "ramp", "posthoc", "imp"]
Role = Literal["generator", "discriminator"]

METHODS = get_args(Method)
_EXPLORING = ("sdst", "ddst", "ramp")
_CONTROLLED = ("dda", "ddst")
_RESIZING = (*_CONTROLLED, "ramp")
_PRUNED = ("posthoc", "imp")

T = TypeVar("T")

_UNKNOWN_LENGTH_INTERVAL = 1000
_WARN_AFTER, _WARN_WINDOW = 7, 10
"""Of the last decisions, that would have pruned a discriminator at its smallest density, before there is a warning."""


class DynamicSparsityCallback(Callback):
    """Trains a GAN sparsely: Double Dynamic Sparse Training (DDST) and what it is compared with.

    Add it to the Trainer of a GAN with manual optimization. It masks the weights of both networks'
    Linear, Conv and ConvTranspose layers, explores the generator's mask, measures the balance
    ratio (BR) around generator updates, and resizes the discriminator's mask to keep BR between
    two bounds ("Double Dynamic Sparse Training for GANs", 2022; "Balanced Training for Sparse
    GANs", NeurIPS 2023, arXiv 2302.14670). Every interval counts generator updates.

    Masks of single weights simulate unstructured sparsity: inactive weights are exactly 0, and dense
    kernels do the arithmetic. With masks of whole channels training computes without inactive ones.

    Args:
        generator_density: The generator's density: active over maskable weights, in (0, 1].
        discriminator_density: The discriminator's: where "dda", "ddst" and "ramp" start, what the
            others have or come to. By default the generator's; with "posthoc" 1.
        method: "dense" (no masks), "static" (masks never change), "sdst" (the generator explores),
            "dda" (the discriminator is resized), "ddst" (both), "ramp" (the generator explores, the
            discriminator's density rises in a straight line to its maximum), "posthoc" (dense, pruned by
            magnitude after two thirds of the run, fine-tuned) or "imp" (iterative magnitude pruning:
            rounds that prune a fifth and go back to the initial weights).
        signal: What the discriminator is resized by: "balance_ratio", "real_sign" (the sign of its scores of
            real images, as in ADA), or a signal registered with `control_signal`.
        bounds: The signal is kept between these; by default the signal's own, 0.45 and 0.55 for BR. "auto"
            takes shares of the highest that BR has been, and follows it.
        min_discriminator_density: Lower limit of resizing. By default the smaller of the generator's
            density and the discriminator's at the start. (The paper's is 0.05. BR starts near 0, so
            the first decisions prune, and a discriminator that is too small to learn is never grown
            again.)
        max_discriminator_density: Upper limit of resizing. 1 is the paper's relaxed setting; below 1
            the strict one, in which the discriminator explores where it may not grow.
        delta: Density that a decision adds or removes. By default 0.05, the paper's; with bounds "auto" so much that
            it takes the whole run from the lower limit to the upper.
        interval: Generator updates between decisions on the discriminator. By default a 100th of the
            run's, but 100 in runs of less than 10,000, and a tenth of less than 1,000; 1,000 where the run's length
            is unknown.
        explore_interval: Generator updates between explorations of the generator. By default half of
            what `interval` is by default.
        probe_interval: Generator updates between measurements of BR; "auto" takes 50 to 100 measurements a
            decision, all there are where `interval` is shorter; None measures nothing.
        generator: Dotted name of the generator in the module; by default the usual names are tried.
        discriminator: The same for the discriminator.
        real: Where the real images are in the batch: a key, an index, or a path of them as
            "images.target". By default they are its one floating-point tensor shaped like the
            generator's output.
        discriminator_output: Where the scores are in what the discriminator returns; by default they
            are its first tensor.
        dense_layers: Layers of either network that are left dense, and out of its density: patterns of
            their names in the module (``"generator.to_rgb"``, ``"*.attention.*"``), or names of
            classes (``"Linear"``).
        layer_densities: Densities of single layers, in (0, 1], by such patterns; the first that
            matches counts. Those layers keep them, and their network's others share what is left.
        initial_masks: "random", or "magnitude" to prune the weights as they are when fitting starts: for
            a GAN that was trained dense and loaded.
        granularity: What masks consist of: single "weight"s, N:M patterns such as "2:4" (N active in every M
            consecutive inputs), or whole "channel"s, which training then computes without. Densities are reached as
            nearly as whole channels allow; with N:M they are N / M. `distribution`, `scope`, `layer_floor` and
            `layer_densities` are for single weights only, and `growth` is not for channels, which grow at random.
        growth: Which inactive weights grow: "gradient" (RigL), "random" (SET), "momentum", or a rule
            registered with `growth_rule`.
        distribution: How active weights are spread over layers at first: "erk", "er" or "uniform".
        scope: "global" lets all layers' weights compete (the paper's), "layer" keeps to `distribution`.
        layer_floor: The share of what `distribution` gives a layer that global pruning leaves it.
        exploration_rate: The share of active weights, or channels, that an exploration replaces, at the start. By
            default 0.5, the paper's; 0.1 of channels.
        schedule: How that share falls over the run: "cosine", "linear" or "constant".
        regrown: What an exploration does with weights that it prunes and grows again: "keep" leaves them their value
            and optimizer state, as RigL's reference code and the paper's do; "reset" has them start from 0.
        estimator: BR over a window: "ratio_of_means" or the paper's, fragile "mean_of_ratios".
        seed: Of what is drawn here; by default torch's initial seed, which `seed_everything` sets.
        stop_on_divergence: Whether to end the run where a warning says that it has broken down: weights
            that are not finite, a discriminator that scores everything alike, no BR for ten intervals.

    Raises:
        ValueError: For an argument outside what is allowed; at the start of fitting, for a network
            that is not found or cannot be masked at these densities.

    Example::

        trainer = Trainer(callbacks=[DynamicSparsityCallback(generator_density=0.1)])
        trainer.fit(my_gan, data)
    """

    def __init__(
        self,
        generator_density: float,
        discriminator_density: float | None = None,
        method: Method = "ddst",
        signal: str = "balance_ratio",
        bounds: tuple[float, float] | Literal["auto"] | None = None,
        min_discriminator_density: float | None = None,
        max_discriminator_density: float = 1.0,
        delta: float | None = None,
        interval: int | None = None,
        explore_interval: int | None = None,
        probe_interval: int | Literal["auto"] | None = "auto",
        generator: str | None = None,
        discriminator: str | None = None,
        real: Place | None = None,
        discriminator_output: Place | None = None,
        dense_layers: Sequence[str] = (),
        layer_densities: Mapping[str, float] | None = None,
        initial_masks: Initial = "random",
        granularity: str = "weight",
        growth: str = "gradient",
        distribution: str = "erk",
        scope: Scope = "global",
        layer_floor: float = 0.25,
        exploration_rate: float | None = None,
        schedule: str = "cosine",
        regrown: Regrown = "reset",
        estimator: Estimator = "ratio_of_means",
        seed: int | None = None,
        stop_on_divergence: bool = False,
    ) -> None:
        self._compared = hparams(locals())
        check_choice("method", method, METHODS)
        units = find_units(granularity)
        units.check_density("generator_density", generator_density)
        check_choice("signal", signal, SIGNALS)
        if discriminator_density is None:
            balanced = min(generator_density, max_discriminator_density)
            discriminator_density = 1.0 if method == "posthoc" else balanced
        units.check_density("discriminator_density", discriminator_density)
        if exploration_rate is None:
            exploration_rate = units.drop_fraction
        check_rate("exploration_rate", exploration_rate)
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("estimator", estimator, ESTIMATORS)
        if isinstance(dense_layers, str):
            raise ValueError(f"dense_layers={dense_layers!r} must be a list of patterns.")
        for pattern, density in (layer_densities or {}).items():
            check_density(f"layer_densities[{pattern!r}]", density)
        check_choice("initial_masks", initial_masks, INITIAL)
        check_choice("regrown", regrown, REGROWN)
        check_choice("growth", growth, GROWTH_RULES)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_choice("scope", scope, SCOPES)
        check_density("layer_floor", layer_floor)
        _check_intervals(method, interval, explore_interval, probe_interval)
        if min_discriminator_density is None:
            min_discriminator_density = min(generator_density, discriminator_density)
        if isinstance(bounds, str) and (bounds != "auto" or signal != "balance_ratio"):
            raise ValueError(f'bounds={bounds!r} with signal={signal!r} must be two numbers; only BR\'s can be "auto".')
        fixed = SIGNALS[signal].bounds if bounds is None or isinstance(bounds, str) else bounds
        fixed = cast(tuple[float, float], tuple(fixed))  # YAML gives a list
        step = DensityController.delta if delta is None else delta
        controller = DensityController(fixed, step, min_discriminator_density, max_discriminator_density, signal)
        if method in _RESIZING:
            units.check_density("max_discriminator_density", max_discriminator_density)
        if discriminator_density > max_discriminator_density and method in _RESIZING:
            raise ValueError(
                f"discriminator_density={discriminator_density} must not be above "
                f"max_discriminator_density={max_discriminator_density}."
            )
        if discriminator_density < min_discriminator_density and method in _RESIZING:
            raise ValueError(
                f"discriminator_density={discriminator_density} must not be below "
                f"min_discriminator_density={min_discriminator_density}."
            )
        dense = method in ("dense", *_PRUNED)
        if dense and layer_densities:
            raise ValueError(
                f'layer_densities={dict(layer_densities)} with method="{method}": its networks are dense at the start.'
            )
        self.method = method
        self._signal = signal if method in _CONTROLLED else None
        self._densities: dict[Role, float] = {
            "generator": 1.0 if dense else generator_density,
            "discriminator": 1.0 if dense else discriminator_density,
        }
        self._pruned_to = (generator_density, discriminator_density)
        self._pruning: MagnitudePruning | None = None
        if method in _PRUNED:
            lowest = min(self._pruned_to)
            self._pruning = MagnitudePruning.post_hoc() if method == "posthoc" else MagnitudePruning.iterative(lowest)
        self._names: dict[Role, str | None] = {"generator": generator, "discriminator": discriminator}
        self._masking: dict[str, Any] = {
            "initial": initial_masks,
            "dense_layers": tuple(dense_layers),
            "regrown": regrown,
        }
        of_weights = {
            "layer_densities": dict(layer_densities or {}),
            "growth": growth,
            "distribution": distribution,
            "scope": scope,
            "layer_floor": layer_floor,
        }
        self._granularity = granularity
        defaults = signature(DynamicSparsityCallback).parameters
        given = {name: value for name, value in of_weights.items() if value and value != defaults[name].default}
        units.check_options(granularity, given)
        self._masking |= given
        self._min_density = min_discriminator_density
        self._new_controller: Controller | None = None
        if method in _CONTROLLED:
            self._new_controller = controller
            if bounds == "auto":
                limits = (min_discriminator_density, max_discriminator_density)
                self._new_controller = RelativeController(limits, delta)
        elif method == "ramp":
            self._new_controller = DensityRamp(discriminator_density, max_discriminator_density)
        self._controller: Controller | None = self._new_controller
        self._exploration = DropFractionSchedule(exploration_rate, schedule)
        self._estimator = estimator
        self._intervals = (interval, explore_interval, probe_interval)
        self._seed = seed
        self._stop_on_divergence = stop_on_divergence
        self._real = real
        self._discriminator_output = discriminator_output
        self._length = RunLength()
        self._networks: dict[Role, MaskedNetwork] = {}
        self._full_names: dict[int, str] = {}
        self._module: nn.Module | None = None
        self._training: SparseTraining | None = None
        self._accumulated: PendingGradients | None = None
        self._saved: Mapping[str, Any] | None = None
        self._handles: list[RemovableHandle] = []
        self._batch: Any = None
        self._in_batch = False
        self._resumed: Mapping[str, Any] | None = None
        self._warned_of_raw_optimizers = False
        self._warned_of_bounds = False

    # ---- what can be read at any time ----------------------------------------------------------------

    @property
    def generator_density(self) -> float:
        """The generator's actual density; before it is known to this callback, what it will be."""
        return self._density("generator")

    @property
    def discriminator_density(self) -> float:
        """The discriminator's actual density; before it is known to this callback, what it will be."""
        return self._density("discriminator")

    def masks(self, network: Role) -> dict[str, Tensor]:
        """The masks of a network.

        Args:
            network: "generator" or "discriminator".

        Returns:
            A bool tensor for every maskable weight, true where active, under the name it has in
            ``pl_module.named_parameters()``. Empty before fitting, unless `attach` was called.
        """
        check_choice("network", network, self._densities)
        if network in self._networks:
            masks = self._networks[network].masks
            return {full: masks[name] for name, full in self._names_in_module(network).items()}
        if self._saved is not None:
            saved = self._saved["networks"][network]
            return {saved["names"][name]: mask for name, mask in saved["masks"].items()}
        return {}

    @property
    def balance(self) -> Balance | None:
        """The balance in the current window, with its parts; None where it is not measured."""
        if self._training is None or self._intervals[2] is None:
            return None
        return self._training.window.read()

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
        """How often BR was measured so far."""
        return 0 if self._training is None else self._training.measurements

    @property
    def decisions(self) -> list[tuple[int, Decision]]:
        """Every decision on densities so far, with the generator update it was made at.

        They are on the discriminator's; with "posthoc" and "imp" on both networks'.
        """
        return [] if self._training is None else list(self._training.decisions)

    @property
    def flops_ratio(self) -> float | None:
        """Training operations so far, relative to dense training; None before the second generator update."""
        flops = self._flops
        return flops.ratio if flops.dense else None

    @property
    def flops_ledger(self) -> dict[str, LayerFlops]:
        """Training operations so far of every maskable weight, by its name in the module; empty where not counted."""
        return {} if self._training is None else self._by_full_name(self._training.flops.layers)

    @property
    def mean_layer_densities(self) -> dict[str, float]:
        """The density of every maskable weight, by its name in the module, averaged over generator updates so far."""
        return {} if self._training is None else self._by_full_name(self._training.flops.mean_densities)

    @property
    def plan(self) -> Plan:
        """The intervals in force; None in it is never, or not known yet."""
        return Plan() if self._training is None else self._training.plan

    def networks(self) -> dict[Role, MaskedNetwork]:
        """Both sparse networks; empty before fitting, unless `attach` was called."""
        return dict(self._networks)

    @property
    def _flops(self) -> LayerFlops:
        """Of both networks so far."""
        return LayerFlops() if self._training is None else self._training.flops.total

    def _by_full_name(self, of_networks: Iterable[Mapping[str, T]]) -> dict[str, T]:
        """What is known of each network's maskable weights, by their names in the module."""
        pairs = zip(self._networks, of_networks, strict=True)
        return {self._names_in_module(role)[name]: value for role, values in pairs for name, value in values.items()}

    def _names_in_module(self, role: Role) -> dict[str, str]:
        """From the names of maskable weights in their network to those in ``pl_module.named_parameters()``."""
        return {name: self._full_names[id(p)] for name, p in self._networks[role].parameters.items()}

    def _density(self, role: Role) -> float:
        if role in self._networks:
            return self._networks[role].density
        if masks := self.masks(role):
            return sum(count_true(mask) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
        return self._densities[role]

    # ---- attaching -----------------------------------------------------------------------------------

    def attach(self, module: nn.Module) -> None:
        """Finds the networks and masks them; fitting does this by itself.

        Args:
            module: What holds the generator and the discriminator.

        Raises:
            ValueError: If a network is not found, or cannot be masked at its density.
        """
        # One process's: drawing the masks sets weights to 0, and the weights are the same everywhere already.
        seed = distributed.broadcast(torch.initial_seed() if self._seed is None else self._seed)
        self._module = module
        self._full_names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._networks = {}
        found = {role: find_network(module, role, name) for role, name in self._names.items()}
        if found["generator"] is found["discriminator"]:
            raise ValueError(f"generator and discriminator are the same module, {self._names['discriminator']!r}.")
        self._check_patterns(module, found)
        needs_inputs = find_units(self._granularity).needs_inputs
        inputs = infer_inputs(module, found["generator"]) if needs_inputs else ((), ())
        for offset, (role, network) in enumerate(found.items()):
            # Of several pairs each has masks of its own.
            of_name = zlib.crc32((self._names[role] or "").encode())
            try:
                self._networks[role] = self._masked(
                    network,
                    self._densities[role],
                    inputs[offset],
                    name=name_in(module, network),
                    seed=seed % 2**62 + offset + 2 * of_name,
                    state=None if self._saved is None else self._saved["networks"][role],
                )
            except ValueError as error:
                raise ValueError(f"{role} with {role}_density={self._densities[role]}: {error}") from error
        lowest: dict[Role, tuple[str, float]] = {}
        if self.method in _CONTROLLED:
            lowest["discriminator"] = ("min_discriminator_density", self._min_density)
        if self._pruning is not None:
            generator_density, discriminator_density = self._pruned_to
            lowest["generator"] = ("generator_density", generator_density)
            lowest["discriminator"] = ("discriminator_density", discriminator_density)
        for role, (argument, density) in lowest.items():
            try:
                self._networks[role].allocation(density)
            except ValueError as error:
                raise ValueError(f"{argument}={density}: {error}") from error

    def _masked(self, network: nn.Module, density: float, inputs: Sequence[Any], **options: Any) -> MaskedNetwork:
        """A network with masks, which is called with these inputs, known where masks are of channels."""
        return MaskedNetwork(network, density, granularity=self._granularity, inputs=inputs, **self._masking, **options)

    def _check_patterns(self, module: nn.Module, found: Mapping[Role, nn.Module]) -> None:
        arguments = [argument for argument in ("dense_layers", "layer_densities") if self._masking.get(argument)]
        if not arguments:
            return
        layers = {
            name_of_layer(name_in(module, network), name): layer
            for network in found.values()
            for weight in maskable_weights(network)
            for name, layer in weight.layers.items()
        }
        for argument in arguments:
            for pattern in self._masking[argument]:
                if not any(matches(pattern, name, layer) for name, layer in layers.items()):
                    raise ValueError(
                        f"{argument}: {pattern!r} matches no layer; there are {', '.join(layers)}, and classes "
                        f"{', '.join(sorted({type(layer).__name__ for layer in layers.values()}))}."
                    )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that masks can be held under the Trainer's strategy."""
        if stage == "fit":
            check_strategy(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Masks the networks, and hooks into them and their optimizers."""
        if not loads_late(trainer):
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_backward_passes(trainer)
        check_folders(trainer, pl_module)
        if self._saved is None and self._training is not None and self._module is pl_module:
            self._saved = self.state_dict()  # fitting goes on
        if self._saved is not None or not self._networks or self._module is not pl_module:
            self.attach(pl_module)
        generator, discriminator = self._networks["generator"], self._networks["discriminator"]
        if self.method in _PRUNED or (self.method in _EXPLORING and generator.density < 1):
            refuse_other_averages(trainer, pl_module, generator.network)
        self._refuse_shared(trainer, pl_module)
        for network in self._networks.values():
            if distributed.is_distributed():  # after a call of attach there may be others
                network.load_state_dict(distributed.broadcast(network.state_dict()))
            network.to_weights()
        probe = None
        if self._intervals[2] is not None:
            probe = BalanceProbe(
                generator.network,
                discriminator.network,
                real=self._real,
                discriminator_output=self._discriminator_output,
                module=pl_module if isinstance(pl_module, ScoresItself) else None,
            )
        self._controller = deepcopy(self._new_controller)  # which follows these networks' BR
        self._warned_of_bounds = False
        self._training = SparseTraining(
            generator,
            discriminator,
            trainer.optimizers,
            explores=self.method in _EXPLORING,
            controller=self._controller,
            probe=probe,
            exploration=self._exploration,
            estimator=self._estimator,
            plan=self._planned(),
            pruning=self._pruning,
            pruned_to=self._pruned_to,
            unscaled=_unscaled(trainer),
        )
        self._accumulated = PendingGradients(trainer.optimizers)
        if self._saved is not None:
            self._training.load_state_dict(self._saved["training"])
            self._length.load_state_dict(self._saved["length"])
            self._saved = None
        else:
            self._length = RunLength()
        self._training.check_ranks()
        for optimizer in self._training.generator_optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(lambda stepping, *_: self._before_step(stepping)),
                optimizer.register_step_post_hook(lambda stepped, *_: self._after_step(trainer, stepped)),
            ]
        pairs = [self, *self._others(trainer)]
        if all(pair._module is pl_module for pair in pairs):  # the last one
            write_custom_scalars(trainer, pl_module, {pair._prefix(trainer): pair._compared for pair in pairs})

    def _refuse_shared(self, trainer: Trainer, module: LightningModule) -> None:
        others = self._others(trainer)
        if others and isinstance(module, ScoresItself):
            raise ValueError(
                f"{type(module).__name__}.balance_scores gives the scores of one pair, and there are "
                f"{len(others) + 1} DynamicSparsityCallbacks."
            )
        own = {id(parameter) for network in self._networks.values() for parameter in network.parameters.values()}
        for other in others:
            for role, network in other.networks().items():
                if other._module is module and any(id(p) in own for p in network.parameters.values()):
                    raise ValueError(f"two DynamicSparsityCallbacks mask the same {role}; each weight has one mask.")

    def _others(self, trainer: Trainer) -> list["DynamicSparsityCallback"]:
        """The callbacks of other pairs."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if isinstance(c, DynamicSparsityCallback) and c is not self]

    def _planned(self) -> Plan:
        """The intervals, as far as they are known by now."""
        interval, explore_interval, probe_interval = self._intervals
        if self._length.known:
            updates = self._length.updates
            if interval is None:
                interval = _default_interval(updates)
                interval = max(interval, probe_interval if isinstance(probe_interval, int) else 1)
            if explore_interval is None:
                explore_interval = _default_interval(updates) // 2
        if probe_interval == "auto":
            probe_interval = _default_probe_interval(interval)
        return Plan(interval, explore_interval, probe_interval, self._length.updates)

    # ---- training --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over from a checkpoint what the Trainer would have changed before."""
        if loads_late(trainer):
            self._begin(trainer, pl_module)
        if self._resumed is not None and self._accumulated is not None:
            self._accumulated.load_state_dict(self._resumed["accumulated"])
            resume_randomness(trainer, self._resumed["random"])
        self._resumed = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the batch, for the real images in it."""
        self._batch, self._in_batch = batch, True

    @uncompiled
    def _before_step(self, optimizer: Optimizer) -> None:
        if self._training is not None and self._in_batch:
            self._training.before_step(optimizer)

    @uncompiled
    def _after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self._training is None or not self._in_batch:
            return  # loading a checkpoint of FSDP2 makes steps, too
        decided, reported = len(self._training.decisions), len(self._training.divergence.reports)
        rewinds_done = self._training.rewinds
        if not self._training.after_step(optimizer, self._batch):
            return
        if self._training.rewinds > rewinds_done:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GeneratorEMA):
                    callback.restart(self._networks["generator"].network)
        new = self._training.decisions[decided:]
        line_is_due = logs_at(trainer, self._training.updates)
        if line_is_due:
            self._training.divergence.finite(self._training.updates)
        self._report(trainer, self._training.divergence.reports[reported:])
        if not new and not line_is_due:
            return
        prefix = self._prefix(trainer)
        values = {f"{prefix}{name}": value for name, value in self._scalars().items()}
        log_scalars(trainer, values, self._training.updates)
        for update, decision in new:
            for writer in tensorboards(trainer):
                writer.add_text(f"{prefix}decision/reason", f"{decision.action}: {decision.reason}", update)
        if new and not self._warned_of_bounds:
            self._warn_of_bounds(self._training.decisions)

    def _warn_of_bounds(self, decisions: Sequence[tuple[int, Decision]]) -> None:
        at_floor = [(update, decision.reason) for update, decision in decisions[-_WARN_WINDOW:] if decision.at_floor]
        if len(at_floor) < _WARN_AFTER:
            return
        self._warned_of_bounds = True
        update, reason = at_floor[-1]
        rank_zero_warn(
            f"at generator update {update}: {reason}; so it was in {len(at_floor)} of the last {_WARN_WINDOW} "
            "decisions. Where the signal is on one side of its bounds whatever the discriminator is, they do not fit "
            'the GAN, and keep it too sparse to learn. bounds="auto" and method="ramp" do not depend on the signal\'s '
            "level."
        )

    def _report(self, trainer: Trainer, reports: Sequence[tuple[int, str]]) -> None:
        for update, message in reports:
            trainer.should_stop |= self._stop_on_divergence
            ending = " The run stops." if self._stop_on_divergence else ""
            rank_zero_warn(f"at generator update {update}: {message}{ending}")
            for writer in tensorboards(trainer):
                writer.add_text(f"{self._prefix(trainer)}divergence", message, update)

    def _prefix(self, trainer: Trainer) -> str:
        """Of what is logged: the generator's name where several pairs are trained sparsely."""
        assert self._module is not None
        if not self._others(trainer):
            return ""
        return f"{name_in(self._module, self._networks['generator'].network)}/"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Works out the run's length in generator updates, once."""
        self._batch, self._in_batch = None, False
        if self._training is None:
            return
        self._training.after_batch(batch)
        if self._training.updates and not trainer.global_step and not self._warned_of_raw_optimizers:
            self._warned_of_raw_optimizers = True
            rank_zero_warn(
                "the generator was updated and Trainer.global_step is still 0: the training step steps torch's own "
                "optimizers (trainer.optimizers, self.optimizers(use_pl_optimizer=False)), which Lightning does not "
                "count. ModelCheckpoint saves nothing until the run ends, and max_steps does not end it. Step what "
                "self.optimizers() returns."
            )
        if self._length.known:
            return
        self._length.observe(trainer, self._training.updates)
        if self._length.known:
            self._training.schedule(self._planned())
            if self._length.updates is None:
                self._length_is_unknown()

    def _length_is_unknown(self) -> None:
        unknown = (
            "nothing but time limits this run (max_epochs, max_steps), so its length in generator updates is unknown"
        )
        if self.method in ("ramp", *_PRUNED):
            raise ValueError(f'{unknown}, and method="{self.method}" is spread over the run\'s length.')
        if self.method in _EXPLORING:
            rank_zero_warn(f"{unknown}: the exploration rate stays what it is at the start.")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says in words what happened so far."""
        if self._training is not None:
            relative = isinstance(self._controller, RelativeController)
            words = summary_markdown(
                self.method, self._signal, self._training, self._densities["discriminator"], relative
            )
            for writer in tensorboards(trainer):
                writer.add_text(f"{self._prefix(trainer)}about/what_happened", words, self.generator_updates)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps evaluation out of what is counted as training."""
        if self._training is not None:
            self._training.flops.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on counting."""
        if self._training is not None:
            self._training.flops.resume()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs where the operations were, and takes every hook away."""
        for writer in tensorboards(trainer):
            if ledger := self.flops_ledger:
                writer.add_text(f"{self._prefix(trainer)}flops/ledger", _table(ledger), self.generator_updates)
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes every hook away."""
        self._detach()

    def _detach(self) -> None:
        self._batch, self._in_batch = None, False
        if self._training is not None:
            self._training.detach()
        if self._accumulated is not None:
            self._accumulated.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _scalars(self) -> dict[str, float]:
        assert self._training is not None
        values: dict[str, float] = {}
        if (balance := self.balance) is not None and balance.samples:
            parts = ("alpha", "beta", "real", "fake", "real_sign")
            values |= {f"balance/{part}": getattr(balance, part) for part in parts}
            if balance.ratio is not None:
                values["balance/ratio"] = balance.ratio
            if self._controller is not None:
                values |= self._controller.readings(balance)
        for role, network in self._networks.items():
            values[f"density/{role}"] = network.density
            values[f"density/{role}_target"] = network.target
            values |= {f"coverage/{role}": network.coverage, f"overlap/{role}": network.overlap}
            densities = network.layer_densities
            values |= {f"layer_density/{full}": densities[name] for name, full in self._names_in_module(role).items()}
        if self.method in (*_RESIZING, *_PRUNED):
            actions = [decision.action for _, decision in self._training.decisions]
            values |= {f"decision/{action}": float(actions.count(action)) for action in ACTIONS}
        if (flops := self._flops).dense:
            values |= {"flops/training_ratio": flops.ratio, "flops/measuring_ratio": flops.probes / flops.dense}
        return values

    # ---- saving ----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Of its own for every pair of networks that is named."""
        named = {role: name for role, name in self._names.items() if name is not None}
        return self._generate_state_key(**named) if named else super().state_key

    def state_dict(self) -> dict[str, Any]:
        """Masks, counters, the balance window and every random state; loads with ``weights_only=True``."""
        if self._saved is not None:
            return dict(self._saved)
        if self._training is None or self._accumulated is None:
            return {}
        networks = {
            role: network.state_dict() | {"names": self._names_in_module(role)}
            for role, network in self._networks.items()
        }
        return {
            "method": self.method,
            "networks": networks,
            "training": self._training.state_dict(),
            "length": self._length.state_dict(),
            "accumulated": self._accumulated.state_dict(),
            "random": distributed.all_gather(random_states()),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that says nothing about this callback's masks, unless they come from its weights."""
        saved = checkpoint.get("callbacks", {})
        method = saved.get(self.state_key, {}).get("method", self.method)
        if trainer.state.fn == "fit" and method != self.method:
            raise ValueError(
                f'the checkpoint is of a run with method="{method}", and this one has method="{self.method}". To begin '
                "another run from its weights, load them into the module and fit without ckpt_path."
            )
        if trainer.state.fn != "fit" or saved.get(self.state_key) or self._masking["initial"] == "magnitude":
            return
        others = [key for key in saved if key.startswith(type(self).__name__)]
        raise ValueError(
            f"the checkpoint holds no masks for {self.state_key}"
            + (f", but for {', '.join(others)}. Name the same networks as then." if others else ".")
            + ' To start from the dense networks in it, say initial_masks="magnitude"; to start from its weights with '
            "random masks, load them into the module and fit without ckpt_path."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; fitting goes on from it."""
        if state_dict:
            self._saved = state_dict
            self._resumed = state_dict
            self._networks, self._training = {}, None


def _default_interval(updates: int | None) -> int:
    """Between decisions, for the length of a run."""
    if updates is None:
        return _UNKNOWN_LENGTH_INTERVAL
    return max(10, min(updates // 10, 100), updates // 100)


def _default_probe_interval(interval: int | None) -> int:
    """Between measurements: a 100th of what is between decisions, but in short runs, where that costs most, a 50th."""
    return 1 if interval is None else max(1, min(interval // 50, 2), interval // 100)


def _table(ledger: Mapping[str, LayerFlops]) -> str:
    """The operations layer by layer, in Markdown."""
    rows = [
        "| layer | steps | dense gradients | measuring BR | dense training | share of dense |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in [*ledger.items(), ("**all**", LayerFlops.total(ledger.values()))]:
        cells = [f"{value:.4g}" for value in (f.steps, f.dense_gradients, f.probes, f.dense)]
        rows.append(f"| {name} | {' | '.join(cells)} | {f.ratio:.1%} |")
    return "\n".join(rows)


def _unscaled(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Takes the scale of fp16's loss off gradients, where there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return torch.clone
    return lambda gradient: gradient / scaler.scale(torch.ones((), device=gradient.device))


def _check_intervals(
    method: str, interval: int | None, explore_interval: int | None, probe_interval: int | str | None
) -> None:
    for name, value in (("interval", interval), ("explore_interval", explore_interval)):
        if value is not None:
            check_count(name, value)
    if probe_interval is None:
        if method in _CONTROLLED:
            raise ValueError(f'probe_interval=None measures no balance ratio, which method="{method}" needs.')
    elif probe_interval != "auto":
        if not isinstance(probe_interval, int):
            raise ValueError(f'probe_interval={probe_interval!r} must be an integer, at least 1, "auto" or None.')
        check_count("probe_interval", probe_interval)
        if interval is not None and probe_interval > interval:
            raise ValueError(f"probe_interval={probe_interval} must not be longer than interval={interval}.")
