"""Files of checkpoints: written atomically, checked when they are read."""

import errno
import io
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_ddst.utils import cache
from lightning_ddst.utils.lightning_private import load_checkpoint

AVERAGES = "generator_averages"
"""The key in weights-only checkpoints that holds the states of `GeneratorEMA` callbacks, by their `state_key`."""
_SHARDED = "meta.pt"
"""A file in the folder that is the checkpoint of a model that is split over processes."""
_ABANDONED = 3600.0
"""Seconds after which a temporary file is one of a killed process."""
_OBJECTS = "holds other objects than tensors, numbers, texts and containers"
_COLORS = re.compile("\x1b\\[[0-9;]*m")
"""Codes of a terminal's colors, which torch writes into errors."""


class CheckpointError(OSError):
    """A checkpoint cannot be written, or is damaged."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint next to the earlier one, and then replaces it: one of them is always there and complete.

    The temporary file is in the folder of the checkpoint, so ``TMPDIR`` may be on another file system. A full disk or a
    process that is killed leaves the earlier checkpoint as it was. ``lightning-ddst`` uses it by default. URLs of other
    file systems ("s3://...") are left to Lightning.

    Before it loads a checkpoint it compares the file's checksums. It loads tensors, numbers, texts and containers only,
    so that no checkpoint runs code, unless ``Trainer.fit(weights_only=False)`` allows other objects.

    Example::

        trainer = Trainer(plugins=[AtomicCheckpointIO()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: Its contents.
            path: Path of the file; folders are created.
            storage_options: Must be None, as in `TorchCheckpointIO`.

        Raises:
            CheckpointError: If the file cannot be written; a file that was there before is unchanged.
            TypeError: If `storage_options` are given.
        """
        if _is_url(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        path = Path(path).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path.parent)
            with cache.atomic_write(path) as temporary, temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                _sync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {path} cannot be written: {error.strerror or error}; an earlier file of this name is "
                "unchanged. Free some space, or choose another folder."
            ) from error
        _sync_folder(path.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint.

        Args:
            path: Path of the file.
            map_location: As for `torch.load`.
            weights_only: As for `torch.load`; True by default.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If the file is damaged, or holds other objects.
        """
        local = Path(path).expanduser()
        if not _is_url(path) and local.is_file() and (damage := find_damage(local)):
            raise CheckpointError(f"the checkpoint {path} is damaged: {damage}.")
        try:
            content: dict[str, Any] = load_checkpoint(path, map_location, weights_only is not False)
        except OSError:
            raise
        except Exception as error:  # torch.load may raise anything for a damaged file
            raise CheckpointError(
                f"the checkpoint {path} is damaged or {_OBJECTS}: {describe_error(error)}. If you trust "
                "it, load it with Trainer.fit(weights_only=False)."
            ) from error
        return content


def describe_error(error: Exception) -> str:
    """Returns an error of `torch.load` in one line without control characters."""
    line = _COLORS.sub("", cache.first_line(error))
    if isinstance(error, pickle.UnpicklingError) and line.startswith("Weights only load failed"):
        reason = str(error).partition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        return reason.removesuffix(".") or "it is no pickle of tensors"
    return line.removesuffix(".")


def find_damage(path: Path) -> str | None:
    """Compares a file of `torch.save` with the checksums in it; `torch.load` does not.

    Returns:
        The damage; None if there is none, or if the file is of another format, without checksums.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile raises whatever damaged headers lead to
        return cache.first_line(error)
    return None if damaged is None else f"{damaged} does not match its checksum"


def why_no_checkpoint(path: str | Path) -> str | None:
    """Returns the reason why a path names no checkpoint; None if it may name one, or is a URL."""
    local = Path(path).expanduser()
    if _is_url(path) or local.is_file() or (local / _SHARDED).is_file():
        return None
    if not local.is_dir():
        return "no such file"
    inside = sorted(local.rglob("*.ckpt"), key=lambda each: each.stat().st_mtime)
    return f"it is a folder{f'; name a file, such as {inside[-1]}' if inside else ' without checkpoints'}"


def _is_url(path: str | Path) -> bool:
    return "://" in str(path) or "::" in str(path)


def _remove_abandoned(folder: Path) -> None:
    """Removes the temporary files of processes that were killed."""
    for path in folder.glob(f"*.ckpt.{'[0-9a-f]' * 32}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def _sync(descriptor: int) -> None:
    """Writes a file to the disk, on file systems that can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _sync_folder(folder: Path) -> None:
    """Writes a folder's entries to the disk, on systems that can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
