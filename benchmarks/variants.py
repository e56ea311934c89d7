"""Controllers and an average that the package does not have, to compare it with.

PYTHONPATH=benchmarks lightning-ddst fit --config benchmarks/fashion.yaml --sparsity.method lightning_ddst.methods.DDST
    --sparsity.method.generator_density 0.1 --sparsity.method.controller variants.ExploresInBand
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_ddst import GeneratorEMA
from lightning_ddst.balance import Balance, Controller, Decision, DensityController, DensityRamp
from lightning_ddst.sparsity.averaging import WeightAverage


@dataclass(frozen=True)
class ExploresInBand(DensityController):
    """Explores the discriminator while BR is within its bounds, instead of keeping its mask.

    Args:
        limits: Explore also at the smallest density, and when dense.
    """

    limits: bool = False

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Decides as `DensityController`, and explores instead of holding."""
        decision = super().decide(balance, density, progress, share)
        value = self.value(balance)
        within = value is not None and self.bounds[0] <= value <= self.bounds[1]
        if decision.action == "hold" and (within or self.limits):
            return replace(decision, action="explore", reason=f"{decision.reason}: the discriminator explores")
        return decision


class RisingFloor(Controller):
    """DDST with a lower limit of the density that rises in a straight line over the run; BR decides above it.

    Args:
        min_density: The lower limit at the start, in (0, 1].
        floor: The lower limit at the end, in [min_density, 1].
        bounds: Lower and upper bound of BR.
        delta: Density added or removed at once, in (0, 1].
    """

    def __init__(
        self, min_density: float, floor: float, bounds: tuple[float, float] = (0.45, 0.55), delta: float = 0.05
    ) -> None:
        self._feedback = DensityController(bounds, delta, min_density)
        self._ramp = DensityRamp(min_density, floor)

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Decides as `DensityController`, and grows to the floor where the density is below it."""
        floor = self._ramp.decide(balance, self._ramp.start, progress, share).density
        decision = replace(self._feedback, min_density=floor).decide(balance, max(density, floor), progress, share)
        if decision.density > density and decision.action != "grow":
            return replace(decision, action="grow", reason=f"{decision.reason}; the floor is {floor:.3f}")
        return decision

    def readings(self, balance: Balance) -> dict[str, float]:
        """BR and its bounds."""
        return self._feedback.readings(balance)


class GrowsWithoutGap(Controller):
    """DDST that grows while alpha is below a share of its highest; BR decides above it.

    The highest is that of the medians of three windows in a row.

    Args:
        min_density: Smallest density, in (0, 1].
        least: The share of the highest alpha, in (0, 1].
        bounds: Lower and upper bound of BR.
        delta: Density added or removed at once, in (0, 1].
    """

    def __init__(
        self, min_density: float, least: float = 0.5, bounds: tuple[float, float] = (0.45, 0.55), delta: float = 0.05
    ) -> None:
        self._feedback = DensityController(bounds, delta, min_density)
        self._least = least
        self._last: list[float] = []
        self._highest = 0.0

    def observe(self, balance: Balance) -> None:
        """Follows alpha."""
        self._last = [*self._last, balance.alpha][-3:]
        if len(self._last) == 3:
            self._highest = max(self._highest, median(self._last))

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Grows without a gap, else decides as `DensityController`."""
        if balance.alpha < self._least * self._highest and density < 1:
            reason = f"alpha {balance.alpha:.3f} is below {self._least:g} of its highest, {self._highest:.3f}"
            return Decision("grow", min(density + self._feedback.delta, 1.0), reason)
        return self._feedback.decide(balance, density, progress, share)

    def readings(self, balance: Balance) -> dict[str, float]:
        """BR and its bounds."""
        return self._feedback.readings(balance)

    def state_dict(self) -> dict[str, Any]:
        """Returns the observed values."""
        return {"last": self._last, "highest": self._highest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self._last, self._highest = list(state["last"]), state["highest"]


class Brake(Controller):
    """Grows the discriminator unless BR has fallen from its highest; the bounds are shares of the highest BR.

    The highest is that of means of two windows in a row.

    Args:
        lower: Below this share of the highest BR it prunes.
        upper: Above this share it grows.
        explores: Whether it explores between the two, and at the limits of the density, instead of keeping the mask.
        min_density: Smallest density, in (0, 1]; the largest is 1.
        delta: Density added or removed at once, in (0, 1].
    """

    def __init__(self, lower: float, upper: float, explores: bool, min_density: float, delta: float = 0.05) -> None:
        self._shares = DensityController((lower, upper), delta, min_density)  # which checks the arguments
        self._explores = explores
        self._last = self._highest = 0.0

    def observe(self, balance: Balance) -> None:
        """Follows BR."""
        if balance.ratio is not None:
            self._highest = max(self._highest, (self._last + balance.ratio) / 2)
            self._last = balance.ratio

    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        """Decides as `DensityController` between shares of the highest BR."""
        if not self._highest:
            return Decision("undecided", density, balance.reason or "BR has not been above 0 yet")
        decision = self._controller().decide(balance, density, progress, share)
        if decision.action == "hold" and self._explores:
            return replace(decision, action="explore")
        return decision

    def _controller(self) -> DensityController:
        lower, upper = self._shares.bounds
        return replace(self._shares, bounds=(lower * self._highest, upper * self._highest))

    def readings(self, balance: Balance) -> dict[str, float]:
        """BR and its bounds, once there are any."""
        return self._controller().readings(balance) if self._highest else {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the observed values."""
        return {"last": self._last, "highest": self._highest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self._last, self._highest = state["last"], state["highest"]


class PlainAverage(WeightAverage):
    """An average of weights that does not know of masks, as in the paper's code.

    A grown weight's average begins at 0; what was pruned is 0 in it.
    """

    def update_weight(self, average: Tensor, value: Tensor, age: Tensor, decay: float) -> None:
        """Averages as if there were no masks, then masks."""
        average.lerp_(value, 1 - decay).masked_fill_(value == 0, 0)


class PlainEMA(GeneratorEMA):
    """`GeneratorEMA` with a `PlainAverage`; replaces it, because two would swap the weights with each other."""

    average_class = PlainAverage


class ChannelsLast(Callback):
    """Stores weights of convolutions with their channels last, which CPUs and tensor cores compute faster."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.to(memory_format=torch.channels_last)
