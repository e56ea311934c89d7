"""Steps the learning rate schedulers of a `GANModule`, which Lightning leaves to the user in manual optimization."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from lightning_ddst.utils.states import COUNT, NUMBER, Form, check_state, each, maybe
from lightning_ddst.utils.validation import check_choice, check_count

_UNUSED = ("monitor", "reduce_on_plateau", "strict")
"""Keys that Lightning drops with a warning in manual optimization."""
_STATE_FORM: Form = each({"steps": COUNT, "due": COUNT, "value": maybe(NUMBER)})


@dataclass
class _Monitored:
    """The keys of a scheduler's dictionary that Lightning drops in manual optimization."""

    scheduler: Any
    monitor: str | None
    plateau: bool
    strict: bool


@dataclass
class _Scheduled:
    """A scheduler, when it steps, and its state.

    Attributes:
        kind: Name of its class.
        steps: Steps of its optimizer so far.
        due: Steps that wait for the monitored value.
        resumed: Whether the steps that wait are those of a checkpoint.
        value: The monitored value when the checkpoint was saved; None if it was not known then.
        epoch: The scheduler's own count after its last step.
    """

    scheduler: Any
    interval: str
    frequency: int
    monitored: _Monitored | None

    def __post_init__(self) -> None:
        self.kind = type(self.scheduler).__name__
        self.steps = 0
        self.due = 0
        self.resumed = False
        self.value: float | None = None
        self.epoch = getattr(self.scheduler, "last_epoch", None)
        check_choice(f"interval of {self.kind}", self.interval, ("step", "epoch"))
        check_count(f"frequency of {self.kind}", self.frequency)
        if self.plateau and self.monitor is None:
            raise ValueError(
                f"monitor=None of {self.kind} must be the name of a logged metric: return "
                '{"scheduler": ..., "monitor": "..."} in configure_optimizers.'
            )

    @property
    def plateau(self) -> bool:
        return isinstance(self.scheduler, ReduceLROnPlateau) if self.monitored is None else self.monitored.plateau

    @property
    def monitor(self) -> str | None:
        return None if self.monitored is None else self.monitored.monitor


class SchedulerSteps(Callback):
    """Steps a module's learning rate schedulers, as Lightning does in automatic optimization.

    A scheduler with the interval "step" steps after every `frequency`-th update of its own optimizer; with "epoch", at
    the end of every `frequency`-th epoch, before validation. ReduceLROnPlateau steps later, before the next batch or
    at the end of training, when the monitored metric is known.

    Args:
        module: The module whose schedulers it steps. Others that the same Trainer fits are left alone.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._monitored: list[_Monitored] = []
        self._scheduled: list[_Scheduled] = []
        self._loaded: list[dict[str, Any]] = []
        self._measured = False  # whether validation or the epoch's end came after the last batch
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepares to read the dictionaries that `configure_optimizers` returns."""
        if stage != "fit" or pl_module is not self._module:
            return
        configure: Callable[[], Any] = pl_module.configure_optimizers
        own = {name: value for name, value in vars(pl_module).items() if name == "configure_optimizers"}

        def read() -> Any:
            vars(pl_module).pop("configure_optimizers")
            vars(pl_module).update(own)
            self._monitored = []
            return self._without_unused(configure())

        vars(pl_module)["configure_optimizers"] = read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores counts, and starts to count the optimizers' steps."""
        if pl_module is not self._module:
            self._scheduled = []
            return
        known = {id(monitored.scheduler): monitored for monitored in self._monitored}
        self._scheduled = [
            _Scheduled(config.scheduler, config.interval, config.frequency, known.get(id(config.scheduler)))
            for config in trainer.lr_scheduler_configs
        ]
        for scheduled, state in zip(self._scheduled, self._loaded, strict=False):
            scheduled.steps, scheduled.due, scheduled.value = state["steps"], state["due"], state["value"]
            scheduled.resumed = scheduled.due > 0
        self._loaded = []
        optimizers: dict[int, Optimizer] = {id(s.scheduler.optimizer): s.scheduler.optimizer for s in self._scheduled}
        self._remove_hooks()
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers.values()]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps the schedulers that waited for a metric."""
        self._step_due(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Steps the schedulers that waited for a metric."""
        self._step_due(trainer)
        self._measured = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps the schedulers of epochs after the last batch."""
        if not trainer.is_last_batch:
            return
        for scheduled in self._scheduled:
            if scheduled.interval == "epoch" and (trainer.current_epoch + 1) % scheduled.frequency == 0:
                self._step_or_wait(scheduled)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that validation has logged its metrics."""
        self._measured = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that the epoch has logged its metrics."""
        self._measured = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps the schedulers that waited for a metric."""
        self._step_due(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Counts no more steps; the counts stay, for a checkpoint that is saved after the fit."""
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Counts no more steps; Lightning calls no `teardown` after an error."""
        self._remove_hooks()

    # ---- stepping --------------------------------------------------------------------------------------

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for scheduled in self._scheduled:
            if scheduled.scheduler.optimizer is optimizer:
                scheduled.steps += 1
                if scheduled.interval == "step" and scheduled.steps % scheduled.frequency == 0:
                    self._step_or_wait(scheduled)

    def _step_or_wait(self, scheduled: _Scheduled) -> None:
        if scheduled.plateau:
            scheduled.due += 1
        else:
            self._step(scheduled, None)

    def _step_due(self, trainer: Trainer) -> None:
        for scheduled in self._scheduled:
            due, scheduled.due = scheduled.due, 0
            if due and (value := self._value(trainer, scheduled)) is not None:
                for _ in range(due):
                    self._step(scheduled, value)

    def _step(self, scheduled: _Scheduled, metric: Any) -> None:
        if getattr(scheduled.scheduler, "last_epoch", None) != scheduled.epoch:
            raise ValueError(
                f"{scheduled.kind} is stepped elsewhere, too: GANModule steps the schedulers that configure_optimizers "
                "returns, so remove the calls of their step()."
            )
        self._module.lr_scheduler_step(scheduled.scheduler, metric)
        scheduled.epoch = getattr(scheduled.scheduler, "last_epoch", None)

    def _value(self, trainer: Trainer, scheduled: _Scheduled) -> Any:
        name, resumed, scheduled.resumed = scheduled.monitor or "", scheduled.resumed, False
        value = trainer.callback_metrics.get(name, scheduled.value if resumed else None)
        if value is None:
            named = f"monitor={name!r} of {scheduled.kind}"
            metrics = ", ".join(sorted(trainer.callback_metrics)) or "none"
            if not resumed and (scheduled.monitored is None or scheduled.monitored.strict):
                raise ValueError(f"{named} must be one of the logged metrics: {metrics}.")
            why = "was not known when the checkpoint was saved" if resumed else f"is not among the metrics: {metrics}"
            rank_zero_warn(f"{named} {why}; the scheduler does not step.")
        return value

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ---- dictionaries ----------------------------------------------------------------------------------

    def _without_unused(self, configured: Any) -> Any:
        """Notes the keys that Lightning would drop with a warning, and returns the rest."""
        if isinstance(configured, Mapping):
            if "lr_scheduler" not in configured:
                return configured
            scheduler = self._noted(configured["lr_scheduler"], configured.get("monitor"))
            return {**configured, "lr_scheduler": scheduler}
        if isinstance(configured, list | tuple):
            if len(configured) == 2 and isinstance(configured[0], list):
                optimizers, schedulers = configured
                several = schedulers if isinstance(schedulers, list) else [schedulers]
                return optimizers, [self._noted(scheduler) for scheduler in several]
            return type(configured)([self._without_unused(part) for part in configured])
        return configured

    def _noted(self, given: Any, monitor: str | None = None) -> Any:
        values = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
        scheduler = values.get("scheduler")
        plateau = values.get("reduce_on_plateau", isinstance(scheduler, ReduceLROnPlateau))
        monitored = _Monitored(scheduler, values.get("monitor", monitor), plateau, values.get("strict", True))
        self._monitored.append(monitored)
        return {name: value for name, value in values.items() if name not in _UNUSED}

    # ---- saving ----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the counts of steps, and the metrics that waiting schedulers monitor."""
        if not self._scheduled:
            return
        checkpoint["gan_schedulers"] = [
            {"steps": scheduled.steps, "due": scheduled.due, "value": self._known(trainer, scheduled)}
            for scheduled in self._scheduled
        ]

    def _known(self, trainer: Trainer, scheduled: _Scheduled) -> float | None:
        # After the last batch of an epoch, but before its validation, the metric is the last epoch's.
        known = scheduled.due and (self._measured or scheduled.interval == "step")
        value = trainer.callback_metrics.get(scheduled.monitor or "") if known else None
        return None if value is None else float(value)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the counts.

        Raises:
            ValueError: For counts of another form.
        """
        loaded = checkpoint.get("gan_schedulers", [])
        check_state(type(self._module).__name__, {"gan_schedulers": loaded}, {"gan_schedulers": _STATE_FORM})
        self._loaded = list(loaded)
