"""Trains sparse GANs in PyTorch Lightning by Double Dynamic Sparse Training (DDST)."""

from importlib.metadata import version

from lightning_ddst.callbacks import (
    DynamicSparsityCallback,
    FrechetDistance,
    GeneratorEMA,
    InterruptCheckpoint,
    RunSummary,
    SampleGrid,
)
from lightning_ddst.module import GANModule
from lightning_ddst.sparsity import growth_rule

__all__ = [
    "DynamicSparsityCallback",
    "FrechetDistance",
    "GANModule",
    "GeneratorEMA",
    "InterruptCheckpoint",
    "RunSummary",
    "SampleGrid",
    "growth_rule",
]
__version__ = version("lightning-ddst")
