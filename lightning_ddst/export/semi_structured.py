"""Linear layers with 2:4 zeros as torch's semi-structured tensors, which sparse tensor cores multiply faster."""

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured


def to_semi_structured(network: nn.Module) -> list[str]:
    """Replaces the weights of Linear layers whose zeros are 2:4 by semi-structured tensors, for inference.

    Train with ``granularity="2:4"`` for this (Mishra et al. 2021), then call it on the network on a GPU of compute
    capability 8.0 or newer, in half precision. Layers stay as they are where the weight has more than 2 non-zeros in 4
    consecutive inputs, where it is computed (spectral norm), or where torch does not support its type or shape.

    Args:
        network: Changed in place; computes the same up to rounding.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: If no layer can be replaced, with the reason for the first; the network is left as it was.

    Example::

        generator.half().cuda().eval()
        to_semi_structured(generator)
    """
    sparse: dict[nn.Linear, Tensor] = {}
    names, reasons = [], ["it has no Linear layer whose weight is a plain parameter"]
    for name, layer in network.named_modules():
        if type(layer) is nn.Linear and "weight" in layer._parameters:
            try:
                sparse[layer] = _converted(layer.weight.detach())
                names.append(name)
            except (RuntimeError, ValueError) as error:
                reasons.append(f"{name or 'weight'}: {' '.join(str(error).split())}")
    if not sparse:
        raise ValueError(
            f"{type(network).__name__} has nothing to make semi-structured: {reasons[min(1, len(reasons) - 1)]}."
        )
    for layer, weight in sparse.items():
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return names


def _converted(weight: Tensor) -> Tensor:
    """Returns a weight as a semi-structured tensor; raises a ValueError, or torch a RuntimeError, if it cannot be."""
    if weight.shape[1] % 4 or bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) > 2).any()):
        raise ValueError(f"the zeros of its {tuple(weight.shape)} weights are not 2:4")
    if not weight.is_cuda:
        raise ValueError(f"it is on {weight.device}, and semi-structured tensors need a CUDA GPU")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"its type is {weight.dtype}, and it must be float16 or bfloat16")
    sparse: Tensor = to_sparse_semi_structured(weight.contiguous())
    return sparse
