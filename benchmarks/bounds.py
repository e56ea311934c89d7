"""Bounds of the balance ratio: the paper's, those that `bounds="auto"` finds, and runs without feedback.

    python benchmarks/bounds.py --data FOLDER_OF_FASHION_MNIST [--jobs 2] [--seeds 10 11]

Small convolutional GANs on Fashion-MNIST at 16x16 pixels, one to three minutes a run. What is done is in
results/bounds.jsonl and is skipped; the table of it is printed at the end (and alone with --jobs 0).
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from statistics import mean
from typing import Any

from rows import add, rows

SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "generator 30 %": {"generator_density": 0.3},
    "random growth": {"growth": "random"},
    "3 D steps": {"discriminator_steps": 3, "updates": 2000},
    "300 images": {"images": 300},
}
METHODS: dict[str, dict[str, Any]] = {
    "bounds 0.45 to 0.55": {"method": "ddst"},
    "bounds auto": {"method": "ddst", "bounds": "auto"},
    "real_sign 0.5 to 0.7": {"method": "ddst", "signal": "real_sign"},
    "ramp": {"method": "ramp"},
    "D balanced": {"method": "sdst"},
    "D dense": {"method": "sdst", "discriminator_density": 1.0},
    "0.45 to 0.55, floor 0.05": {"method": "ddst", "min_discriminator_density": 0.05},
    "0.45 to 0.55, steps of 0.1": {"method": "ddst", "delta": 0.1},
}
VARIANTS = ("0.45 to 0.55, floor 0.05", "0.45 to 0.55, steps of 0.1")
"""Of the controller; only in the first setting."""
CELLS = [(s, m) for s, m in product(SETTINGS, METHODS) if s == "base" or m not in VARIANTS]


def run(setting: str, method: str, seed: int, data: str, cache: str) -> dict[str, Any]:
    """Trains one GAN and says how it came out."""
    import torch
    from lightning.pytorch import Trainer, seed_everything

    from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA, SampleQuality
    from lightning_ddst.data import FashionMNISTDataModule
    from lightning_ddst.models import SmallDiscriminator, SmallGenerator, trained_fashion_cnn

    settings = {"updates": 3000, "images": None, "discriminator_steps": 1, "generator_density": 0.1}
    settings |= SETTINGS[setting] | METHODS[method]
    updates, images, steps = (settings.pop(name) for name in ("updates", "images", "discriminator_steps"))
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.9), fused=True)

    gan = GANModule(
        SmallGenerator(16, 1, 6),
        SmallDiscriminator(16, 1, 6),
        discriminator_steps=steps,
        generator_optimizer=adam,
        discriminator_optimizer=adam,
    )
    batches = updates * steps
    fashion = FashionMNISTDataModule(
        data, 16, images=images, batch_size=32, batches_per_epoch=batches, reference="test"
    )
    sparsity = DynamicSparsityCallback(**settings, interval=200, explore_interval=100, probe_interval=5)
    classifier = trained_fashion_cnn(data, 16, epochs=2, cache=cache)
    quality = SampleQuality(classifier, "fashion_cnn_16", cache=cache)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[sparsity, GeneratorEMA(0.998), quality],
        logger=False,
        num_sanity_val_steps=0,
        **quiet,
    )
    trainer.fit(gan, fashion)
    (_, distance) = quality.history["frechet_distance"][-1]
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "distance": distance,
        "discriminator_density": sparsity.discriminator_density,
        "flops": sparsity.flops_ratio,
        "bounds": getattr(sparsity._controller, "bounds", None),
        "balance": [(update, decision.reason) for update, decision in sparsity.decisions],
        "torch": torch.__version__,
    }


def table() -> str:
    """Means over seeds, in Markdown, with every seed's distance; what there is no run of is left out."""
    found = rows("bounds")
    lines = ["| setting | run | seeds | Frechet distance | each | D's density at the end | training FLOPs |"]
    lines.append("|---|---|---|---|---|---|---|")
    for setting, method in CELLS:
        cell = sorted((r for r in found if (r["setting"], r["method"]) == (setting, method)), key=lambda r: r["seed"])
        if not cell:
            continue
        each = ", ".join(f"{row['distance']:.1f}" for row in cell)
        distance, density, flops = (
            mean(row[part] for row in cell) for part in ("distance", "discriminator_density", "flops")
        )
        lines.append(f"| {setting} | {method} | {len(cell)} | {distance:.2f} | {each} | {density:.2f} | {flops:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, side by side, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--cache", default="benchmark_cache")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--cell", nargs=3, metavar=("SETTING", "RUN", "SEED"), help="one run, as a line of JSON")
    options = parser.parse_args()
    if options.cell:
        setting, method, seed = options.cell
        print(json.dumps(run(setting, method, int(seed), options.data, options.cache)))
        return
    there = {(row["setting"], row["method"], row["seed"]) for row in rows("bounds")}
    cells = [(setting, method, seed) for seed in options.seeds for setting, method in CELLS]
    missing = [cell for cell in cells if cell not in there]

    def one(cell: tuple[str, str, int]) -> None:
        command = [sys.executable, __file__, "--data", options.data, "--cache", options.cache, "--cell"]
        finished = subprocess.run(
            [*command, *map(str, cell)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if finished.returncode:
            print(f"{cell} failed: {finished.stderr[-500:]}", flush=True)
            return
        row = json.loads(finished.stdout.splitlines()[-1])
        add("bounds", row)
        print(
            f"{len(rows('bounds'))}/{len(cells)} {cell}: {row['distance']:.2f}, D {row['discriminator_density']:.2f}",
            flush=True,
        )

    if options.jobs:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, missing))
    print(table())


if __name__ == "__main__":
    main()
