"""The maskable weights of a network, and the parameters that store them."""

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook

from lightning_ddst.sparsity.spectral import SpectralVectors, spectral_norms

TRANSPOSED_LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weight has input channels as first dimension."""

MASKABLE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_LAYERS)
"""Layers whose weight is masked; biases, norms, embeddings and learned constants are never masked."""


def channel_dim(layer: nn.Module) -> int:
    """Returns the dimension of channels in a maskable layer's input and output, counted from the end."""
    return -1 - len(layer.kernel_size) if hasattr(layer, "kernel_size") else -1  # type: ignore[arg-type]


@dataclass(frozen=True)
class MaskableWeight:
    """One weight that can be masked.

    Attributes:
        name: Its name as in ``network.named_parameters()``.
        parameter: The parameter that an optimizer updates. Under spectral norm this is the weight before
            normalization, so masking comes first.
        layers: The layers that use it, by name; several if it is shared.
        spectral: The singular vectors that spectral norm keeps for it, one pair per layer.
    """

    name: str
    parameter: nn.Parameter
    layers: dict[str, nn.Module]
    spectral: tuple[SpectralVectors, ...]

    @property
    def out_dim(self) -> int:
        """The dimension of output channels, 0 or 1; the other one is the dimension of input channels."""
        return int(isinstance(next(iter(self.layers.values())), TRANSPOSED_LAYERS))


def maskable_weights(network: nn.Module) -> list[MaskableWeight]:
    """Lists the weights of a network's Linear, Conv and ConvTranspose layers.

    A shared weight is listed once. A weight that another kind of layer shares (an embedding, for example) is left out.

    Args:
        network: Any module.

    Returns:
        The weights, in the order of ``network.named_parameters()``.

    Raises:
        ValueError: If a layer is lazy and has no shape yet, if a parametrization other than spectral norm computes
            its weight, or if the network has no maskable weight.
    """
    layers: dict[int, dict[str, nn.Module]] = {}
    unmaskable: set[int] = set()
    for layer_name, module in network.named_modules():
        if isinstance(module, MASKABLE_LAYERS):
            layers.setdefault(id(_stored_weight(module, layer_name)), {})[layer_name] = module
        elif not isinstance(module, parametrize.ParametrizationList):
            unmaskable |= {id(parameter) for parameter in module.parameters(recurse=False)}
    spectral = list(spectral_norms(network))
    found = [
        MaskableWeight(name, p, layers[id(p)], tuple(norm for norm in spectral if norm.parameter is p))
        for name, p in network.named_parameters()
        if id(p) in layers and id(p) not in unmaskable and p.numel()
    ]
    if not found:
        kinds = ", ".join(kind.__name__ for kind in MASKABLE_LAYERS)
        raise ValueError(f"{type(network).__name__} has nothing to mask: it has no weight in a {kinds} layer.")
    return found


def _stored_weight(layer: nn.Module, layer_name: str) -> nn.Parameter:
    """Returns the parameter that stores a layer's weight."""
    parameter: nn.Parameter | None = None
    if parametrize.is_parametrized(layer, "weight"):
        chain = layer.parametrizations["weight"]  # type: ignore[index]
        if len(chain) == 1 and isinstance(chain[0], _SpectralNorm):
            parameter = chain.original  # type: ignore[union-attr]
    elif "weight" in layer._parameters:
        parameter = layer._parameters["weight"]
    elif any(isinstance(h, _SpectralNormHook) and h.name == "weight" for h in layer._forward_pre_hooks.values()):
        parameter = layer.get_parameter("weight_orig")
    if parameter is None:
        raise ValueError(
            f"The weight of layer {layer_name!r} is computed from other parameters in a way that cannot be masked. "
            "Allowed are plain weights and torch's two spectral norms; remove weight norm (a row without active "
            "weights has norm 0), torch.nn.utils.prune and other parametrizations."
        )
    if is_lazy(parameter):
        raise ValueError(f"Layer {layer_name!r} is lazy and has no shape yet: run the network once before masking.")
    return parameter
