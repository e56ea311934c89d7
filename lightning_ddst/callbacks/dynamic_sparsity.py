"""The callback that trains a GAN sparsely."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.balance.ratio import Estimator
from lightning_ddst.callbacks._support.checks import (
    check_checkpoint,
    check_finite_weights,
    check_masks,
    check_separate,
    check_settings,
    check_unchanged,
    check_unlimited,
    is_same,
    warn_of_raw_optimizers,
)
from lightning_ddst.callbacks._support.folders import check_folders
from lightning_ddst.callbacks._support.options import MaskingOptions, MeasuringOptions, list_arguments
from lightning_ddst.callbacks._support.pending_gradients import PendingGradients
from lightning_ddst.callbacks._support.readings import RunReadings
from lightning_ddst.callbacks._support.reporting import RunReport, hparams, write_custom_scalars
from lightning_ddst.callbacks._support.rng import random_states, resume_randomness
from lightning_ddst.callbacks._support.run_length import RunLength
from lightning_ddst.callbacks._support.strategies import (
    check_backward_passes,
    check_strategy,
    loads_late,
    make_unscaler,
)
from lightning_ddst.callbacks.ema import GeneratorEMA
from lightning_ddst.callbacks.quality import SampleQuality
from lightning_ddst.methods import Intervals, Method, Plan, SparseTraining, make_method
from lightning_ddst.methods.masked_pair import MaskedPair
from lightning_ddst.sparsity import find_units
from lightning_ddst.sparsity.enforcement import OptimizerState
from lightning_ddst.sparsity.masked import Regrown
from lightning_ddst.sparsity.units import Initial
from lightning_ddst.utils import distributed
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.lightning_private import state_key
from lightning_ddst.utils.nested import Place
from lightning_ddst.utils.networks import name_in, refuse_other_averages
from lightning_ddst.utils.states import ANYTHING, PLAIN, RANDOM_STATES, TEXT, Form, check_state, each, named, restoring

METHOD_ARGUMENTS = (
    *("generator_density", "discriminator_density", "signal", "bounds", "delta"),
    *("min_discriminator_density", "max_discriminator_density", "exploration_rate", "schedule"),
)
"""Arguments of the method; None means the method's own default."""
UNITS_ARGUMENTS = ("growth", "distribution", "scope", "layer_floor", "layer_densities")
"""Arguments of the granularity; None means its own default."""
_STATE_FORM: Form = {
    "method": TEXT,
    "settings": named(PLAIN),
    "networks": named(ANYTHING),  # depends on the granularity
    "training": SparseTraining.state_form,
    "length": RunLength.state_form,
    "pending_gradients": PendingGradients.state_form,
    "random": each(RANDOM_STATES),
}


class DynamicSparsityCallback(RunReadings, Callback):
    """Trains a GAN sparsely: Double Dynamic Sparse Training (DDST) and the methods it is compared with.

    Add it to the Trainer of a GAN with manual optimization. It masks the weights of both networks' Linear, Conv and
    ConvTranspose layers, explores the generator's mask, measures the balance ratio (BR) around generator updates, and
    resizes the discriminator's mask to keep BR between two bounds ("Double Dynamic Sparse Training for GANs", 2022;
    "Balanced Training for Sparse GANs", NeurIPS 2023, arXiv 2302.14670). Every interval counts generator updates.

    Masks of single weights simulate unstructured sparsity: inactive weights are exactly 0, and dense kernels do the
    arithmetic. With masks of whole channels, training computes without the inactive ones.

    Args:
        generator_density: The generator's density: active over maskable weights, in (0, 1]. All methods but "dense"
            need it; for N:M masks it is N/M.
        discriminator_density: The discriminator's density: at the start for "dda", "ddst" and "ramp", else the one it
            keeps or reaches. By default the generator's density; 1 for "posthoc".
        method: "dense" (no masks), "static" (masks never change), "sdst" (the generator explores), "dda" (the
            discriminator is resized), "ddst" (both), "ramp" (the generator explores, the discriminator's density rises
            in a straight line to its maximum), "posthoc" (dense, pruned by magnitude after two thirds of the run,
            fine-tuned), "imp" (iterative magnitude pruning: rounds that prune a fifth and restore the initial
            weights), a name registered with `training_method`, or a `lightning_ddst.methods.Method` object. An object
            has its own densities, signal, bounds, limits and exploration rate. An argument that the method does not
            have is rejected.
        signal: Signal that controls the discriminator's density: "balance_ratio", "real_sign" (the mean sign of its
            scores of real images, as in ADA), or a signal registered with `control_signal`.
        bounds: Lower and upper bound of the signal; by default the signal's own, 0.45 and 0.55 for BR. "auto" takes
            shares of the highest BR so far.
        min_discriminator_density: Lower limit of resizing. By default the smaller of the generator's density and the
            discriminator's at the start. (The paper uses 0.05. BR starts near 0, so the first decisions prune, and a
            discriminator that is too small to learn never grows again.)
        max_discriminator_density: Upper limit of resizing. 1, the default, is the paper's relaxed setting; below 1, the
            strict one, the discriminator explores at its maximum instead of growing.
        delta: Density that a decision adds or removes. By default 0.05, the paper's; with bounds "auto" as much as
            takes the whole run from the lower limit to the upper.
        interval: Generator updates between decisions on the discriminator. By default 1 % of the run's length; 100 in
            runs of less than 10,000, a tenth of runs of less than 1,000, and 1,000 if the length is unknown.
        explore_interval: Generator updates between explorations of the generator; by default half the default of
            `interval`.
        probe_interval: Generator updates between measurements of BR. "auto" makes 50 to 100 measurements per decision,
            or one per update where `interval` is shorter; None measures nothing.
        generator: Dotted name of the generator in the module; by default the usual names are tried.
        discriminator: Dotted name of the discriminator; by default the usual names are tried.
        real: Place of the real images in the batch: a key, an index, or a path of them such as "images.target". By
            default its one floating-point tensor that is shaped like the generator's output.
        discriminator_output: Place of the scores in the discriminator's output; by default its first tensor.
        dense_layers: Layers of either network that stay dense and outside its density: patterns of their names in the
            module (``"generator.to_rgb"``, ``"*.attention.*"``), or class names (``"Linear"``).
        layer_densities: Densities of single layers, in (0, 1], by such patterns; the first match counts. These layers
            keep their densities, and the other layers of their network share the rest.
        initial_masks: "random", or "magnitude" to prune the present weights when fitting starts, for a GAN that was
            trained dense and loaded.
        granularity: Unit of the masks: single "weight"s, whole "channel"s, or "N:M" (such as "2:4"): N of every M
            weights along the input dimension, at density N/M. Channels reach densities as nearly as whole ones allow.
        growth: Inactive weights that grow: "gradient" (RigL), "random" (SET), "momentum", or a rule registered with
            `growth_rule`. Channels grow at random.
        distribution: Distribution of active weights over layers at the start: "erk", "er" or "uniform".
        scope: "global", the paper's, lets the weights of all layers compete; "layer" keeps to `distribution`.
        layer_floor: Share of a layer's count in `distribution` that global pruning must leave; by default 0.25.
        exploration_rate: Drop fraction at the start: the share of active units that an exploration prunes and regrows.
            By default 0.5, the paper's, and 0.1 for channels.
        schedule: Decay of the drop fraction over the run: "cosine", "linear" or "constant".
        regrown: Treatment of weights that an exploration prunes and grows again: "keep" keeps their value and optimizer
            state, as RigL's reference code and the paper's do; "reset" restarts them from 0.
        optimizer_state: "reset" keeps the optimizer state of inactive weights at 0, so that a grown weight starts with
            fresh state; "keep" leaves it to the optimizer, as the paper's code does with Adam.
        estimator: Estimator of BR over a window: "ratio_of_means", or the paper's, fragile "mean_of_ratios".
        seed: Seed of the masks; by default torch's initial seed, which `seed_everything` sets.
        stop_on_divergence: Whether to end the run when a warning reports that training has broken down: weights that
            are not finite, a discriminator that gives everything the same score, no BR for ten intervals.

    Attributes:
        settings: The method with its arguments, a `lightning_ddst.methods.Method`.

    Raises:
        ValueError: For an argument outside the allowed range; at the start of fitting, for a network that is not found
            or cannot be masked at these densities.

    Example::

        trainer = Trainer(callbacks=[DynamicSparsityCallback(generator_density=0.1)])
        trainer.fit(my_gan, data)
    """

    def __init__(
        self,
        generator_density: float | None = None,
        discriminator_density: float | None = None,
        method: Method | str = "ddst",
        signal: str | None = None,
        bounds: tuple[float, float] | Literal["auto"] | None = None,
        min_discriminator_density: float | None = None,
        max_discriminator_density: float | None = None,
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
        growth: str | None = None,
        distribution: str | None = None,
        scope: str | None = None,
        layer_floor: float | None = None,
        exploration_rate: float | None = None,
        schedule: str | None = None,
        regrown: Regrown = "reset",
        optimizer_state: OptimizerState = "reset",
        estimator: Estimator = "ratio_of_means",
        seed: int | None = None,
        stop_on_divergence: bool = False,
    ) -> None:
        arguments = dict(locals())
        if generator_density is None and isinstance(method, str):
            arguments["generator_density"] = find_units(granularity).fixed_density  # of N:M masks
        self.settings = make_method(method, {name: arguments[name] for name in METHOD_ARGUMENTS})
        self._masking = MaskingOptions(
            generator,
            discriminator,
            granularity,
            initial_masks,
            regrown,
            optimizer_state,
            dense_layers,
            {name: arguments[name] for name in UNITS_ARGUMENTS if arguments[name] is not None},
        )
        self._masking.check_method(self.settings)
        self._measuring = MeasuringOptions(real, discriminator_output, estimator)
        self._intervals = Intervals(interval, explore_interval, probe_interval)
        if probe_interval is None and self.settings.needs_balance:
            raise ValueError(f'probe_interval=None measures no balance ratio, which method="{self.method}" needs.')
        self._seed = seed
        self._stop_on_divergence = stop_on_divergence
        self._length = RunLength()
        self._report: RunReport | None = None
        self._pending: PendingGradients | None = None
        self._resumed: Mapping[str, Any] | None = None  # the state that fit resumes from, until training starts
        self._evaluates = False  # whether the checkpoint that is loaded is for an evaluation
        self._handles: list[RemovableHandle] = []
        self._batch: Any = None
        self._in_batch = False
        self._warned_of_raw_optimizers = False

    # ---- attaching -----------------------------------------------------------------------------------

    def attach(self, module: nn.Module) -> None:
        """Finds the networks and masks them; `Trainer.fit` calls this automatically.

        Args:
            module: The module that holds the generator and the discriminator.

        Raises:
            ValueError: If a network is not found, or cannot be masked at its density.
        """
        # All processes use one seed: they hold the same weights, and must set the same ones to 0.
        seed = distributed.broadcast(torch.initial_seed() if self._seed is None else self._seed)
        self._pair = None
        saved = None if self._saved is None else self._saved["networks"]
        self._pair = self._masking.mask(module, self.settings, seed, saved)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that masks work under the Trainer's strategy."""
        if stage == "fit":
            check_strategy(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Masks the networks and registers hooks on them and their optimizers."""
        if not loads_late(trainer):
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_backward_passes(trainer)
        check_folders(trainer, pl_module)
        if self._resumed is None:
            self._saved = None  # of a checkpoint that was evaluated
        if self._saved is None and self._training is not None and self._module is pl_module:
            self._saved = self.state_dict()  # a second call of fit continues the first
            self._saved["length"] = RunLength().state_dict()  # over a length of its own
        if self._saved is not None or self._module is not pl_module:
            self.attach(pl_module)
        pair = self._fitted
        for network in pair.networks.values():
            if distributed.is_distributed():  # an earlier call of attach may have drawn other masks in each process
                network.load_state_dict(distributed.broadcast(network.state_dict()))
            network.to_weights()
        if self._saved is None:
            check_finite_weights(pair)
        mask_updates = self.settings.mask_updates()
        generator = pair.networks["generator"]
        if any("generator" in each.roles and (each.resizes or generator.density < 1) for each in mask_updates):
            refuse_other_averages(trainer, pl_module, generator.network)
        others = self._others(trainer)
        check_separate(pair, [other._fitted for other in others if other._module is pl_module], pl_module)
        self._length = RunLength()
        measured = self._intervals.probe_interval is not None
        self._training = SparseTraining(
            generator,
            pair.networks["discriminator"],
            trainer.optimizers,
            mask_updates,
            probe=self._measuring.probe(pair) if measured else None,
            estimator=self._measuring.estimator,
            plan=self._planned(),
            unscaled=make_unscaler(trainer),
            optimizer_state=self._masking.optimizer_state,
        )
        self._pending = PendingGradients(trainer.optimizers)
        if self._saved is not None:
            with restoring(self.state_key):
                self._training.load_state_dict(self._saved["training"])
            self._length.load_state_dict(self._saved["length"])
            self._training.schedule(self._planned())
            self._saved = None
        self._training.check_ranks()
        for optimizer in self._training.generator_optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(lambda stepping, *_: self._before_step(stepping)),
                optimizer.register_step_post_hook(lambda stepped, *_: self._after_step(trainer, stepped)),
            ]
        prefix, stops = self._prefix(trainer), self._stop_on_divergence
        self._report = RunReport(self.settings, pair, self._training, prefix=prefix, measured=measured, stops=stops)
        if all(other._module is pl_module for other in others):  # the other pairs are attached already
            arguments = {each._prefix(trainer): each._hparams() for each in (self, *others)}
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            metrics = [name for each in callbacks if isinstance(each, SampleQuality) for name in each.names]
            write_custom_scalars(trainer, pl_module, arguments, metrics)

    @property
    def _module(self) -> nn.Module | None:
        return None if self._pair is None else self._pair.module

    def _hparams(self) -> dict[str, float | str]:
        return hparams(self.settings, self._masking.granularity, self._fitted.networks["generator"].growth)

    def _others(self, trainer: Trainer) -> list["DynamicSparsityCallback"]:
        """Returns the callbacks of the other pairs of networks."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if isinstance(c, DynamicSparsityCallback) and c is not self]

    def _prefix(self, trainer: Trainer) -> str:
        """Returns the prefix of logged names: the generator's name if there are several pairs, else nothing."""
        if not self._others(trainer):
            return ""
        return f"{name_in(self._fitted.module, self._fitted.networks['generator'].network)}/"

    def _planned(self) -> Plan:
        length = self._length
        return Plan.for_run(self._intervals, length.updates, known=length.known, reference=length.reference)

    # ---- training --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores gradients and random states, which the Trainer would have changed earlier."""
        if loads_late(trainer):
            self._begin(trainer, pl_module)
        if self._resumed is not None and self._pending is not None:
            if self._training is not None and self._length.resume(trainer):
                self._training.schedule(self._planned())
            with restoring(self.state_key):
                self._pending.load_state_dict(self._resumed["pending_gradients"])
            resume_randomness(trainer, self._resumed["random"])
        self._resumed = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the batch, which holds the real images, and follows optimizers that were made anew."""
        if self._training is not None and not is_same(self._training.optimizers, trainer.optimizers):
            self._follow_optimizers(trainer, pl_module)
        self._batch, self._in_batch = batch, True

    def _follow_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        length = self._length.state_dict()
        self._resumed = self.state_dict() | {"length": length}
        self._saved = self._resumed
        self._detach()
        self._begin(trainer, module)
        self._resumed = None  # random states and gradients stay what they are
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GeneratorEMA):
                callback.hook(trainer, module)  # averages come after masks
        rank_zero_info("DynamicSparsityCallback: the optimizers were made anew; their steps are followed.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the networks still have the weights that were masked, and inactive ones are 0."""
        if self._training is not None:
            check_unchanged(self._fitted)

    @uncompiled
    def _before_step(self, optimizer: Optimizer) -> None:
        if self._training is not None and self._in_batch:
            self._training.before_step(optimizer)

    @uncompiled
    def _after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self._training is None or not self._in_batch:
            return  # loading an FSDP2 checkpoint also steps the optimizers
        rewinds = self._training.rewinds
        if self._training.after_step(optimizer, self._batch):
            self._after_update(trainer, self._training.rewinds > rewinds)

    def _after_update(self, trainer: Trainer, rewound: bool) -> None:
        assert self._training is not None
        if rewound:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GeneratorEMA):
                    callback.restart(self._training.network("generator").network)
        if self._report is not None:
            self._report.after_update(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follows the run's length, as the Trainer's progress tells it."""
        self._batch, self._in_batch = None, False
        if self._training is None:
            return
        rewinds = self._training.rewinds
        if self._training.after_batch(batch):
            self._after_update(trainer, self._training.rewinds > rewinds)
        if self._training.updates and not trainer.global_step and not self._warned_of_raw_optimizers:
            self._warned_of_raw_optimizers = True
            warn_of_raw_optimizers()
        self._follow_length(trainer, self._training)

    def _follow_length(self, trainer: Trainer, training: SparseTraining) -> None:
        was_known = self._length.known
        if self._length.observe(trainer, training.updates):
            training.schedule(self._planned())
            if not was_known and self._length.updates is None:
                check_unlimited(self.settings, training)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a summary of the run so far to TensorBoard."""
        if self._report is not None:
            self._report.after_epoch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pauses counting operations: evaluation is not training."""
        if self._training is not None:
            self._training.flops.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resumes counting operations."""
        if self._training is not None:
            self._training.flops.resume()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the operations of each layer and removes every hook."""
        if self._report is not None:
            self._report.after_fit(trainer)
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes every hook, and forgets a state that could not be resumed."""
        self._detach()
        if self._resumed is not None:
            self._saved = self._resumed = self._pair = self._training = None

    def _detach(self) -> None:
        self._batch, self._in_batch, self._report = None, False, None
        if self._training is not None:
            self._training.detach()
        if self._pending is not None:
            self._pending.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- saving ----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of the state; it holds the networks' names if they were given, so several pairs do not collide."""
        named = {role: name for role, name in self._masking.names.items() if name is not None}
        return state_key(self, **named) if named else super().state_key

    def _arguments(self) -> dict[str, Any]:
        options = (self.settings, self._masking, self._measuring, self._intervals)
        return {name: value for each in options for name, value in list_arguments(each).items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns masks, counters, the balance window and every random state; loads with ``weights_only=True``."""
        if self._saved is not None:
            return dict(self._saved)
        if self._training is None or self._pending is None or self._pair is None:
            return {}
        return {
            "method": self.method,
            "settings": self._arguments(),
            "networks": self._pair.state_dict(),
            "training": self._training.state_dict(),
            "length": self._length.state_dict(),
            "pending_gradients": self._pending.state_dict(),
            "random": distributed.all_gather(random_states()),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint that a fit cannot resume from, before anything has changed.

        Raises:
            ValueError: If the checkpoint is of other settings, has a state of another form, or has no masks for this
                callback, unless ``initial_masks="magnitude"``.
        """
        self._evaluates = trainer.state.fn != "fit"
        if self._evaluates:
            return
        saved = checkpoint.get("callbacks", {})
        check_state("the checkpoint", {"callbacks": saved}, {"callbacks": named(ANYTHING)})
        if state := saved.get(self.state_key):
            self._check_state(state)
        needs_masks = self._masking.initial_masks != "magnitude"
        check_checkpoint(saved, self.state_key, self.settings, needs_masks=needs_masks)
        if state:
            check_settings(state["settings"], self._arguments())
            with restoring(self.state_key):
                check_masks(pl_module, self._masking.find_networks(pl_module), state["networks"])
                for update, held in zip(self.settings.mask_updates(), state["training"]["mask_updates"], strict=False):
                    update.load_state_dict(held["state"])

    def _check_state(self, state: Any) -> None:
        """Checks the form of a state, which may be of another method and granularity."""
        check_state(self.state_key, state, _STATE_FORM)
        with restoring(self.state_key):
            form = MaskedPair.state_form(state["settings"].get("granularity"))
        check_state(self.state_key, {"networks": state["networks"]}, {"networks": form})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict` when fitting starts.

        A checkpoint that is loaded for an evaluation can be read, if nothing was fitted before, and no fit resumes it.

        Raises:
            ValueError: For another form of state; nothing has changed in that case.
        """
        if not state_dict:
            return
        self._check_state(state_dict)
        if self._evaluates and self._training is not None:
            return
        self._saved = state_dict
        self._resumed = None if self._evaluates else state_dict
        self._pair, self._training = None, None
