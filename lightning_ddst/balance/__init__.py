"""The balance ratio: its measurement without side effects, its window, and the density controller."""

from lightning_ddst.balance.controller import (
    CalibratingController,
    Controller,
    Decision,
    DensityController,
    DensityRamp,
)
from lightning_ddst.balance.probe import BalanceProbe, ScoresItself
from lightning_ddst.balance.signals import SIGNALS, control_signal
from lightning_ddst.balance.training import Exploration, Plan, SparseTraining
from lightning_ddst.balance.window import Balance, BalanceWindow

__all__ = [
    "SIGNALS",
    "Balance",
    "BalanceProbe",
    "BalanceWindow",
    "CalibratingController",
    "Controller",
    "Decision",
    "DensityController",
    "DensityRamp",
    "Exploration",
    "Plan",
    "ScoresItself",
    "SparseTraining",
    "control_signal",
]
