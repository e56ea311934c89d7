"""Dynamic density adjustment: from the balance ratio to the discriminator's density."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from lightning_ddst.balance.ratio import Balance
from lightning_ddst.balance.signals import SIGNALS
from lightning_ddst.utils.validation import check_density

Action = Literal["grow", "prune", "explore", "hold", "undecided"]
ACTIONS: tuple[Action, ...] = ("grow", "prune", "explore", "hold", "undecided")

_REACH = 0.3
"""How far above, or below, the steady share steps are as large as they get."""
_WINDOWS = 3
"""In a row, whose median counts as a level that BR has been at: it may jump while training begins."""
_BR = (
    "BR, the balance ratio, is the share of the gap between the scores of real and of generated images that one "
    "generator update closes. "
)


@dataclass(frozen=True)
class Decision:
    """What to do with the discriminator now.

    Attributes:
        action: "grow" or "prune" to `density`, "explore" at it, or nothing: "hold", "undecided".
        density: The density aimed at, in (0, 1].
        reason: The comparison behind it, in words and numbers.
        at_floor: Whether the discriminator would be pruned if its density were not the smallest allowed.
    """

    action: Action
    density: float
    reason: str
    at_floor: bool = False


class Controller(ABC):
    """Decides on the discriminator's density."""

    def observe(self, balance: Balance) -> None:  # noqa: B027 -- most have nothing to remember
        """Takes note of a window, once an interval, before anything is decided.

        Args:
            balance: What the window says.
        """

    @abstractmethod
    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Decides.

        Args:
            balance: What the last window says.
            density: The density aimed at so far.
            progress: The share of the run that is done, 0 where its length is unknown.
            share: The share of the run that lies between two decisions, 0 where it is unknown.
        """

    def readings(self, balance: Balance) -> dict[str, float]:
        """Returns what the decision is made from, by the names under which it is logged."""
        return {}

    @property
    def explanation(self) -> str:
        """One or two sentences for TensorBoard about the reasons of the decisions; empty if they have none."""
        return ""

    @property
    def judges(self) -> bool:
        """Whether growing means that the discriminator was too weak, and pruning that it was too strong."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What it remembers; loads with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 -- most have nothing to remember
        """Takes over what `state_dict` gave."""


@dataclass(frozen=True)
class DensityController(Controller):
    """Keeps a signal, the balance ratio, between two bounds by the discriminator's density (DDST's DDA).

    A ratio above the bounds says that the discriminator is too weak, so it grows; below, that it
    is too strong, so it is pruned. An undecided ratio moves nothing. At a maximum below 1 (the
    paper's strict setting), where it may not grow, it explores instead.

    Args:
        bounds: Lower and upper bound of the signal, lower < upper; the balance ratio's are not negative.
        delta: Density added or removed at once, in (0, 1].
        min_density: Smallest density, in (0, 1].
        max_density: Largest density, in [min_density, 1]; 1 is the relaxed setting.
        signal: A key of `SIGNALS`.

    Raises:
        ValueError: For an argument outside what is allowed.
    """

    bounds: tuple[float, float] = (0.45, 0.55)
    delta: float = 0.05
    min_density: float = 0.05
    max_density: float = 1.0
    signal: str = "balance_ratio"

    def __post_init__(self) -> None:
        SIGNALS.find("signal", self.signal)
        least, never = (0.0, ", neither negative") if self.signal == "balance_ratio" else (-math.inf, "")
        if len(self.bounds) != 2 or not least <= self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds={tuple(self.bounds)} must be two numbers, lower < upper{never}.")
        check_density("delta", self.delta)
        _check_limits(self.min_density, self.max_density)

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Decides from the window's signal and the density aimed at so far."""
        signal, value = SIGNALS[self.signal], self.value(balance)
        if value is None:
            return Decision("undecided", density, balance.reason or f"{signal.label} is undecided")
        lower, upper = self.bounds
        if lower <= value <= upper:
            return Decision("hold", density, f"{signal.label} {value:.3f} is within {lower:g} to {upper:g}")
        strength = signal.high_means if value > upper else ("strong" if signal.high_means == "weak" else "weak")
        comparison = f"> {upper:g}" if value > upper else f"< {lower:g}"
        reason = f"{signal.label} {value:.3f} {comparison}: the discriminator is too {strength}"
        if strength == "weak":
            if density < self.max_density:
                return Decision("grow", min(_tidy(density + self.delta), self.max_density), reason)
            if self.max_density < 1:
                return Decision("explore", density, f"{reason}, and at its largest density {density:g}")
            return Decision("hold", density, f"{reason}, but dense already")
        if density > self.min_density:
            return Decision("prune", max(_tidy(density - self.delta), self.min_density), reason)
        return Decision("hold", density, f"{reason}, but at its smallest density {density:g}", at_floor=True)

    @property
    def explanation(self) -> str:
        """Says what the signal means."""
        label, above = SIGNALS[self.signal].label, SIGNALS[self.signal].high_means
        below = "weak" if above == "strong" else "strong"
        does = {"weak": "gets weights", "strong": "loses weights"}
        return (
            f"{_BR if self.signal == 'balance_ratio' else ''}Where {label} is above its bounds, the discriminator is "
            f"too {above} and {does[above]}; below, it is too {below} and {does[below]}."
        )

    @property
    def judges(self) -> bool:
        """The bounds say what too weak and too strong are."""
        return True

    def value(self, balance: Balance) -> float | None:
        """The signal; None where it is undecided."""
        value = SIGNALS[self.signal].read(balance)
        return None if value is None or math.isnan(value) else value

    def readings(self, balance: Balance) -> dict[str, float]:
        """The signal, where it is decided, and its bounds."""
        value = self.value(balance)
        decided = {} if value is None else {"control/signal": value}
        return decided | {"control/lower": self.bounds[0], "control/upper": self.bounds[1]}


class RelativeController(Controller):
    """Lets the discriminator grow by how near the balance ratio is to the highest that it has been.

    What BR is depends on networks, losses, learning rates and the generator's density; that it falls when the
    discriminator gets ahead does not (docs/bounds.md). Where BR is at its highest the density rises as in a straight
    line from the smallest to the largest over the run; with BR lower it rises more slowly, and below `steady` of the
    highest it falls. The highest is that of medians of `_WINDOWS` windows in a row, and never fades: BR that falls for
    another reason, as with a learning rate that goes to 0, takes density away, too. A discriminator that does not tell
    real from fake is no strong one, so it grows as in a straight line. At a largest density below 1, where it may not
    grow, it explores instead.

    Args:
        limits: Smallest and largest density, smallest <= largest, in (0, 1].
        delta: The largest step of a decision, in (0, 1]; None for what a straight line adds meanwhile, and the paper's
            0.05 where the run's length is unknown.
        steady: The share of the highest at which BR leaves the density as it is, in (0, 1).

    Raises:
        ValueError: For an argument outside what is allowed.
    """

    def __init__(self, limits: tuple[float, float], delta: float | None = None, steady: float = 0.65) -> None:
        _check_limits(*limits)
        if delta is not None:
            check_density("delta", delta)
        if not 0 < steady < 1:
            raise ValueError(f"steady={steady} must be in (0, 1).")
        self._limits = limits
        self._delta = delta
        self._steady = steady
        self._last: list[float] = []
        self._highest = 0.0

    def observe(self, balance: Balance) -> None:
        """Follows BR."""
        if balance.ratio is None:
            return
        self._last = [*self._last, balance.ratio][-_WINDOWS:]
        if len(self._last) == _WINDOWS:
            self._highest = max(self._highest, median(self._last))

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Decides by what was observed; without a level yet the density rises."""
        smallest, largest = self._limits
        step, reason = 1.0, balance.reason
        if balance.ratio is not None and self._highest > 0:
            level = balance.ratio / self._highest
            step = min(max((level - self._steady) / _REACH, -1.0), 1.0)
            reason = f"BR {balance.ratio:.3f} is {level:.0%} of the highest, {self._highest:.3f}"
        elif balance.ratio is not None and balance.ratio > 0:
            reason = f"BR is {balance.ratio:.3f}, and its level is not known yet"
        elif not balance.at_chance:
            return Decision("undecided", density, reason or "BR has not been above 0 yet")
        full = self._delta
        if full is None:
            full = (largest - smallest) * share if share else DensityController.delta
        planned = min(max(_tidy(density + step * full), smallest), largest)
        if planned > density:
            return Decision("grow", planned, reason)
        if planned < density:
            return Decision("prune", planned, reason)
        return Decision("explore" if step > 0 and largest < 1 else "hold", density, reason)

    @property
    def explanation(self) -> str:
        """Says what the balance ratio means relative to its highest."""
        return (
            f"{_BR}The nearer BR is to the highest that it has been, the more weights the discriminator gets; where BR "
            "has fallen far below, it loses weights."
        )

    def readings(self, balance: Balance) -> dict[str, float]:
        """BR, where it is decided; once there is a level, below what D is pruned, and above what it grows fastest."""
        decided = {} if balance.ratio is None else {"control/signal": balance.ratio}
        if not self._highest:
            return decided
        lower, upper = (share * self._highest for share in (self._steady, self._steady + _REACH))
        return decided | {"control/lower": lower, "control/upper": upper}

    def state_dict(self) -> dict[str, Any]:
        """What was observed; loads with ``weights_only=True``."""
        return {"last": self._last, "highest": self._highest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        if "highest" in state:  # of a run with given bounds there is nothing to take over
            self._last, self._highest = list(state["last"]), state["highest"]


@dataclass(frozen=True)
class DensityRamp(Controller):
    """Lets the discriminator's density rise in a straight line over the run, whatever the balance: no feedback.

    What a controller has to be better than.

    Args:
        start: The density at the start, in (0, 1].
        end: The density at the end, in [start, 1].

    Raises:
        ValueError: For a density outside what is allowed.
    """

    start: float
    end: float = 1.0

    def __post_init__(self) -> None:
        check_density("start", self.start)
        if not self.start <= self.end <= 1:
            raise ValueError(f"end={self.end} must be in [start={self.start}, 1].")

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Decides from the share of the run that is done."""
        planned = _tidy(self.start + (self.end - self.start) * min(progress, 1.0))
        action: Action = "grow" if planned > density else "hold"
        return Decision(action, max(planned, density), f"{progress:.0%} of the run is done")


def _check_limits(smallest: float, largest: float) -> None:
    """By the names of the callback's arguments."""
    check_density("max_discriminator_density", largest)
    if not 0 < smallest <= largest:
        raise ValueError(f"min_discriminator_density={smallest} must be in (0, max_discriminator_density={largest}].")


def _tidy(density: float) -> float:
    """Without the rounding errors that adding delta again and again piles up."""
    return round(density, 9)
