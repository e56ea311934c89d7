"""The balance ratio: its measurement without side effects, its window, and the density controller."""

from lightning_ddst.balance.controller import Decision, DensityController
from lightning_ddst.balance.probe import BalanceProbe, ScoresItself
from lightning_ddst.balance.training import Exploration, Plan, SparseTraining
from lightning_ddst.balance.window import Balance, BalanceWindow

__all__ = [
    "Balance",
    "BalanceProbe",
    "BalanceWindow",
    "Decision",
    "DensityController",
    "Exploration",
    "Plan",
    "ScoresItself",
    "SparseTraining",
]
