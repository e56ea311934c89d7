"""A copy of a network with smaller layers, without the channels that no weight reads."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_ddst.sparsity.channels.groups import Channels
from lightning_ddst.sparsity.channels.marking import floats_in
from lightning_ddst.sparsity.channels.structured_forward import fit_to_inputs, narrow
from lightning_ddst.sparsity.channels.tracing import alike, trace_channels
from lightning_ddst.sparsity.maskable import TRANSPOSED_LAYERS, layer_weights
from lightning_ddst.sparsity.reparametrized import copy_network, fold_all
from lightning_ddst.utils.modules import eval_mode, remove_hooks

_DIFFERS = 1e-3
"""Allowed deviation from the full network, relative to its largest output."""


@torch.no_grad()
def compact(network: nn.Module, *inputs: Any, narrow_features: bool = False) -> tuple[nn.Module, int, int]:
    """Copies a network without the channels that only weights of 0 read.

    A network with masks of whole channels loses all inactive channels; one with masks of single weights loses those
    whose reading weights happen to be all 0. The copy is for evaluation, where its output equals the network's up to
    rounding. Weights under spectral norm or weight norm are stored as plain, normalized weights.

    Args:
        network: The network; it does not change.
        inputs: Example arguments of the network, the batch first.
        narrow_features: Whether tensors that the network returns may have fewer channels, if its layers read them, too:
            for discriminators that return features.

    Returns:
        The copy, the number of removable channels that it keeps, and the number of removable channels of the network.

    Raises:
        ValueError: If channels cannot be traced, or the copy's output differs.
    """
    with eval_mode(network):
        expected = _outputs(network, inputs)
        copy = copy_network(network)
        fold_all(copy)
    channels = trace_channels(copy, *inputs, narrow_features=narrow_features)
    active = _read(copy, channels)
    kept = channels.kept(active)
    for name, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
        if name not in kept:
            continue
        owner, _, attribute = name.rpartition(".")
        module = copy.get_submodule(owner)
        small = narrow(tensor, kept[name]).clone()
        if isinstance(tensor, nn.Parameter):
            module._parameters[attribute] = nn.Parameter(small, tensor.requires_grad)
        else:
            module._buffers[attribute] = small
    for module in copy.modules():
        _say_sizes(module)
    narrower = channels.kept_outputs(active)
    expected = [narrow(tensor, narrower.get(number, {})) for number, tensor in enumerate(expected)]
    with remove_hooks(fit_to_inputs(copy.modules())):
        outputs = _outputs(copy, inputs)
    if not alike(expected, outputs, _DIFFERS):
        raise ValueError(f"{type(network).__name__} has another output without the channels that nothing reads.")
    return copy, int(active.sum()), len(active)


def _outputs(network: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Returns a network's output, the same also if it draws noise."""
    with isolate_rng():
        torch.manual_seed(0)
        return floats_in(network(*inputs))


def _read(network: nn.Module, channels: Channels) -> Tensor:
    """Returns the channels that some weight reads, at least one per group; bool ``(channels,)``."""
    weights = layer_weights(network)
    active = torch.ones(sum(channels.sizes), dtype=torch.bool)
    while True:
        read = torch.zeros_like(active)
        for weight in weights:
            reads = 1 - weight.out_dim
            if (of := channels.axes.get(weight.name, {}).get(reads)) is None:
                continue
            # Rows of removed channels read nothing.
            mask = channels.mask(weight.name, weight.parameter.shape, active)
            used = (weight.parameter.cpu() != 0) & mask
            used = used.movedim(reads, 0).flatten(1).any(1)
            read[of[used & (of >= 0)]] = True
        for group in read.split(list(channels.sizes)):
            group[0] |= not group.any()
        if torch.equal(read & active, active):
            return active
        active &= read


def _say_sizes(module: nn.Module) -> None:
    """Sets a layer's attributes to its new sizes."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1:
        sizes = module.weight.shape[:2]
        module.in_channels, module.out_channels = sizes if isinstance(module, TRANSPOSED_LAYERS) else sizes[::-1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = [tensor for tensor in (module.weight, module.running_mean) if tensor is not None]
        module.num_features = len(held[0]) if held else module.num_features
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.embedding_dim = module.weight.shape[1]
