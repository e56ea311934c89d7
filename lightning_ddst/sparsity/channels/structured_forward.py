"""Runs a network without some of its channels: every layer is smaller, the network's code is unchanged."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from lightning_ddst.utils.compilation import is_compiled
from lightning_ddst.utils.modules import remove_hooks

Kept = Mapping[str, Mapping[int, Tensor]]
"""The remaining indices, int64, by the name of a parameter or buffer and by each dimension that gets smaller."""
_SIZED = (nn.Unflatten, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
"""Layers whose forward depends on a number of channels that is no shape of a parameter."""
_SIZES = ("unflattened_size", "num_groups", "num_channels", "num_features")


def narrow(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Returns the remaining part of a tensor; indices may be on any device, gradients flow to the full tensor."""
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


class StructuredForward:
    """A replacement ``forward`` that computes with the remaining channels in training mode, until `remove`.

    The network keeps its full parameters and buffers. They are cut at every call, gradients flow to the full
    parameters (0 at removed entries), and updates of buffers are written to the full buffers. So optimizers,
    checkpoints and gradient synchronization are not affected. In evaluation mode the full network computes, and its
    output is the same, bit for bit, as without this package. Features that a network returns have the remaining
    channels in training mode, and all channels in evaluation mode.

    Args:
        network: The network whose ``forward`` is replaced.
        kept: The remaining indices; may be changed in place between calls. If empty, the full network computes.
    """

    def __init__(self, network: nn.Module, kept: Kept) -> None:
        self._network = network
        self._kept = kept
        self._body = RawForward(network)
        self._replaced = vars(network).get("forward")
        network.forward = self._call

    def remove(self) -> None:
        """Restores the network's own ``forward``."""
        restore_forward(self._network, self._replaced)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._kept and self._network.training):
            return self._body(*args, **kwargs)
        parameters, buffers = dict(self._network.named_parameters()), dict(self._network.named_buffers())
        held = parameters | buffers
        cut = {name: narrow(held[name], kept) for name, kept in self._kept.items()}
        output = self._body.call_with(cut, *args, **kwargs)
        for name in cut.keys() & buffers.keys():  # BatchNorm's statistics, spectral norm's vectors
            ((dim, index),) = self._kept[name].items()
            buffers[name].data.index_copy_(dim, index, cut[name])
        return output


class RawForward(nn.Module):
    """A network's own ``forward``, without the network's hooks; a `StructuredForward` does not change it.

    Args:
        network: The network; it does not change.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._sized = [layer for layer in network.modules() if isinstance(layer, _SIZED)]
        replaced = vars(network).get("forward")
        structured = getattr(replaced, "__self__", None)
        self._patched = structured._replaced if isinstance(structured, StructuredForward) else replaced

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the class's ``forward``, or what replaced it in this network."""
        if self._patched is not None:
            return self._patched(*args, **kwargs)
        return type(self.network).forward(self.network, *args, **kwargs)

    def call_with(self, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Calls the network with other parameters and buffers, which may be smaller, by their names in it."""
        with _fitting(self._sized):
            return functional_call(self, {f"network.{name}": tensor for name, tensor in tensors.items()}, args, kwargs)


def restore_forward(module: nn.Module, replaced: Callable[..., Any] | None) -> None:
    """Gives a module the ``forward`` back that it had itself, or its class's."""
    vars(module).pop("forward", None)
    if replaced is not None:
        module.forward = replaced


def can_run_structured(network: nn.Module) -> bool:
    """Returns whether `StructuredForward` suits a network: not if compiled, since every change would recompile it."""
    return not is_compiled(network)


@contextmanager
def _fitting(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Fits layers to the channels of their inputs inside the context."""
    sizes = [{name: vars(layer)[name] for name in _SIZES if name in vars(layer)} for layer in layers]
    with remove_hooks(fit_to_inputs(layers)):
        try:
            yield
        finally:
            for layer, size in zip(layers, sizes, strict=True):
                vars(layer).update(size)


def fit_to_inputs(layers: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Makes layers that hold a number of channels fit their next inputs; returns the hooks that do so."""
    hooks = []
    for layer in layers:
        if isinstance(layer, nn.Unflatten):
            if all(isinstance(size, int) for size in layer.unflattened_size):  # not names of dimensions
                layer.unflattened_size = (-1, *layer.unflattened_size[1:])
        elif isinstance(layer, _SIZED):
            hooks.append(layer.register_forward_pre_hook(_fit_norm))
    return hooks


def _fit_norm(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    channels = args[0].shape[1]
    if isinstance(norm, nn.GroupNorm):  # only whole groups of channels are removed
        norm.num_groups = norm.num_groups * channels // norm.num_channels
        norm.num_channels = channels
    else:
        vars(norm)["num_features"] = channels
