"""Logs the calls of networks, cheaply enough for every training step."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.nested import leaves_in, tensors_in
from lightning_ddst.utils.states import Form, Leaf

Signature = tuple[Any, ...]
"""The calls of a piece of training and the numbers of backward passes: nested tuples of int, bool and str."""


class CallLog:
    """A log of networks' calls by forward hooks.

    It holds, for each call, the network, its mode, whether gradients are enabled, how many weights are trained, and
    shapes of arguments and whether they require gradients; and the number of backward passes through the networks'
    outputs. Two pieces of training with equal logs take the same operations.

    Attributes:
        enabled: Whether calls are logged.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._networks: list[Sequence[Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self.clear()

    def __reduce__(self) -> Any:
        return CallLog, ()  # a copied network's hooks log nothing

    def attach(self, network: nn.Module, weights: Iterable[Tensor]) -> None:
        """Registers hooks on a network, or on the parts of a list or dict of modules.

        Args:
            network: The network; the first one has number 0.
            weights: Its weights.
        """
        number = len(self._networks)
        self._networks.append(list(weights))
        for part in _callable_parts(network):
            self._handles += [
                part.register_forward_pre_hook(partial(self._before, number), with_kwargs=True),
                part.register_forward_hook(partial(self._after, number)),
            ]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._networks.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Logs no calls inside the context."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def clear(self) -> None:
        """Forgets all calls."""
        self._calls: list[Signature] = []
        self._backward: Counter[int] = Counter()

    @property
    def empty(self) -> bool:
        """Whether there were no calls since `clear`."""
        return not (self._calls or self._backward)

    @property
    def signature(self) -> Signature:
        """The calls since `clear`; empty if there were none."""
        return () if self.empty else (tuple(self._calls), tuple(sorted(self._backward.items())))

    @signature.setter
    def signature(self, signature: Signature) -> None:
        calls, backward = signature or ((), ())
        self._calls, self._backward = list(calls), Counter(dict(backward))

    @uncompiled
    def _before(self, number: int, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.enabled and self._networks:
            trained = [weight.requires_grad for weight in self._networks[number]].count(True)
            given = tuple(_describe([args, kwargs]))
            self._calls.append((number, module.training, torch.is_grad_enabled(), trained, given))

    @uncompiled
    def _after(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        if self.enabled and self._networks and torch.is_grad_enabled():
            tensors = [each for _, each in tensors_in(output) if each.requires_grad]
            for each in tensors[:1] + tensors[1:][-1:]:  # scores come first or last
                each.register_hook(partial(self._on_backward, number))

    def _on_backward(self, number: int, gradient: Tensor) -> None:
        if self.enabled and self._networks:
            self._backward[number] += 1


def _callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the module, or the outermost modules with a ``forward`` if it only holds others."""
    if type(module).forward is not nn.Module.forward:
        yield module
        return
    for child in module.children():
        yield from _callable_parts(child)


def called_networks(signature: Signature) -> set[int]:
    """Returns the numbers of the networks that were called."""
    return {call[0] for call in signature[0]} if signature else set()


def get_kind(signature: Signature) -> Signature:
    """Returns a signature without sizes: calls of equal kinds differ in batch sizes and the like only."""
    return _map_shapes(signature, lambda shape: len(shape))


def get_size(signature: Signature) -> int:
    """Returns the number of all entries of the tensors that the networks were called with."""
    sizes: list[int] = []
    _map_shapes(signature, lambda shape: sizes.append(torch.Size(shape).numel()))
    return sum(sizes)


def _map_shapes(signature: Signature, function: Any) -> Signature:
    calls, backward = signature or ((), ())
    mapped = [
        (*rest, tuple((each[0], function(each[1:])) if isinstance(each, tuple) else each for each in given))
        for *rest, given in calls
    ]
    return tuple(mapped), backward


def _describe(arguments: Any) -> Iterator[Any]:
    """Yields for each tensor whether it requires gradients, and its shape; also flags and words."""
    for _, value in leaves_in(arguments):
        if isinstance(value, Tensor):
            yield (value.requires_grad, *value.shape)
        elif isinstance(value, bool | str):
            yield value


def _is_signature(value: Any) -> bool:
    hash(value)  # lists are none
    return get_size(value) >= 0 and all(type(number) is int for number in called_networks(value))


SIGNATURE: Form = Leaf("the calls of networks, as a CallLog returns them", _is_signature)
"""The form of a saved signature."""
