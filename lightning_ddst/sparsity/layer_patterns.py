"""Patterns that select layers by their names or by the names of their classes."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn


def name_of_layer(network: str, layer: str) -> str:
    """Returns a layer's name in the module that holds its network; either name may be empty."""
    return f"{network}.{layer}".strip(".")


def matches(pattern: str, name: str, layer: nn.Module) -> bool:
    """Returns whether a pattern matches a layer's name (``*.to_rgb``) or is a name of its class (``Conv2d``)."""
    return fnmatchcase(name, pattern) or any(kind.__name__ == pattern for kind in type(layer).__mro__)


def first_match(patterns: Iterable[str], layers: Mapping[str, nn.Module], network: str) -> str | None:
    """Returns the first pattern that matches one of several layers; None if none does.

    Args:
        patterns: The patterns.
        layers: The layers by their names in a network.
        network: The name of the network.
    """
    for pattern in patterns:
        if any(matches(pattern, name_of_layer(network, name), layer) for name, layer in layers.items()):
            return pattern
    return None
