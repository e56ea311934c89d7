"""Exports trained generators to files."""

from lightning_ddst.export.formats import (
    FORMAT,
    Weights,
    load_compressed,
    load_generator,
    save_compressed,
    save_dense,
    save_onnx,
    save_program,
)
from lightning_ddst.export.semi_structured import to_semi_structured
from lightning_ddst.sparsity.reparametrized import fold_weight_norm

__all__ = [
    "FORMAT",
    "Weights",
    "fold_weight_norm",
    "load_compressed",
    "load_generator",
    "save_compressed",
    "save_dense",
    "save_onnx",
    "save_program",
    "to_semi_structured",
]
