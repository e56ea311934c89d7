"""Sizes and speeds of an exported generator: the paper's SNGAN at 32 pixels, by density.

    OMP_NUM_THREADS=1 python benchmarks/exported.py

Random masks and weights: neither sizes nor speeds depend on which weights are active. Times are ratios of medians, in
turn, for a batch of 16; kept in results/exported.jsonl.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from rows import add, origin

from lightning_ddst import export
from lightning_ddst.models import SNGANGenerator
from lightning_ddst.sparsity import SparseNetwork
from lightning_ddst.speed import sparse_linears, time_ratio

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
BATCH = 16


def measure(density: float, folder: Path) -> None:
    torch.manual_seed(0)
    generator = SNGANGenerator(32).eval()
    sparse = SparseNetwork(generator, density)
    noise = torch.randn(BATCH, generator.latent_dim)
    dense, small, onnx = (folder / name for name in ("dense", "small", "generator.onnx"))
    export.save_dense(generator, dense)
    export.save_compressed(generator, small)
    difference = export.save_onnx(generator, onnx, noise)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: noise.numpy()}
    by_onnx = time_ratio(lambda: session.run(None, fed), lambda: generator(noise))
    linears = sparse_linears(generator, noise)
    row = {
        "density": density,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "dense_bytes": dense.stat().st_size,
        "compressed_bytes": small.stat().st_size,
        "of_maskable_fp32": round(small.stat().st_size / (4 * sparse.total), 4),
        "onnx_bytes": onnx.stat().st_size,
        "onnx_differs": float(f"{difference:.2g}"),
        "onnx_time": round(by_onnx, 3),
        "linear_times": {name: round(ratio, 3) for name, ratio in linears.items()},
        "command": "OMP_NUM_THREADS=1 python benchmarks/exported.py",
    }
    add("exported", row | origin())
    print(row, flush=True)


if __name__ == "__main__":
    for density in DENSITIES:
        with tempfile.TemporaryDirectory() as folder:
            measure(density, Path(folder))
