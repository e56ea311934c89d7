"""Layers by pattern: of their names, or by the names of their classes."""

from fnmatch import fnmatchcase

from torch import nn


def matches(pattern: str, name: str, layer: nn.Module) -> bool:
    """Whether a pattern is the layer's name, with wildcards (``*.to_rgb``), or a name of its class (``Conv2d``)."""
    return fnmatchcase(name, pattern) or any(kind.__name__ == pattern for kind in type(layer).__mro__)
