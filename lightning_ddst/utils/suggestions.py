"""The nearest right name for a wrong one."""

from collections.abc import Iterable
from difflib import get_close_matches


def find_nearest(name: object, names: Iterable[object]) -> str | None:
    """Returns the name that is most similar to a wrong one, in either case of letters; None if none is similar.

    Args:
        name: The wrong name.
        names: The right names.
    """
    by_lower = {str(each).lower(): str(each) for each in names}
    near = get_close_matches(str(name).lower(), by_lower, n=1)
    return by_lower[near[0]] if near else None


def did_you_mean(name: object, names: Iterable[object], prefix: str = "") -> str:
    """Returns a question with the most similar name, to append to an error; empty if none is similar.

    Args:
        name: The wrong name.
        names: The right names.
        prefix: Text that belongs before the names, such as "--".
    """
    near = find_nearest(name, names)
    return "" if near is None else f" Did you mean {prefix}{near}?" if prefix else f" Did you mean {near!r}?"
