"""Checks of arguments; each raises a ValueError that names the argument, its value and the allowed values."""

from collections.abc import Collection
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar

from lightning_ddst.utils.suggestions import did_you_mean

T = TypeVar("T")


def check_density(name: str, value: float) -> None:
    """Checks that a value is in (0, 1]."""
    if not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} must be a number in (0, 1].")
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} must be in (0, 1].")


def check_rate(name: str, value: float) -> None:
    """Checks that a value is in [0, 1]."""
    if not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} must be a number in [0, 1].")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be in [0, 1].")


def check_count(name: str, value: int) -> None:
    """Checks that a value is a positive integer, of Python, NumPy or any other kind."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer, at least 1.")


def check_choice(name: str, value: T, allowed: Collection[T]) -> None:
    """Checks that a value is one of several names or numbers."""
    if value not in allowed:
        hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(map(str, allowed))}.{hint}")


def to_plain_numbers(options: Any) -> None:
    """Replaces the numbers in a dataclass, which may be frozen, by `plain_number`; also the entries of sequences."""
    for field in fields(options):
        value = getattr(options, field.name)
        if type(value) in (tuple, list):
            value = type(value)(map(plain_number, value))
        object.__setattr__(options, field.name, plain_number(value))


def plain_number(value: Any) -> Any:
    """Returns a number of NumPy or another kind as Python's, which loads with ``weights_only=True``; others as is."""
    if isinstance(value, bool | int) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
