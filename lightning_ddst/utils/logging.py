"""Logging against generator updates: scalars, texts, images and hyperparameters, by each logger's own methods."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from PIL import Image as PILImage

from lightning_ddst.utils.lightning_packages import is_a

Pixels = NDArray[np.uint8]
"""An RGB image, uint8 ``(height, width, 3)``."""


@runtime_checkable
class Recorder(Protocol):
    """A callback that records logged values."""

    def record_scalars(self, values: Mapping[str, float], updates: int) -> None:
        """Records values by name, after a number of generator updates."""


def log_scalars(trainer: Trainer, values: Mapping[str, float], updates: int) -> None:
    """Logs numbers to every logger and recorder of the run, with generator updates as x-axis.

    `LightningModule.log` would log them at ``trainer.global_step``, which counts the steps of all optimizers. They are
    also in ``trainer.callback_metrics``, where ModelCheckpoint and EarlyStopping find what they monitor.

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
    set_callback_metrics(trainer, values)


def set_callback_metrics(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Sets values in ``trainer.callback_metrics``, which keeps every name's last one, and logs nothing.

    Args:
        trainer: The running Trainer.
        values: Numbers by name.
    """
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in values.items()})


def show_progress(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Shows values at the front of the progress bar until they are replaced; NaN removes one.

    Args:
        trainer: The running Trainer.
        values: Numbers by name.
    """
    shown = trainer.progress_bar_metrics
    others = {name: value for name, value in shown.items() if name not in values}
    shown.clear()
    shown.update({name: float(value) for name, value in values.items() if not math.isnan(value)} | others)


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
    """Returns the TensorBoard writers of the run; empty with other loggers."""
    loggers: list[Any] = trainer.loggers
    return [logger.experiment for logger in loggers if is_a(logger, "TensorBoardLogger")]


# ---- texts, images and hyperparameters -----------------------------------------------------------------


def shows_images(trainer: Trainer) -> bool:
    """Returns whether a logger of the run takes images; the same in all processes."""
    return any(_find_sink(logger) is not None for logger in trainer.loggers)


def scalars_only(trainer: Trainer) -> list[str]:
    """Returns the class names of the run's loggers that take neither texts nor images."""
    return [type(logger).__name__ for logger in trainer.loggers if _find_sink(logger) is None]


def log_text(trainer: Trainer, name: str, text: str, updates: int) -> None:
    """Logs a text to every logger that takes texts, from the first process.

    Args:
        trainer: The running Trainer.
        name: Name of the text.
        text: The text, in Markdown.
        updates: Generator updates so far.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if (sink := _find_sink(logger)) is not None:
            sink.text(name, text, updates)


def log_image(trainer: Trainer, name: str, pixels: Pixels, updates: int) -> None:
    """Logs an image to every logger that takes images, from the first process.

    Args:
        trainer: The running Trainer.
        name: Name of the image.
        pixels: The image, uint8 ``(height, width, 3)``.
        updates: Generator updates so far.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if (sink := _find_sink(logger)) is not None:
            sink.image(name, pixels, updates)


def log_hyperparameters(trainer: Trainer, values: Mapping[str, float | str]) -> None:
    """Logs hyperparameters to every logger but TensorBoard's, whose table needs the names of final numbers, too.

    Args:
        trainer: The running Trainer.
        values: Numbers and texts by name.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        sink = _find_sink(logger)
        if sink is None:
            logger.log_hyperparams(dict(values))
        else:
            sink.hyperparameters(dict(values))


@dataclass(frozen=True)
class _Sink(ABC):
    """Texts, images and hyperparameters by the methods of one kind of logger."""

    logger: Any

    @abstractmethod
    def text(self, name: str, text: str, updates: int) -> None: ...

    @abstractmethod
    def image(self, name: str, pixels: Pixels, updates: int) -> None: ...

    def hyperparameters(self, values: dict[str, float | str]) -> None:
        self.logger.log_hyperparams(values)


class _TensorBoard(_Sink):
    def text(self, name: str, text: str, updates: int) -> None:
        self.logger.experiment.add_text(name, text, updates)

    def image(self, name: str, pixels: Pixels, updates: int) -> None:
        self.logger.experiment.add_image(name, pixels, updates, dataformats="HWC")

    def hyperparameters(self, values: dict[str, float | str]) -> None:
        pass


class _Wandb(_Sink):
    def text(self, name: str, text: str, updates: int) -> None:
        self.logger.log_text(name, columns=["generator updates", "text"], data=[[updates, text]], step=updates)

    def image(self, name: str, pixels: Pixels, updates: int) -> None:
        self.logger.log_image(name, [pixels], step=updates)


class _MLFlow(_Sink):
    """Artifacts of a run, one file per name and generator update."""

    def text(self, name: str, text: str, updates: int) -> None:
        self.logger.experiment.log_text(self.logger.run_id, text, f"{name}/{updates:08d}.md")

    def image(self, name: str, pixels: Pixels, updates: int) -> None:
        self.logger.experiment.log_image(self.logger.run_id, pixels, f"{name}/{updates:08d}.png")

    def hyperparameters(self, values: dict[str, float | str]) -> None:
        """Leaves out those that a resumed run has already: MLflow rejects another value."""
        present = self.logger.experiment.get_run(self.logger.run_id).data.params
        super().hyperparameters({name: value for name, value in values.items() if name not in present})


class _CSV(_Sink):
    """Files next to ``metrics.csv``: one for all texts of a name, and one for each image."""

    def text(self, name: str, text: str, updates: int) -> None:
        with self._path(f"{name}.md").open("a", encoding="utf-8") as file:
            file.write(f"<!-- generator update {updates} -->\n{text}\n\n")

    def image(self, name: str, pixels: Pixels, updates: int) -> None:
        PILImage.fromarray(pixels).save(self._path(f"{name}/{updates:08d}.png"))

    def _path(self, name: str) -> Path:
        path = Path(self.logger.experiment.log_dir) / name  # the experiment first: it expects an empty folder
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


_SINKS: dict[str, type[_Sink]] = {
    "TensorBoardLogger": _TensorBoard,
    "WandbLogger": _Wandb,
    "MLFlowLogger": _MLFlow,
    "CSVLogger": _CSV,
}


def _find_sink(logger: Any) -> _Sink | None:
    """Returns the methods for texts and images of a logger; None if it takes none, or writes files elsewhere."""
    if is_a(logger, "CSVLogger") and "://" in str(logger.log_dir):
        return None
    return next((sink(logger) for name, sink in _SINKS.items() if is_a(logger, name)), None)
