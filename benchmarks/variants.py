"""What the package does not do, to compare with: callbacks that take a part of it out.

PYTHONPATH=benchmarks lightning-ddst fit ... --trainer.callbacks+=variants.PlainAverage
"""

from dataclasses import replace
from functools import partialmethod
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ddst.balance import Balance, Decision, DensityController, controller
from lightning_ddst.sparsity.averaging import WeightAverage
from lightning_ddst.sparsity.enforcement import MaskEnforcer


class PlainAverage(Callback):
    """An average of weights that does not know of masks, as in the paper's code.

    A grown weight's average begins at 0; what was pruned is 0 in it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        mask_aware = WeightAverage.update

        @torch.no_grad()
        def update(average: WeightAverage) -> None:
            weights = average._ages
            average._ages = {}
            mask_aware(average)
            average._ages = weights
            live = average._live()
            for name in weights:
                average._averages[name].masked_fill_(live[name] == 0, 0)

        WeightAverage.update = update  # type: ignore[method-assign]


class KeptState(Callback):
    """Optimizer state of inactive weights is left to the optimizer, as in the paper's code with Adam."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        keep = partialmethod(MaskEnforcer.__init__, optimizer_state="keep")
        MaskEnforcer.__init__ = keep  # type: ignore[method-assign, assignment]


class ExploresInBand(Callback):
    """Where BR is within its bounds, the discriminator explores at its density instead of keeping its mask.

    Args:
        limits: Also at its smallest and largest density, where it keeps its mask otherwise.
    """

    def __init__(self, limits: bool = False) -> None:
        self._limits = limits

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        decide = DensityController.decide

        def explore(controls: DensityController, *args: Any, **kwargs: Any) -> Decision:
            decision = decide(controls, *args, **kwargs)
            if decision.action == "hold" and (self._limits or "within" in decision.reason):
                return replace(decision, action="explore", reason=f"{decision.reason}: the discriminator explores")
            return decision

        DensityController.decide = explore  # type: ignore[method-assign]


class Brake(Callback):
    """The discriminator grows unless BR has fallen, from the highest that it was, to bounds that are shares of that.

    It does not go on from checkpoints.

    Args:
        lower: Below this share of the highest BR the discriminator is pruned.
        upper: Above it, it grows.
        explores: Between the two, and at its limits, it explores instead of keeping its mask.
    """

    def __init__(self, lower: float, upper: float, explores: bool) -> None:
        self._lower, self._upper, self._explores = lower, upper, explores
        self._last = self._highest = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        decide = DensityController.decide

        def braked(controls: DensityController, balance: Balance, density: float, *shares: float) -> Decision:
            if balance.ratio is not None:
                self._highest = max(self._highest, (self._last + balance.ratio) / 2)
                self._last = balance.ratio
                bounds = self._lower * self._highest, self._upper * self._highest
                controls = replace(controls, bounds=bounds)
            decision = decide(controls, balance, density, *shares)
            if decision.action == "hold" and self._explores:
                return replace(decision, action="explore")
            return decision

        DensityController.decide = braked  # type: ignore[method-assign]


class Even(Callback):
    """With bounds "auto" another share of its highest at which BR leaves the discriminator's density as it is.

    Trials that were made with commit 7352a99, where that share was 0.6, gave 0.65 by this; those with 0.6 did without.

    Args:
        share: In (0, 1).
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        controller._STEADY = self._share
