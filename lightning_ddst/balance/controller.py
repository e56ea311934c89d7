"""Dynamic density adjustment: from the balance ratio to the discriminator's density."""

from dataclasses import dataclass
from typing import Literal

from lightning_ddst.balance.window import Balance
from lightning_ddst.sparsity.checks import check_density

Action = Literal["grow", "prune", "explore", "hold", "undecided"]
ACTIONS: tuple[Action, ...] = ("grow", "prune", "explore", "hold", "undecided")


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


@dataclass(frozen=True)
class DensityController:
    """Keeps the balance ratio between two bounds by the discriminator's density (DDST's DDA).

    A ratio above the bounds says that the discriminator is too weak, so it grows; below, that it
    is too strong, so it is pruned. An undecided ratio moves nothing. At a maximum below 1 (the
    paper's strict setting), where it may not grow, it explores instead.

    Args:
        bounds: Lower and upper bound of the balance ratio, 0 <= lower < upper.
        delta: Density added or removed at once, in (0, 1].
        min_density: Smallest density, in (0, 1].
        max_density: Largest density, in [min_density, 1]; 1 is the relaxed setting.

    Raises:
        ValueError: For an argument outside what is allowed.
    """

    bounds: tuple[float, float] = (0.45, 0.55)
    delta: float = 0.05
    min_density: float = 0.05
    max_density: float = 1.0

    def __post_init__(self) -> None:
        if len(self.bounds) != 2 or not 0 <= self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds={tuple(self.bounds)} must be two numbers, lower < upper, neither negative.")
        check_density("delta", self.delta)
        check_density("max_discriminator_density", self.max_density)
        if not 0 < self.min_density <= self.max_density:
            raise ValueError(
                f"min_discriminator_density={self.min_density} must be in (0, "
                f"max_discriminator_density={self.max_density}]."
            )

    def decide(self, balance: Balance, density: float) -> Decision:
        """Decides from the window's balance and the density aimed at so far."""
        if balance.ratio is None:
            return Decision("undecided", density, balance.reason)
        lower, upper = self.bounds
        if balance.ratio > upper:
            reason = f"BR {balance.ratio:.3f} > {upper:g}: the discriminator is too weak"
            if density < self.max_density:
                return Decision("grow", min(_tidy(density + self.delta), self.max_density), reason)
            if self.max_density < 1:
                return Decision("explore", density, f"{reason}, and at its largest density {density:g}")
            return Decision("hold", density, f"{reason}, but dense already")
        if balance.ratio < lower:
            reason = f"BR {balance.ratio:.3f} < {lower:g}: the discriminator is too strong"
            if density > self.min_density:
                return Decision("prune", max(_tidy(density - self.delta), self.min_density), reason)
            return Decision("hold", density, f"{reason}, but at its smallest density {density:g}")
        return Decision("hold", density, f"BR {balance.ratio:.3f} is within {lower:g} to {upper:g}")


def _tidy(density: float) -> float:
    """Without the rounding errors that adding delta again and again piles up."""
    return round(density, 9)
