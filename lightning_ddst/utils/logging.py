"""Logging against generator updates."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


@runtime_checkable
class Recorder(Protocol):
    """A callback that is told what is logged."""

    def record_scalars(self, values: Mapping[str, float], updates: int) -> None:
        """Takes in numbers by name, after so many generator updates."""


def log_scalars(trainer: Trainer, values: Mapping[str, float], updates: int) -> None:
    """Logs numbers to every logger of the run, with generator updates as the x-axis, and tells recorders.

    `LightningModule.log` would put them at ``trainer.global_step``, which counts the steps of
    every optimizer.

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
    """Whether ``Trainer(log_every_n_steps=...)``, counted in generator updates, has a line due."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and updates % every == 0


def generator_updates(trainer: Trainer) -> int:
    """Generator updates so far, as counted by the run's `DynamicSparsityCallback`, or else by its module."""
    counters = [*trainer.callbacks, trainer.lightning_module]  # type: ignore[attr-defined]
    counts = (getattr(counter, "generator_updates", None) for counter in counters)
    return next((count for count in counts if count is not None), 0)


def tensorboards(trainer: Trainer) -> list[Any]:
    """The TensorBoard writers of the run, for text and images; none where another logger is used."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
