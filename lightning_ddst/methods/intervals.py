"""Intervals between measurements, decisions and explorations, in generator updates."""

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar, Literal

from lightning_ddst.utils.counts import describe_times
from lightning_ddst.utils.states import COUNT, POSITIVE, Form, maybe
from lightning_ddst.utils.validation import check_count, to_plain_numbers

_UNKNOWN_LENGTH_INTERVAL = 1000
_LONGEST_WINDOW = 10_000
"""Measurements that a window keeps at most; more would not make the balance ratio more certain."""


@dataclass(frozen=True)
class Intervals:
    """The intervals that the user requests, in generator updates; None leaves them to `Plan.for_run`.

    Attributes:
        interval: Updates between two decisions.
        explore_interval: Updates between two explorations.
        probe_interval: Updates between two measurements of the balance ratio; "auto" leaves it to `Plan.for_run`,
            None measures nothing.

    Raises:
        ValueError: If an interval is not a positive integer, or `probe_interval` is longer than `interval`.
    """

    interval: int | None = None
    explore_interval: int | None = None
    probe_interval: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        """Checks the intervals."""
        to_plain_numbers(self)
        for name in ("interval", "explore_interval"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        if self.probe_interval is None or self.probe_interval == "auto":
            return
        if not isinstance(self.probe_interval, Integral):
            raise ValueError(f'probe_interval={self.probe_interval!r} must be an integer, at least 1, "auto" or None.')
        check_count("probe_interval", self.probe_interval)
        if self.interval is not None and self.probe_interval > self.interval:
            raise ValueError(f"probe_interval={self.probe_interval} must not be longer than interval={self.interval}.")


@dataclass(frozen=True)
class Plan:
    """The current intervals, in generator updates; None means never, or not known yet.

    Attributes:
        interval: Updates between two decisions on the discriminator's density.
        explore_interval: Updates between two explorations of the generator.
        probe_interval: Updates between two measurements of the balance ratio.
        updates: The run's length, over which exploration is annealed.
    """

    interval: int | None = None
    explore_interval: int | None = None
    probe_interval: int | None = None
    updates: int | None = None

    state_form: ClassVar[Form] = {
        "interval": maybe(POSITIVE),
        "explore_interval": maybe(POSITIVE),
        "probe_interval": maybe(POSITIVE),
        "updates": maybe(COUNT),
    }
    """The form of the fields as a dict."""

    @classmethod
    def for_run(cls, intervals: Intervals, updates: int | None, *, known: bool, reference: int | None = None) -> "Plan":
        """Fills in the default intervals.

        Args:
            intervals: The requested intervals.
            updates: The run's length; None if nothing limits the run.
            known: Whether the run's length is known. Until then, defaults stay None.
            reference: The length that default intervals are derived from; by default `updates`.
        """
        interval, explore_interval = intervals.interval, intervals.explore_interval
        probe_interval = intervals.probe_interval
        if known:
            default = _default_interval(updates if reference is None else reference)
            if interval is None:
                interval = max(default, probe_interval if isinstance(probe_interval, Integral) else 1)
            if explore_interval is None:
                explore_interval = default // 2
        if probe_interval == "auto":
            probe_interval = _default_probe_interval(interval)
        return cls(interval, explore_interval, probe_interval, updates)

    def times(self, interval: int) -> str:
        """Returns an interval in words, such as "every 100 updates, 30 times"."""
        number = "" if self.updates is None else f", {describe_times(self.updates // interval)}"
        return f"every {interval:,} updates{number}" if interval > 1 else f"at every update{number}"

    @property
    def window(self) -> int:
        """Number of measurements between two decisions; a small number while it is not known."""
        return min(max(1, (self.interval or 10) // (self.probe_interval or 1)), _LONGEST_WINDOW)


def is_due(update: int, interval: int | None) -> bool:
    """Returns whether something that happens every `interval` generator updates happens at this one."""
    return interval is not None and update % interval == 0


def _default_interval(updates: int | None) -> int:
    """Returns the interval between decisions for a run of this length."""
    if updates is None:
        return _UNKNOWN_LENGTH_INTERVAL
    return max(10, min(updates // 10, 100), updates // 100)


def _default_probe_interval(interval: int | None) -> int:
    """Returns 1/100 of the interval between decisions; in short runs, where measuring costs most, up to 1/50."""
    return 1 if interval is None else max(1, min(interval // 50, 2), interval // 100)
