"""Dynamic density adjustment: from the balance ratio to the discriminator's density."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_ddst.balance.ratio import Balance
from lightning_ddst.balance.signals import SIGNALS
from lightning_ddst.sparsity.checks import check_choice, check_density

Action = Literal["grow", "prune", "explore", "hold", "undecided"]
ACTIONS: tuple[Action, ...] = ("grow", "prune", "explore", "hold", "undecided")

_BOUNDS = (0.6, 0.75)
"""Bounds that are found, in units of the balance ratio at the densities of the start."""
_RISES = 1.25
"""A balance ratio that is more than so many times the last one is still rising."""


@dataclass(frozen=True)
class Decision:
    """What to do with the discriminator now.

    Attributes:
        action: "grow" or "prune" to `density`, "explore" at it, or nothing: "hold", "undecided".
        density: The density aimed at, in (0, 1].
        reason: The comparison behind it, in words and numbers.
    """

    action: Action
    density: float
    reason: str


class Controller(ABC):
    """Decides on the discriminator's density."""

    @abstractmethod
    def decide(self, balance: Balance, density: float, progress: float = 0.0) -> Decision:
        """Decides.

        Args:
            balance: What the last window says.
            density: The density aimed at so far.
            progress: The share of the run that is done, in [0, 1].
        """

    def readings(self, balance: Balance) -> dict[str, float]:
        """What the decision is made from, by the names it is logged under."""
        return {}

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
        check_choice("signal", self.signal, SIGNALS)
        least, never = (0.0, ", neither negative") if self.signal == "balance_ratio" else (-math.inf, "")
        if len(self.bounds) != 2 or not least <= self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds={tuple(self.bounds)} must be two numbers, lower < upper{never}.")
        check_density("delta", self.delta)
        check_density("max_discriminator_density", self.max_density)
        if not 0 < self.min_density <= self.max_density:
            raise ValueError(
                f"min_discriminator_density={self.min_density} must be in (0, "
                f"max_discriminator_density={self.max_density}]."
            )

    def decide(self, balance: Balance, density: float, progress: float = 0.0) -> Decision:
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
        return Decision("hold", density, f"{reason}, but at its smallest density {density:g}")

    def value(self, balance: Balance) -> float | None:
        """The signal; None where it is undecided."""
        value = SIGNALS[self.signal].read(balance)
        return None if value is None or math.isnan(value) else value

    def readings(self, balance: Balance) -> dict[str, float]:
        """The signal, where it is decided, and its bounds."""
        value = self.value(balance)
        decided = {} if value is None else {"control/signal": value}
        return decided | {"control/lower": self.bounds[0], "control/upper": self.bounds[1]}


class CalibratingController(Controller):
    """Keeps a signal between bounds that are found first, from what the signal is at the densities of the start.

    What the balance ratio is depends on networks, losses, learning rates and densities. How far it falls from a
    discriminator as sparse as the generator to a dense one is much the same in many settings: to about two thirds
    (docs/bounds.md). So the densities stay as they are until the signal has stopped to rise, as it does from nearly 0
    in the first few windows, and the bounds are `_BOUNDS` times what it is then.

    Args:
        controller: Everything but the bounds.

    Attributes:
        bounds: Once they are found.
    """

    def __init__(self, controller: DensityController) -> None:
        self.bounds: tuple[float, float] | None = None
        self._controller = controller
        self._before: float | None = None

    def decide(self, balance: Balance, density: float, progress: float = 0.0) -> Decision:
        """Decides, or finds the bounds."""
        if self.bounds is not None:
            return replace(self._controller, bounds=self.bounds).decide(balance, density, progress)
        value = self._controller.value(balance)
        if value is None or value <= 0:
            return Decision("undecided", density, balance.reason or "nothing to derive bounds from yet")
        before, self._before = self._before, value
        label = SIGNALS[self._controller.signal].label
        if before is None or value > _RISES * before:
            return Decision(
                "hold", density, f"{label} {value:.3f}, and its bounds are not known before it stops to rise"
            )
        level = (before + value) / 2
        self.bounds = (_BOUNDS[0] * level, _BOUNDS[1] * level)
        reason = (
            f"{label} has come to {level:.3f}: it will be kept between {self.bounds[0]:.3f} and {self.bounds[1]:.3f}"
        )
        return Decision("hold", density, reason)

    def readings(self, balance: Balance) -> dict[str, float]:
        """The signal, where it is decided, and its bounds, once they are found."""
        if self.bounds is not None:
            return replace(self._controller, bounds=self.bounds).readings(balance)
        value = self._controller.value(balance)
        return {} if value is None else {"control/signal": value}

    def state_dict(self) -> dict[str, Any]:
        """The bounds, and what is needed to find them; loads with ``weights_only=True``."""
        return {"bounds": self.bounds, "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        # Of a run whose bounds were given there is nothing to take over.
        self.bounds, self._before = state.get("bounds"), state.get("before")


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

    def decide(self, balance: Balance, density: float, progress: float = 0.0) -> Decision:
        """Decides from the share of the run that is done."""
        planned = _tidy(self.start + (self.end - self.start) * min(progress, 1.0))
        action: Action = "grow" if planned > density else "hold"
        return Decision(action, max(planned, density), f"{progress:.0%} of the run is done")


def _tidy(density: float) -> float:
    """Without the rounding errors that adding delta again and again piles up."""
    return round(density, 9)
