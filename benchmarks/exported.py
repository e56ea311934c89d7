"""Sizes and speeds of an exported generator: the paper's SNGAN at 32 pixels, by what its masks consist of, and density.

    OMP_NUM_THREADS=1 python benchmarks/exported.py

Random masks and weights: neither sizes nor speeds depend on which weights are active. Times are ratios of medians, in
turn, for a batch of 16; kept in results/exported.jsonl.
"""

import tempfile
from pathlib import Path

import torch
from rows import add, origin

from lightning_ddst import export
from lightning_ddst.export.benchmark import onnx_time_ratio, sparse_linears, time_ratio
from lightning_ddst.models import SNGANGenerator
from lightning_ddst.sparsity import MaskedNetwork, compact

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
BATCH = 16


def measure(granularity: str, density: float, folder: Path) -> None:
    torch.manual_seed(0)
    generator = SNGANGenerator(32).eval()
    noise = torch.randn(BATCH, generator.latent_dim)
    sparse = MaskedNetwork(generator, density, granularity=granularity, inputs=(noise,))
    small, left, channels = compact(generator, noise)
    files = {name: folder / name for name in ("dense", "compressed", "onnx", "program")}
    export.save_dense(generator, files["dense"])
    export.save_compressed(generator, files["compressed"])
    difference = export.save_onnx(small, files["onnx"], noise)
    export.save_program(small, files["program"], noise)
    with torch.no_grad():
        by_torch = time_ratio(lambda: small(noise), lambda: generator(noise))
        by_onnx = onnx_time_ratio(files["onnx"], generator, noise)
    row = {
        "granularity": granularity,
        "density": density,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "channels": [left, channels],
        **{f"{name}_bytes": path.stat().st_size for name, path in files.items()},
        "of_maskable_fp32": round(files["compressed"].stat().st_size / (4 * sparse.total), 4),
        "onnx_differs": float(f"{difference:.2g}"),
        "torch_time": round(by_torch, 3),
        "onnx_time": round(by_onnx, 3),
        "linear_times": {name: round(ratio, 3) for name, ratio in sparse_linears(generator, noise).items()},
        "command": "OMP_NUM_THREADS=1 python benchmarks/exported.py",
    }
    add("exported", row | origin())
    print(row, flush=True)


if __name__ == "__main__":
    for granularity in ("weight", "channel"):
        for density in DENSITIES:
            with tempfile.TemporaryDirectory() as folder:
                measure(granularity, density, Path(folder))
