"""One registry for everything that users can add by name: methods, growth rules, signals, units, losses."""

from collections.abc import Callable
from typing import TypeVar

from lightning_ddst.utils.suggestions import did_you_mean

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dict of objects by name; YAML, the command line and Python accept the names instead of the objects.

    Args:
        kind: The singular noun that errors use, such as "growth rule".

    Example::

        LOSSES: Registry[Loss] = Registry("loss")

        @LOSSES.register("hinge")
        class Hinge(Loss): ...
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers an object under a name.

        Args:
            name: The name. Defining the same object again, as notebooks do, replaces it.

        Raises:
            ValueError: If another object has the name.
            TypeError: If the name is no text, as in a decorator without parentheses.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a {self.kind} must be text, and is {name!r}; decorators need parentheses.")

        def add(value: T) -> T:
            if name in self and _origin(self[name]) != _origin(value):
                raise ValueError(f"{self.kind} {name!r} is registered already, by {'.'.join(_origin(self[name]))}.")
            self[name] = value
            return value

        return add

    def find(self, argument: str, name: str) -> T:
        """Returns the object with a name.

        Args:
            argument: The argument whose value is the name, for the error.
            name: The name.

        Raises:
            ValueError: If nothing is registered under the name; the error lists all names and the nearest one.
        """
        if name not in self:
            raise ValueError(
                f"{argument}={name!r} is unknown; allowed are {', '.join(self)}.{did_you_mean(name, self)}"
            )
        return self[name]


def _origin(value: object) -> tuple[str, str]:
    """Returns the module and the name under which an object was defined."""
    defined = getattr(value, "__wrapped__", value)  # as functools.wraps has it
    known = defined if hasattr(defined, "__qualname__") else type(defined)
    return known.__module__, known.__qualname__
