"""Lightning callbacks: dynamic sparsity, and what shows how a run went."""

from lightning_ddst.callbacks.dynamic_sparsity import DynamicSparsityCallback
from lightning_ddst.callbacks.ema import GeneratorEMA
from lightning_ddst.callbacks.frechet import FrechetDistance
from lightning_ddst.callbacks.interrupt import InterruptCheckpoint
from lightning_ddst.callbacks.samples import SampleGrid
from lightning_ddst.callbacks.summary import RunSummary

__all__ = [
    "DynamicSparsityCallback",
    "FrechetDistance",
    "GeneratorEMA",
    "InterruptCheckpoint",
    "RunSummary",
    "SampleGrid",
]
