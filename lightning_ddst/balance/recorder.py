"""Records a GAN's forward calls by hooks: the generator's inputs, its fakes, and their scores."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ddst.balance.calls import Adversarial, Call, Generated, Scored, get_weights_version, walk_graph
from lightning_ddst.balance.generator_calls import GeneratorCalls
from lightning_ddst.balance.layout import Order, find_order
from lightning_ddst.balance.normalized import NormalizedWeights
from lightning_ddst.balance.replay import CallState
from lightning_ddst.balance.scores import ScoreReader, average_all, cannot_measure, check_is_score
from lightning_ddst.utils.compilation import is_called_by_compiled, is_compiled, uncompiled
from lightning_ddst.utils.nested import describe_tensors, tensors_in
from lightning_ddst.utils.networks import SeveralParts, get_parts

_CALLS = 16
"""Number of calls of each part of the discriminator to keep: more than lie between a scored batch and the update."""


class CallRecorder:
    """A recorder of both networks' calls by forward hooks; the user's training step need not change.

    It records the generator's calls if gradients are enabled, and all of the discriminator's calls. Only the last few
    are kept.

    Args:
        generator: The generator, possibly of several parts.
        discriminator: The discriminator, possibly of several parts.
        reader: The places of the scores in the discriminator's output.

    Attributes:
        recording: Whether calls are recorded; False at first.
        watches_gradients: Whether `Scored.reached` is recorded; True at first.
        scored: The discriminator's calls, oldest first.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, reader: ScoreReader | None = None) -> None:
        self.recording, self.watches_gradients = False, True
        self._generator = generator
        self._calls = GeneratorCalls(generator, self._records_generator)
        self._parts = get_parts(discriminator)
        self._names = _list_names(discriminator)
        self._reader = reader or ScoreReader()
        self._paused = False
        self._handles: list[RemovableHandle] = []
        self._normalized = NormalizedWeights(nn.Identity())  # in the running call
        self.clear()

    @property
    def generated(self) -> deque[Generated]:
        """The generator's calls, oldest first."""
        return self._calls.calls

    def attach(self, *, generator: bool = True) -> None:
        """Registers the hooks on both networks, or on the discriminator alone."""
        self._handles = self._calls.attach() if generator else []
        for part in self._parts:
            self._handles += [
                part.register_forward_pre_hook(self._before_discriminator, with_kwargs=True),
                part.register_forward_hook(self._after_discriminator, with_kwargs=True),
            ]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._normalized.stop()

    def clear(self) -> None:
        """Forgets every call."""
        self._calls.clear()
        self.scored: deque[Scored] = deque(maxlen=_CALLS * len(self._parts))
        self._state: CallState | None = None  # before the running call
        self._normalized.stop()
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
        return CallRecorder(nn.Identity(), nn.Identity())

    def scored_by(self, part: int) -> list[Scored]:
        """Returns the calls of one part of the discriminator, oldest first."""
        return [scored for scored in self.scored if scored.part == part]

    def has_generator_step(self, part: int = 0) -> bool:
        """Returns whether a call of a part of the discriminator was recorded by which the generator was trained."""
        return any(isinstance(scored, Adversarial) for scored in self.scored_by(part))

    def find_generator_step(self, part: int = 0) -> Adversarial:
        """Returns the last call by which the generator was trained.

        Args:
            part: Number of the part of the discriminator that was called.

        Raises:
            RuntimeError: If no such call was recorded; the message names the missing part.
        """
        for scored in reversed(self.scored_by(part)):
            if isinstance(scored, Adversarial):
                return scored
        name = ", ".join(_list_names(self._generator))
        first_counts = "the generator returns several tensors, and the first counts as its images: return them first"
        if not self.generated and self._calls.returns_several:
            raise cannot_measure(f"the first output of the generator ({name}) has no gradients; {first_counts}")
        if not self.generated:
            raise cannot_measure(
                f"no call of the generator ({name}) with gradients was seen since its "
                "last update. The training step must call the module itself, `generator(z)`: other methods, "
                "`generator.forward(z)` among them, are not seen"
            )
        if self._calls.incomplete:
            raise cannot_measure(
                f"the training step changes what one part of the generator ({name}) returns before the next takes it. "
                "Do this in the forward method of a module that holds all of them, and call that module, `self(x)`"
            )
        calls = self.scored_by(part)
        seen = {str(tuple(value.shape)) for scored in calls for _, value in scored.call.tensors()}
        other = "arguments that are no tensors, such as lists or dicts of tensors" if calls else "nothing"
        shape = str(tuple(self.generated[-1].fake.shape))
        hint = ""
        if self._calls.returns_several:
            hint = f"; {first_counts}"
        elif shape in seen:
            hint = (
                ". Another network may have made these images: name the networks that belong together. Or re-entrant "
                "checkpointing of the generator hides the gradients: use torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False)"
            )
        raise cannot_measure(
            f"the discriminator ({self._names[part]}) was not called, with gradients flowing back, on "
            f"what the generator returned, of shape {shape}; it was called on {', '.join(sorted(seen)) or other}"
            f"{hint}"
        )

    def _records_discriminator(self) -> bool:
        return self.recording and not self._paused

    def _records_generator(self) -> bool:
        # A call without gradients only makes images for the discriminator's update or for display.
        return self.recording and not self._paused and torch.is_grad_enabled()

    @uncompiled
    def _before_discriminator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._records_discriminator():
            call = Call(args, kwargs)
            trained = any(value.requires_grad for _, value in call.tensors())
            self._state = CallState.capture(module, args, kwargs) if trained else None
            self._arguments, self._argument_versions = call.cloned(), call.versions()
            self._normalized.stop()
            self._normalized = NormalizedWeights(module if trained else nn.Identity())
            if not is_compiled(module) and not is_called_by_compiled():  # its hooks would compile the network again
                self._normalized.record()

    @uncompiled
    def _after_discriminator(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._records_discriminator():
            return
        self._normalized.stop()
        call, version = Call(args, kwargs), get_weights_version(module)
        part = next(number for number, each in enumerate(self._parts) if each is module)
        reached: dict[int, Tensor] = {}
        if self.watches_gradients and torch.is_grad_enabled():
            self._watch_gradients(output, reached)
        # Tensors are compared by memory, so copies replace the arguments only if the call itself changed one.
        kept = call.detached() if call.versions() == self._argument_versions else self._arguments
        found = None if self._state is None else self._find_images(call)
        if self._state is None or found is None:
            self.scored.append(Scored(kept, version, part=part, trains=torch.is_grad_enabled(), reached=reached))
            return
        place, value, made, order = found
        scores = self._reader.read(output)
        self._check_depends(scores, value, output)
        check_is_score(scores, value)
        same = value.data_ptr() == made.fake.data_ptr() and value._version == made.fake_version
        as_it_is = same and value.numel() == made.fake.numel()
        score = average_all(scores)
        self.scored.append(
            Adversarial(
                *(kept, version, self._state, score, made, place, as_it_is),
                part=part,
                reached=reached,
                order=order,
                normalized=self._normalized,
            )
        )

    @staticmethod
    def _watch_gradients(output: Any, reached: dict[int, Tensor]) -> None:
        def keep(number: int, gradient: Tensor | None) -> None:
            if gradient is not None:
                reached[number] = gradient.any()

        for number, (_, value) in enumerate(tensors_in(output)):
            if value.requires_grad:
                value.register_hook(partial(keep, number))

    def _find_images(self, call: Call) -> tuple[int | str, Tensor, Generated, Order | None] | None:
        """Finds the argument that the generator made: its images, or these with their axes moved."""
        sources = [(place, value, self._calls.find_source(value)) for place, value in call.tensors()]
        made = [(place, value, source) for place, value, source in sources if source is not None]
        for place, value, source in made:
            if value.shape[1:] == source.fake.shape[1:]:
                return place, value, source, None
        for place, value, source in made:
            batch = len(source.fake)
            for part in (value[:batch], value[-batch:]) if value.dim() else ():  # joined with others
                if (order := find_order(source.fake, part)) is not None:
                    return place, value, source, order
        return None

    def _check_depends(self, scores: list[Tensor], fake: Tensor, output: Any) -> None:
        if not all(any(node is fake.grad_fn for node in walk_graph(score)) for score in scores):
            raise cannot_measure(
                "the discriminator's scores do not depend on the generator's images. Name the "
                f"entry that does, `discriminator_output=...`; it returns {describe_tensors(output)}"
            )


def _list_names(network: nn.Module) -> list[str]:
    """Returns the names of a network's parts, or the name of its class if it is one module."""
    return list(network.part_names) if isinstance(network, SeveralParts) else [type(network).__name__]
