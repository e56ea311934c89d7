"""Finds the channels of a network that can be taken out, and tries that they can."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.channels.dependency_graph import alike, floats_in, trace
from lightning_ddst.sparsity.channels.groups import Channels
from lightning_ddst.sparsity.channels.structured_forward import RawForward, narrowed
from lightning_ddst.sparsity.maskable import maskable_weights
from lightning_ddst.sparsity.sharding import is_split
from lightning_ddst.utils.modules import eval_mode

_DIFFERS = 0.01
"""What the network without channels may differ by from the one in which they are 0, relative to its largest output."""


def trace_channels(network: nn.Module, *inputs: Any, whole: Collection[str] = ()) -> Channels:
    """Finds the channels that can be taken out of a network.

    Every Linear, Conv and ConvTranspose layer in turn computes, instead of its output, marks: each channel has its own
    pattern of NaN over the batch. Where a pattern arrives at another layer, or at a norm, its channel is read there;
    where patterns are mixed, as by attention or GroupNorm, or arrive at the network's output, the channels stay. What
    was found is then tried, group by group, by taking out every second channel: the network must compute the same as
    when their weights are 0.

    Args:
        network: Any network; it is called in evaluation mode, and left as it is.
        inputs: What it is called with: an example, the batch first.
        whole: Names of weights that keep all their rows and columns.

    Returns:
        The channels. Layers whose channels cannot be taken out have none.

    Raises:
        ValueError: If the network cannot be called with these inputs, or has no channels that can be taken out.
    """
    kind = type(network).__name__
    if any(map(is_split, network.parameters())):
        raise ValueError(f"the channels of {kind} cannot be traced: its parameters are split over processes (FSDP2).")
    devices = {parameter.device.index for parameter in network.parameters() if parameter.is_cuda}
    with eval_mode(network), torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            links = trace(network, inputs)
        except Exception as error:  # whatever somebody's network meets with these inputs, or with other batches
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
            f"{kind} has no channels that can be taken out: each of its layers is grouped, has its outputs mixed by "
            "attention or a norm over channels, or a shape of fixed size behind it (write x.unflatten(1, (-1, 4, 4)) "
            "in the place of x.view(-1, 256, 4, 4))."
        )
    return _selected(channels, works)


def _described(inputs: Iterable[Any]) -> str:
    return ", ".join(f"a tensor {tuple(i.shape)}" if isinstance(i, Tensor) else type(i).__name__ for i in inputs)


def _selected(channels: Channels, wanted: Sequence[bool]) -> Channels:
    """Some of the groups."""
    stays = torch.tensor(wanted).repeat_interleave(torch.tensor(channels.sizes))
    number = torch.where(stays, stays.cumsum(0) - 1, -1)
    number = torch.cat([number, torch.tensor([-1])])  # of what belongs to none
    sizes = tuple(size for size, keep in zip(channels.sizes, wanted, strict=True) if keep)
    axes = {name: {dim: number[c] for dim, c in dims.items()} for name, dims in channels.axes.items()}
    axes = {name: {dim: c for dim, c in dims.items() if (c >= 0).any()} for name, dims in axes.items()}
    return Channels(sizes, {name: dims for name, dims in axes.items() if dims})


def _agrees(
    network: nn.Module, drawn: Mapping[str, Tensor], inputs: Sequence[Any], channels: Channels, group: int
) -> bool:
    """Whether the network is the same without every second channel of a group as with their weights at 0."""
    first = sum(channels.sizes[:group])
    active = torch.ones(sum(channels.sizes), dtype=torch.bool)
    active[first + 1 : first + channels.sizes[group] : 2] = False
    if active.all():
        return False  # its only channel
    kept = channels.kept(active)
    zeroed = _zeroed(network, drawn, channels, active)
    cut = zeroed | {name: narrowed(zeroed[name], dims) for name, dims in kept.items()}
    try:
        there, here = (_outputs(network, tensors, inputs) for tensors in (zeroed, cut))
    except Exception:  # whatever somebody's network does with a shape of fixed size
        return False
    return alike(there, here, _DIFFERS)


def _outputs(network: nn.Module, tensors: Mapping[str, Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """What a network gives with these tensors, if it can in double precision: deep ones make much of rounding."""
    body = RawForward(network)
    torch.manual_seed(0)  # for noise of its own
    try:
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        floats = [i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
        return floats_in(body.call_with(doubles, *floats))
    except Exception:  # its code may convert to a type by itself
        return floats_in(body.call_with(tensors, *inputs))


def _drawn(network: nn.Module) -> dict[str, Tensor]:
    """Random parameters, so that nothing hides behind a 0."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        scale = max(1, parameter[:1].numel()) ** -0.5  # what a layer gives is about as large as what it takes
        tensors[name] = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
    return tensors


def _zeroed(network: nn.Module, drawn: Mapping[str, Tensor], channels: Channels, active: Tensor) -> dict[str, Tensor]:
    """These parameters, with 0 at weights of inactive channels; and buffers that fit them."""
    tensors, buffers = dict(drawn), dict(network.named_buffers())
    names = {id(buffer): name for name, buffer in buffers.items()}
    for weight in maskable_weights(network):
        tensor = drawn[weight.name]
        tensor = tensors[weight.name] = tensor * channels.mask(weight.name, tensor.shape, active).to(tensor.device)
        for spectral in weight.spectral:
            left, right = (names[id(vector)] for vector in spectral.vectors())
            matrix = tensor.movedim(spectral.dim, 0).flatten(1)
            buffers[left] = nn.functional.normalize(matrix @ buffers[right], dim=0)  # for a norm that is not near 0
    return tensors | buffers
