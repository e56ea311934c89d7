"""Schedules of the exploration rate (drop fraction) over a run."""

import math
from collections.abc import Callable
from numbers import Real

from lightning_ddst.utils.registry import Registry

SCHEDULES: Registry[Callable[[float], float]] = Registry("schedule")
"""Functions from progress through the run, 0 at its start and 1 at its end, to a factor of the exploration rate.

Register others to use them by name.
"""


@SCHEDULES.register("cosine")
def cosine(progress: float) -> float:
    """Returns a factor that anneals to 0 at the end (Dettmers and Zettlemoyer 2019; RigL, Evci et al. 2020)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@SCHEDULES.register("linear")
def linear(progress: float) -> float:
    """Returns a factor that falls linearly to 0 at the end."""
    return 1 - progress


@SCHEDULES.register("constant")
def constant(progress: float) -> float:
    """Returns 1, so that the rate stays constant."""
    return 1.0


def exploration_rate(initial: float, schedule: str, progress: float) -> float:
    """Returns the share of active weights to prune and regrow now.

    Args:
        initial: The rate at the start, in [0, 1].
        schedule: A key of `SCHEDULES`.
        progress: Share of the run that is done; clipped to [0, 1].

    Returns:
        A rate in [0, initial].

    Raises:
        ValueError: If the schedule is unknown, or gives no factor in [0, 1].
    """
    factor = SCHEDULES.find("schedule", schedule)(min(max(progress, 0.0), 1.0))
    if not (isinstance(factor, Real) and 0 <= factor <= 1):
        raise ValueError(f"schedule={schedule!r} returned {factor!r} at progress {progress}; it must be in [0, 1].")
    return initial * float(factor)
