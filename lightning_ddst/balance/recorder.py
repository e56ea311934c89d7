"""What is seen of a GAN's own forward calls."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_ddst.balance.replay import CallState

_SAME = 1e-2
"""Relative deviation up to which images are the batch's, or are the batch's shifted and scaled."""


@dataclass(frozen=True)
class Call:
    """The arguments of a forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[tuple[int | str, Tensor]]:
        """Each tensor with its position or name."""
        items: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return [(place, value) for place, value in items if isinstance(value, Tensor)]

    def detached(self) -> "Call":
        """With tensors that share memory with the arguments."""
        return self.replaced({place: value.detach() for place, value in self.tensors()})

    def cloned(self) -> "Call":
        """With copies of the tensors."""
        return self.replaced({place: value.detach().clone() for place, value in self.tensors()})

    def versions(self) -> list[int]:
        """Which grow where a tensor is written into."""
        return [value._version for _, value in self.tensors()]

    def replaced(self, values: dict[int | str, Any]) -> "Call":
        """With other values at some positions and names."""
        args = tuple(values.get(i, value) for i, value in enumerate(self.args))
        return Call(args, {name: values.get(name, value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class Generated:
    """A call of the generator: what it began from, what it returned, and how autograd's graph was marked there."""

    call: Call
    state: CallState
    version: int
    fake: Tensor
    fake_version: int
    mark: object


@dataclass(frozen=True)
class Scored:
    """A call of the discriminator."""

    call: Call
    version: int


@dataclass(frozen=True)
class Adversarial(Scored):
    """A call of the discriminator on what the generator made, with gradients flowing back to that.

    Attributes:
        state: What it began from.
        score: The mean score.
        made: The generator's call.
        place: The argument that came from it.
        as_it_is: Whether the argument is what the generator returned, neither augmented nor joined with others.
    """

    state: CallState
    score: Tensor
    made: Generated
    place: int | str
    as_it_is: bool

    @property
    def argument(self) -> Tensor:
        """What came from the generator."""
        return dict(self.call.tensors())[self.place]


def history(value: Tensor) -> Iterator[Node]:
    """What a tensor was made from: the nodes of autograd's graph, nearest first."""
    waiting, seen = deque([value.grad_fn]), set()
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [earlier for earlier, _ in node.next_functions]


def metadata(node: Node) -> dict[object, object]:
    """What can be noted down at a node of autograd's graph, as long as that lives."""
    return node.metadata  # type: ignore[return-value]  # a property, though torch declares a method


def weights_version(network: nn.Module) -> int:
    """Grows with every change of the network's weights."""
    return sum(parameter._version for parameter in network.parameters())


def changes_fakes(step: Adversarial) -> bool:
    """Whether the discriminator's argument does not hold fakes as they were, at its beginning or its end."""
    argument, fake = step.argument, step.made.fake.to(step.argument.dtype)
    if argument.data_ptr() == fake.data_ptr() and argument.shape == fake.shape:
        return not step.as_it_is  # or it was written into
    return not any(torch.equal(part, fake) for part in (argument[: len(fake)], argument[-len(fake) :]))


def rescaled(value: Tensor, real: Tensor) -> bool:
    """Whether values are ``a * real + b``, channel by channel, with any a and b that are not 1 and 0."""
    channels = real.shape[1] if real.dim() > 2 else 1
    if channels > 1:
        value, real = value.transpose(0, 1), real.transpose(0, 1)
    x, y = (tensor.reshape(channels, -1).double() for tensor in (real, value))
    offset = y.mean(1) - x.mean(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    slope = (x * y).mean(1) / x.square().mean(1)
    spread, rest = y.std(1, correction=0), (y - slope[:, None] * x).std(1, correction=0)
    alike = (rest < _SAME * spread).all()
    return bool(alike and ((slope - 1).abs() > _SAME).logical_or(offset.abs() > _SAME * spread).any())
