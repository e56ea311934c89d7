"""Finds the removable channels of a network, and verifies that they can be removed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.channels.dependency_graph import alike, floats_in, trace
from lightning_ddst.sparsity.channels.groups import Channels
from lightning_ddst.sparsity.channels.structured_forward import RawForward, narrow
from lightning_ddst.sparsity.maskable import layer_weights
from lightning_ddst.sparsity.sharding import is_split
from lightning_ddst.utils.modules import eval_mode

_DIFFERS = 0.01
"""Allowed deviation of the network without channels from the one where they are 0, relative to its largest output."""


def trace_channels(network: nn.Module, *inputs: Any, whole: Collection[str] = ()) -> Channels:
    """Finds the removable channels of a network.

    Each Linear, Conv and ConvTranspose layer in turn returns patterns instead of its output: each channel has its own
    pattern of NaN over the batch. If a pattern reaches another layer or a norm, that module reads the channel. If
    patterns are mixed (by attention or GroupNorm, for example) or reach the network's output, their channels are not
    removable. The result is then verified group by group: without every second channel, the network must have the same
    output as with their weights at 0.

    Args:
        network: Any network; it is called in evaluation mode and does not change.
        inputs: Example arguments of the network, the batch first.
        whole: Names of weights that keep all their rows and columns.

    Returns:
        The channels. Layers without removable channels have none.

    Raises:
        ValueError: If the network cannot be called with these inputs, or has no removable channels.
    """
    kind = type(network).__name__
    if any(map(is_split, network.parameters())):
        raise ValueError(f"the channels of {kind} cannot be traced: its parameters are sharded over processes (FSDP2).")
    devices = {parameter.device.index for parameter in network.parameters() if parameter.is_cuda}
    with eval_mode(network), torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            links = trace(network, inputs)
        except Exception as error:  # the user's network may raise anything with these inputs or other batch sizes
            raise ValueError(
                f"the channels of {kind} cannot be traced: called with {_described(inputs)}, it fails: {error}"
            ) from error
        for name in whole:
            links.fix((name, 0))
            links.fix((name, 1))
        channels = links.channels()
        drawn = _drawn(network)
        works = [_agrees(network, drawn, inputs, channels, group) for group in range(len(channels.sizes))]
    if not any(works):
        raise ValueError(
            f"{kind} has no channels that can be taken out: each of its layers is grouped, is followed by attention or "
            "a norm that mixes channels, or by a shape of fixed size (write x.unflatten(1, (-1, 4, 4)) instead of "
            "x.view(-1, 256, 4, 4))."
        )
    return _selected(channels, works)


def _described(inputs: Iterable[Any]) -> str:
    return ", ".join(f"a tensor {tuple(i.shape)}" if isinstance(i, Tensor) else type(i).__name__ for i in inputs)


def _selected(channels: Channels, wanted: Sequence[bool]) -> Channels:
    """Returns some of the groups."""
    stays = torch.tensor(wanted).repeat_interleave(torch.tensor(channels.sizes))
    number = torch.where(stays, stays.cumsum(0) - 1, -1)
    number = torch.cat([number, torch.tensor([-1])])  # for indices that belong to no channel
    sizes = tuple(size for size, keep in zip(channels.sizes, wanted, strict=True) if keep)
    axes = {name: {dim: number[c] for dim, c in dims.items()} for name, dims in channels.axes.items()}
    axes = {name: {dim: c for dim, c in dims.items() if (c >= 0).any()} for name, dims in axes.items()}
    return Channels(sizes, {name: dims for name, dims in axes.items() if dims})


def _agrees(
    network: nn.Module, drawn: Mapping[str, Tensor], inputs: Sequence[Any], channels: Channels, group: int
) -> bool:
    """Returns whether removing every second channel of a group has the same result as setting their weights to 0."""
    first = sum(channels.sizes[:group])
    active = torch.ones(sum(channels.sizes), dtype=torch.bool)
    active[first + 1 : first + channels.sizes[group] : 2] = False
    if active.all():
        return False  # the group has only one channel
    kept = channels.kept(active)
    zeroed = _zeroed(network, drawn, channels, active)
    cut = zeroed | {name: narrow(zeroed[name], dims) for name, dims in kept.items()}
    try:
        there, here = (_outputs(network, tensors, inputs) for tensors in (zeroed, cut))
    except Exception:  # the user's code may use a fixed shape
        return False
    return alike(there, here, _DIFFERS)


def _outputs(network: nn.Module, tensors: Mapping[str, Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """Returns a network's output with these tensors, if possible in double precision: depth amplifies rounding."""
    body = RawForward(network)
    torch.manual_seed(0)  # for a network that draws noise
    try:
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        floats = [i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
        return floats_in(body.call_with(doubles, *floats))
    except Exception:  # the network's code may require a dtype
        return floats_in(body.call_with(tensors, *inputs))


def _drawn(network: nn.Module) -> dict[str, Tensor]:
    """Draws random parameters, so that no parameter is 0."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        scale = max(1, parameter[:1].numel()) ** -0.5  # a layer's output is about as large as its input
        tensors[name] = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
    return tensors


def _zeroed(network: nn.Module, drawn: Mapping[str, Tensor], channels: Channels, active: Tensor) -> dict[str, Tensor]:
    """Returns the parameters with 0 at weights of inactive channels, and buffers that fit them."""
    tensors, buffers = dict(drawn), dict(network.named_buffers())
    names = {id(buffer): name for name, buffer in buffers.items()}
    for weight in layer_weights(network):
        tensor = drawn[weight.name]
        tensor = tensors[weight.name] = tensor * channels.mask(weight.name, tensor.shape, active).to(tensor.device)
        for spectral in weight.spectral:
            left, right = (names[id(vector)] for vector in spectral.vectors())
            matrix = tensor.movedim(spectral.dim, 0).flatten(1)
            buffers[left] = nn.functional.normalize(matrix @ buffers[right], dim=0)  # keeps the norm from being near 0
    return tensors | buffers
