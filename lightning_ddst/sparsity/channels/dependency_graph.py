"""Traces the channels of every layer of a network to the layers that read them."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_ddst.sparsity.channels.groups import Channels
from lightning_ddst.sparsity.channels.marking import Arrival, Marking, Pairs, find_pairs, is_injective
from lightning_ddst.sparsity.maskable import MASKABLE_LAYERS, MaskableWeight, layer_weights

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)
"""Modules with one entry per channel: BatchNorm, InstanceNorm, GroupNorm, PReLU. All but GroupNorm do not mix them."""
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
"""Layers that compute channels but are not masked, such as those of a class-conditional BatchNorm."""
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
Axis = tuple[str, int]
"""A weight's name and a dimension; for all tensors of a norm or an embedding, the module's name and 0."""


class DependencyGraph:
    """A graph that joins the indices of axes that belong to the same channel (union-find).

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.weights: dict[str, MaskableWeight] = {weight.name: weight for weight in layer_weights(network)}
        self.others = {n: m for n, m in network.named_modules() if isinstance(m, _NORMS + _EMBEDDINGS) and _size(m) > 1}
        self._names = {id(t): name for name, t in [*network.named_parameters(), *network.named_buffers()]}
        self._sizes: dict[Axis, int] = {}
        self._starts: dict[Axis, int] = {}
        self._parents: list[int] = []
        self._fixed: dict[int, str] = {}
        self._constants: set[Axis] = set()
        self._returned: dict[Axis, int] = {}
        for name, weight in self.weights.items():
            for dim in (0, 1):
                self._add((name, dim), _count_channels(weight, dim))
        for name, module in self.others.items():
            self._add((name, 0), _size(module))
            if isinstance(module, nn.GroupNorm):
                together = module.num_channels // module.num_groups
                self.join((name, 0), (name, 0), ((i, i - i % together) for i in range(module.num_channels)))
            if parametrize.is_parametrized(module):  # such as an embedding under spectral norm
                self.fix((name, 0), f"{type(module).__name__} {name!r} has a parametrization")

    def _add(self, axis: Axis, size: int) -> None:
        self._starts[axis], self._sizes[axis] = len(self._parents), size
        self._parents += range(len(self._parents), len(self._parents) + size)

    def add_constant(self, name: str, dim: int, size: int) -> Axis:
        """Adds a dimension of a parameter that is no weight of a layer, such as a learned constant."""
        self._add((name, dim), size)
        self._constants.add((name, dim))
        return name, dim

    def add_returned(self, number: int, dim: int, size: int) -> Axis:
        """Adds a dimension of a tensor that the network returns, if it is not there yet."""
        axis = (f"output {number}", dim)
        if axis not in self._sizes:
            self._add(axis, size)
            self._returned[axis] = number
        return axis

    def _root(self, index: int) -> int:
        while self._parents[index] != index:
            self._parents[index] = index = self._parents[self._parents[index]]
        return index

    def join(self, source: Axis, reader: Axis, pairs: Iterable[tuple[int, int]]) -> None:
        """Joins channels of a source with those of a reader, given pairs of reader index and source index."""
        for there, here in pairs:
            self._parents[self._root(self._starts[reader] + there)] = self._root(self._starts[source] + here)

    def fix_some(self, axis: Axis, indices: Iterable[int], reason: str) -> None:
        """Marks some channels of an axis as not removable; the first reason for a channel counts."""
        for index in indices:
            self._fixed.setdefault(self._starts[axis] + index, reason)

    def fix(self, axis: Axis, reason: str) -> None:
        """Marks all channels of an axis as not removable."""
        self.fix_some(axis, range(self._sizes[axis]), reason)

    def keep_whole(self, name: str) -> None:
        """Marks all channels of a weight as not removable."""
        if name in self.weights:
            layer = next(iter(self.weights[name].layers))
            self.fix((name, self.weights[name].out_dim), "it stays dense")
            self.fix((name, 1 - self.weights[name].out_dim), f"{layer!r} reads them and stays dense")

    def groups_of_layers(self, channels: Channels) -> dict[str, list[int]]:
        """Returns the groups of the channels that each layer computes, by the layer's name."""
        group = torch.tensor([number for number, size in enumerate(channels.sizes) for _ in range(size)])
        found = {}
        for name, weight in self.weights.items():
            of = channels.axes.get(name, {}).get(weight.out_dim)
            if of is not None:
                found[next(iter(weight.layers))] = group[of[of >= 0]].unique().tolist()
        return found

    def channels(self) -> Channels:
        """Returns the removable channels: those that layers compute and read, and that are not fixed."""
        fixed = {self._root(index): reason for index, reason in reversed(self._fixed.items())}
        gives = {(name, weight.out_dim) for name, weight in self.weights.items()}
        reads = {(name, 1 - dim) for name, dim in gives}
        gives |= self._constants
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
        returned: dict[int, dict[int, Tensor]] = {}
        whole: dict[str, str] = {}
        for axis, start in self._starts.items():
            roots = [self._root(i) for i in range(start, start + self._sizes[axis])]
            of = torch.tensor([numbers.get(root, -1) for root in roots])
            if (of >= 0).any():
                if axis in self._returned:
                    returned.setdefault(self._returned[axis], {})[axis[1]] = of
                    continue
                for name, dim, channels in self._tensors(axis, of):
                    found.setdefault(name, {})[dim] = channels
            elif axis in gives and axis not in self._constants:
                is_read = not all(where[root].isdisjoint(reads) for root in roots)
                reasons = [fixed[root] for root in roots if root in fixed and (is_read or fixed[root] != RETURNED)]
                if reasons:
                    whole[next(iter(self.weights[axis[0]].layers))] = reasons[0]
        return Channels(tuple(map(len, groups.values())), found, returned, whole)

    def _tensors(self, axis: Axis, channels: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """Yields every parameter and buffer with this axis, with its dimension and channels."""
        name, dim = axis
        if axis in self._constants:
            yield name, dim, channels
            return
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


RETURNED = "the network returns them"
"""Reason for channels that reach the network's output."""


def trace(network: nn.Module, inputs: Sequence[Any], *, narrow_features: bool = False) -> DependencyGraph:
    """Traces every layer's channels to the layers that read them.

    Args:
        network: The network; it is called in its current mode, without gradients.
        inputs: Example arguments of the network, the batch first.
        narrow_features: Whether channels that the network returns are removable if a layer reads them, too.

    Returns:
        The graph of channels.
    """
    links = DependencyGraph(network)
    gives = {name: (weight.name, weight.out_dim) for weight in links.weights.values() for name in weight.layers}
    reads = {name: (weight, 1 - dim) for name, (weight, dim) in gives.items()}
    layers = {name: layer for weight in links.weights.values() for name, layer in weight.layers.items()}
    for name, layer in layers.items():
        if getattr(layer, "groups", 1) > 1:
            links.fix(gives[name], "a grouped convolution")
            links.fix(reads[name], f"grouped convolution {name!r} reads them")
    norms = {name: module for name, module in links.others.items() if isinstance(module, _NORMS)}
    reads |= {name: (name, 0) for name in norms}
    embeddings = {name: module for name, module in links.others.items() if name not in norms}
    gives |= {name: (name, 0) for name in embeddings}
    layers |= embeddings
    marking = Marking(network, inputs, layers, norms)
    for source in marking.shapes:
        found, mixed = _follow(marking, source)
        if mixed:
            links.fix(gives[source], marking.find_mixer(source))
        for arrival, pairs in found:
            if arrival.reader:
                links.join(gives[source], reads[arrival.reader], pairs)
            elif not narrow_features:
                links.fix_some(gives[source], (here for _, here in pairs), RETURNED)
            elif pairs:
                dim, pairs = _channel_dim(arrival.values, pairs, marking.size(source))
                size = arrival.values.shape[dim]
                links.join(gives[source], links.add_returned(arrival.output, dim, size), pairs)
    for name in _bare_parameters(network, links):
        _trace_constant(links, marking, network.get_parameter(name), name, reads)
    return links


def _follow(marking: Marking, source: str) -> tuple[list[tuple[Arrival, Pairs]], bool]:
    """Returns where a layer's channels arrive, and whether they are mixed.

    Scales and shifts that one layer computes for the same channels (AdaIN), and gates (GLU), would mix their marks, so
    halves of the channels are followed one after the other if all at once are mixed.
    """
    for parts in range(1, marking.most_parts(source) + 1):
        found, mixed = [], False
        for part in range(parts):
            for arrival in marking.from_layer(source, part, parts):
                pairs, mixes = find_pairs(arrival.values, arrival.dim, marking.size(source))
                found.append((arrival, pairs))
                mixed |= mixes
        if not mixed:
            break
    return found, mixed


def _channel_dim(values: Tensor, pairs: Pairs, channels: int) -> tuple[int, Pairs]:
    """Returns the dimension of a returned tensor that holds the channels, with the pairs along it; 1 if unclear."""
    found = {1: pairs}
    if values.dim() > 2:  # tokens have their channels last
        found[values.dim() - 1] = find_pairs(values, values.dim() - 1, channels)[0]
    return next(((dim, along) for dim, along in found.items() if is_injective(along)), (1, pairs))


def _bare_parameters(network: nn.Module, links: DependencyGraph) -> Iterator[str]:
    """Yields the parameters of users' own modules that are neither weights nor biases of layers: learned constants."""
    known = {id(weight.parameter) for weight in links.weights.values()}
    for owner, module in network.named_modules():
        builtin = type(module).__module__.startswith("torch.") and not isinstance(module, _CONTAINERS)
        if not builtin and not isinstance(module, MASKABLE_LAYERS):
            for name, parameter in module.named_parameters(owner, recurse=False):
                # Others, such as (outputs, inputs) or (outputs, inputs, 3, 3), are weights, which mix channels.
                constant = parameter.dim() in (1, 3) or (1 < parameter.dim() < 5 and len(parameter) == 1)
                if constant and parameter.numel() > 1 and id(parameter) not in known:
                    yield name


def _trace_constant(
    links: DependencyGraph, marking: Marking, parameter: Tensor, name: str, reads: dict[str, Axis]
) -> None:
    """Joins a parameter's channels with those of its readers, along the first dimension that holds channels."""
    for dim, size in enumerate(parameter.shape):
        if size == 1:
            continue
        arrivals = marking.from_parameter(name, dim)
        found = [(a, *find_pairs(a.values, a.dim, size)) for a in arrivals]
        if any(mixed for *_, mixed in found):
            return  # a weight, for example
        if found and all(is_injective(pairs) for _, pairs, _ in found):
            axis = links.add_constant(name, dim, size)
            for arrival, pairs, _ in found:
                if arrival.reader:
                    links.join(axis, reads[arrival.reader], pairs)
                elif pairs:
                    links.fix_some(axis, (here for _, here in pairs), RETURNED)
            return


def _count_channels(weight: MaskableWeight, dim: int) -> int:
    """Returns the number of channels along a dimension; a grouped convolution's weight has fewer entries than that."""
    layer: Any = next(iter(weight.layers.values()))
    if getattr(layer, "groups", 1) > 1:
        return int(layer.out_channels if dim == weight.out_dim else layer.in_channels)
    return weight.parameter.shape[dim]


def _size(module: nn.Module) -> int:
    """Returns the number of channels of a norm or an embedding."""
    attributes = ("num_features", "num_channels", "num_parameters", "embedding_dim")
    return next(int(size) for name in attributes if (size := getattr(module, name, None)) is not None)
