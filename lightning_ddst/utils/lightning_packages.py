"""Lightning's two packages, `lightning.pytorch` and `pytorch_lightning`: the same names, separate classes.

Objects of either may meet here, so nothing else tests for a class of Lightning.
"""

from importlib import import_module
from typing import Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def is_a(value: object, name: str) -> bool:
    """Returns whether an object is an instance of Lightning's class of this name, in either package.

    Args:
        value: Any object.
        name: Name of the class, such as "DDPStrategy".
    """
    return any(kind.__name__ == name and _package(kind) is not None for kind in type(value).__mro__)


def package_of(value: object) -> Any:
    """Imports the package whose class an object is an instance of.

    Raises:
        TypeError: If it is an instance of neither package's classes.
    """
    for kind in type(value).__mro__:
        if (package := _package(kind)) is not None:
            return import_module(package)
    raise TypeError(f"{type(value).__name__} must be an instance of a class in {' or '.join(PACKAGES)}.")


def _package(kind: type) -> str | None:
    return next((package for package in PACKAGES if f"{kind.__module__}.".startswith(f"{package}.")), None)
