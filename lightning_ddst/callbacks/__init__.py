"""Lightning callbacks: dynamic sparsity, and what shows how a run went."""

from lightning_ddst.callbacks.dynamic_sparsity import DynamicSparsityCallback

__all__ = ["DynamicSparsityCallback"]
