"""What smaller layers gain in training: the mean step of the paper's SNGAN pair with masks of whole channels.

    OMP_NUM_THREADS=1 python benchmarks/smaller.py [--densities 0.1 0.3 0.5] [--steps 1 5] [--updates 20]

Both networks have the density given, under Lightning's Trainer, with BR measured every 10th update; the dense pair
without the callback takes turns with it, update by update, in one process. No mask changes meanwhile.
"""

import argparse

import torch
from lightning.pytorch import Callback, seed_everything
from overhead import Turns, over, together, trainer
from rows import add, origin
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddst import DynamicSparsityCallback, GANModule
from lightning_ddst.models import SNGANDiscriminator, SNGANGenerator

BATCH = 16
WARM_UP = 2


def fit(callbacks: list[Callback], discriminator_steps: int, updates: int) -> None:
    gan = GANModule(SNGANGenerator(), SNGANDiscriminator(), loss="hinge", discriminator_steps=discriminator_steps)
    batches = (updates + WARM_UP) * discriminator_steps
    images = TensorDataset(torch.rand(batches * BATCH, 3, 32, 32) * 2 - 1)
    trainer(callbacks, epochs=1).fit(gan, DataLoader(images, batch_size=BATCH))


def compare(density: float, discriminator_steps: int, updates: int) -> None:
    seed_everything(0, verbose=False)
    Turns.whose = Turns.runs = 0
    sparsity = DynamicSparsityCallback(
        density, granularity="channel", interval=1000, explore_interval=500, probe_interval=10
    )
    runs: list[list[Callback]] = [[Turns(discriminator_steps)], [Turns(discriminator_steps), sparsity]]
    together(fit, [(each, discriminator_steps, updates) for each in runs])
    dense, small = (callbacks[0].seconds[WARM_UP:] for callbacks in runs)
    row = {
        "density": density,
        "actual": [round(network.density, 4) for network in sparsity.networks().values()],
        "discriminator_steps": discriminator_steps,
        "updates": updates,
        "batch": BATCH,
        **over(small, dense),
        "dense_ms": round(1e3 * sum(dense) / updates),
        "command": f"benchmarks/smaller.py --densities {density} --steps {discriminator_steps} --updates {updates}",
    }
    add("smaller", row | origin())
    print(row, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5], help="discriminator steps a generator step")
    parser.add_argument("--updates", type=int, default=20, help="of the generator, that are compared")
    options = parser.parse_args()
    for density in options.densities:
        for steps in options.steps:
            compare(density, steps, options.updates)
