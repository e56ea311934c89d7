"""Dynamic density adjustment: controllers of the discriminator's density."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import median
from typing import Any, ClassVar, Literal

from lightning_ddst.balance.ratio import Balance
from lightning_ddst.balance.signals import SIGNALS
from lightning_ddst.utils.states import DENSITY, FINITE, FLAG, TEXT, Form, Leaf, check_state, each
from lightning_ddst.utils.validation import check_choice, check_density, to_plain_numbers

Action = Literal["grow", "prune", "explore", "hold", "undecided"]
ACTIONS: tuple[Action, ...] = ("grow", "prune", "explore", "hold", "undecided")

_REACH = 0.3
"""Distance above or below the steady share from which steps have full size."""
_WINDOWS = 3
"""Consecutive windows whose median counts as a level of BR; single windows may jump early in training."""
_BR = (
    "BR, the balance ratio, is the share of the gap between the scores of real and of generated images that one "
    "generator update closes. "
)


@dataclass(frozen=True)
class Decision:
    """A decision on the discriminator's density.

    Attributes:
        action: "grow" or "prune" to `density`, "explore" at it, or no change: "hold", "undecided".
        density: The target density, in (0, 1].
        reason: The comparison behind the decision, in words and numbers.
        at_floor: Whether the controller would prune the discriminator, but it is at its minimum density.

    Raises:
        ValueError: For another action, a density outside (0, 1], or a reason that is no text.
    """

    action: Action
    density: float
    reason: str
    at_floor: bool = False

    state_form: ClassVar[Form] = {
        "action": Leaf(f"one of {', '.join(ACTIONS)}", ACTIONS.__contains__),
        "density": DENSITY,
        "reason": TEXT,
        "at_floor": FLAG,
    }
    """The form of the fields as a dict."""

    def __post_init__(self) -> None:
        """Checks the fields, and makes them values that load with ``weights_only=True``."""
        check_choice("action", self.action, ACTIONS)
        to_plain_numbers(self)
        check_density("density", self.density)
        if not isinstance(self.reason, str):
            raise ValueError(f"reason={self.reason!r} must be text.")
        object.__setattr__(self, "reason", str(self.reason))
        object.__setattr__(self, "at_floor", bool(self.at_floor))


class Controller(ABC):
    """Base class of controllers, which decide on the discriminator's density."""

    def observe(self, balance: Balance) -> None:  # noqa: B027 -- most have nothing to remember
        """Observes a window once per interval, before the decision.

        Args:
            balance: The balance over the window.
        """

    @abstractmethod
    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Returns a decision.

        Args:
            balance: The balance over the last window.
            density: The current target density.
            progress: The share of the run that is done, in [0, 1]; 0 if the run's length is unknown.
            share: The share of the run between two decisions; 0 if the run's length is unknown.
        """

    def readings(self, balance: Balance) -> dict[str, float]:
        """Returns the numbers that the decision depends on, by their logged names."""
        return {}

    @property
    def explanation(self) -> str:
        """One or two sentences for TensorBoard that explain the decisions; empty if there is nothing to explain."""
        return ""

    @property
    def judges(self) -> bool:
        """Whether growing means that the discriminator was too weak, and pruning that it was too strong."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Returns the controller's state; loads with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 -- most have nothing to remember
        """Restores the state returned by `state_dict`."""


@dataclass(frozen=True)
class DensityController(Controller):
    """A controller that keeps a signal between two bounds: dynamic density adjustment (DDA) of DDST.

    With the balance ratio as signal, a ratio above the bounds means that the discriminator is too weak, so it grows; a
    ratio below means that it is too strong, so it is pruned. An undecided ratio changes nothing. At a maximum density
    below 1 (the paper's strict setting) the discriminator explores instead of growing.

    Args:
        bounds: Lower and upper bound of the signal, lower < upper; not negative for the balance ratio.
        delta: Density that a decision adds or removes, in (0, 1].
        min_density: Minimum density, in (0, 1].
        max_density: Maximum density, in [min_density, 1]; 1 is the relaxed setting.
        signal: A key of `SIGNALS`.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    bounds: tuple[float, float] = (0.45, 0.55)
    delta: float = 0.05
    min_density: float = 0.05
    max_density: float = 1.0
    signal: str = "balance_ratio"

    def __post_init__(self) -> None:
        SIGNALS.find("signal", self.signal)
        least, never = (0.0, ", neither negative") if self.signal == "balance_ratio" else (-math.inf, "")
        pair = tuple(self.bounds) if isinstance(self.bounds, Sequence) else ()
        if len(pair) != 2 or not all(isinstance(bound, Real) for bound in pair) or not least <= pair[0] < pair[1]:
            raise ValueError(f"bounds={self.bounds!r} must be two numbers, lower < upper{never}.")
        check_density("delta", self.delta)
        _check_limits(self.min_density, self.max_density)

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Returns a decision from the window's signal and the current target density."""
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
        """The meaning of the signal, in one or two sentences."""
        label, above = SIGNALS[self.signal].label, SIGNALS[self.signal].high_means
        below = "weak" if above == "strong" else "strong"
        does = {"weak": "gets weights", "strong": "loses weights"}
        return (
            f"{_BR if self.signal == 'balance_ratio' else ''}Where {label} is above its bounds, the discriminator is "
            f"too {above} and {does[above]}; below, it is too {below} and {does[below]}."
        )

    @property
    def judges(self) -> bool:
        """True: the bounds define too weak and too strong."""
        return True

    def value(self, balance: Balance) -> float | None:
        """Returns the signal; None if it is undecided."""
        value = SIGNALS[self.signal].read(balance)
        return None if value is None or math.isnan(value) else value

    def readings(self, balance: Balance) -> dict[str, float]:
        """Returns the signal with its bounds; nothing while it is undecided."""
        if (value := self.value(balance)) is None:
            return {}  # TensorBoard's chart of the band needs all three at the same updates
        return {"control/signal": value, "control/lower": self.bounds[0], "control/upper": self.bounds[1]}


class RelativeController(Controller):
    """A controller that compares the balance ratio with its highest value so far (``bounds="auto"``).

    The level of BR depends on networks, losses, learning rates and the generator's density, but BR always falls when
    the discriminator gets ahead (docs/bounds.md). While BR is at its highest, the density rises at the rate of a
    straight line from the minimum to the maximum over the run. At lower BR it rises more slowly; below `steady` of the
    highest it falls. The highest is the largest median of `_WINDOWS` consecutive windows and never decays, so the
    density also falls if BR falls for another reason, such as a learning rate that decays to 0. A discriminator that
    does not tell real from fake is not strong, so it grows as in a straight line. At a maximum density below 1 the
    discriminator explores instead of growing.

    Args:
        limits: Minimum and maximum density, minimum <= maximum, in (0, 1].
        delta: Largest step of a decision, in (0, 1]. None means the step of a straight line over the run; if the run's
            length is unknown, the paper's 0.05.
        steady: Share of the highest BR at which the density does not change, in (0, 1).

    Raises:
        ValueError: For an argument outside the allowed range.
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
        """Records BR and updates its highest level."""
        if balance.ratio is None:
            return
        self._last = [*self._last, balance.ratio][-_WINDOWS:]
        if len(self._last) == _WINDOWS:
            self._highest = max(self._highest, median(self._last))

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Returns a decision from BR relative to its highest level; the density rises until a level is known."""
        smallest, largest = self._limits
        step, reason = 1.0, balance.reason
        if balance.ratio is not None and self._highest > 0:
            level = balance.ratio / self._highest
            step = min(max((level - self._steady) / _REACH, -1.0), 1.0)
            reason = f"BR {balance.ratio:.3f} is {self._compare(level)}"
        elif balance.ratio is not None and balance.ratio > 0:
            reason = f"BR is {balance.ratio:.3f}, and there is no earlier level yet to compare it with"
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

    def _compare(self, level: float) -> str:
        if level > 1:
            return f"above its highest level so far, {self._highest:.3f}"
        if level < 0:
            return f"below 0, and its highest level so far is {self._highest:.3f}"
        side = "below" if level < self._steady else "at least"
        return f"{level:.0%} of its highest level so far, {self._highest:.3f} ({side} {self._steady:.0%})"

    @property
    def explanation(self) -> str:
        """The meaning of BR relative to its highest level, in three sentences."""
        return (
            f"{_BR}The nearer BR is to the highest level that it has reached, the more weights the discriminator gets; "
            f"where BR has fallen below {self._steady:.0%} of that level, it loses weights. A level is the median of "
            f"{_WINDOWS} windows, so a single window may be above the highest."
        )

    def readings(self, balance: Balance) -> dict[str, float]:
        """Returns BR with the bounds of pruning and of fastest growth; nothing while BR or its level is not known."""
        if balance.ratio is None or not self._highest:
            return {}  # TensorBoard's chart of the band needs all three at the same updates
        lower, upper = (share * self._highest for share in (self._steady, self._steady + _REACH))
        return {"control/signal": balance.ratio, "control/lower": lower, "control/upper": upper}

    def state_dict(self) -> dict[str, Any]:
        """Returns the observations; loads with ``weights_only=True``."""
        return {"last": self._last, "highest": self._highest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        if state:  # a run with fixed bounds has none
            check_state(type(self).__name__, state, {"last": each(FINITE), "highest": FINITE})
            self._last, self._highest = list(state["last"]), state["highest"]


@dataclass(frozen=True)
class DensityRamp(Controller):
    """A controller without feedback: the discriminator's density rises in a straight line over the run.

    It is the baseline of controllers with feedback.

    Args:
        start: The density at the start, in (0, 1].
        end: The density at the end, in [start, 1].

    Raises:
        ValueError: For a density outside the allowed range.
    """

    start: float
    end: float = 1.0

    def __post_init__(self) -> None:
        check_density("start", self.start)
        if not self.start <= self.end <= 1:
            raise ValueError(f"end={self.end} must be in [start={self.start}, 1].")

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Returns a decision from the share of the run that is done."""
        if progress + share > 1 + 1e-9:
            progress = 1.0  # there is no later decision
        planned = _tidy(self.start + (self.end - self.start) * min(progress, 1.0))
        action: Action = "grow" if planned > density else "hold"
        return Decision(action, max(planned, density), f"{progress:.0%} of the run is done")


def _check_limits(smallest: float, largest: float) -> None:
    """Checks the limits; errors use the names of the callback's arguments."""
    check_density("max_discriminator_density", largest)
    if not 0 < smallest <= largest:
        raise ValueError(f"min_discriminator_density={smallest} must be in (0, max_discriminator_density={largest}].")


def _tidy(density: float) -> float:
    """Removes the rounding errors that repeated additions of delta accumulate."""
    return round(density, 9)
