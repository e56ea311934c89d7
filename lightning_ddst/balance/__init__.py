"""The balance ratio (BR): its measurement without side effects, its window, and the density controllers.

At every measured generator update, `recorder` records the networks' calls, `real_images` finds the real images in the
batch, `probe` scores them and the fakes before and after the update, and `ratio` computes BR from the scores of a
window. `controller` decides on a density by BR or another of the `signals`.
"""

from importlib import import_module

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


def __getattr__(name: str) -> object:
    """Returns objects that moved to `lightning_ddst.methods`, for their former import path."""
    if name in ("Plan", "SparseTraining"):
        return getattr(import_module("lightning_ddst.methods"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
