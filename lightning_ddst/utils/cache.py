"""Cached files: named by a digest of their inputs, written atomically, checked when they are read."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

Hash: TypeAlias = "hashlib.blake2b"


def digest(*parts: object) -> str:
    """Computes a digest of several parts.

    Args:
        parts: Tensors, mappings from names to tensors, bytes, or other objects, which count by their ``repr``.

    Returns:
        32 hexadecimal digits, the same in every process and run.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            _add(hashed, part)
        elif isinstance(part, Mapping):
            for name, value in part.items():
                hashed.update(f"{name}:".encode())
                _add(hashed, value) if isinstance(value, Tensor) else hashed.update(repr(value).encode())
        else:
            hashed.update(part if isinstance(part, bytes) else repr(part).encode())
        hashed.update(b";")
    return hashed.hexdigest()


def _add(hashed: Hash, tensor: Tensor) -> None:
    hashed.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        hashed.update(flat.view(torch.uint8).numpy().data)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_writable(folder: Path) -> None:
    """Creates a folder if it does not exist, and checks that files can be written there.

    Raises:
        OSError: If the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` atomically at the end of the context."""
    temporary = path.with_name(f"{path.name[-50:]}.{uuid4().hex}")  # names have at most 255 bytes
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by name to a file, atomically.

    Raises:
        OSError: If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        torch.save({"digest": digest(held), "tensors": held}, temporary)


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """Reads a file of `save_tensors`.

    Returns:
        The tensors, on the CPU; None if there is no such file, or, with a warning, if it is damaged.
    """
    if not path.exists():
        return None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        tensors: dict[str, Tensor] = held["tensors"]
        if digest(tensors) == held["digest"]:
            return tensors
        damage = "its contents have changed since it was written"
    except Exception as error:  # torch.load may raise anything for a damaged file
        damage = first_line(error)
    rank_zero_warn(f"{path} is damaged ({damage}); what it held is computed again.")
    return None
