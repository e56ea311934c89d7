"""Logging against generator updates."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer

from lightning_ddst.utils.lightning_packages import is_a


@runtime_checkable
class Recorder(Protocol):
    """A callback that records logged values."""

    def record_scalars(self, values: Mapping[str, float], updates: int) -> None:
        """Records values by name, after a number of generator updates."""


def log_scalars(trainer: Trainer, values: Mapping[str, float], updates: int) -> None:
    """Logs numbers to every logger and recorder of the run, with generator updates as x-axis.

    `LightningModule.log` would log them at ``trainer.global_step``, which counts the steps of all optimizers.

    Args:
        trainer: The running Trainer.
        values: Numbers by name.
        updates: Generator updates so far.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=updates)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Recorder):
            callback.record_scalars(values, updates)


def logs_at(trainer: Trainer, updates: int) -> bool:
    """Returns whether logging is due: every ``Trainer(log_every_n_steps=...)`` generator updates."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and updates % every == 0


def generator_updates(trainer: Trainer) -> int:
    """Returns the generator updates so far, as counted by the `DynamicSparsityCallback` or else by the module.

    In an evaluation the module's count comes first: it is that of an evaluated checkpoint, and the callback keeps that
    of its last fit.
    """
    counters = [*trainer.callbacks, trainer.lightning_module]  # type: ignore[attr-defined]
    if trainer.state.fn != "fit":
        counters.reverse()
    counts = (getattr(counter, "generator_updates", None) for counter in counters)
    return next((count for count in counts if count is not None), 0)


def tensorboards(trainer: Trainer) -> list[Any]:
    """Returns the TensorBoard writers of the run, for text and images; empty with other loggers."""
    loggers: list[Any] = trainer.loggers
    return [logger.experiment for logger in loggers if is_a(logger, "TensorBoardLogger")]
