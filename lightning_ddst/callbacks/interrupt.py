"""A checkpoint of an interrupted run."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_ddst.utils.lightning_packages import package_of

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptCheckpoint(Callback):
    """A callback that saves a checkpoint when a run is interrupted, and ends the run.

    On Ctrl-C (SIGINT) or SIGTERM the run finishes its batch (and, at the end of an epoch, the validation) and saves
    ``checkpoints/interrupted.ckpt`` in the log folder. ``trainer.fit(..., ckpt_path=<that file>)`` resumes exactly. A
    second signal ends the run at once. ``lightning-ddst fit`` adds this callback automatically. Put it last in
    ``Trainer(callbacks=...)``.

    Args:
        dirpath: Folder of the checkpoint; by default ``checkpoints`` in the log folder.

    Attributes:
        path: Path of the checkpoint; None before it is saved.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.path: Path | None = None
        self._dirpath = dirpath
        self._signal: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs signal handlers; Python allows that only in the main thread."""
        self._signal = self.path = None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._interrupted) for number in _SIGNALS}

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore()  # so that a second signal ends the run at once
        rank_zero_info("\nInterrupted: saving a checkpoint after this batch; interrupt again to stop at once.")

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Saves and ends an interrupted run, except at an epoch's last batch: Lightning would skip the validation."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves and ends an interrupted run."""
        if not _is_done(trainer):
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        # Processes get the signal at different batches, or not at all.
        if not trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            return
        folder = Path(self._dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        self.path = folder / "interrupted.ckpt"
        trainer.save_checkpoint(self.path)
        rank_zero_info(f"The interrupted run is saved; resume with --ckpt_path {self.path}")
        if self._signal == signal.SIGTERM:
            raise package_of(trainer).utilities.exceptions.SIGTERMException(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the earlier signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the earlier signal handlers."""
        self._restore()


def _is_done(trainer: Trainer) -> bool:
    """Returns whether the run ends with this epoch anyway."""
    epochs, limit = trainer.current_epoch + 1, trainer.max_epochs or -1  # Lightning counts an epoch after its hooks
    return 0 < limit <= epochs or 0 < trainer.max_steps <= trainer.global_step
