"""Trains sparse GANs in PyTorch Lightning by Double Dynamic Sparse Training (DDST)."""

from lightning_ddst.callbacks import DynamicSparsityCallback

__all__ = ["DynamicSparsityCallback"]
