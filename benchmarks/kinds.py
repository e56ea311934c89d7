"""Kinds of updates, by what happens in them: short runs that show each, and what follows for the mean of a long run."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.methods.intervals import Intervals, Plan

ORDINARY, MEASUREMENT = "ordinary update", "measurement of BR"
EXPLORATION = "exploration of G"
GROWS, PRUNES = "decision that grows D", "decision that prunes D"
AFTER = "the update after "
KINDS = (ORDINARY, MEASUREMENT, *(kind for change in (EXPLORATION, GROWS, PRUNES) for kind in (change, AFTER + change)))

DENSITY = 0.1
EVERY, PROBED = 5, 4
"""Updates between two mask changes, and between two measurements, in the short runs."""
FIRST = EVERY + 2
"""The first update that belongs to a kind: states of optimizers are made, and much is checked, before."""


class Amount(Protocol):
    """A number, or several of them."""

    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: float, /) -> Any: ...


A = TypeVar("A", bound=Amount)


def short_runs(granularity: str = "weight") -> dict[str, DynamicSparsityCallback]:
    """Callbacks of runs whose masks change in every fifth update, by the kind of change."""

    def sparse(**arguments: Any) -> DynamicSparsityCallback:
        rarely = {"interval": 1000, "explore_interval": 1000, "probe_interval": PROBED}
        return DynamicSparsityCallback(DENSITY, granularity=granularity, **rarely | arguments)

    return {
        EXPLORATION: sparse(method="sdst", explore_interval=EVERY, exploration_rate=0.5, schedule="constant"),
        GROWS: sparse(method="dda", interval=EVERY, bounds=(0.0, 1e-9)),
        PRUNES: sparse(method="dda", interval=EVERY, bounds=(1e6, 1e7), discriminator_density=0.9),
    }


def length(changes: int) -> int:
    """Updates of a short run with so many mask changes that belong to a kind."""
    return EVERY * (changes + 1) + 1


def sort(updates: Mapping[int, A], change: str) -> dict[str, list[A]]:
    """Sorts updates of a short run by kind; those in which two things happen are left out.

    Args:
        updates: By their number, from `FIRST`.
        change: The kind of mask changes.
    """
    found: dict[str, list[A]] = {}
    for update, value in updates.items():
        happens = {
            change: update % EVERY == 0,
            AFTER + change: update % EVERY == 1,
            MEASUREMENT: update % PROBED == 0,
        }
        here = [kind for kind, due in happens.items() if due] or [ORDINARY]
        if len(here) == 1:
            found.setdefault(here[0], []).append(value)
    return found


def mean_of_run(kinds: Mapping[str, A], updates: int) -> A:
    """The mean of a DDST run's updates at the default intervals of a run of so many updates.

    Half of the decisions grow D and half prune it; kinds that are not there are left out.
    """
    plan = Plan.for_run(Intervals(), updates, known=True)
    ordinary = kinds[ORDINARY]
    mean = ordinary + (kinds[MEASUREMENT] - ordinary) / plan.probe_interval
    intervals = {EXPLORATION: plan.explore_interval, GROWS: 2 * plan.interval, PRUNES: 2 * plan.interval}
    for change, interval in intervals.items():
        for kind in (change, AFTER + change):
            if kind in kinds:
                mean += (kinds[kind] - ordinary) / interval
    return mean


def mean_kinds(kinds: Mapping[str, A]) -> dict[str, A]:
    """The means of the paper's run and of that of a small experiment."""
    return {f"mean of {updates:,} updates": mean_of_run(kinds, updates) for updates in (100_000, 3_000)}
