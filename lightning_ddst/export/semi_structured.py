"""Converts Linear layers with 2:4 zeros to torch's semi-structured tensors, which run faster on sparse tensor cores."""

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured


def to_semi_structured(network: nn.Module) -> list[str]:
    """Replaces the weights of Linear layers whose zeros are 2:4 by semi-structured tensors, for inference.

    Train with ``granularity="2:4"`` (Mishra et al. 2021), then call this function with the network in half precision on
    a GPU of compute capability 8.0 or newer. Layers do not change if the weight has more than 2 non-zeros in 4
    consecutive inputs, if it is computed (spectral norm, or weight norm before `fold_weight_norm`), or if torch does
    not support its dtype or shape.

    Args:
        network: The network; it changes in place, and computes the same up to rounding.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: If no layer can be replaced, with the reason for the first; the network does not change then.

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
    """Converts a weight to a semi-structured tensor; raises ValueError, or torch RuntimeError, if it cannot."""
    if weight.shape[1] % 4 or bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) > 2).any()):
        raise ValueError(f"the zeros of its {tuple(weight.shape)} weights are not 2:4")
    if not weight.is_cuda:
        raise ValueError(f"it is on {weight.device}, and semi-structured tensors need a CUDA GPU")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"its type is {weight.dtype}, and it must be float16 or bfloat16")
    sparse: Tensor = to_sparse_semi_structured(weight.contiguous())
    return sparse
