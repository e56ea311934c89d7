"""Checks before a run that its folders can be written to and have enough space."""

import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_ddst.utils import cache
from lightning_ddst.utils.lightning_packages import is_a

_COPIES = 5
"""Copies of the weights in a checkpoint: weights, two moments of Adam, an average, initial weights."""
_LOGS = 2**20  # bytes


def check_folders(trainer: Trainer, module: LightningModule) -> None:
    """Checks the local folders of logs and checkpoints.

    Raises:
        OSError: If a folder cannot be written to, or has too little space for a checkpoint.
    """
    values = module.state_dict().values()  # may hold extra state of any type
    tensors = [value for value in values if isinstance(value, Tensor) and not is_lazy(value)]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    needed: dict[Path, int] = {}
    if trainer.loggers and trainer.log_dir is not None:
        needed[Path(trainer.log_dir)] = _LOGS
    for callback in trainer.checkpoint_callbacks:
        dirpath = getattr(callback, "dirpath", None)
        if is_a(callback, "ModelCheckpoint") and dirpath is not None:
            needed[Path(dirpath)] = _COPIES * weights + _LOGS
    for folder, size in needed.items():
        if "://" not in str(folder) and trainer.is_global_zero:
            _check_folder(folder, size)


def _check_folder(folder: Path, needed: int) -> None:
    advice = "Choose another, Trainer(default_root_dir=...)."
    try:
        cache.check_writable(folder)
    except OSError as error:
        raise OSError(f"the run cannot write to {folder}: {error}. {advice}") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:,.0f} MiB left, and a single checkpoint of this run needs about "
            f"{needed / 2**20:,.0f} MiB. {advice}"
        )
