"""Puts training into the state of a validation, to measure between two validations or without any."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ddst.utils.modules import eval_mode


class ActsInValidation(Callback):
    """A base class of callbacks whose hooks at a validation's start and end are needed to measure rightly."""


@contextmanager
def validation_state(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Sets evaluation mode, averaged weights, and no counting of operations, as in a validation.

    Args:
        trainer: A Trainer that is training, between two batches.
        module: Its module.
    """
    callbacks = [each for each in trainer.callbacks if isinstance(each, ActsInValidation)]  # type: ignore[attr-defined]
    trainer.validating = True
    try:
        with eval_mode(module):
            for callback in callbacks:
                callback.on_validation_start(trainer, module)
            yield
    finally:
        for callback in callbacks:
            callback.on_validation_end(trainer, module)
        trainer.training = True
