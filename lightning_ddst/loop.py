"""Sparse training without a Trainer: in a plain PyTorch loop, or with Lightning Fabric."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.attached.checks import (
    check_limits,
    check_masks,
    check_method,
    check_settings,
    check_unchanged,
    check_unlimited,
)
from lightning_ddst.attached.hooks import AttachedTraining, check_attached
from lightning_ddst.attached.loop_networks import LoopNetworks, Networks, StepWatch, UnmaskedValues, check_device
from lightning_ddst.attached.options import RunOptions, given_arguments
from lightning_ddst.attached.report import RunReport, new_series
from lightning_ddst.attached.wrapped import find_scaler, unwrap_optimizer
from lightning_ddst.callbacks import DynamicSparsityCallback
from lightning_ddst.methods import Plan
from lightning_ddst.report.display import RunDisplay
from lightning_ddst.sparsity import find_units
from lightning_ddst.sparsity.averaging import WeightAverage
from lightning_ddst.sparsity.dense_gradients import unscale_by
from lightning_ddst.sparsity.optimizers import UpdateHooks
from lightning_ddst.utils import distributed
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.series import RecordedSeries
from lightning_ddst.utils.states import Form, maybe, restoring
from lightning_ddst.utils.validation import check_count

Log = Callable[[dict[str, float], int], object]
"""A function of scalars by name and of the generator updates so far."""
_CHECKED_EVERY = 1000
"""Training steps after which the weights are compared with the masks again, which waits for the device."""
_STATE_FORM: Form = {"average": maybe(WeightAverage.state_form)}
"""The form of the state, next to that of `AttachedTraining`."""
_SPARSIFIED: "WeakSet[nn.Module]" = WeakSet()
"""The networks that are trained sparsely at present."""


def sparsify(
    generator: Networks,
    discriminator: Networks,
    optimizers: Iterable[Optimizer],
    *,
    length: int | None = None,
    balance_scores: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    example_inputs: Any = None,
    ema_decay: float | None = None,
    scaler: Any = None,
    log: Log | None = None,
    log_every: int = 50,
    **arguments: Any,
) -> "SparseLoop":
    """Trains a GAN sparsely in a loop of your own.

    It masks both networks at once. From then on, wrap each training step in `SparseLoop.step`. Everything that
    `DynamicSparsityCallback` does in a Trainer happens here, too, with the same arguments.

    Args:
        generator: The generator; also one that `Fabric.setup` or DistributedDataParallel returned.
        discriminator: The discriminator, likewise. Each may also be a list or dict of modules (ModuleList and
            ModuleDict included), several discriminators for example, which share one density.
        optimizers: The optimizers of both, in any order, but always in the same one. They are found by the parameters
            they hold.
        length: Generator updates of the whole run. The default intervals and the decay of the drop fraction depend on
            it. None if it is unknown: the drop fraction then stays constant, and methods that need a length are
            rejected.
        balance_scores: Function that returns the discriminator's scores of real and of generated images for a batch,
            for GANs whose calls cannot be recorded; see `lightning_ddst.balance.ScoresItself`.
        example_inputs: Example input of the generator: a tensor, or a tuple of its arguments. Masks of whole channels
            need it.
        ema_decay: Decay of an average of the generator's weights that respects its masks, in [0, 1); None keeps none.
        scaler: The GradScaler of fp16; Fabric's own is found by itself.
        log: Function that logs scalars, called as ``log(values, update)`` in the first process: ``fabric.log_dict``,
            ``wandb.log``, or one of yours. The names are those that the callback logs.
        log_every: Generator updates between two calls of `log`. Decisions are always logged.
        **arguments: The arguments of `DynamicSparsityCallback`, with its defaults and checks: ``generator_density``,
            ``method``, ``interval``, ``real``, ``granularity`` and so on. In patterns of layers the networks are named
            "generator" and "discriminator".

    Returns:
        The sparse training.

    Raises:
        TypeError: For an argument that does not exist.
        ValueError: For an argument outside the allowed range, a weight that no optimizer updates, a network that
            cannot be masked at these densities, or one that is trained sparsely already.

    Example::

        sparse = sparsify(generator, discriminator, [opt_g, opt_d], generator_density=0.1, length=100_000)
        for real in loader:
            with sparse.step(real):
                train_discriminator(real)
                train_generator(real)
    """
    try:
        bound = inspect.signature(DynamicSparsityCallback).bind(**arguments)
    except TypeError as error:
        raise TypeError(f"sparsify() {error}.") from None
    bound.apply_defaults()
    networks = LoopNetworks(generator, discriminator)
    options = RunOptions.of_arguments(bound.arguments | networks.part_names())
    if length is not None:
        check_count("length", length)
    check_count("log_every", log_every)
    if not isinstance(optimizers, Iterable):
        raise ValueError(f"optimizers must be a list of torch.optim.Optimizer, and is one {type(optimizers).__name__}.")
    given = list(optimizers)
    found = [unwrap_optimizer(optimizer) for optimizer in given]
    scaler = scaler or next(filter(None, (find_scaler(each) for each in given)), None)
    if balance_scores is not None:
        networks.balance_scores = balance_scores  # type: ignore[assignment]
    if example_inputs is not None:
        networks.example_input_array = example_inputs
    elif find_units(options.masking.granularity).needs_inputs:
        raise ValueError(
            f'example_inputs=None: granularity="{options.masking.granularity}" needs an example of the generator\'s '
            "input, such as example_inputs=torch.zeros(2, 128)."
        )
    return SparseLoop(
        networks,
        found,
        options,
        given=given_arguments(sparsify, {"length": length, "ema_decay": ema_decay, "log_every": log_every}) | arguments,
        length=length,
        ema_decay=ema_decay,
        scaler=scaler,
        log=log,
        log_every=log_every,
        stops=bound.arguments["stop_on_divergence"],
    )


class SparseLoop(RunDisplay):
    """Sparse training in a loop that the user writes; `sparsify` makes it.

    Its readings (`masks`, `generator_density`, `balance_ratio`, `decisions`, `flops_ratio` and so on) are those of
    `DynamicSparsityCallback`; names of weights begin with "generator." or "discriminator.". As a context manager it
    calls `close` at the end.

    Args:
        networks: The two networks.
        optimizers: Their optimizers.
        options: The options of the run.
        given: The arguments of `sparsify` that ``repr`` shows, by name.
        length: Generator updates of the run; None if it is unknown.
        ema_decay: Decay of the generator's average; None keeps none.
        scaler: The GradScaler of fp16, or None.
        log: Function that logs scalars.
        log_every: Generator updates between two calls of `log`.
        stops: Whether `should_stop` is set when training has broken down.

    Attributes:
        should_stop: Whether training has broken down and `stop_on_divergence` was requested: end the loop.
    """

    def __init__(
        self,
        networks: LoopNetworks,
        optimizers: list[Optimizer],
        options: RunOptions,
        *,
        given: Mapping[str, Any],
        length: int | None,
        ema_decay: float | None,
        scaler: Any,
        log: Log | None,
        log_every: int,
        stops: bool,
    ) -> None:
        self._networks = networks
        self._optimizers = optimizers
        self._options = options
        self._given = dict(given)
        self._series = new_series()
        self._length = length
        self._unscaled = unscale_by(scaler)
        self._log = log
        self._log_every = log_every
        self._stops = stops
        self._ema_decay = ema_decay
        self.should_stop = False
        self._steps = 0
        self._inside = False
        self._handles: list[RemovableHandle] = []
        for role, network in networks.parts():
            if network in _SPARSIFIED:
                raise ValueError(f"the {role} is trained sparsely already: call close() of its training first.")
        if length is None:
            check_unlimited(self.settings, "length=None, so the run's length in generator updates is unknown")
        self._unmasked: UnmaskedValues | None = UnmaskedValues(networks)
        try:
            self._attach(None)
        except BaseException:
            self.close()
            self._unmasked.mark()
            self._unmasked.restore()
            raise
        self._unmasked.mark()

    def _attach(self, state: Mapping[str, Any] | None) -> AttachedTraining:
        self._pair = self._options.mask(self._networks, None if state is None else state["networks"])
        self._attached = AttachedTraining(
            self._pair,
            self._options,
            self._optimizers,
            name="sparsify",
            plan=Plan.for_run(self._options.intervals, self._length, known=True),
            unscaled=self._unscaled,
            after_update=self._after_update,
            state=state,
        )
        self._attached.training.flops.pause()
        self._report = _LoopReport(
            self, self._options, self._attached, self._series, self._log, self._log_every, stops=self._stops
        )
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in self._optimizers]
        averaged = self._optimizers if self._ema_decay is not None else []
        self._averaging = UpdateHooks(self._networks.generator, averaged, self._update_average)
        self._watch = StepWatch(self._pair, self._optimizers)
        self._average = self._make_average()
        if self._average is not None and state is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"])
        _SPARSIFIED.update(part for _, part in self._networks.parts())
        return self._attached

    # ---- around a step -----------------------------------------------------------------------------

    @contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """Trains on one batch inside the context.

        Everything that belongs to the training step must be inside: the calls of both networks, the backward passes,
        and the steps of their optimizers.

        Args:
            batch: The batch, as the step uses it: on the networks' device, after every change of the images. Any
                nesting of mappings, sequences and dataclasses, with the real images at `real`.

        Raises:
            RuntimeError: If the training is closed or in a step already; if weights were replaced, or inactive ones
                written to; at a generator update, if BR cannot be measured.
        """
        attached = self._open()
        if self._inside:
            raise RuntimeError("step(batch) was called inside another step(batch).")
        self._check(batch)
        self._inside = True
        attached.training.flops.resume()
        attached.begin_batch(batch)
        try:
            with self._watch.watching():
                yield
            attached.end_batch(batch)
            self._averaging.end_batch()
        finally:
            attached.abandon_batch()
            attached.training.flops.pause()
            self._inside = False

    def _open(self) -> AttachedTraining:
        if self._attached is None or not self._handles:
            raise RuntimeError("the sparse training is closed: call sparsify(...) again.")
        return self._attached

    def _check(self, batch: Any) -> None:
        if self._steps == 0:
            self._unmasked = None  # frees it
            for network in self._fitted.networks.values():
                network.to_weights()
            check_device(batch, self._networks)
        if self._steps % _CHECKED_EVERY == 0:
            check_unchanged(self._fitted)
        self._steps += 1

    @uncompiled
    def _before_step(self, *_: Any) -> None:
        if not self._inside:
            raise RuntimeError(
                "an optimizer stepped outside step(batch), where nothing is counted: write `with sparse.step(batch):` "
                "around the whole training step."
            )

    def _after_update(self, rewound: bool) -> None:
        if rewound:
            self._average = self._make_average()
        if self._length is not None and self.generator_updates == self._length + 1:
            distributed.warn(
                f"length={self._length} generator updates are over, and the run continues: the drop fraction is that "
                "of the end of the run."
            )
        self._report.after_update()

    # ---- the average -------------------------------------------------------------------------------

    def averages(self) -> dict[str, Tensor]:
        """Returns the averaged weights and buffers by their names in the generator.

        Raises:
            ValueError: If there is no average, ``ema_decay=None``.
        """
        return self._needed_average().values()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the generator the averaged weights inside the context, for samples and evaluation.

        Raises:
            ValueError: If there is no average, ``ema_decay=None``.
            RuntimeError: Inside `step`.
        """
        average = self._needed_average()
        if self._inside:
            raise RuntimeError("averaged() was called inside step(batch), which trains the generator's own weights.")
        average.swap()
        try:
            yield
        finally:
            average.swap()

    def _needed_average(self) -> WeightAverage:
        if self._average is None:
            raise ValueError("ema_decay=None keeps no average: call sparsify(..., ema_decay=0.999).")
        return self._average

    def _make_average(self) -> WeightAverage | None:
        return None if self._ema_decay is None else WeightAverage(self._networks.generator, self._ema_decay)

    def _update_average(self) -> None:
        if self._average is not None:
            self._average.update()

    # ---- saving and closing ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns masks, counters, the balance window and the average; loads with ``weights_only=True``.

        For an exact resume, also save the networks, the optimizers, `random_states`, and where the loader is.
        """
        assert self._attached is not None
        average = None if self._average is None else self._average.state_dict()
        return self._attached.state_dict() | {"average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`, to resume a run.

        Load the states of networks and optimizers before or after it, and the random states last.

        Args:
            state: The state.

        Raises:
            ValueError: If the state has another form, or is of a run with another method, density, granularity or
                choice of layers.
            RuntimeError: If the training is closed or in a step.
        """
        attached = self._open()
        if self._inside:
            raise RuntimeError("load_state_dict was called inside step(batch).")
        check_attached("sparsify", state, _STATE_FORM)
        check_method(state, self.settings)
        check_limits(state, self.settings)
        check_settings(state["settings"], self._options.arguments())
        with restoring("sparsify"):
            check_masks(self._networks, self._options.masking.find_networks(self._networks), state["networks"])
        if self._unmasked is not None:
            self._unmasked.restore()
        self._detach(attached)
        self._series = new_series()
        self._attach(state).pending.load_state_dict(state["pending_gradients"])
        self._steps = 0
        self.should_stop = False

    def close(self) -> None:
        """Ends sparse training: removes every hook; readings and masks stay."""
        if self._attached is not None:
            self._report.after_run()
            self._detach(self._attached)

    def _detach(self, attached: AttachedTraining) -> None:
        attached.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._averaging.remove()
        _SPARSIFIED.difference_update(part for _, part in self._networks.parts())

    def __enter__(self) -> "SparseLoop":
        """Returns the training itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends sparse training."""
        self.close()


class _LoopReport(RunReport):
    """Logs by the user's function."""

    def __init__(
        self,
        loop: SparseLoop,
        options: RunOptions,
        attached: AttachedTraining,
        series: RecordedSeries,
        log: Log | None,
        every: int,
        stops: bool,
    ) -> None:
        super().__init__(options, attached, series, stops=stops)
        self._loop = loop
        self._log = log
        self._every = every

    def line_is_due(self, update: int) -> bool:
        return update % self._every == 0

    def log(self, values: Mapping[str, float], update: int) -> None:
        if self._log is not None and distributed.get_rank() == 0:
            self._log(dict(values), update)

    def print(self, text: str) -> None:
        if distributed.get_rank() == 0:
            print(text)

    def stop(self) -> None:
        self._loop.should_stop = True
