"""Generators as files of their own."""

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

__all__ = [
    "FORMAT",
    "Weights",
    "load_compressed",
    "load_generator",
    "save_compressed",
    "save_dense",
    "save_onnx",
    "save_program",
]
