"""Trains sparse GANs in PyTorch and Lightning by Double Dynamic Sparse Training (DDST)."""

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
from lightning_ddst.loop import SparseLoop, sparsify
from lightning_ddst.sparsity import growth_rule
from lightning_ddst.utils.checkpoints import AtomicCheckpointIO
from lightning_ddst.utils.rng import random_states, set_random_states

__all__ = [
    "AtomicCheckpointIO",
    "DynamicSparsityCallback",
    "GANModule",
    "GeneratorEMA",
    "InterruptCheckpoint",
    "RunSummary",
    "SampleGrid",
    "SampleQuality",
    "SparseLoop",
    "SparsityPlots",
    "control_signal",
    "growth_rule",
    "random_states",
    "set_random_states",
    "sparsify",
]
__version__ = version("lightning-ddst")
