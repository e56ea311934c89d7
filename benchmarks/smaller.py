"""Times a training step of the paper's SNGAN pair with masks of whole channels, over the dense step.

    OMP_NUM_THREADS=1 python benchmarks/smaller.py [--densities 0.1 0.3 0.5] [--steps 1 5] [--updates 20]

Both networks have the density given, under Lightning's Trainer, with BR measured every 10th update; the dense pair
without the callback takes turns with it, update by update, in one process. No mask changes meanwhile.
"""

import argparse

from overhead import Setting, over, prepare, take_turns
from rows import add, origin

from lightning_ddst import DynamicSparsityCallback

BATCH = 16
WARM_UP = 2


def compare(density: float, setting: Setting, updates: int) -> None:
    """Adds a row of a density of both networks."""
    sparsity = DynamicSparsityCallback(
        density, granularity="channel", interval=1000, explore_interval=500, probe_interval=10
    )
    seconds = take_turns({"dense": [], "small": [sparsity]}, setting, updates + WARM_UP, setting.steps)
    dense, small = (each[WARM_UP:] for each in seconds.values())
    row = {
        "density": density,
        "actual": [round(network.density, 4) for network in sparsity.networks().values()],
        "discriminator_steps": setting.steps,
        "accelerator": setting.accelerator,
        "precision": setting.precision,
        "updates": updates,
        "batch": setting.batch_size,
        **over(small, dense),
        "dense_ms": round(1e3 * sum(dense) / updates, 1),
        "command": f"python benchmarks/smaller.py --densities {density} --steps {setting.steps} --updates {updates}",
    }
    add("smaller", row | origin())
    print(row, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5], help="discriminator steps a generator step")
    parser.add_argument("--updates", type=int, default=20, help="of the generator, that are compared")
    options = parser.parse_args()
    prepare()
    for density in options.densities:
        for steps in options.steps:
            compare(density, Setting("SNGAN", steps, batch_size=BATCH), options.updates)
