"""What of a sparse generator runs faster, measured on the spot: its Linear layers as sparse tensors."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_ddst.utils.modules import eval_mode, remove_hooks

_TURNS = 15
WORTHWHILE = 0.95
"""A layer is replaced where it takes less than this share of its time."""


class SparseLinear(nn.Module):
    """A Linear layer for inference whose weight is a sparse CSR tensor.

    Args:
        dense: The layer to replace; its zeros are left out.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", dense.weight.detach().to_sparse_csr())
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """From ``(..., in_features)`` to ``(..., out_features)``; equal to the dense layer's up to rounding."""
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        product = (self.weight @ rows.t()).t()
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], -1)


def sparse_linears(network: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """Replaces the Linear layers of a network that are faster as sparse tensors, for inference.

    Layers under spectral norm, and those that a `MultiheadAttention` has, are left alone.

    Args:
        network: Is changed in place, and computes the same up to rounding.
        inputs: What it will be called with: what is faster depends on the batch, the device, and the number of threads.

    Returns:
        For each Linear layer, by name, its sparse time over its dense one, medians of measurements in turn;
        those below 0.95 were replaced.
    """
    layers = {name: layer for name, layer in network.named_modules() if type(layer) is nn.Linear}
    seen: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Tensor]) -> None:
        seen.setdefault(name, args[0].detach())

    handles = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    with remove_hooks(handles), eval_mode(network), torch.no_grad():
        network(*inputs)
    ratios = {}
    for name, x in seen.items():
        sparse = SparseLinear(layers[name])
        ratios[name] = time_ratio(partial(sparse, x), partial(layers[name], x))
        if ratios[name] < WORTHWHILE:
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, sparse)
    return ratios


@torch.no_grad()
def time_ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """The time of one thing over that of another: medians of several turns, after one to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TURNS + 1):
        for function, times in zip((one, other), seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:])


def onnx_time_ratio(path: str | Path, generator: nn.Module, *inputs: Tensor) -> float:
    """The time of an ONNX file under onnxruntime over that of the generator in it, with as many threads as torch has.

    Args:
        path: What `lightning_ddst.export.formats.save_onnx` wrote.
        generator: The generator, on the CPU.
        inputs: What both are called with.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fed = {known.name: value.numpy() for known, value in zip(session.get_inputs(), inputs, strict=True)}
    with eval_mode(generator):
        return time_ratio(lambda: session.run(None, fed), lambda: generator(*inputs))


def synchronize() -> None:
    """Waits until a GPU has finished; needed before reading the clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
