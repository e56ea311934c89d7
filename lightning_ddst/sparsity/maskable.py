"""Which weights of a network can be masked, and where they are stored."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook

from lightning_ddst.sparsity.spectral import SpectralVectors

MASKABLE_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers whose weight is masked; biases, norms, embeddings and learned constants never are."""


@dataclass(frozen=True)
class MaskableWeight:
    """One weight that can be masked.

    Attributes:
        name: Its name as in ``network.named_parameters()``.
        parameter: The parameter an optimizer updates. Under spectral norm this is the weight before
            normalisation, so that masking comes first.
        layer: The layer it belongs to.
        spectral: The singular vectors that spectral norm keeps for it, or None.
    """

    name: str
    parameter: nn.Parameter
    layer: nn.Module
    spectral: SpectralVectors | None


def maskable_weights(network: nn.Module) -> list[MaskableWeight]:
    """Lists the weights of a network's Linear, Conv and ConvTranspose layers.

    A weight that is shared is listed once; one that is shared with another kind of layer (an
    embedding, say) is left out.

    Args:
        network: Any module.

    Returns:
        The weights, in the order of ``network.named_parameters()``.

    Raises:
        ValueError: If a layer is lazy and has no shape yet, if its weight is computed by something
            other than spectral norm, or if nothing can be masked.
    """
    unmaskable = {
        id(parameter)
        for module in network.modules()
        if not isinstance(module, MASKABLE_LAYERS) and not isinstance(module, parametrize.ParametrizationList)
        for parameter in module.parameters(recurse=False)
    }
    sources = {id(weight.parameter): weight for weight in _stored_weights(network)}
    found = [sources[id(p)] for _, p in network.named_parameters() if id(p) in sources and id(p) not in unmaskable]
    if not found:
        kinds = ", ".join(kind.__name__ for kind in MASKABLE_LAYERS)
        raise ValueError(f"{type(network).__name__} has nothing to mask: it has no weight in a {kinds} layer.")
    return found


def _stored_weights(network: nn.Module) -> Iterator[MaskableWeight]:
    for layer_name, layer in network.named_modules():
        if not isinstance(layer, MASKABLE_LAYERS):
            continue
        local_name, spectral = _storage(layer, layer_name)
        parameter = layer.get_parameter(local_name)
        if is_lazy(parameter):
            raise ValueError(f"Layer {layer_name!r} is lazy and has no shape yet: run the network once before masking.")
        yield MaskableWeight(f"{layer_name}.{local_name}" if layer_name else local_name, parameter, layer, spectral)


def _storage(layer: nn.Module, layer_name: str) -> tuple[str, SpectralVectors | None]:
    """Where a layer's trainable weight is stored: its name in the layer, and spectral norm's vectors."""
    if parametrize.is_parametrized(layer, "weight"):
        chain = layer.parametrizations["weight"]  # type: ignore[index]
        if len(chain) == 1 and isinstance(norm := chain[0], _SpectralNorm):
            spectral = SpectralVectors(norm, "_u", "_v", dim=norm.dim, eps=norm.eps)
            return "parametrizations.weight.original", spectral
    elif "weight" in layer._parameters:
        return "weight", None
    else:
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, _SpectralNormHook) and hook.name == "weight":
                return "weight_orig", SpectralVectors(layer, "weight_u", "weight_v", dim=hook.dim, eps=hook.eps)
    raise ValueError(
        f"The weight of layer {layer_name!r} is computed from other parameters in a way that cannot be masked. "
        "Allowed are plain weights and torch's two spectral norms; remove weight norm (a row without active weights "
        "has norm 0), torch.nn.utils.prune and other parametrizations."
    )
