"""A network's forward calls as they were recorded, and the versions of weights."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_ddst.balance.layout import Order
from lightning_ddst.balance.normalized import NormalizedWeights
from lightning_ddst.balance.replay import CallState


@dataclass(frozen=True)
class Call:
    """The arguments of a forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[tuple[int | str, Tensor]]:
        """Returns each tensor with its position or name."""
        items: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return [(place, value) for place, value in items if isinstance(value, Tensor)]

    def tensor_at(self, place: int | str) -> Tensor | None:
        """Returns the tensor at a position or name; None if there is none."""
        return dict(self.tensors()).get(place)

    def detached(self) -> "Call":
        """Returns the call with detached tensors, which share memory with the arguments."""
        return self.replaced({place: value.detach() for place, value in self.tensors()})

    def cloned(self) -> "Call":
        """Returns the call with copies of the tensors."""
        return self.replaced({place: value.detach().clone() for place, value in self.tensors()})

    def versions(self) -> list[int]:
        """Returns one number per tensor, which grows when the tensor is written to."""
        return [value._version for _, value in self.tensors()]

    def replaced(self, values: Mapping[int | str, Any]) -> "Call":
        """Returns the call with other values at some positions and names."""
        args = tuple(values.get(i, value) for i, value in enumerate(self.args))
        return Call(args, {name: values.get(name, value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class Generated:
    """A call of the generator, of one of its parts, or of a module that holds parts.

    Attributes:
        call: The arguments.
        state: The state before the call.
        version: The version of the generator's weights.
        fake: The returned images.
        fake_version: The version of `fake` at the call; it grows when the tensor is written to.
        mark: An object that marks the node of autograd's graph that made `fake`.
        network: The module that was called.
        inputs: The calls whose unchanged output was an argument, by its position or name. None if another part of the
            generator made an argument in another way, so that repeating this call alone would miss that part.
        output: Number of `fake` among the tensors that the call returned.
    """

    call: Call
    state: CallState
    version: int
    fake: Tensor
    fake_version: int
    mark: object
    network: nn.Module = field(default_factory=nn.Identity)
    inputs: Mapping[int | str, "Generated"] | None = field(default_factory=dict)
    output: int = 0

    def returned(self, output: int, fake: Tensor, version: int) -> "Generated":
        """Returns the same call with another of the tensors that it returned as the images."""
        return self if output == self.output else replace(self, output=output, fake=fake, fake_version=version)


@dataclass(frozen=True)
class Scored:
    """A call of the discriminator.

    Attributes:
        call: The arguments.
        version: The version of the discriminator's weights.
        part: Number of the part of the discriminator that was called.
        trains: Whether gradients were enabled, so that the call may train a network.
        reached: Whether the last gradient of a returned tensor has entries other than 0, by the tensor's number; empty
            before a backward pass, and where gradients are not looked at.
    """

    call: Call
    version: int
    part: int = field(default=0, kw_only=True)
    trains: bool = field(default=True, kw_only=True)
    reached: dict[int, Tensor] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Adversarial(Scored):
    """A call of the discriminator on generated images, with gradients flowing back to the generator.

    Attributes:
        state: The state before the call.
        score: The mean score.
        made: The generator's call.
        place: Position or name of the argument that the generator made.
        as_it_is: Whether the argument is the unchanged output of the generator, not augmented or concatenated.
        order: The order of the axes of `made.fake` in the argument.
        normalized: The weights that spectral norm computed; of a compiled discriminator, they are not recorded yet.
    """

    state: CallState
    score: Tensor
    made: Generated
    place: int | str
    as_it_is: bool
    order: Order | None = field(default=None, kw_only=True)
    normalized: NormalizedWeights = field(default_factory=lambda: NormalizedWeights(nn.Identity()), kw_only=True)

    @property
    def argument(self) -> Tensor:
        """The argument that the generator made."""
        return dict(self.call.tensors())[self.place]


def walk_graph(value: Tensor) -> Iterator[Node]:
    """Yields the nodes of autograd's graph behind a tensor, nearest first."""
    waiting, seen = deque([value.grad_fn]), set()
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [earlier for earlier, _ in node.next_functions]


def get_metadata(node: Node) -> dict[object, Any]:
    """Returns the metadata of a node of autograd's graph, which live as long as the node."""
    return node.metadata  # type: ignore[return-value]  # a property, though torch declares a method


def get_weights_version(network: nn.Module) -> int:
    """Returns a number that grows with every change of the network's weights."""
    return sum(parameter._version for parameter in network.parameters())
