"""Tensors in batches and in networks' outputs: any nesting of mappings, sequences and dataclasses."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

Place = str | int
"""Place of an entry: a key or an index, or a path of them, ``"images.target"`` or ``"0.image"``."""


def tensors_in(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor with its place, in order; the place is empty if the value itself is a tensor."""
    if isinstance(value, Tensor):
        yield place, value
    else:
        for key, item in _items(value).items():
            yield from tensors_in(item, f"{place}.{key}" if place else str(key))


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


def get_entry(value: Any, place: Place) -> Any:
    """Returns the entry at a place.

    Raises:
        KeyError: If there is no such entry.
    """
    items = {str(name): item for name, item in _items(value).items()}
    if str(place) in items:  # a key may contain dots
        return items[str(place)]
    key, _, rest = str(place).partition(".")
    if not rest or key not in items:
        raise KeyError(place)
    return get_entry(items[key], rest)


def _items(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}
