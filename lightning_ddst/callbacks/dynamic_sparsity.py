"""The callback that trains a GAN sparsely."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_ddst.attached.checks import (
    check_limits,
    check_masks,
    check_not_overwritten,
    check_separate,
    check_settings,
    check_unchanged,
    check_unlimited,
    is_same,
)
from lightning_ddst.attached.hooks import AttachedTraining, check_attached
from lightning_ddst.attached.options import RunOptions, given_arguments
from lightning_ddst.attached.report import new_series
from lightning_ddst.attached.summary import describe_plan, describe_results, describe_start
from lightning_ddst.balance.ratio import Estimator
from lightning_ddst.balance.scores import ScorePlaces
from lightning_ddst.callbacks._support.folders import check_folders
from lightning_ddst.callbacks._support.reporting import UPDATES, TrainerReport, hparams, write_custom_scalars
from lightning_ddst.callbacks._support.results import gather_results, is_interruption, save_results
from lightning_ddst.callbacks._support.run_length import RunLength, explain_unknown
from lightning_ddst.callbacks._support.strategies import (
    check_backward_passes,
    check_strategy,
    loads_late,
    make_unscaler,
)
from lightning_ddst.callbacks._support.trainer_checks import (
    check_checkpoint,
    check_other_averages,
    restores_start,
    shows_summary,
    warn_of_raw_optimizers,
)
from lightning_ddst.callbacks._support.validation_state import ActsInValidation
from lightning_ddst.callbacks.ema import GeneratorEMA
from lightning_ddst.callbacks.quality import SampleQuality
from lightning_ddst.methods import Method, Plan, SparseTraining
from lightning_ddst.report.display import RunDisplay
from lightning_ddst.report.results import RunResults, Status
from lightning_ddst.sparsity.enforcement import OptimizerState
from lightning_ddst.sparsity.masked import Regrown
from lightning_ddst.sparsity.units import Initial
from lightning_ddst.utils import distributed
from lightning_ddst.utils.cache import first_line
from lightning_ddst.utils.lightning_packages import is_a
from lightning_ddst.utils.lightning_private import state_key
from lightning_ddst.utils.logging import scalars_only
from lightning_ddst.utils.nested import Place
from lightning_ddst.utils.networks import Name, name_in
from lightning_ddst.utils.rng import random_states, resume_randomness
from lightning_ddst.utils.states import ANYTHING, RANDOM_STATES, Form, check_state, each, named, restoring

_STATE_FORM: Form = {"length": RunLength.state_form, "random": each(RANDOM_STATES)}
"""The form of the state, next to that of `AttachedTraining`."""


class DynamicSparsityCallback(RunDisplay, ActsInValidation):
    """Trains a GAN sparsely: Double Dynamic Sparse Training (DDST) and the methods it is compared with.

    Add it to the Trainer of a GAN with manual optimization. It masks the weights of both networks (those of linear,
    convolutional, recurrent and attention layers, and of layers of your own: see `maskable_weights`), explores the
    generator's mask, measures the balance ratio (BR) around generator updates, and resizes the discriminator's mask by
    BR ("Double Dynamic Sparse Training for GANs", 2022; "Balanced Training for Sparse GANs", NeurIPS 2023, arXiv
    2302.14670). Every interval counts generator updates.

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
        bounds: Lower and upper bound of the signal. "auto", the default with BR, takes shares of the highest BR so far;
            the paper's bounds are 0.45 and 0.55. Other signals have default bounds of their own.
        min_discriminator_density: Lower limit of resizing. By default the smaller of the generator's density and the
            discriminator's at the start. (The paper uses 0.05. BR starts near 0, so the first decisions prune, and a
            discriminator that is too small to learn never grows again.)
        max_discriminator_density: Upper limit of resizing. 1, the default, is the paper's relaxed setting; below 1, the
            strict one, the discriminator explores at its maximum instead of growing.
        delta: Density that a decision adds or removes. By default a decision with bounds "auto" adds at most the step
            of a straight line from the lower limit to the upper over the run; with two numbers it is 0.05, the paper's.
        interval: Generator updates between decisions on the discriminator. By default 1 % of the run's length; 100 in
            runs of less than 10,000, a tenth of runs of less than 1,000 (at least 10), and 1,000 if the length is
            unknown.
        explore_interval: Generator updates between explorations of the generator; by default half the default of
            `interval`.
        probe_interval: Generator updates between measurements of BR. "auto" makes 50 to 150 measurements per decision,
            or one per update where `interval` is shorter; None measures nothing.
        generator: Dotted name of the generator in the module, or a list of the names of its parts, which share one
            density. By default the usual names are tried, in the module and in its submodules.
        discriminator: Dotted name of the discriminator, or a list of the names of several (``["mpd", "msd"]``), which
            share one density; a score is the mean over their mean scores. By default the usual names are tried.
        real: Place of the real images in the batch: a key, an index, or a path of them such as "images.target". By
            default its one floating-point tensor that is shaped like the images that the discriminator takes, or else
            has as many values per image and is shown to it with its axes moved or reshaped.
        discriminator_output: Place of the scores in the discriminator's output: a key, an index (-1 is the last), or a
            path in which an asterisk stands for every entry, as in ``"*.-1"``; several scores count by the mean of
            their means. By default its only floating-point tensor. ``{"real": 0, "fake": 1}`` for a discriminator that
            scores real and generated images in one call; ``{"difference": ""}`` if that call returns one score of how
            much more real the real images look.
        dense_layers: Layers of either network that stay dense and outside its density: patterns of their names in the
            module (``"generator.to_rgb"``, ``"*.attention.*"``), or class names (``"Linear"``); outside Linear and Conv
            layers also patterns of a weight's own name (``"generator.style.weight_mean"``).
        layer_densities: Densities of single layers, in (0, 1], by such patterns; the first match counts. These layers
            keep their densities, and the other layers of their network share the rest.
        masked_parameters: Further parameters to mask, in layers of your own: their dimensions of outputs and of inputs
            by patterns of their names in the module (``{"generator.*.kernel": (0, 1)}``). Parameters with "weight" in
            their name are found without it; see `maskable_weights`.
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
        verbose: Whether to print a line for every decision. The table at the start and the results at the end belong
            to the model's summary, which ``Trainer(enable_model_summary=False)`` switches off.

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
        generator: Name | None = None,
        discriminator: Name | None = None,
        real: Place | None = None,
        discriminator_output: ScorePlaces | None = None,
        dense_layers: Sequence[str] = (),
        layer_densities: Mapping[str, float] | None = None,
        masked_parameters: Mapping[str, tuple[int, int]] | None = None,
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
        verbose: bool = False,
    ) -> None:
        self._options = RunOptions.of_arguments(locals())
        self._given = given_arguments(DynamicSparsityCallback, locals())
        self._series = new_series()
        self._stop_on_divergence = stop_on_divergence
        self._length = RunLength()
        self._report: TrainerReport | None = None
        self._resumed: Mapping[str, Any] | None = None  # the state that fit resumes from, until training starts
        self._overwritten = False  # whether a checkpoint was loaded into the module since its last fit
        self._evaluates = False  # whether the checkpoint that is loaded is for an evaluation
        self._warned_of_raw_optimizers = False

    # ---- attaching -----------------------------------------------------------------------------------

    def attach(self, module: nn.Module) -> None:
        """Finds the networks and masks them; `Trainer.fit` calls this automatically.

        Args:
            module: The module that holds the generator and the discriminator.

        Raises:
            ValueError: If a network is not found, or cannot be masked at its density.
        """
        pair = self._options.mask(module, None if self._saved is None else self._saved["networks"])
        if self._saved is None:
            self._attached = None  # its counters and decisions belong to other masks
            self._series = new_series()
        self._pair, self._overwritten = pair, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that masks work under the Trainer's strategy."""
        if stage == "fit":
            check_strategy(trainer)
        if is_a(trainer.precision_plugin, "DoublePrecision"):
            pl_module.double()  # Lightning does so only after it has loaded a checkpoint, whose weights it would round

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Masks the networks and registers hooks on them and their optimizers."""
        if not loads_late(trainer):
            self._begin(trainer, pl_module)
            self._tell_start(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, *, keeps_masks: bool = False) -> None:
        check_backward_passes(trainer)
        check_folders(trainer, pl_module)
        if self._resumed is None:
            self._saved = None  # of a checkpoint that was evaluated
        if self._saved is None and self._training is not None and self._module is pl_module:
            check_not_overwritten(self._overwritten)
            check_unchanged(self._fitted)
            self._saved = self.state_dict()  # a second call of fit continues the first
            length = RunLength(self._length)  # over a length of its own
            self._saved["length"] = length.state_dict()
        else:
            length = RunLength()
        if not keeps_masks and (self._saved is not None or self._module is not pl_module):
            self.attach(pl_module)
        pair = self._fitted
        generator = pair.networks["generator"]
        changes = [each for each in self.settings.mask_updates() if "generator" in each.roles]
        if any(each.resizes or generator.density < 1 for each in changes):
            check_other_averages(trainer, pl_module, generator.network)
        others = self._others(trainer)
        check_separate(pair, [other._fitted for other in others if other._module is pl_module], pl_module)
        self._length = length
        if self._saved is not None:
            self._length.load_state_dict(self._saved["length"])
        self._attached = AttachedTraining(
            pair,
            self._options,
            trainer.optimizers,
            name=self.state_key,
            plan=self._planned(),
            unscaled=make_unscaler(trainer),
            after_update=lambda rewound: self._after_update(trainer, rewound),
            state=self._saved,
        )
        self._saved = None
        self._report = TrainerReport(
            trainer,
            self._options,
            self._attached,
            self._series,
            prefix=self._prefix(trainer),
            stops=self._stop_on_divergence,
        )
        if all(other._module is pl_module for other in others):  # the other pairs are attached already
            arguments = {each._prefix(trainer): each._hparams(trainer) for each in (self, *others)}
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            metrics = [name for each in callbacks if isinstance(each, SampleQuality) for name in each.names]
            controlled = {
                each._prefix(trainer): any(update.decides for update in each.settings.mask_updates())
                for each in (self, *others)
            }
            write_custom_scalars(trainer, pl_module, arguments, controlled, metrics)

    def _tell_start(self, trainer: Trainer) -> None:
        """Prints the networks, and the plan if it is known; names loggers that leave out texts and images."""
        if self._training is not None and shows_summary(trainer):
            rank_zero_info(f"\n{describe_start(self, self._training if self._length.known else None)}\n")
        first = not any(other._training is not None for other in self._others(trainer))
        if first and (loggers := scalars_only(trainer)):
            rank_zero_info(f"lightning_ddst: scalars only for {', '.join(loggers)}; texts and images are left out.")

    def _tell_results(self, trainer: Trainer) -> None:
        """Prints the results, unless a RunSummary does."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        summarized = any(each.__name__ == "RunSummary" for c in callbacks for each in type(c).__mro__)
        if self.generator_updates and shows_summary(trainer) and not summarized:
            rank_zero_info(f"\n{describe_results(self)}\n")

    @property
    def _module(self) -> nn.Module | None:
        return None if self._pair is None else self._pair.module

    def _hparams(self, trainer: Trainer) -> dict[str, float | str]:
        growth = self._fitted.networks["generator"].growth
        return hparams(trainer, self._options, growth, self.changed_settings)

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
        return Plan.for_run(self._options.intervals, length.updates, known=length.known, reference=length.reference)

    # ---- training --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores gradients and random states, which the Trainer would have changed earlier."""
        if loads_late(trainer):
            self._begin(trainer, pl_module)
            self._tell_start(trainer)
            _hook_averages(trainer, pl_module)
        if self._attached is not None:
            was_known = self._length.known
            if self._length.begin(trainer):
                self._reschedule(trainer, self._attached.training, was_known)
        if self._resumed is not None and self._attached is not None:
            with restoring(self.state_key):
                self._attached.pending.load_state_dict(self._resumed["pending_gradients"])
            resume_randomness(trainer, self._resumed["random"])
        self._resumed = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the batch, which holds the real images, and follows optimizers that were made anew."""
        if self._training is not None and not is_same(self._training.optimizers, trainer.optimizers):
            self._follow_optimizers(trainer, pl_module)
        if self._attached is not None:
            self._attached.begin_batch(batch)

    def _follow_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        check_unchanged(self._fitted)
        self._saved = self._resumed = self.state_dict()
        self._detach()
        self._begin(trainer, module, keeps_masks=True)  # layers that have thawed since stay dense
        self._resumed = None  # random states and gradients stay what they are
        _hook_averages(trainer, module)
        rank_zero_info("DynamicSparsityCallback: the optimizers were made anew; their steps are followed.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the networks still have the weights that were masked, and inactive ones are 0."""
        if self._training is not None:
            check_unchanged(self._fitted)

    def _after_update(self, trainer: Trainer, rewound: bool) -> None:
        if rewound:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GeneratorEMA):
                    callback.restart(self._fitted.networks["generator"].network)
        if self._report is not None:
            self._report.after_update()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the training step, and estimates the run's length again from the Trainer's progress."""
        if self._attached is None:
            return
        self._attached.end_batch(batch)
        training = self._attached.training
        if training.updates and not trainer.global_step and not self._warned_of_raw_optimizers:
            self._warned_of_raw_optimizers = True
            warn_of_raw_optimizers()
        self._follow_length(trainer, training)
        if self._report is not None and trainer.is_last_batch:  # before callbacks look at the end of the epoch
            self._report.refresh()

    def _follow_length(self, trainer: Trainer, training: SparseTraining) -> None:
        was_known = self._length.known
        if self._length.observe(trainer, training.updates):
            self._reschedule(trainer, training, was_known)

    def _reschedule(self, trainer: Trainer, training: SparseTraining, was_known: bool) -> None:
        training.schedule(self._planned())
        if not was_known and self._report is not None and shows_summary(trainer):
            self._report.print(describe_plan(self, training))
        if not was_known and self._length.updates is None:
            check_unlimited(self.settings, explain_unknown(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a summary of the run so far to TensorBoard."""
        if self._report is not None:
            self._report.after_epoch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pauses counting operations: evaluation is not training."""
        if self._training is not None:
            self._training.flops.pause()
        if self._report is not None:
            self._report.refresh()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resumes counting operations."""
        if self._training is not None:
            self._training.flops.resume()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the operations of each layer, writes ``results.json`` to the log folder, and removes every hook."""
        try:
            if self._report is not None:
                self._report.after_run()
                self._conclude(trainer, self._report, "finished")
                if trainer.global_step and not self.generator_updates:
                    distributed.warn(
                        "no optimizer step was seen that had gradients of the generator: its mask never changed, and "
                        "nothing was measured."
                    )
                self._tell_results(trainer)
        finally:
            self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes ``results.json``, removes every hook, and forgets a state that could not be resumed."""
        try:
            if self._report is not None:
                status: Status = "interrupted" if is_interruption(exception) else "failed"
                self._conclude(trainer, self._report, status, None if status == "interrupted" else exception)
                if status == "interrupted":
                    self._tell_results(trainer)
        finally:
            self._detach()
            if self._resumed is not None:
                self._saved = self._resumed = self._pair = self._attached = None

    def _conclude(
        self, trainer: Trainer, report: TrainerReport, status: Status, exception: BaseException | None = None
    ) -> None:
        save_results(trainer, self.results(trainer, status, exception))
        report.log({UPDATES: float(self.generator_updates)}, self.generator_updates)

    def results(
        self, trainer: Trainer, status: Status = "running", exception: BaseException | None = None
    ) -> RunResults:
        """Returns the results of the run so far, which ``results.json`` in the log folder holds at its end.

        Args:
            trainer: The Trainer of the run.
            status: Status of the run.
            exception: The error that ended it.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        sparse = [
            each for each in callbacks if isinstance(each, DynamicSparsityCallback) and each._training is not None
        ]
        return gather_results(
            trainer,
            {each._prefix(trainer).rstrip("/"): (each, each.changed_settings) for each in sparse},
            [each for each in callbacks if isinstance(each, SampleQuality)],
            status=status,
            error=None if exception is None else first_line(exception),
        )

    @property
    def changed_settings(self) -> dict[str, Any]:
        """The arguments that differ from their defaults."""
        return self._options.changed(self._given)

    def _detach(self) -> None:
        self._report = None
        if self._attached is not None:
            self._attached.detach()

    # ---- saving ----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of the state; it holds the networks' names if they were given, so several pairs do not collide."""
        named = {role: name for role, name in self._options.masking.names.items() if name is not None}
        return state_key(self, **named) if named else super().state_key

    def state_dict(self) -> dict[str, Any]:
        """Returns masks, counters, the balance window and every random state; loads with ``weights_only=True``."""
        if self._saved is not None:
            return dict(self._saved)
        if self._attached is None or self._pair is None:
            return {}
        return self._attached.state_dict() | {
            "length": self._length.state_dict(),
            "random": distributed.all_gather(random_states()),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint that a fit cannot resume from, before anything has changed.

        Raises:
            ValueError: If the checkpoint is of other settings, has a state of another form, or has no masks for this
                callback, unless ``initial_masks="magnitude"``.
        """
        self._evaluates = trainer.state.fn != "fit"
        saved = checkpoint.get("callbacks", {})
        if refits := self._training is not None and self._module is pl_module:
            self._overwritten = True  # the Trainer has loaded the weights already
        check_state("the checkpoint", {"callbacks": saved}, {"callbacks": named(ANYTHING)})
        if state := saved.get(self.state_key):
            check_attached(self.state_key, state, _STATE_FORM)
        if refits:
            self._overwritten = not self._is_state(state)
        if self._evaluates:
            return
        needs_masks = self._options.masking.initial_masks != "magnitude" and not restores_start(trainer, checkpoint)
        check_checkpoint(saved, self.state_key, self.settings, needs_masks=needs_masks)
        if state:
            check_limits(state, self.settings)
            check_settings(state["settings"], self._options.arguments())
            with restoring(self.state_key):
                check_masks(pl_module, self._options.masking.find_networks(pl_module), state["networks"])
                for update, held in zip(self.settings.mask_updates(), state["training"]["mask_updates"], strict=False):
                    update.load_state_dict(held["state"])

    def _is_state(self, saved: Mapping[str, Any] | None) -> bool:
        """Returns whether a saved state is of the same update, with the same masks and measurements."""
        own = self.state_dict()
        if not saved or saved["training"]["updates"] != own["training"]["updates"]:
            return False
        of_saved, of_own = (
            [
                state["training"]["window"]["samples"].nan_to_num(),  # NaN where nothing was measured yet
                *(mask for network in state["networks"].values() for mask in network["masks"].values()),
            ]
            for state in (saved, own)
        )
        return len(of_saved) == len(of_own) and all(map(torch.equal, of_saved, of_own))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict` when fitting starts.

        A checkpoint that is loaded for an evaluation can be read, if nothing was fitted before, and no fit resumes it.

        Raises:
            ValueError: For another form of state; nothing has changed in that case.
        """
        if not state_dict:
            return
        check_attached(self.state_key, state_dict, _STATE_FORM)
        if self._evaluates and self._training is not None:
            return
        self._saved = state_dict
        self._resumed = None if self._evaluates else state_dict
        self._pair, self._attached, self._series = None, None, new_series()


def _hook_averages(trainer: Trainer, module: LightningModule) -> None:
    """Hooks averages to the optimizers again, since they come after masks."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GeneratorEMA) and callback.hooked:
            callback.hook(trainer, module)
