"""Calls a network with marks in place of a layer's output or of a parameter, to find where its channels arrive."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_ddst.sparsity.channels.structured_forward import RawForward, restore_forward
from lightning_ddst.sparsity.maskable import MASKABLE_LAYERS, channel_dim
from lightning_ddst.sparsity.reparametrized import has_weight_norm
from lightning_ddst.utils.modules import remove_hooks
from lightning_ddst.utils.nested import tensors_in

Pairs = list[tuple[int, int]]
"""A channel of a tensor, and a channel of the source whose marks are in it."""


@dataclass(frozen=True)
class Arrival:
    """A tensor that reached a layer, a norm, or the network's output.

    Attributes:
        reader: Name of the layer or norm; empty for the output.
        values: The tensor, with NaN where marks arrived; the batch first.
        dim: The dimension of channels, for a layer or norm; for outputs 1.
        output: For outputs, the number of the tensor.
    """

    reader: str
    values: Tensor
    dim: int
    output: int = 0


class Marking:
    """Calls a network with marks.

    A mark is a pattern of NaN over the batch: the bits of the channel's number, and their inverse. During such calls
    layers return 0, or the marks, instead of their output; norms pass their input on or do not mix its channels.

    Args:
        network: The network; it is called in its current mode.
        inputs: Example arguments of the network, the batch first.
        layers: Layers to replace, by name.
        norms: Other modules that read channels, by name.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Sequence[Any],
        layers: Mapping[str, nn.Module],
        norms: Mapping[str, nn.Module],
    ) -> None:
        self._network = network
        self._inputs = inputs
        self._layers = layers
        self._norms = norms
        self.shapes: dict[str, list[torch.Size]] = {}  # of layers' outputs, call by call
        self._measure()

    def _measure(self) -> None:
        def note(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
            self.shapes.setdefault(name, []).append(output.shape)

        hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in self._layers.items()]
        with remove_hooks(hooks):
            RawForward(self._network)(*self._inputs)

    def size(self, source: str) -> int:
        """Returns the number of channels that a layer computes."""
        return self.shapes[source][0][channel_dim(self._layers[source])]

    def most_parts(self, source: str) -> int:
        """Returns in how many parts a layer's channels can be followed: a mixture of a single channel is not seen."""
        return 2 if self.size(source) >= 4 else 1

    def from_layer(self, source: str, part: int = 0, parts: int = 1) -> list[Arrival]:
        """Returns where the channels that a layer computes arrive, or one of several equal parts of them."""
        codes = _codes(self.size(source))
        marked = torch.arange(self.size(source)) * parts // self.size(source) == part
        return self._arrivals({}, len(codes), partial(self._mark, source, codes & marked))

    def from_parameter(self, name: str, dim: int) -> list[Arrival]:
        """Returns where a parameter's entries along one dimension arrive; empty if its marks cannot be followed.

        A parameter has no batch, so there is one call per row of the pattern. The network is called with a batch of 2,
        of which the first sample is kept.
        """
        parameter = self._network.get_parameter(name)
        if not any(arrival.values.isnan().any() for arrival in self._with(name, torch.full_like(parameter, torch.nan))):
            return []
        calls = []
        for row in _codes(parameter.shape[dim]):
            marks = row.to(parameter.device).view([-1 if i == dim else 1 for i in range(parameter.dim())])
            calls.append(self._with(name, parameter.detach().masked_fill(marks, torch.nan)))
        if any([a.reader for a in call] != [a.reader for a in calls[0]] for call in calls):
            return []
        arrivals = []
        for same in zip(*calls, strict=True):
            if any(len(arrival.values) != 2 for arrival in same):
                return []
            values = torch.cat([arrival.values[:1] for arrival in same])
            arrivals.append(Arrival(same[0].reader, values, same[0].dim, same[0].output))
        return arrivals

    def _with(self, name: str, value: Tensor) -> list[Arrival]:
        return self._arrivals({name: value}, 2, lambda layer, output: output)

    def find_mixer(self, source: str) -> str:
        """Returns a text about the module in which channels of a layer's output are mixed first."""
        batch = len(_codes(self.size(source)))
        running, found = [self._network], list[nn.Module]()

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if any(_is_mixed(tensor, batch) for tensor in floats_in([args, kwargs])):
                found.append(running[-1])
            running.append(module)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            if any(_is_mixed(tensor, batch) for tensor in floats_in(output)):
                found.append(module)

        modules = [module for module in self._network.modules() if module is not self._network]
        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
        with remove_hooks([*hooks, *(module.register_forward_hook(after) for module in modules)]):
            parts = self.most_parts(source)
            for part in range(parts):
                self.from_layer(source, part, parts)
        mixer = [*found, self._network][0]
        normed = isinstance(mixer, MASKABLE_LAYERS) and has_weight_norm(mixer)
        verb = "reads them under weight norm" if normed else "mixes channels"
        return f"{describe_module(self._network, mixer)} {verb}"

    def _mark(self, source: str, codes: Tensor, name: str, output: Tensor) -> Tensor:
        """Marks the output of one layer."""
        if name != source or len(output) != len(codes):
            return output
        dim = channel_dim(self._layers[name])
        marks = codes.to(output.device).view(len(codes), *(1,) * (output.dim() - 2), -1).movedim(-1, dim)
        return output.masked_fill(marks, torch.nan)

    def _arrivals(
        self, tensors: Mapping[str, Tensor], batch: int, marked: Callable[[str, Tensor], Tensor]
    ) -> list[Arrival]:
        """Calls the network with other parameters, and layers that return `marked` of their name and zeros."""
        seen: list[Arrival] = []
        calls = dict.fromkeys(self._layers, 0)

        def replaced(name: str, *args: Any, **kwargs: Any) -> Tensor:
            given: Tensor = args[0] if args else kwargs["input"]
            if given.is_floating_point():
                seen.append(Arrival(name, given, channel_dim(self._layers[name])))
            shape = self.shapes[name][calls[name] % len(self.shapes[name])]
            calls[name] += 1
            dtype = given.dtype if given.is_floating_point() else torch.get_default_dtype()
            return marked(name, given.new_zeros((len(given), *shape[1:]), dtype=dtype))

        def note(name: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(Arrival(name, args[0], 1))

        def pass_on(name: str, given: Tensor) -> Tensor:
            return given.clone()

        repeated = [
            value[:1].expand(batch, *value.shape[1:]) if isinstance(value, Tensor) and value.dim() else value
            for value in self._inputs
        ]
        mixing = {name: norm for name, norm in self._norms.items() if isinstance(norm, nn.GroupNorm)}
        hooks = [norm.register_forward_pre_hook(partial(note, name)) for name, norm in self._norms.items()]
        with remove_hooks(hooks), _replacing(self._layers, replaced), _replacing(mixing, pass_on):
            output = RawForward(self._network).call_with(tensors, *repeated)
        outputs = [tensor if tensor.dim() > 1 else tensor.reshape(-1, 1) for tensor in floats_in(output)]
        return [*seen, *(Arrival("", tensor, 1, number) for number, tensor in enumerate(outputs))]


def find_pairs(values: Tensor, dim: int, channels: int) -> tuple[Pairs, bool]:
    """Finds the marks in a tensor.

    Args:
        values: The tensor, the batch first.
        dim: The dimension of its channels.
        channels: The number of channels of the source.

    Returns:
        The pairs of channels, and whether there are mixed marks, or NaN in a tensor whose batch size has changed.
    """
    batch = len(_codes(channels))
    if len(values) != batch:
        return [], _is_mixed(values, batch)
    nan = values.isnan().movedim(dim, 1).reshape(batch, values.shape[dim], -1)
    ones, zeros = nan[0::2], nan[1::2]
    pure = (ones ^ zeros).all(0)
    numbers = (ones * 2 ** torch.arange(len(ones), device=ones.device)[:, None, None]).sum(0)
    places = torch.arange(len(pure), device=pure.device)[:, None].expand_as(pure)
    pairs = torch.stack([places[pure], numbers[pure]], 1).unique(dim=0).tolist()
    return [(there, here) for there, here in pairs], _is_mixed(values, batch)


def is_injective(pairs: Pairs) -> bool:
    """Returns whether each channel of a tensor comes from one channel of the source, at most."""
    return len({there for there, _ in pairs}) == len(pairs)


def floats_in(output: Any) -> list[Tensor]:
    """Returns the floating-point tensors in a network's output."""
    return [tensor for _, tensor in tensors_in(output) if tensor.is_floating_point() and tensor.numel()]


def describe_module(network: nn.Module, module: nn.Module) -> str:
    """Returns a text that names a part of a network, such as "LayerNorm 'norm'", or the network's own code."""
    name = next(name for name, part in network.named_modules() if part is module)
    kind = parametrize.type_before_parametrizations(module).__name__
    return f"{kind} {name!r}" if name else f"the code of {kind}"


def _codes(number: int) -> Tensor:
    """Returns a pattern over the batch per channel: its number's bits and their inverse, bool ``(batch, channels)``."""
    bits = max(1, (number - 1).bit_length())
    ones = torch.arange(number) >> torch.arange(bits)[:, None] & 1 == 1
    return torch.stack([ones, ~ones], 1).flatten(0, 1)


def _is_mixed(values: Tensor, batch: int) -> bool:
    """Returns whether a tensor holds NaN that is no mark."""
    nan = values.isnan()
    if not values.dim() or len(values) != batch:
        return bool(nan.any())
    return bool((nan.any(0) & ~(nan[0::2] ^ nan[1::2]).all(0)).any())


@contextmanager
def _replacing(layers: Mapping[str, nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replaces the ``forward`` of layers inside the context; the new one takes the layer's name first."""
    replaced = [vars(layer).get("forward") for layer in layers.values()]
    for name, layer in layers.items():
        layer.forward = partial(forward, name)
    try:
        yield
    finally:
        for layer, own in zip(layers.values(), replaced, strict=True):
            restore_forward(layer, own)
