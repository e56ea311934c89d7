"""Traces the channels of every layer of a network to the layers that read them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_ddst.sparsity.channels.groups import Channels
from lightning_ddst.sparsity.channels.structured_forward import RawForward
from lightning_ddst.sparsity.maskable import MaskableWeight, channel_dim, layer_weights
from lightning_ddst.utils.modules import remove_hooks

_NORMS = (nn.modules.batchnorm._NormBase,)
"""Norms with one entry per channel that do not mix channels: BatchNorm, InstanceNorm."""
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
"""Layers that compute channels but are not masked, such as those of a class-conditional BatchNorm."""
Axis = tuple[str, int]
"""A weight's name and a dimension; for all tensors of a norm or an embedding, the module's name and 0."""


class DependencyGraph:
    """A graph that joins the indices of axes that belong to the same channel (union-find).

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.weights: dict[str, MaskableWeight] = {weight.name: weight for weight in layer_weights(network)}
        self.others = {n: m for n, m in network.named_modules() if isinstance(m, _NORMS + _EMBEDDINGS)}
        self._names = {id(t): name for name, t in [*network.named_parameters(), *network.named_buffers()]}
        self._sizes: dict[Axis, int] = {}
        self._starts: dict[Axis, int] = {}
        self._parents: list[int] = []
        self._fixed: set[int] = set()
        for name, weight in self.weights.items():
            for dim in (0, 1):
                self._add((name, dim), weight.parameter.shape[dim])
        for name, module in self.others.items():
            self._add((name, 0), module.num_features if isinstance(module, _NORMS) else module.embedding_dim)
            if parametrize.is_parametrized(module):  # such as an embedding under spectral norm
                self.fix((name, 0))

    def _add(self, axis: Axis, size: int) -> None:
        self._starts[axis], self._sizes[axis] = len(self._parents), size
        self._parents += range(len(self._parents), len(self._parents) + size)

    def _root(self, index: int) -> int:
        while self._parents[index] != index:
            self._parents[index] = index = self._parents[self._parents[index]]
        return index

    def join(self, source: Axis, reader: Axis, pairs: Iterable[tuple[int, int]]) -> None:
        """Joins channels of a source with those of a reader, given pairs of reader index and source index."""
        for there, here in pairs:
            self._parents[self._root(self._starts[reader] + there)] = self._root(self._starts[source] + here)

    def fix_some(self, axis: Axis, indices: Iterable[int]) -> None:
        """Marks some channels of an axis as not removable."""
        self._fixed |= {self._starts[axis] + index for index in indices}

    def fix(self, axis: Axis) -> None:
        """Marks all channels of an axis as not removable."""
        self.fix_some(axis, range(self._sizes[axis]))

    def channels(self) -> Channels:
        """Returns the removable channels: those that layers compute and read, and that are not fixed."""
        fixed = {self._root(index) for index in self._fixed}
        gives = {(name, weight.out_dim) for name, weight in self.weights.items()}
        reads = {(name, 1 - dim) for name, dim in gives}
        where: dict[int, set[Axis]] = {}
        for axis, start in self._starts.items():
            for index in range(start, start + self._sizes[axis]):
                where.setdefault(self._root(index), set()).add(axis)
        groups: dict[frozenset[Axis], list[int]] = {}
        for root, axes in where.items():
            if root not in fixed and not axes.isdisjoint(gives) and not axes.isdisjoint(reads):
                groups.setdefault(frozenset(axes), []).append(root)
        numbers = {root: number for number, root in enumerate(root for roots in groups.values() for root in roots)}
        found: dict[str, dict[int, Tensor]] = {}
        for axis, start in self._starts.items():
            of = torch.tensor([numbers.get(self._root(i), -1) for i in range(start, start + self._sizes[axis])])
            if (of >= 0).any():
                for name, dim, channels in self._tensors(axis, of):
                    found.setdefault(name, {})[dim] = channels
        return Channels(tuple(map(len, groups.values())), found)

    def _tensors(self, axis: Axis, channels: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """Yields every parameter and buffer with this axis, with its dimension and channels."""
        name, dim = axis
        if name in self.others:
            module = self.others[name]
            for held in (*module._parameters.values(), *module._buffers.values()):
                if held is not None and held.dim():
                    yield self._names[id(held)], int(isinstance(module, _EMBEDDINGS)), channels
            return
        weight = self.weights[name]
        yield name, dim, channels
        if dim == weight.out_dim:
            for layer in weight.layers.values():
                if layer._parameters.get("bias") is not None:
                    yield self._names[id(layer._parameters["bias"])], 0, channels
        for spectral in weight.spectral:
            left, right = spectral.vectors()
            if dim == spectral.dim:
                yield self._names[id(left)], 0, channels
            else:
                kernel = prod(weight.parameter.shape[2:])
                yield self._names[id(right)], 0, channels.repeat_interleave(kernel)


def trace(network: nn.Module, inputs: Sequence[Any]) -> DependencyGraph:
    """Traces every layer's channels to the layers that read them.

    Args:
        network: The network; it is called in its current mode, without gradients.
        inputs: Example arguments of the network, the batch first.

    Returns:
        The graph of channels.
    """
    links = DependencyGraph(network)
    gives = {name: (weight.name, weight.out_dim) for weight in links.weights.values() for name in weight.layers}
    reads = {name: (weight, 1 - dim) for name, (weight, dim) in gives.items()}
    layers = {name: layer for weight in links.weights.values() for name, layer in weight.layers.items()}
    for name, layer in layers.items():
        if getattr(layer, "groups", 1) > 1:
            links.fix(gives[name])
            links.fix(reads[name])
    norms = {name: module for name, module in links.others.items() if isinstance(module, _NORMS)}
    reads |= {name: (name, 0) for name in norms}
    embeddings = {name: module for name, module in links.others.items() if name not in norms}
    gives |= {name: (name, 0) for name in embeddings}
    layers |= embeddings
    shapes = _shapes(network, inputs, layers)
    for source, calls in shapes.items():
        codes = _codes(calls[0][channel_dim(layers[source])])
        for reader, values, dim in _marked(network, inputs, layers, norms, shapes, source, codes):
            pairs, mixed = _arrived(values, dim, len(codes))
            if reader in reads:
                links.join(gives[source], reads[reader], pairs)
            else:  # the network's output
                links.fix_some(gives[source], (here for _, here in pairs))
            if mixed:
                links.fix(gives[source])
    return links


def _shapes(network: nn.Module, inputs: Sequence[Any], layers: Mapping[str, nn.Module]) -> dict[str, list[torch.Size]]:
    """Returns the output shapes of each layer, call by call."""
    shapes: dict[str, list[torch.Size]] = {}

    def note(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        shapes.setdefault(name, []).append(output.shape)

    with remove_hooks([layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()]):
        RawForward(network)(*inputs)
    return shapes


def _codes(number: int) -> Tensor:
    """Returns a pattern over the batch per channel: its number's bits and their inverse, bool ``(batch, channels)``."""
    bits = max(1, (number - 1).bit_length())
    ones = torch.arange(number) >> torch.arange(bits)[:, None] & 1 == 1
    return torch.stack([ones, ~ones], 1).flatten(0, 1)


def _arrived(values: Tensor, dim: int, batch: int) -> tuple[list[tuple[int, int]], bool]:
    """Finds the patterns in a tensor.

    Returns:
        Pairs of a channel of the tensor and a channel whose pattern occurs in it; and whether there are mixed
        patterns, or NaN in a tensor whose batch size has changed.
    """
    nan = values.isnan()
    if len(values) != batch:
        return [], bool(nan.any())
    nan = nan.movedim(dim, 1).reshape(batch, values.shape[dim], -1)
    ones, zeros = nan[0::2], nan[1::2]
    pure = (ones ^ zeros).all(0)
    numbers = (ones * 2 ** torch.arange(len(ones), device=ones.device)[:, None, None]).sum(0)
    places = torch.arange(len(pure), device=pure.device)[:, None].expand_as(pure)
    pairs = torch.stack([places[pure], numbers[pure]], 1).unique(dim=0).tolist()
    return [(there, here) for there, here in pairs], bool((nan.any(0) & ~pure).any())


def _marked(
    network: nn.Module,
    inputs: Sequence[Any],
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    shapes: Mapping[str, Sequence[torch.Size]],
    source: str,
    codes: Tensor,
) -> list[tuple[str, Tensor, int]]:
    """Calls the network with patterns as the output of one layer, and 0 as the output of the others.

    Returns:
        The inputs of layers and norms, each with the layer's name and the dimension of channels; and the network's
        output, under an empty name.
    """
    seen: list[tuple[str, Tensor, int]] = []
    calls = dict.fromkeys(layers, 0)

    def replaced(name: str, *args: Any, **kwargs: Any) -> Tensor:
        given: Tensor = args[0] if args else kwargs["input"]
        dim = channel_dim(layers[name])
        if given.is_floating_point():
            seen.append((name, given, dim))
        shape = shapes[name][calls[name] % len(shapes[name])]
        calls[name] += 1
        dtype = given.dtype if given.is_floating_point() else torch.get_default_dtype()
        output = given.new_zeros((len(given), *shape[1:]), dtype=dtype)
        if name == source and len(given) == len(codes):
            marks = codes.to(given.device).view(len(codes), *(1,) * (output.dim() - 2), -1).movedim(-1, dim)
            output = output.masked_fill(marks, torch.nan)
        return output

    def note(name: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append((name, args[0], 1))

    repeated = [
        value[:1].expand(len(codes), *value.shape[1:]) if isinstance(value, Tensor) and value.dim() else value
        for value in inputs
    ]
    hooks = [norm.register_forward_pre_hook(partial(note, name)) for name, norm in norms.items()]
    with remove_hooks(hooks), _replacing(layers, replaced):
        output = RawForward(network)(*repeated)
    return [*seen, *(("", tensor.reshape(len(tensor), -1), 1) for tensor in floats_in(output) if tensor.dim())]


@contextmanager
def _replacing(layers: Mapping[str, nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replaces the ``forward`` of layers inside the context; the new one takes the layer's name first."""
    for name, layer in layers.items():
        layer.forward = partial(forward, name)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def alike(ones: Sequence[Tensor], others: Sequence[Tensor], differs: float) -> bool:
    """Returns whether tensors are equal up to `differs` times the largest entry of each first one; NaN never is."""
    return len(ones) == len(others) and all(
        one.shape == other.shape and bool((one - other).abs().max() <= differs * one.abs().max())
        for one, other in zip(ones, others, strict=True)
    )


def floats_in(output: Any) -> list[Tensor]:
    """Returns the floating-point tensors in a network's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, Mapping):
        output = output.values()
    return [tensor for part in output for tensor in floats_in(part)] if isinstance(output, Iterable) else []
