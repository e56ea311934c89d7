"""Layers by pattern: of their names, or by the names of their classes."""

from fnmatch import fnmatchcase

from torch import nn


def name_of_layer(network: str, layer: str) -> str:
    """A layer's name in the module that holds its network; either name may be empty."""
    return f"{network}.{layer}".strip(".")


def matches(pattern: str, name: str, layer: nn.Module) -> bool:
    """Whether a pattern is the layer's name, with wildcards (``*.to_rgb``), or a name of its class (``Conv2d``)."""
    return fnmatchcase(name, pattern) or any(kind.__name__ == pattern for kind in type(layer).__mro__)
