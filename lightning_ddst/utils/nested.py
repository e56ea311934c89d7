"""Tensors in batches and in networks' outputs: any nesting of mappings, sequences and dataclasses."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

Place = str | int
"""Place of an entry: a key or an index, or a path of them, ``"images.target"`` or ``"0.image"``.

Indices may be negative (``-1`` is the last entry), ``*`` in a path stands for every entry (``"*.-1"``: the last entry
of each), and the empty path for the value itself.
"""


def leaves_in(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields everything that is no mapping, sequence or dataclass, with its place, in order."""
    if (items := _items(value)) is None:
        yield place, value
    else:
        for key, item in items.items():
            yield from leaves_in(item, f"{place}.{key}" if place else str(key))


def tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor with its place, in order; the place is empty if the value itself is a tensor."""
    return ((place, leaf) for place, leaf in leaves_in(value) if isinstance(leaf, Tensor))


def get_first_tensor(value: Any) -> Tensor:
    """Returns the first tensor in a network's output.

    Raises:
        TypeError: If there is no tensor.
    """
    for _, tensor in tensors_in(value):
        return tensor
    raise TypeError(f"no tensor in what a network returned: {type(value).__name__}.")


def describe_tensors(value: Any) -> str:
    """Returns a text with place, shape and dtype of every tensor in a value, for messages."""
    described = [f"{place} {tuple(tensor.shape)} {tensor.dtype}".strip() for place, tensor in tensors_in(value)]
    return ", ".join(described) or "no tensor"


def find_entries(value: Any, place: Place) -> list[Any]:
    """Returns the entries at a place: several if its path holds ``*``, otherwise one.

    Raises:
        KeyError: If there is no such entry, or one of those that ``*`` stands for lacks it.
    """
    path = str(place)
    if not path:
        return [value]
    items = {str(name): item for name, item in (_items(value) or {}).items()}
    named = dict(items)
    if isinstance(value, list | tuple):
        named |= {str(i - len(value)): item for i, item in enumerate(value)}
        named |= {name: getattr(value, name) for name in getattr(value, "_fields", ())}  # of a named tuple
    if path in named:  # a key may contain dots
        return [named[path]]
    key, _, rest = path.partition(".")
    if key == "*" and items:
        return [entry for item in items.values() for entry in find_entries(item, rest)]
    if not rest or key not in named:
        raise KeyError(place)
    return find_entries(named[key], rest)


def get_entry(value: Any, place: Place) -> Any:
    """Returns the entry at a place.

    Raises:
        KeyError: If there is not exactly one such entry.
    """
    entries = find_entries(value, place) if str(place) else []
    if len(entries) != 1:
        raise KeyError(place)
    return entries[0]


def get_tensor(batch: Any, name: str, place: Place) -> Tensor:
    """Returns the tensor of a batch at the place that an argument names.

    Args:
        batch: The batch.
        name: Name of the argument, for the error.
        place: Its value.

    Raises:
        ValueError: If there is no tensor at that place.
    """
    try:
        entry = get_entry(batch, place)
    except KeyError:
        entry = None
    if not isinstance(entry, Tensor):
        raise ValueError(f"{name}={place!r} is no tensor in the batch; it holds {describe_tensors(batch)}.")
    return entry


def find_images(batch: Any, place: Place | None, shape: Callable[[], torch.Size], owner: str) -> Tensor:
    """Finds the real images in a batch.

    Args:
        batch: Any nesting of mappings, sequences and dataclasses.
        place: Place of the real images; None means the only floating-point tensor, or of several the only one of
            the generator's shape.
        shape: Returns the shape of one generated image; called for several floating-point tensors only.
        owner: Name of the class with the argument `real`, for the error.

    Raises:
        ValueError: If there is no tensor at that place, or not exactly one that could be the real images.
    """
    if place is not None:
        return get_tensor(batch, "real", place)
    if isinstance(batch, Tensor):
        return batch
    found = {name: tensor for name, tensor in tensors_in(batch) if tensor.is_floating_point()}
    wanted = ""
    if len(found) > 1:
        size = shape()
        found = {name: tensor for name, tensor in found.items() if tensor.shape[1:] == size}
        wanted = f" of shape (batch, {', '.join(map(str, size))}), like the generator's output,"
    if len(found) == 1:
        return next(iter(found.values()))
    number = f"{len(found)} floating-point tensors" if found else "no floating-point tensor"
    example = next(iter(found), "...")
    raise ValueError(
        f"real=None: the batch holds {number}{wanted} that could be the real images; name them, "
        f'{owner}(..., real="{example}"). It holds {describe_tensors(batch)}.'
    )


def find_labels(batch: Any, place: Place | None, images: Tensor) -> Tensor | None:
    """Finds the labels of a batch of images; None if there are none.

    Args:
        batch: Any nesting of mappings, sequences and dataclasses.
        place: Place of the labels; None means the second of a list or tuple of two, else the only tensor of integers
            with one entry per image.
        images: The real images.

    Raises:
        ValueError: If there is no tensor at that place, or several could be the labels.
    """
    if place is not None:
        return get_tensor(batch, "labels", place)
    if isinstance(batch, list | tuple) and len(batch) == 2 and batch[0] is images and isinstance(batch[1], Tensor):
        return batch[1]
    found = {
        name: tensor
        for name, tensor in tensors_in(batch)
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        and tensor.shape == images.shape[:1]
        and tensor is not images
    }
    if len(found) > 1:
        raise ValueError(
            f"labels=None: any of the batch's {', '.join(found)} could be the labels; name them, GANModule(..., "
            f'labels="{next(iter(found))}"), as real="..." names the images. It holds {describe_tensors(batch)}.'
        )
    return next(iter(found.values()), None)


def _items(value: Any) -> dict[Any, Any] | None:
    """Returns the entries of a mapping, sequence or dataclass by key, index or field; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None
