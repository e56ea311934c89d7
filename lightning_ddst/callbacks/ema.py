"""The generator's exponential moving average, used for evaluation."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ddst.attached.checks import is_same
from lightning_ddst.callbacks._support.validation_state import ActsInValidation
from lightning_ddst.sparsity.averaging import BufferHandling, WeightAverage, average_states
from lightning_ddst.sparsity.optimizers import UpdateHooks, find_optimizers
from lightning_ddst.utils.checkpoints import AVERAGES
from lightning_ddst.utils.lightning_private import state_key
from lightning_ddst.utils.networks import Name, find_network, is_same_network
from lightning_ddst.utils.states import check_state, restoring


class GeneratorEMA(ActsInValidation):
    """A callback that averages the generator's weights over its updates and evaluates with the average.

    During validation, testing and prediction the generator has the averaged weights. Training uses its own weights,
    which a checkpoint's ``state_dict`` holds; the callback's state holds the average. Weights-only checkpoints
    (``ModelCheckpoint(save_weights_only=True)``) hold no states of callbacks: the average is in them under
    ``generator_averages``. The average respects masks: see `WeightAverage`.

    Args:
        decay: Decay of the average, in [0, 1); the paper's is 0.999.
        buffers: "average" averages BatchNorm's statistics like weights; "copy" evaluates with the generator's current
            statistics.
        generator: Dotted name of the generator in the module, or a list of the names of its parts; by default the usual
            names are tried.

    Attributes:
        average_class: Class of the average; a subclass of `GeneratorEMA` may set another subclass of `WeightAverage`.

    Raises:
        ValueError: For an argument outside the allowed range; at the start, if the generator is not found.
    """

    average_class: ClassVar[type[WeightAverage]] = WeightAverage

    def __init__(
        self, decay: float = 0.999, buffers: BufferHandling = "average", generator: Name | None = None
    ) -> None:
        self._decay = decay
        self._buffers: BufferHandling = buffers
        self._name = generator if generator is None or isinstance(generator, str) else list(generator)
        self._generator: nn.Module | None = None
        self._average: WeightAverage | None = None
        self._saved: Mapping[str, Any] | None = None
        self._hooks: UpdateHooks | None = None
        self._optimizers: list[Optimizer] = []
        self.average_class(nn.Identity(), decay, buffers)  # checks the arguments now

    @property
    def state_key(self) -> str:
        """Key of the state; it holds the generator's name if it was given."""
        return super().state_key if self._name is None else state_key(self, generator=self._name)

    def averages(self) -> dict[str, Tensor]:
        """Returns the averaged weights and buffers by their names in the generator; empty before the first average.

        Those of a generator of several parts have their names in the module.
        """
        return {} if self._average is None else self._average.values()

    @contextmanager
    def own_weights(self) -> Iterator[None]:
        """Gives the generator its own weights inside the context, also during evaluation."""
        averaged = self._average is not None and self._average.swapped
        self._evaluate(False)
        try:
            yield
        finally:
            self._evaluate(averaged)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hooks into the module's saving and loading: Lightning calls no callback for weights-only checkpoints."""
        _hook(pl_module)

    # ---- training --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts or resumes the average, and registers hooks on the generator's optimizers, after those that mask."""
        self._prepare(pl_module)
        self.hook(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Follows optimizers that were made anew."""
        if not is_same(self._optimizers, trainer.optimizers):
            self.hook(trainer, pl_module)

    def hook(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Registers hooks on the present optimizers of the generator, behind all hooks that they have."""
        self._detach()
        self._optimizers = list(trainer.optimizers)
        generator = find_network(pl_module, "generator", self._name)
        trained = {name: p for name, p in generator.named_parameters() if p.requires_grad}
        find_optimizers(trained, trainer.optimizers)  # raises if one is in none
        self._hooks = UpdateHooks(generator, trainer.optimizers, self._update)

    @property
    def hooked(self) -> bool:
        """Whether the average follows optimizers."""
        return self._hooks is not None

    def restart(self, generator: nn.Module) -> None:
        """Restarts the average from the current weights if it averages this generator."""
        if is_same_network(self._generator, generator):
            self._average = self.average_class(generator, self._decay, self._buffers)

    def _update(self) -> None:
        assert self._average is not None
        self._average.update()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages an update that not all of the generator's optimizers took part in."""
        if self._hooks is not None:
            self._hooks.end_batch()

    def _prepare(self, pl_module: LightningModule) -> None:
        generator = find_network(pl_module, "generator", self._name)
        begun = self._average is not None and self._average.updates > 0 and is_same_network(self._generator, generator)
        if self._saved is None and begun:
            return
        with torch.inference_mode(False):  # evaluation may come before training
            average = self.average_class(generator, self._decay, self._buffers)
            saved, self._saved = self._saved, None
            if saved is not None:
                with restoring(self.state_key):
                    average.load_state_dict(saved)
            self._generator, self._average = generator, average

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes every hook."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes every hook and gives the generator its own weights back."""
        self._detach()
        self._evaluate(False)

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    # ---- evaluation ------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the generator the averaged weights."""
        self._prepare(pl_module)
        self._evaluate(True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the generator its own weights back."""
        self._evaluate(False)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _evaluate(self, averaged: bool) -> None:
        if self._average is not None and self._average.swapped != averaged:
            self._average.swap()

    # ---- saving ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the average; loads with ``weights_only=True``."""
        if self._saved is not None:
            return dict(self._saved)
        return {} if self._average is None else self._average.state_dict()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the generator's own weights, also during evaluation."""
        if self._average is not None and self._average.swapped:
            self._average.swap()
            state = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = {name: value.clone() for name, value in state.items()}
            self._average.swap()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`, once the generator exists.

        Raises:
            ValueError: For another form of state.
        """
        if state_dict:
            check_state(self.state_key, state_dict, self.average_class.state_form)
            self._saved = state_dict

    def save_average(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the average to a weights-only checkpoint, which holds no states of callbacks."""
        if "callbacks" not in checkpoint:
            self.on_save_checkpoint(trainer, pl_module, checkpoint)
            checkpoint.setdefault(AVERAGES, {})[self.state_key] = self.state_dict()

    def load_average(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Restores the average of a checkpoint, or forgets it: the average then restarts from the loaded weights.

        Raises:
            ValueError: In evaluation, if the checkpoint may be of a run with an average and does not hold it.
        """
        self._average = self._saved = None  # they are of other weights than those that are being loaded
        states = checkpoint.get("callbacks", checkpoint.get(AVERAGES))
        if states is not None and self.state_key in states:
            self.load_state_dict(states[self.state_key])
        elif trainer.state.fn != "fit":
            averages = average_states(states or {})
            if states is None or averages:
                there = f"averages of {', '.join(averages)}" if averages else "no average"
                raise ValueError(
                    f"the checkpoint holds the generator's own weights and {there}, so {self.state_key} cannot "
                    f"evaluate it; leave out {type(self).__name__} to evaluate the own weights."
                )
            rank_zero_warn(
                f"The checkpoint is of a run without {self.state_key}: the generator's own weights are used."
            )


_HOOKED: "WeakSet[LightningModule]" = WeakSet()
"""Modules whose saving and loading calls `_save_averages` and `_load_averages`."""


def _hook(module: LightningModule) -> None:
    """Makes a module's `on_save_checkpoint` and `on_load_checkpoint` save and load averages; only the first time."""
    if module not in _HOOKED:
        _HOOKED.add(module)
        _extend(module, "on_save_checkpoint", _save_averages)
        _extend(module, "on_load_checkpoint", _load_averages)


def _extend(module: LightningModule, name: str, also: Callable[[LightningModule, dict[str, Any]], None]) -> None:
    own = vars(module).get(name)

    def hook(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        if own is None:
            getattr(type(self), name)(self, checkpoint)
        else:
            own(checkpoint)
        also(self, checkpoint)

    hook.__name__ = name  # a pickled module has its class's method again
    setattr(module, name, MethodType(hook, module))


def _averaging(module: LightningModule) -> list[GeneratorEMA]:
    try:
        callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    except RuntimeError:  # no Trainer has it
        return []
    return [callback for callback in callbacks if isinstance(callback, GeneratorEMA)]


def _save_averages(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    for callback in _averaging(module):
        callback.save_average(module.trainer, module, checkpoint)


def _load_averages(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    for callback in _averaging(module):
        callback.load_average(module.trainer, checkpoint)
