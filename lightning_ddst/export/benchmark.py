"""Benchmarks which Linear layers of a sparse generator run faster as sparse tensors."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.reparametrized import fold_weight_norm
from lightning_ddst.utils.modules import eval_mode, remove_hooks

_TURNS = 15
WORTHWHILE = 0.95
"""A layer is replaced if its sparse version takes less than this share of its time."""


class SparseLinear(nn.Module):
    """A Linear layer for inference whose weight is a sparse CSR tensor.

    Args:
        dense: The layer to replace; the sparse tensor omits its zeros.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", dense.weight.detach().to_sparse_csr())
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)``, as the dense layer does up to rounding."""
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        product = (self.weight @ rows.t()).t()
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], -1)


def sparse_linears(network: nn.Module, *inputs: Any) -> dict[str, float]:
    """Replaces the Linear layers of a network that are faster as sparse tensors, for inference.

    Weights under weight norm become plain weights. Layers under spectral norm and layers of a `MultiheadAttention` do
    not change.

    Args:
        network: The network; it changes in place, and computes the same up to rounding. It may return anything.
        inputs: Its later arguments: the speed depends on the batch, the device and the number of threads.

    Returns:
        Sparse time over dense time of each Linear layer by name, from medians of alternating measurements. Layers below
        0.95 were replaced.
    """
    fold_weight_norm(network)
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
    """Returns the time of one function over that of another, from medians of several turns after a warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TURNS + 1):
        for function, times in zip((one, other), seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:])


def onnx_time_ratio(path: str | Path, generator: nn.Module, *inputs: Any) -> float:
    """Returns the time of an ONNX file under onnxruntime over the generator's time in torch, with equal threads.

    The file of a generator that returns several tensors holds one, and torch computes all of them.

    Args:
        path: A file of `lightning_ddst.export.formats.save_onnx`.
        generator: The generator, on the CPU.
        inputs: Arguments of both.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    fed = {known.name: value.numpy() for known, value in zip(session.get_inputs(), tensors, strict=True)}
    with eval_mode(generator):
        return time_ratio(lambda: session.run(None, fed), lambda: generator(*inputs))


def synchronize() -> None:
    """Waits for the GPU, if there is one; needed before reading the clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
