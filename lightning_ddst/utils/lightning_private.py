"""Every use of a private attribute of Lightning.

Lightning may change these without notice. This module is the only one that touches them, so that a new release of
Lightning breaks one file. `tests/utils/test_lightning_private.py` checks both.
"""

from typing import Any

from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import Callback, Trainer

from lightning_ddst.utils.lightning_packages import is_a


def state_key(callback: Callback, **facts: Any) -> str:
    """Builds the key of a callback's state in checkpoints, for several callbacks of one class in one Trainer.

    Uses ``Callback._generate_state_key`` (Lightning 1.5): its documentation recommends it, but it has no public name.

    Args:
        callback: The callback whose `state_key` this is.
        **facts: The arguments that distinguish it from others of its class.
    """
    return callback._generate_state_key(**facts)


def state_key_of(kind: str, **facts: Any) -> str:
    """Returns the key of `state_key` for the name of a callback's class, without a callback object.

    Lightning's ``Callback._generate_state_key`` (1.5) joins the class name and the facts.
    """
    return f"{kind}{facts!r}"


def fabric_strategy(wrapped: Any) -> Any:
    """Returns the strategy of a module or optimizer that `Fabric.setup` returned; None for anything else.

    Uses ``_FabricModule._strategy`` and ``_FabricOptimizer._strategy`` (Lightning 2.0): neither has a public name for
    it, and a plain loop need not hand over its Fabric object.
    """
    of_fabric = any(kind.__name__ in ("_FabricModule", "_FabricOptimizer") for kind in type(wrapped).__mro__)
    return wrapped._strategy if of_fabric else None


def set_ddp_default(trainer: Trainer, name: str, value: Any) -> None:
    """Sets an argument of DistributedDataParallel unless the user did; does nothing for other strategies.

    Uses ``DDPStrategy._ddp_kwargs`` (Lightning 1.5): the strategy exists before the module that needs the argument.

    Args:
        trainer: The Trainer; its strategy has not wrapped the module yet, as in `LightningModule.setup`.
        name: The argument.
        value: Its value.
    """
    strategy: Any = trainer.strategy
    if is_a(strategy, "DDPStrategy"):
        strategy._ddp_kwargs.setdefault(name, value)


def evaluation_loaders(trainer: Trainer) -> list[Any]:
    """Returns the loaders of the running validation or test.

    Uses ``Trainer._evaluation_loop`` (Lightning 1.5) and ``_EvaluationLoop._combined_loader`` (2.0): after a fit, the
    public ``Trainer.val_dataloaders`` returns the fit's loaders even in `Trainer.validate` with others.
    """
    return _flattened(trainer._evaluation_loop._combined_loader)


def train_loaders(trainer: Trainer) -> list[Any]:
    """Returns the loaders of the running fit; an empty list before they are made.

    Uses ``_FitLoop._combined_loader`` (Lightning 2.0): the public ``Trainer.train_dataloader`` keeps the nesting that
    the user gave.
    """
    return _flattened(trainer.fit_loop._combined_loader)


def _flattened(combined_loader: Any) -> list[Any]:
    return [] if combined_loader is None else list(combined_loader.flattened)


def transfer_batch(trainer: Trainer, batch: Any, dataloader_idx: int) -> Any:
    """Moves a batch to the device, with all of the user's hooks around the transfer.

    Uses ``LightningModule._on_before_batch_transfer`` (Lightning 2.0): `Strategy.batch_to_device` leaves out that hook.
    """
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def resumes_mid_epoch(trainer: Trainer) -> bool:
    """Returns whether a fit resumes before the last batch of an epoch.

    Uses ``_FitLoop.restarted_mid_epoch`` (Lightning 2.5): public by name, but of an internal class.
    """
    loop = trainer.fit_loop
    return loop.restarted_mid_epoch and not loop.epoch_loop.batch_progress.is_last_batch


def _count_first_epoch(trainer: Trainer) -> None:
    """Counts the first epoch of a fit that resumes after the last batch of another epoch.

    Lightning (2.6) does not, so a checkpoint of that epoch, or of a later one, would resume at its beginning.
    """
    progress = trainer.fit_loop.epoch_progress
    ended = progress.current.ready == progress.current.completed
    is_left = (trainer.max_epochs or -1) < 0 or trainer.current_epoch < (trainer.max_epochs or 0)
    if trainer.fit_loop.restarted_mid_epoch and ended and is_left:
        progress.increment_ready()
        progress.increment_started()


def recount_batches(trainer: Trainer) -> None:
    """Corrects the number of batches before the place in the epoch, for a loader whose batches have another size now.

    Lightning saves how many batches of an epoch are done, which is another number in batches of another size. It
    would end the epoch too early, or without its validation. Call this in `on_train_start`; a second call does
    nothing. Uses ``_TrainingEpochLoop.batch_progress`` (Lightning 1.5): public by name, but of an internal class.

    Raises:
        ValueError: If several loaders resume after different numbers of batches.
    """
    _count_first_epoch(trainer)
    if not resumes_mid_epoch(trainer):
        return
    loaders = train_loaders(trainer)
    counts: set[int] = {loader.resumed_batches for loader in loaders if getattr(loader, "resumed_batches", None)}
    if len(counts) > 1:
        raise ValueError(
            f"batch_size: the train loaders resume after different numbers of batches, {sorted(counts)}; resume with "
            "the batch sizes of the checkpoint, or from a checkpoint of an epoch's end."
        )
    for count in counts:
        current = trainer.fit_loop.epoch_loop.batch_progress.current
        moved = count - current.ready
        for stage in ("ready", "started", "processed", "completed"):
            setattr(current, stage, getattr(current, stage) + moved)


def renew_train_iterator(trainer: Trainer) -> None:
    """Renews the iterator of the train loaders if Lightning has already made the next epoch's iterator.

    A loader draws its order and its workers' seeds when its iterator is made; Lightning makes the first one before
    callbacks can restore random states. A fit that resumes in the middle of an epoch, or after its last batch, makes
    another one later. Uses ``_FitLoop._data_fetcher`` (Lightning 1.5) and ``_TrainingEpochLoop.restarted_on_last``
    (2.5).

    Call `recount_batches` before.
    """
    loop = trainer.fit_loop
    made_later = resumes_mid_epoch(trainer) or (loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_last)
    if not made_later and loop._data_fetcher is not None:
        iter(loop._data_fetcher)


def load_checkpoint(path: Any, map_location: Any, weights_only: bool) -> Any:
    """Reads a checkpoint from a file or a URL.

    Uses ``lightning.fabric.utilities.cloud_io._load`` (Lightning 2.0): `TorchCheckpointIO.load_checkpoint` takes
    `weights_only` from Lightning 2.6 on only.

    Args:
        path: Path or URL of the checkpoint.
        map_location: As for `torch.load`.
        weights_only: As for `torch.load`.
    """
    return _load(path, map_location, weights_only=weights_only)
