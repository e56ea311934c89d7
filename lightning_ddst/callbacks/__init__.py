"""Lightning callbacks for sparse training, evaluation and reporting.

`DynamicSparsityCallback.state_dict` saves the state of a sparse run: masks, counters, BR, random states.
"""

from lightning_ddst.callbacks.dynamic_sparsity import DynamicSparsityCallback
from lightning_ddst.callbacks.ema import GeneratorEMA
from lightning_ddst.callbacks.interrupt import InterruptCheckpoint
from lightning_ddst.callbacks.plots import SparsityPlots
from lightning_ddst.callbacks.quality import SampleQuality
from lightning_ddst.callbacks.samples import SampleGrid
from lightning_ddst.callbacks.summary import RunSummary

__all__ = [
    "DynamicSparsityCallback",
    "GeneratorEMA",
    "InterruptCheckpoint",
    "RunSummary",
    "SampleGrid",
    "SampleQuality",
    "SparsityPlots",
]
