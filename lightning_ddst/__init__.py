"""Trains sparse GANs in PyTorch Lightning by Double Dynamic Sparse Training (DDST)."""

from importlib.metadata import version

from lightning_ddst.balance import control_signal
from lightning_ddst.callbacks import (
    DynamicSparsityCallback,
    GeneratorEMA,
    InterruptCheckpoint,
    RunSummary,
    SampleGrid,
    SampleQuality,
    SparsityPlots,
)
from lightning_ddst.gan.module import GANModule
from lightning_ddst.sparsity import growth_rule
from lightning_ddst.utils.checkpoints import AtomicCheckpointIO

__all__ = [
    "AtomicCheckpointIO",
    "DynamicSparsityCallback",
    "GANModule",
    "GeneratorEMA",
    "InterruptCheckpoint",
    "RunSummary",
    "SampleGrid",
    "SampleQuality",
    "SparsityPlots",
    "control_signal",
    "growth_rule",
]
__version__ = version("lightning-ddst")
