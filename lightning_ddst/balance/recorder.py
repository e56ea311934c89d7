"""Records a GAN's own forward calls by hooks: what was generated from what, and what of it was scored."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from lightning_ddst.balance.replay import CallState
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.nested import Place, describe_tensors, get_entry, get_first_tensor

_CALLS = 16
"""How many calls of each network are kept: more than lie between a scored batch and the update."""


# ---- calls -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The arguments of a forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[tuple[int | str, Tensor]]:
        """Each tensor with its position or name."""
        items: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return [(place, value) for place, value in items if isinstance(value, Tensor)]

    def tensor_at(self, place: int | str) -> Tensor | None:
        """The tensor at a position or name; None if there is none."""
        return dict(self.tensors()).get(place)

    def detached(self) -> "Call":
        """With tensors that share memory with the arguments."""
        return self.replaced({place: value.detach() for place, value in self.tensors()})

    def cloned(self) -> "Call":
        """With copies of the tensors."""
        return self.replaced({place: value.detach().clone() for place, value in self.tensors()})

    def versions(self) -> list[int]:
        """One number per tensor, which grows when the tensor is written into."""
        return [value._version for _, value in self.tensors()]

    def replaced(self, values: dict[int | str, Any]) -> "Call":
        """With other values at some positions and names."""
        args = tuple(values.get(i, value) for i, value in enumerate(self.args))
        return Call(args, {name: values.get(name, value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class Generated:
    """A call of the generator.

    Attributes:
        call: The arguments.
        state: The state that it began from.
        version: The version of the generator's weights.
        fake: The returned images.
        fake_version: Their version then, which grows when they are written into.
        mark: An object that marks where autograd's graph ended then.
    """

    call: Call
    state: CallState
    version: int
    fake: Tensor
    fake_version: int
    mark: object


@dataclass(frozen=True)
class Scored:
    """A call of the discriminator.

    Attributes:
        call: The arguments.
        version: The version of the discriminator's weights.
    """

    call: Call
    version: int


@dataclass(frozen=True)
class Adversarial(Scored):
    """A call of the discriminator on generated images, with gradients flowing back to the generator.

    Attributes:
        state: The state that it began from.
        score: The mean score.
        made: The generator's call.
        place: The position or name of the argument that came from it.
        as_it_is: Whether the argument is what the generator returned, neither augmented nor joined with others.
    """

    state: CallState
    score: Tensor
    made: Generated
    place: int | str
    as_it_is: bool

    @property
    def argument(self) -> Tensor:
        """The argument that came from the generator."""
        return dict(self.call.tensors())[self.place]


# ---- the recorder ----------------------------------------------------------------------------------------


class CallRecorder:
    """Records the calls of both networks by forward hooks, so the user's training step need not change.

    The generator's calls are recorded if gradients are enabled, the discriminator's always. Only the last few are
    kept.

    Args:
        generator: The generator.
        discriminator: The discriminator.
        discriminator_output: Where the scores are in what the discriminator returns; by default its first tensor.

    Attributes:
        recording: Whether calls are recorded; False at first.
        generated: The generator's calls, oldest first.
        scored: The discriminator's calls, oldest first.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, discriminator_output: Place | None = None
    ) -> None:
        self.recording = False
        self._generator = generator
        self._discriminator = discriminator
        self._output = discriminator_output
        self._paused = False
        self._handles: list[RemovableHandle] = []
        self.clear()

    def attach(self) -> None:
        """Hooks into both networks."""
        self._handles = [
            self._generator.register_forward_pre_hook(self._before_generator, with_kwargs=True),
            self._generator.register_forward_hook(self._after_generator, with_kwargs=True),
            self._discriminator.register_forward_pre_hook(self._before_discriminator, with_kwargs=True),
            self._discriminator.register_forward_hook(self._after_discriminator, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forgets every call."""
        self.generated: deque[Generated] = deque(maxlen=_CALLS)
        self.scored: deque[Scored] = deque(maxlen=_CALLS)
        self._state: CallState | None = None  # before the call that is running
        self._arguments = Call((), {})  # copies of its arguments, which the network may write into
        self._argument_versions: list[int] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls in this context are not recorded."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallRecorder":
        """The hooks of a copied network record nothing, and do not copy the other network with them."""
        idle = object.__new__(CallRecorder)
        idle.recording = idle._paused = False
        return idle

    def find_generator_step(self) -> Adversarial:
        """Returns the last call by which the generator was trained.

        Raises:
            RuntimeError: If no such call was recorded; the message says which part is missing.
        """
        for scored in reversed(self.scored):
            if isinstance(scored, Adversarial):
                return scored
        if not self.generated:
            raise cannot_measure(
                f"no call of the generator ({type(self._generator).__name__}) with gradients was seen since its "
                "last update. The training step must call the module itself, `generator(z)`: other methods, "
                "`generator.forward(z)` among them, are not seen"
            )
        seen = {str(tuple(value.shape)) for scored in self.scored for _, value in scored.call.tensors()}
        raise cannot_measure(
            f"the discriminator ({type(self._discriminator).__name__}) was not called, with gradients flowing back, on "
            f"what the generator returned, of shape {tuple(self.generated[-1].fake.shape)}; it was called on "
            f"{', '.join(sorted(seen)) or 'nothing'}"
        )

    def _records_discriminator(self) -> bool:
        return self.recording and not self._paused

    def _records_generator(self) -> bool:
        # A call without gradients only makes images for the discriminator, or for somebody to look at.
        return self.recording and not self._paused and torch.is_grad_enabled()

    @uncompiled
    def _before_generator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._records_generator():
            self._state = CallState.capture(self._generator)
            self._arguments = Call(args, kwargs).cloned()

    @uncompiled
    def _after_generator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._records_generator() and (fake := get_first_tensor(output)).grad_fn is not None:
            assert self._state is not None
            mark = object()
            get_metadata(fake.grad_fn)[self] = mark
            version = get_weights_version(self._generator)
            self.generated.append(Generated(self._arguments, self._state, version, fake.detach(), fake._version, mark))

    @uncompiled
    def _before_discriminator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._records_discriminator():
            call = Call(args, kwargs)
            trained = any(value.requires_grad for _, value in call.tensors())
            self._state = CallState.capture(self._discriminator) if trained else None
            self._arguments, self._argument_versions = call.cloned(), call.versions()

    @uncompiled
    def _after_discriminator(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._records_discriminator():
            return
        call, version = Call(args, kwargs), get_weights_version(self._discriminator)
        # Tensors are compared by their memory, so the copies are used only if the call itself changed an argument.
        kept = call.detached() if call.versions() == self._argument_versions else self._arguments
        for place, value in call.tensors():
            made = self._find_source(value)
            if self._state is not None and made is not None and value.shape[1:] == made.fake.shape[1:]:
                score = self._check_depends(get_scores(output, self._output), value, output)
                same = value.data_ptr() == made.fake.data_ptr() and value._version == made.fake_version
                as_it_is = same and value.shape == made.fake.shape
                self.scored.append(Adversarial(kept, version, self._state, average(score), made, place, as_it_is))
                return
        self.scored.append(Scored(kept, version))

    def _check_depends(self, score: Tensor, fake: Tensor, output: Any) -> Tensor:
        if not any(node is fake.grad_fn for node in walk_graph(score)):
            raise cannot_measure(
                "what the discriminator returns first does not depend on what the generator made. Say "
                f"which entry does, `discriminator_output=...`; it returns {describe_tensors(output)}"
            )
        return score

    def _find_source(self, value: Tensor) -> Generated | None:
        """The generator's call that a tensor was made from, by its memory or by autograd's graph."""
        for generated in reversed(self.generated):
            if value.untyped_storage().data_ptr() == generated.fake.untyped_storage().data_ptr():
                return generated
        made = {id(generated.mark): generated for generated in self.generated}
        marks = (get_metadata(node).get(self) for node in walk_graph(value))
        return next((made[id(mark)] for mark in marks if id(mark) in made), None)


# ---- autograd's graph, versions and scores ---------------------------------------------------------------


def walk_graph(value: Tensor) -> Iterator[Node]:
    """Yields the nodes of autograd's graph that a tensor was made by, nearest first."""
    waiting, seen = deque([value.grad_fn]), set()
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [earlier for earlier, _ in node.next_functions]


def get_metadata(node: Node) -> dict[object, object]:
    """The notes on a node of autograd's graph, which live as long as the node."""
    return node.metadata  # type: ignore[return-value]  # a property, though torch declares a method


def get_weights_version(network: nn.Module) -> int:
    """A number that grows with every change of the network's weights."""
    return sum(parameter._version for parameter in network.parameters())


def get_scores(output: Any, place: Place | None) -> Tensor:
    """The scores in what a discriminator returned.

    Args:
        output: What it returned.
        place: Where the scores are; None for the first tensor.

    Raises:
        RuntimeError: If there is no tensor at that place.
    """
    if place is None:
        return get_first_tensor(output)
    try:
        return get_first_tensor(get_entry(output, place))
    except (KeyError, TypeError):
        raise cannot_measure(
            f"discriminator_output={place!r} is no tensor in what the discriminator returns; "
            f"it returns {describe_tensors(output)}"
        ) from None


def average(scores: Tensor) -> Tensor:
    """The mean score, in 32 bits at least, without gradients."""
    return scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).mean()


def cannot_measure(reason: str) -> RuntimeError:
    """An error that says why the balance ratio cannot be measured, and what to do."""
    return RuntimeError(
        f"the balance ratio cannot be measured: {reason}. What cannot be seen can be told: give the module a "
        "method `balance_scores(self, batch)` that returns the discriminator's scores of real and of generated "
        "images (docs/attach.md)."
    )
