"""Finds the removable channels of a network, and verifies that they can be removed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.channels.dependency_graph import trace
from lightning_ddst.sparsity.channels.groups import Axes, Channels, describe_whole
from lightning_ddst.sparsity.channels.marking import describe_module, floats_in
from lightning_ddst.sparsity.channels.structured_forward import RawForward, narrow
from lightning_ddst.sparsity.maskable import layer_weights
from lightning_ddst.sparsity.sharding import is_split
from lightning_ddst.utils.cache import first_line
from lightning_ddst.utils.modules import eval_mode, find_raising_module

K = TypeVar("K")
_DIFFERS = 0.01
"""Allowed deviation of the network without channels from the one where they are 0, relative to its largest output."""


def trace_channels(
    network: nn.Module, *inputs: Any, whole: Collection[str] = (), narrow_features: bool = False
) -> Channels:
    """Finds the removable channels of a network.

    Each Linear, Conv and ConvTranspose layer in turn returns patterns instead of its output: each channel has its own
    pattern of NaN over the batch. If a pattern reaches another layer or a norm, that module reads the channel. Learned
    constants of users' modules are traced the same way. Channels that a GroupNorm normalizes together are removed
    together. If patterns are mixed (by attention or LayerNorm, for example) or reach the network's output, their
    channels are not removable. The result is then verified group by group: without every second channel, the network
    must have the same output as with their weights at 0.

    Args:
        network: Any network; it is called in evaluation mode and does not change.
        inputs: Example arguments of the network, the batch first.
        whole: Names of weights that keep all their rows and columns.
        narrow_features: Whether tensors that the network returns may have fewer channels, if its layers read them, too:
            for discriminators that return features.

    Returns:
        The channels. Layers without removable channels have none, and a reason in `Channels.whole`.

    Raises:
        ValueError: If the network cannot be called with these inputs, or has no removable channels.
    """
    kind = type(network).__name__
    if any(map(is_split, network.parameters())):
        raise ValueError(f"the channels of {kind} cannot be traced: its parameters are sharded over processes (FSDP2).")
    devices = {parameter.device.index for parameter in network.parameters() if parameter.is_cuda}
    with eval_mode(network), torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            links = trace(network, inputs, narrow_features=narrow_features)
        except Exception as error:  # the user's network may raise anything with these inputs or other batch sizes
            raise ValueError(
                f"the channels of {kind} cannot be traced: called with {_described(inputs)}, it fails: {error}"
            ) from error
        if not floats_in(RawForward(network)(*inputs)):
            raise ValueError(f"the channels of {kind} cannot be traced: it returns no tensor that could be compared.")
        for name in whole:
            links.keep_whole(name)
        channels = links.channels()
        drawn = _drawn(network)
        reasons = [_disagreement(network, drawn, inputs, channels, group) for group in range(len(channels.sizes))]
    stays = dict(channels.whole)
    for layer, groups in links.groups_of_layers(channels).items():
        if all(reasons[group] for group in groups):
            stays[layer] = reasons[groups[0]]
    if all(reasons):
        found = f": {describe_whole(stays)}" if stays else ""
        raise ValueError(
            f"{kind} has no channels that can be taken out{found}. Layers need plain code between them that does not "
            "mix channels, without shapes of fixed size (write x.unflatten(1, (-1, 4, 4)) instead of "
            "x.view(-1, 256, 4, 4))."
        )
    return _selected(channels, [not reason for reason in reasons], stays)


def _described(inputs: Iterable[Any]) -> str:
    return ", ".join(f"a tensor {tuple(i.shape)}" if isinstance(i, Tensor) else type(i).__name__ for i in inputs)


def _selected(channels: Channels, wanted: Sequence[bool], whole: Mapping[str, str]) -> Channels:
    """Returns some of the groups."""
    stays = torch.tensor(wanted).repeat_interleave(torch.tensor(channels.sizes))
    number = torch.where(stays, stays.cumsum(0) - 1, -1)
    number = torch.cat([number, torch.tensor([-1])])  # for indices that belong to no channel

    def renumbered(held: Mapping[K, Axes]) -> dict[K, dict[int, Tensor]]:
        axes = {key: {dim: number[c] for dim, c in dims.items()} for key, dims in held.items()}
        axes = {key: {dim: c for dim, c in dims.items() if (c >= 0).any()} for key, dims in axes.items()}
        return {key: dims for key, dims in axes.items() if dims}

    sizes = tuple(size for size, keep in zip(channels.sizes, wanted, strict=True) if keep)
    return Channels(sizes, renumbered(channels.axes), renumbered(channels.returned), whole)


def _disagreement(
    network: nn.Module, drawn: Mapping[str, Tensor], inputs: Sequence[Any], channels: Channels, group: int
) -> str:
    """Returns the reason why a group stays, empty if it does not.

    Removing every second channel of a group must have the same result as setting their weights to 0.
    """
    first, size = sum(channels.sizes[:group]), channels.sizes[group]
    if size == 1:
        return _together(network, channels, first)
    active = torch.ones(sum(channels.sizes), dtype=torch.bool)
    active[first + 1 : first + size : 2] = False
    kept, returned = channels.kept(active), channels.kept_outputs(active)
    zeroed = _zeroed(network, drawn, channels, active)
    cut = zeroed | {name: narrow(zeroed[name], dims) for name, dims in kept.items()}
    try:
        there, here = (_outputs(network, tensors, inputs) for tensors in (zeroed, cut))
    except Exception as error:  # the user's code may use a fixed shape
        place = find_raising_module(network, error)
        return f"without some of them {describe_module(network, place)} fails: {first_line(error)}"
    there = [narrow(tensor, returned.get(number, {})) for number, tensor in enumerate(there)]
    if alike(there, here, _DIFFERS):
        return ""
    return "without some of them the network computes another output"


def _together(network: nn.Module, channels: Channels, channel: int) -> str:
    """Returns the reason why a group has one channel."""
    for name, norm in network.named_modules():
        if isinstance(norm, nn.GroupNorm) and norm.num_groups < norm.num_channels:
            axes = channels.axes.get(f"{name}.weight" if name else "weight", {})
            if any((held == channel).any() for held in axes.values()):
                return f"GroupNorm {name!r} normalizes them together"
    return "they can only be removed together"


def alike(ones: Sequence[Tensor], others: Sequence[Tensor], differs: float) -> bool:
    """Returns whether tensors are equal up to `differs` times the largest entry of each first one; NaN never is."""
    return len(ones) == len(others) and all(
        one.shape == other.shape and bool((one - other).abs().max() <= differs * one.abs().max())
        for one, other in zip(ones, others, strict=True)
    )


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
        row = parameter[0] if parameter.dim() and len(parameter) else parameter
        scale = max(1, row.numel()) ** -0.5  # a layer's output is about as large as its input
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
