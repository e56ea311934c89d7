"""Records a GAN's forward calls by hooks: the generator's inputs, its fakes, and their scores."""

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
"""Number of calls of each network to keep: more than lie between a scored batch and the update."""


# ---- calls -----------------------------------------------------------------------------------------------


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

    def replaced(self, values: dict[int | str, Any]) -> "Call":
        """Returns the call with other values at some positions and names."""
        args = tuple(values.get(i, value) for i, value in enumerate(self.args))
        return Call(args, {name: values.get(name, value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class Generated:
    """A call of the generator.

    Attributes:
        call: The arguments.
        state: The state before the call.
        version: The version of the generator's weights.
        fake: The returned images.
        fake_version: The version of `fake` at the call; it grows when the tensor is written to.
        mark: An object that marks the node of autograd's graph that made `fake`.
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
        state: The state before the call.
        score: The mean score.
        made: The generator's call.
        place: Position or name of the argument that the generator made.
        as_it_is: Whether the argument is the unchanged output of the generator, not augmented or concatenated.
    """

    state: CallState
    score: Tensor
    made: Generated
    place: int | str
    as_it_is: bool

    @property
    def argument(self) -> Tensor:
        """The argument that the generator made."""
        return dict(self.call.tensors())[self.place]


# ---- the recorder ----------------------------------------------------------------------------------------


class CallRecorder:
    """A recorder of both networks' calls by forward hooks; the user's training step need not change.

    It records the generator's calls if gradients are enabled, and all of the discriminator's calls. Only the last few
    are kept.

    Args:
        generator: The generator.
        discriminator: The discriminator.
        discriminator_output: Place of the scores in the discriminator's output; by default its first tensor.

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
        """Registers the hooks on both networks."""
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
        self._state: CallState | None = None  # before the running call
        self._arguments = Call((), {})  # copies of its arguments, which the network may write to
        self._argument_versions: list[int] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses recording inside the context."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallRecorder":
        """Returns an idle recorder: a copied network's hooks record nothing and do not copy the other network."""
        idle = object.__new__(CallRecorder)
        idle.recording = idle._paused = False
        idle._handles = []
        return idle

    def find_generator_step(self) -> Adversarial:
        """Returns the last call by which the generator was trained.

        Raises:
            RuntimeError: If no such call was recorded; the message names the missing part.
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
        shape = str(tuple(self.generated[-1].fake.shape))
        hint = ""
        if shape in seen:
            hint = (
                ". Re-entrant checkpointing of the generator hides the gradients: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        raise cannot_measure(
            f"the discriminator ({type(self._discriminator).__name__}) was not called, with gradients flowing back, on "
            f"what the generator returned, of shape {shape}; it was called on {', '.join(sorted(seen)) or 'nothing'}"
            f"{hint}"
        )

    def _records_discriminator(self) -> bool:
        return self.recording and not self._paused

    def _records_generator(self) -> bool:
        # A call without gradients only makes images for the discriminator's update or for display.
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
        # Tensors are compared by memory, so copies replace the arguments only if the call itself changed one.
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
                "the first tensor that the discriminator returns does not depend on the generator's images. Name the "
                f"entry that does, `discriminator_output=...`; it returns {describe_tensors(output)}"
            )
        return score

    def _find_source(self, value: Tensor) -> Generated | None:
        """Returns the generator's call that made a tensor, found by its memory or by autograd's graph."""
        for generated in reversed(self.generated):
            if value.untyped_storage().data_ptr() == generated.fake.untyped_storage().data_ptr():
                return generated
        made = {id(generated.mark): generated for generated in self.generated}
        marks = (get_metadata(node).get(self) for node in walk_graph(value))
        return next((made[id(mark)] for mark in marks if id(mark) in made), None)


# ---- autograd's graph, versions and scores ---------------------------------------------------------------


def walk_graph(value: Tensor) -> Iterator[Node]:
    """Yields the nodes of autograd's graph behind a tensor, nearest first."""
    waiting, seen = deque([value.grad_fn]), set()
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [earlier for earlier, _ in node.next_functions]


def get_metadata(node: Node) -> dict[object, object]:
    """Returns the metadata of a node of autograd's graph, which live as long as the node."""
    return node.metadata  # type: ignore[return-value]  # a property, though torch declares a method


def get_weights_version(network: nn.Module) -> int:
    """Returns a number that grows with every change of the network's weights."""
    return sum(parameter._version for parameter in network.parameters())


def get_scores(output: Any, place: Place | None) -> Tensor:
    """Returns the scores in a discriminator's output.

    Args:
        output: The output.
        place: Place of the scores; None means the first tensor.

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
    """Returns the mean score, in at least 32 bits, without gradients."""
    return scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).mean()


def cannot_measure(reason: str) -> RuntimeError:
    """Returns an error that explains why the balance ratio cannot be measured, and what to do."""
    return RuntimeError(
        f"the balance ratio cannot be measured: {reason}. Alternatively, give the module a "
        "method `balance_scores(self, batch)` that returns the discriminator's scores of real and of generated "
        "images (docs/attach.md)."
    )
