"""Compares a mask update with a dense training step, other implementations, and the memory's bandwidth.

    python benchmarks/mask_update.py [--authors CLONE] [--rigl-torch CLONE] [--sparsimony CLONE] [--millions 1 10 100]
        [--accelerator gpu]

A multilayer perceptron at batch 64 with Adam, density 0.1. A mask update prunes half of the active weights and grows
as many by gradient. All take turns in one process; kept in results/mask_update.jsonl are medians, and the median and
quartiles of the ratios turn by turn, and the bytes that masks hold and that a mask update needs at its peak.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import peers
import torch
from memory import NewTensors
from overhead import USUAL
from rows import add, origin
from torch import nn

from lightning_ddst.export.benchmark import synchronize
from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer

TURNS = {1: 31, 10: 15, 100: 3}
DENSITY = 0.1
WEIGHTS_READ, WRITTEN = 4 + 4 + 1, 1 + 4
"""Bytes a weight that any update has to read (weight, gradient, mask) and write (mask, weight)."""


def perceptron(millions: float) -> nn.Sequential:
    """Three layers of 2.5, 6.25 and 1.25 million weights, times `millions` / 10."""
    sizes = [round(size * math.sqrt(millions / 10)) for size in (1000, 2500, 2500, 500)]
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def seconds(function: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def bandwidth(weights: int, device: torch.device) -> float:
    """Bytes a second of a copy of as many floats, reading and writing counted."""
    source = torch.rand(weights, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * weights / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(7))


def memory(millions: float, device: torch.device) -> tuple[float, float]:
    """Measures bytes a weight: held by masks and their hooks, and made at the peak of a mask update besides."""
    network = perceptron(millions).to(device)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    batch = torch.randn(64, network[0].in_features, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        network(batch).square().mean().backward()
        optimizer.step()

    step()  # makes gradients and states
    with NewTensors(device) as masks:
        sparse = MaskedNetwork(network, DENSITY)
        enforcer = MaskEnforcer(sparse, [optimizer])
        step()
    gradients = {name: torch.randn_like(parameter) for name, parameter in sparse.parameters.items()}
    peaks = []
    for change in (
        lambda: sparse.explore(0.5, gradients),
        lambda: sparse.resize(2 * DENSITY, gradients),
        lambda: sparse.resize(DENSITY),
    ):
        with NewTensors(device) as update:
            change()
        peaks.append(update.peak)
    enforcer.remove()
    return masks.held / sparse.total, max(peaks) / sparse.total


def compare(millions: int, clones: dict[str, Any], accelerator: str) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if accelerator == "gpu" else accelerator)
    network = perceptron(millions).to(device)
    optimizer = torch.optim.Adam(network.parameters())
    batch = torch.randn(64, network[0].in_features, device=device)
    gradients = {name: torch.randn_like(parameter) for name, parameter in network.named_parameters()}

    def step() -> None:
        optimizer.zero_grad()
        network(batch).square().mean().backward()
        optimizer.step()

    functions: dict[str, Callable[[], object]] = {"dense step": step}
    networks: dict[str, MaskedNetwork] = {}
    for scope in ("global", "layer"):
        sparse = MaskedNetwork(perceptron(millions).to(device), DENSITY, scope=scope)
        networks[f"lightning_ddst, {scope}"] = sparse
        functions[f"lightning_ddst, {scope}"] = lambda sparse=sparse: sparse.explore(0.5, gradients)
    values = {name: torch.randn_like(parameter) for name, parameter in network.named_parameters()}
    theirs: dict[str, nn.Module] = {}
    for peer, clone in clones.items():
        theirs[peer] = perceptron(millions).to(device)
        masked = peers.attach(clone, peer, theirs[peer], DENSITY)
        functions[peer] = lambda masked=masked: masked.explore(gradients)

    @torch.no_grad()
    def as_if_trained() -> None:
        """Fills the active weights anew, so that no update finds those grown before at 0."""
        for sparse in networks.values():
            for name, parameter in sparse.parameters.items():
                parameter.copy_(values[name]).mul_(sparse.masks[name])
        for each in theirs.values():
            for parameter, value in zip(each.parameters(), values.values(), strict=True):
                parameter.copy_(torch.where(parameter == 0, parameter, value))

    times: dict[str, list[float]] = {name: [] for name in functions}
    held, peak = memory(millions, device)
    for turn in range(TURNS[millions] + 1):
        as_if_trained()
        for name, function in functions.items():
            elapsed = seconds(function)
            if turn:  # the first turn warms up
                times[name].append(elapsed)
    ours = times["lightning_ddst, global"]
    weights = sum(parameter.numel() for parameter in network.parameters())
    bound = (WEIGHTS_READ + WRITTEN) * weights / bandwidth(weights, device)
    for name, each in times.items():
        ratios = [one / our for one, our in zip(each, ours, strict=True)]
        row = {
            "millions": millions,
            "threads": torch.get_num_threads(),
            "what": name,
            "beside": list(theirs),
            "milliseconds": round(1e3 * statistics.median(each), 2),
            "to_ours": [round(value, 3) for value in statistics.quantiles(ratios, n=4)],
            "turns": len(each),
            "bandwidth_bound_ms": float(f"{1e3 * bound:.3g}"),
            "mask_bytes_a_weight": round(held, 3),
            "peak_bytes_a_weight": round(peak, 2),
        }
        command = "python benchmarks/mask_update.py" + (" --accelerator gpu" if accelerator == "gpu" else "")
        add("mask_update", {**row, "command": command, **origin()})
        low, middle, high = row["to_ours"]
        print(
            f"{millions:>3} million  {name:<24} {row['milliseconds']:>9.1f} ms, {middle:.2f} of ours "
            f"({low:.2f} to {high:.2f})",
            flush=True,
        )
    print(
        f"{millions:>3} million  memory alone {1e3 * bound:.1f} ms; bytes a weight: {held:.2f} of masks, "
        f"{peak:.1f} more at the peak of an update",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers.add_arguments(parser)
    parser.add_argument("--millions", type=int, nargs="+", choices=TURNS, default=list(TURNS), help="of weights")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default=USUAL[0], help="where")
    options = vars(parser.parse_args())
    clones = {peer: options[peer.replace("-", "_")] for peer in peers.PEERS}
    for millions in options["millions"]:
        compare(millions, {peer: clone for peer, clone in clones.items() if clone is not None}, options["accelerator"])
        gc.collect()


if __name__ == "__main__":
    main()
