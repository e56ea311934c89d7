"""Layers by pattern: of their names, or by the names of their classes."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn


def name_of_layer(network: str, layer: str) -> str:
    """A layer's name in the module that holds its network; either name may be empty."""
    return f"{network}.{layer}".strip(".")


def matches(pattern: str, name: str, layer: nn.Module) -> bool:
    """Whether a pattern is the layer's name, with wildcards (``*.to_rgb``), or a name of its class (``Conv2d``)."""
    return fnmatchcase(name, pattern) or any(kind.__name__ == pattern for kind in type(layer).__mro__)


def first_match(patterns: Iterable[str], layers: Mapping[str, nn.Module], network: str) -> str | None:
    """Returns the first pattern that matches one of several layers.

    Args:
        patterns: The patterns.
        layers: The layers by their names in a network.
        network: The name of the network.
    """
    for pattern in patterns:
        if any(matches(pattern, name_of_layer(network, name), layer) for name, layer in layers.items()):
            return pattern
    return None
