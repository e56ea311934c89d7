"""What a mask update costs, against a dense training step of the same network.

    python benchmarks/mask_update.py

A multilayer perceptron of 10 million weights, batch 64, Adam. Dense steps and mask updates (prune
and grow) take turns in one process; printed are ratios of medians, with the quartiles of the
ratios turn by turn.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise, product

import torch
from torch import nn

from lightning_ddst.sparsity import SparseNetwork

TURNS = 15
SIZES = (1000, 2500, 2500, 500)  # 2.5 + 6.25 + 1.25 million weights


def perceptron() -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(SIZES):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def as_if_trained(sparse: SparseNetwork, values: dict[str, torch.Tensor]) -> None:
    """Fills the active weights anew, so that no update finds those grown before at 0."""
    for name, parameter in sparse.parameters.items():
        parameter.copy_(values[name]).mul_(sparse.masks[name])


def main() -> None:
    torch.manual_seed(0)
    network = perceptron()
    optimizer = torch.optim.Adam(network.parameters())
    batch = torch.randn(64, SIZES[0])

    def step() -> None:
        optimizer.zero_grad()
        network(batch).square().mean().backward()
        optimizer.step()

    for density, scope in product((0.1, 0.5), ("global", "layer")):
        sparse = SparseNetwork(perceptron(), density, scope=scope)
        values, gradients = (
            {name: torch.randn_like(parameter) for name, parameter in sparse.parameters.items()} for _ in range(2)
        )
        steps, updates = [], []
        for turn in range(TURNS + 1):
            elapsed = seconds(step)
            as_if_trained(sparse, values)
            update = seconds(lambda: sparse.explore(0.5, gradients))  # noqa: B023
            if turn:  # the first turn warms up
                steps.append(elapsed)
                updates.append(update)
        ratio = statistics.median(updates) / statistics.median(steps)
        low, _, high = statistics.quantiles([u / s for u, s in zip(updates, steps, strict=True)], n=4)
        print(
            f"density {density}, {scope:<6}  mask update / dense step {ratio:.2f} (quartiles {low:.2f} to {high:.2f}), "
            f"dense step {1e3 * statistics.median(steps):.0f} ms"
        )
    held = sum(mask.numel() * mask.element_size() for mask in sparse.masks.values())
    print(f"masks: {held / sparse.total:.2f} bytes a weight ({sparse.total:,} weights)")


if __name__ == "__main__":
    main()
