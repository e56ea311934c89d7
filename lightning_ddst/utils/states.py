"""Forms of saved states: a checkpoint comes from elsewhere, so its states are checked before anything is restored.

A form is one of these:

- a `Leaf`: a value that a function accepts;
- a dict: a dict with exactly these keys, and forms of their values;
- a tuple: a list or tuple of this length, and forms of its entries;
- `each(form)`: a list or tuple of any length; `named(form)`: a dict with any names as keys;
- `maybe(form)`: None, or a value of this form.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_ddst.utils.cache import first_line


class StateError(ValueError):
    """A state in a checkpoint is damaged, of another version, or of other networks."""


_LONGEST = 60
"""Characters of a value that an error shows."""
_VERSION = "another version of lightning_ddst saved the checkpoint, or it is damaged"


@dataclass(frozen=True)
class Leaf:
    """A form of values without parts.

    Attributes:
        allowed: The allowed values in words, after "must be".
        accepts: Returns whether a value is allowed; an exception means that it is not.
    """

    allowed: str
    accepts: Callable[[Any], object]


@dataclass(frozen=True)
class _Many:
    kind: Any
    entry: Any
    allowed: str


@dataclass(frozen=True)
class _Maybe:
    form: Any


Form: TypeAlias = Any
"""A `Leaf`, a dict, a tuple, or what `each`, `named` and `maybe` return."""


def each(form: Form) -> Form:
    """Returns the form of lists and tuples with entries of one form."""
    return _Many((list, tuple), form, "a list")


def named(form: Form) -> Form:
    """Returns the form of dicts from names to values of one form."""
    return _Many(dict, form, "a dict with names as keys")


def maybe(form: Form) -> Form:
    """Returns the form of None and of values of another form."""
    return _Maybe(form)


def check_state(owner: str, state: Any, form: Form) -> None:
    """Checks that a saved state has a form.

    Args:
        owner: The name of what restores the state, for the error.
        state: The state.
        form: The form.

    Raises:
        StateError: For the first value that has another form; names the owner, the key, the value and what is allowed.
    """
    for place, problem in _problems(state, form, ""):
        raise StateError(f"{owner}: {place or 'the state'}{problem}")


@contextmanager
def restoring(owner: str) -> Iterator[None]:
    """Turns any error of restoring a state inside the context into a StateError of one line.

    Args:
        owner: The name of what restores the state.

    Raises:
        StateError: For an error inside the context.
    """
    try:
        yield
    except Exception as error:  # a state from elsewhere may lead to anything
        reason = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        raise StateError(f"{owner}: the state in the checkpoint cannot be restored: {reason}") from error


def check_tensors(what: str, saved: Mapping[str, Tensor], own: Mapping[str, Tensor], *, complete: bool = True) -> None:
    """Checks that saved tensors have the names and shapes of a network's.

    Args:
        what: What is saved, for the error.
        saved: The saved tensors by name.
        own: The network's tensors by name.
        complete: Whether each of the network's tensors must be there.

    Raises:
        ValueError: For a name that is missing or unknown, and for another shape.
    """
    for name in sorted(saved.keys() | own.keys() if complete else saved.keys()):
        here, there = (tuple(held[name].shape) if name in held else "missing" for held in (own, saved))
        if here != there:
            raise ValueError(f"{what} are another network's: {name!r} is {there} in the checkpoint, and {here} here.")


def make_loadable(owner: str, state: Any) -> Any:
    """Returns a state in types that load with ``weights_only=True``; numbers and texts of NumPy become Python's.

    Args:
        owner: The name of what the state belongs to, for the error.
        state: The state.

    Raises:
        TypeError: For a value that does not load.
    """
    if isinstance(state, np.generic):
        state = state.item()
    if isinstance(state, dict):
        return {make_loadable(owner, name): make_loadable(owner, value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        values = [make_loadable(owner, value) for value in state]
        return values if isinstance(state, list) else tuple(values)
    if isinstance(state, Tensor) or type(state) in (bool, int, float, str, bytes, type(None)):
        return state
    raise TypeError(
        f"{owner}.state_dict() returned {_shown(state)}; it may hold tensors, numbers, text, None, and lists, tuples "
        "and dicts of them, which load with weights_only=True."
    )


def _problems(value: Any, form: Form, place: str) -> Iterator[tuple[str, str]]:
    """Yields places in a value where it has another form, each with the end of a sentence about it."""
    if isinstance(form, Leaf):
        if not _accepts(form, value):
            yield place, f"={_shown(value)} must be {form.allowed}."
    elif isinstance(form, _Maybe):
        if value is not None:
            yield from _problems(value, form.form, place)
    elif isinstance(form, _Many):
        if not isinstance(value, form.kind) or (isinstance(value, dict) and not all(type(n) is str for n in value)):
            yield place, f"={_shown(value)} must be {form.allowed}."
            return
        entries: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for name, entry in entries:
            yield from _problems(entry, form.entry, f"{place}[{name!r}]")
    elif isinstance(form, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(form):
            yield place, f"={_shown(value)} must be a list of {len(form)}."
            return
        for number, (entry, part) in enumerate(zip(value, form, strict=True)):
            yield from _problems(entry, part, f"{place}[{number}]")
    else:
        yield from _record_problems(value, form, place)


def _record_problems(value: Any, form: Mapping[str, Form], place: str) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        yield place, f"={_shown(value)} must be a dict with {', '.join(form)}."
        return
    for name in [*form, *value]:
        inner = f"{place}.{name}".removeprefix(".")
        if name not in value:
            yield inner, f" is missing: {_VERSION}."
        elif name not in form:
            yield inner, f" is unknown, allowed are {', '.join(form)}: {_VERSION}."
    for name, part in form.items():
        yield from _problems(value[name], part, f"{place}.{name}".removeprefix("."))


def _accepts(form: Leaf, value: Any) -> bool:
    try:
        return bool(form.accepts(value))
    except Exception:  # a value of another type may lead to anything
        return False


def _shown(value: Any) -> str:
    """Returns a value in one short line."""
    if isinstance(value, Tensor):
        return repr(value.item()) if value.numel() == 1 else f"{value.dtype} {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(entry) for name, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _of(dtype: torch.dtype | None, dimensions: int | None = None) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and (value.is_floating_point() or value.is_complex() if dtype is None else value.dtype == dtype)
        and dimensions in (None, value.dim())
    )


def _is_numpy_state(value: Any) -> bool:
    name, keys, *rest = value
    np.random.RandomState().set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    return len(rest) == 3


def _is_python_state(value: Any) -> bool:
    version, internal, gauss = value
    random.Random().setstate((version, tuple(internal), gauss))
    return gauss is None or isinstance(gauss, float)


def _is_torch_state(value: Any) -> bool:
    torch.Generator().set_state(value.cpu())
    return True


ANYTHING = Leaf("anything", lambda value: True)
PLAIN = Leaf("a number, a text or None, or lists or dicts of them", _is_plain)
FLAG = Leaf("True or False", lambda value: type(value) is bool)
TEXT = Leaf("a text", lambda value: type(value) is str)
INTEGER = Leaf("an integer", lambda value: type(value) is int)
COUNT = Leaf("an integer, at least 0", lambda value: type(value) is int and value >= 0)
POSITIVE = Leaf("an integer, at least 1", lambda value: type(value) is int and value >= 1)
NUMBER = Leaf("a number", _is_number)
FINITE = Leaf("a finite number", lambda value: _is_number(value) and math.isfinite(value))
SECONDS = Leaf("a finite number, at least 0", lambda value: _is_number(value) and 0 <= value < math.inf)
DENSITY = Leaf("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1)
SHARE = Leaf("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
TENSOR = Leaf("a tensor", lambda value: isinstance(value, Tensor) and value.layout == torch.strided)
FLOATS = Leaf("a tensor of floating-point numbers", _of(None))
AGES = Leaf(
    "a tensor of floating-point numbers, at least 0",
    lambda value: _of(None)(value) and bool(((value >= 0) & value.isfinite()).all()),
)
BOOL_TENSOR = Leaf("a bool tensor", _of(torch.bool))
MASK = Leaf("a bool tensor with a true entry", lambda value: _of(torch.bool)(value) and bool(value.any()))
BITS = Leaf(
    "a uint8 tensor of one dimension, 8 entries for every 64 weights",
    lambda value: _of(torch.uint8, 1)(value) and len(value) % 8 == 0,
)
TORCH_STATE = Leaf("a state of torch.Generator", _is_torch_state)
RANDOM_STATES: Form = {
    "torch": TORCH_STATE,
    "devices": each(Leaf("a uint8 tensor", _of(torch.uint8, 1))),
    "numpy": Leaf("a state of numpy.random", _is_numpy_state),
    "python": Leaf("a state of Python's random", _is_python_state),
}
