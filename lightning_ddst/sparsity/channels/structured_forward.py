"""Runs a network without some of its channels: every layer physically smaller, the network's own code unchanged."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lightning_ddst.utils.compilation import is_compiled

Kept = Mapping[str, Mapping[int, Tensor]]
"""Of parameters and buffers by name, for each dimension that becomes smaller, the indices that stay: int64."""


def narrowed(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """What stays of a tensor, by indices on any device; gradients go back to the whole one."""
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


class StructuredForward:
    """Has a network in training mode compute with what stays of its parameters and buffers, until `remove`.

    The network keeps all of them: they are cut at every call, gradients arrive at the whole parameters (0 at what
    was left out), and what the call writes into buffers is written into the whole ones. So optimizers, checkpoints
    and gradient synchronisation see nothing of it. In evaluation mode the whole network computes: what it gives is,
    bit for bit, what it gives without this package.

    Args:
        network: Whose ``forward`` is replaced.
        kept: What stays; may be changed in place between calls. Empty, the network computes as before.
    """

    def __init__(self, network: nn.Module, kept: Kept) -> None:
        self._network = network
        self._kept = kept
        self._body = RawForward(network)
        network.forward = self._call

    def remove(self) -> None:
        """Gives the network its own ``forward`` back."""
        self._network.__dict__.pop("forward", None)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._kept and self._network.training):
            return self._body(*args, **kwargs)
        parameters, buffers = dict(self._network.named_parameters()), dict(self._network.named_buffers())
        held = parameters | buffers
        cut = {name: narrowed(held[name], kept) for name, kept in self._kept.items()}
        output = self._body.call_with(cut, *args, **kwargs)
        for name in cut.keys() & buffers.keys():  # BatchNorm's statistics, spectral norm's vectors
            ((dim, index),) = self._kept[name].items()
            buffers[name].data.index_copy_(dim, index, cut[name])
        return output


class RawForward(nn.Module):
    """The ``forward`` of a network's class, without the network's hooks.

    Args:
        network: Is not changed.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._unflattens = [layer for layer in network.modules() if isinstance(layer, nn.Unflatten)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes."""
        return type(self.network).forward(self.network, *args, **kwargs)

    def call_with(self, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the network computes with other parameters and buffers, by their names in it; also with smaller ones."""
        with _widened(self._unflattens):
            return functional_call(self, {f"network.{name}": tensor for name, tensor in tensors.items()}, args, kwargs)


def can_run_structured(network: nn.Module) -> bool:
    """Whether a network can be run so: not where it is compiled, since every change would be compiled anew."""
    return not is_compiled(network)


@contextmanager
def _widened(layers: Sequence[nn.Unflatten]) -> Iterator[None]:
    """Has layers make as many channels as there are, for a while."""
    sizes = [layer.unflattened_size for layer in layers]
    for layer in layers:
        widen(layer)
    try:
        yield
    finally:
        for layer, size in zip(layers, sizes, strict=True):
            layer.unflattened_size = size


def widen(layer: nn.Unflatten) -> None:
    """Has a layer make as many channels as there are."""
    if all(isinstance(size, int) for size in layer.unflattened_size):  # and not of named tensors
        layer.unflattened_size = (-1, *layer.unflattened_size[1:])
