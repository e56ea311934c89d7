"""The balance ratio: its measurement without side effects, its window, and the density controller.

BR is computed in `ratio`, from what `probe` measured. `controller` decides by it, or by another of the `signals`.
`training` does all of it at every generator update, and has masks changed.
"""

from lightning_ddst.balance.controller import (
    Controller,
    Decision,
    DensityController,
    DensityRamp,
    RelativeController,
)
from lightning_ddst.balance.probe import BalanceProbe, ScoresItself
from lightning_ddst.balance.ratio import Balance, BalanceWindow
from lightning_ddst.balance.signals import SIGNALS, control_signal

__all__ = [
    "SIGNALS",
    "Balance",
    "BalanceProbe",
    "BalanceWindow",
    "Controller",
    "Decision",
    "DensityController",
    "DensityRamp",
    "RelativeController",
    "ScoresItself",
    "control_signal",
]
