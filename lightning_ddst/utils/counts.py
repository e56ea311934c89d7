"""Counts in words."""


def describe_times(count: int) -> str:
    """Returns a number of times in words, such as "once" or "1,200 times"."""
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
