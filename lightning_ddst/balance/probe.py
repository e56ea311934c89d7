"""Measures what the discriminator says of one generator update, and leaves no trace."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_ddst.balance.recorder import (
    Adversarial,
    Call,
    Generated,
    Scored,
    changes_fakes,
    history,
    metadata,
    rescaled,
    weights_version,
)
from lightning_ddst.balance.replay import CallState, replayed, weights
from lightning_ddst.sparsity.sharding import reshard
from lightning_ddst.utils.compilation import is_compiled, run_eagerly, uncompiled
from lightning_ddst.utils.nested import Place, get_entry, get_first_tensor, tensors_in

_CALLS = 16
"""How many calls of each network are remembered: more than lie between a scored batch and the update."""
_STEPS = 20
"""Training steps after which it is given up to see the discriminator being shown real images."""


@runtime_checkable
class ScoresItself(Protocol):
    """A module that tells the probe what watching its networks cannot."""

    def balance_scores(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The discriminator's scores for a batch.

        It is called around a generator update, without gradients, and every time with the same
        random state, so that the same noise is drawn.

        Args:
            batch: As the training step gets it.

        Returns:
            Scores of real images and of generated ones, of any shapes; their means are taken.
        """
        ...


class BalanceProbe:
    """Watches a GAN's own forward calls, and repeats them after a generator update.

    What the generator was fed and which argument of the discriminator its output became is seen by
    forward hooks, so nothing of the user's training step has to change. `before_update` keeps the
    weights that the update is about to change; `after_update` scores the real images, the generator
    with the old weights, and with the new ones on the same input.

    The repeated calls run in the mode (training or evaluation) of the training step, without
    gradients, from the buffers, autocast and random states (of torch and Python) that the generator's
    training began from, and with the discriminator's weights from before the update; everything is
    put back after each of them. So training is the same, bit for bit, and all three scores come from
    the same discriminator. The old generator's score is taken from training, where that computed it
    from these weights.

    Args:
        generator: Its input is repeated.
        discriminator: Gives the scores: any shape, the mean is taken.
        real: Where the real images are in the batch; by default they are its one floating-point
            tensor of the fakes' shape but for the batch size.
        discriminator_output: Where the scores are in what the discriminator returns; by default
            they are its first tensor.
        module: What holds both networks and gives the scores by itself, a `ScoresItself`, where
            watching the networks cannot.

    Attributes:
        watching: Whether calls are recorded; switched on for updates that will be measured.
        checked: Whether a whole training step was compared with what the probe makes of it.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        real: Place | None = None,
        discriminator_output: Place | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self.watching = False
        self.checked = module is not None
        self._generator = generator
        self._discriminator = discriminator
        self._real = real
        self._output = discriminator_output
        self._module = module
        self._probing = False
        self._shape: torch.Size | None = None  # of one image
        self._place: int | str = 0  # of images among the discriminator's arguments
        self._changed = False  # whether the training step changes what the generator returns
        self._steps = 0  # looked at as a whole
        self._forget()
        self._handles = []
        if module is None:
            self._handles = [
                generator.register_forward_pre_hook(self._calling_generator, with_kwargs=True),
                generator.register_forward_hook(self._generator_called, with_kwargs=True),
                discriminator.register_forward_pre_hook(self._calling_discriminator, with_kwargs=True),
                discriminator.register_forward_hook(self._discriminator_called, with_kwargs=True),
            ]

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "BalanceProbe":
        """A copied network's hooks see nothing, and drag no copy of the other network along."""
        blind = object.__new__(BalanceProbe)
        blind.watching = False
        return blind

    # ---- what training does ----------------------------------------------------------------------

    def _forget(self) -> None:
        self._generated: deque[Generated] = deque(maxlen=_CALLS)
        self._scored: deque[Scored] = deque(maxlen=_CALLS)
        self._state: CallState | None = None  # of the call that is under way
        self._arguments = Call((), {})  # of that call, before it
        self._argument_versions: list[int] = []
        self._before: dict[nn.Parameter, Tensor] = {}  # the weights before the update
        self._versions = (-1, -1)  # of both networks' weights then

    @uncompiled
    def _calling_generator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._generator_trains():
            self._state = CallState.now(self._generator)
            self._arguments = Call(args, kwargs).cloned()

    @uncompiled
    def _generator_called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._generator_trains() and (fake := get_first_tensor(output)).grad_fn is not None:
            assert self._state is not None
            mark = object()
            metadata(fake.grad_fn)[self] = mark
            version = weights_version(self._generator)
            self._generated.append(Generated(self._arguments, self._state, version, fake.detach(), fake._version, mark))

    def _generator_trains(self) -> bool:
        # Without gradients it is a call for the discriminator's sake, or for somebody to look at.
        return self.watching and not self._probing and torch.is_grad_enabled()

    @uncompiled
    def _calling_discriminator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watching and not self._probing:
            call = Call(args, kwargs)
            trained = any(value.requires_grad for _, value in call.tensors())
            self._state = CallState.now(self._discriminator) if trained else None
            self._arguments, self._argument_versions = call.cloned(), call.versions()

    @uncompiled
    def _discriminator_called(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.watching and not self._probing:
            call, version = Call(args, kwargs), weights_version(self._discriminator)
            # Told apart by where they lie in memory, so only what the call itself changed is taken from the copies.
            kept = call.detached() if call.versions() == self._argument_versions else self._arguments
            for place, value in call.tensors():
                made = self._source(value)
                if self._state is not None and made is not None and value.shape[1:] == made.fake.shape[1:]:
                    score = self._scores_in(output)
                    if not any(node is value.grad_fn for node in history(score)):
                        raise self._cannot(
                            "what the discriminator returns first does not depend on what the generator made. Say "
                            f"which entry does, `discriminator_output=...`; it returns {_described(output)}"
                        )
                    same = value.data_ptr() == made.fake.data_ptr() and value._version == made.fake_version
                    as_it_is = same and value.shape == made.fake.shape
                    self._scored.append(Adversarial(kept, version, self._state, _mean(score), made, place, as_it_is))
                    return
            self._scored.append(Scored(kept, version))

    def _source(self, value: Tensor) -> Generated | None:
        """The generator's call that a tensor was made from, as its memory tells, or autograd's graph."""
        for generated in reversed(self._generated):
            if value.untyped_storage().data_ptr() == generated.fake.untyped_storage().data_ptr():
                return generated
        made = {id(generated.mark): generated for generated in self._generated}
        marks = (metadata(node).get(self) for node in history(value))
        return next((made[id(mark)] for mark in marks if id(mark) in made), None)

    # ---- the measurement -------------------------------------------------------------------------

    def before_update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps the present weights.

        Args:
            parameters: Those that the update may change.
        """
        self._before = {parameter: parameter.detach().clone() for parameter in parameters}
        self._versions = (weights_version(self._generator), weights_version(self._discriminator))

    def after_update(self, batch: Any) -> Tensor:
        """Measures the update, and forgets what was recorded.

        Args:
            batch: The training step's batch, any nesting of mappings, sequences and dataclasses.

        Returns:
            ``(4,)``: the mean scores of real images, of the old generator's and the new one's, and the mean sign of
            the real images' scores.

        Raises:
            RuntimeError: If a call of the generator, of the discriminator on what it made, or the
                real images are missing; the message says which, and what to do.
        """
        for network in (self._generator, self._discriminator):
            reshard(network)
        try:
            scores = self._scores_of_calls(batch) if self._module is None else self._scores_of_module(batch)
            return torch.stack([*map(_mean, scores), _mean(scores[0].sign())])
        finally:
            self._forget()

    def _scores_of_calls(self, batch: Any) -> list[Tensor]:
        step = self._generator_step()
        self._shape, self._place = step.made.fake.shape[1:], step.place
        if not self.checked:
            self._changed = changes_fakes(step)
        self._check_real(batch)
        real = self._call_on_real(self._real_images(batch), batch, step)
        with weights(self._before, of=self._before):
            scores = [self._discriminate(real, step), self._score_before(step)]
        with weights(self._before, of=self._discriminator.parameters()):
            return [*scores, self._score_generated(step)]

    def _scores_of_module(self, batch: Any) -> list[Tensor]:
        assert isinstance(self._module, ScoresItself)
        state = CallState.now(self._module)
        with weights(self._before, of=self._before), self._quietly(self._module, state):
            real, fake = self._module.balance_scores(batch)
        with weights(self._before, of=self._discriminator.parameters()), self._quietly(self._module, state):
            return [real, fake, self._module.balance_scores(batch)[1]]

    def _score_before(self, step: Adversarial) -> Tensor:
        """That of training, if nothing was changed on the way to or from it."""
        unchanged = (step.made.version, step.version) == self._versions
        # Compiled calls may round otherwise than those of the other scores.
        compiled = is_compiled(self._generator) or is_compiled(self._discriminator)
        if unchanged and step.as_it_is and not compiled:
            return step.score
        return self._score_generated(step)

    def _score_generated(self, step: Adversarial) -> Tensor:
        call = step.made.call.cloned()  # networks may write into their arguments
        with self._quietly(self._generator, step.made.state):
            images = get_first_tensor(self._generator(*call.args, **call.kwargs))
        return self._discriminate(step.call.replaced({step.place: images.to(step.argument.dtype)}), step)

    def _discriminate(self, call: Call, step: Adversarial) -> Tensor:
        call = call.cloned()
        with self._quietly(self._discriminator, step.state):
            return self._scores_in(self._discriminator(*call.args, **call.kwargs))

    def _scores_in(self, output: Any) -> Tensor:
        if self._output is None:
            return get_first_tensor(output)
        try:
            return get_first_tensor(get_entry(output, self._output))
        except (KeyError, TypeError):
            raise self._cannot(
                f"discriminator_output={self._output!r} is no tensor in what the discriminator returns; "
                f"it returns {_described(output)}"
            ) from None

    # ---- what is scored --------------------------------------------------------------------------

    def _generator_step(self) -> Adversarial:
        """The last call by which the generator was trained."""
        for scored in reversed(self._scored):
            if isinstance(scored, Adversarial):
                return scored
        if not self._generated:
            raise self._cannot(
                f"no call of the generator ({type(self._generator).__name__}) with gradients was seen since its "
                "last update. The training step must call the module itself, `generator(z)`: other methods, "
                "`generator.forward(z)` among them, are not seen"
            )
        seen = {str(tuple(value.shape)) for scored in self._scored for _, value in scored.call.tensors()}
        raise self._cannot(
            f"the discriminator ({type(self._discriminator).__name__}) was not called, with gradients flowing back, on "
            f"what the generator returned, of shape {tuple(self._generated[-1].fake.shape)}; it was called on "
            f"{', '.join(sorted(seen)) or 'nothing'}"
        )

    def _real_images(self, batch: Any) -> Tensor:
        if self._real is not None:
            try:
                return get_first_tensor(get_entry(batch, self._real)).detach()
            except (KeyError, TypeError):
                raise self._cannot(
                    f"real={self._real!r} is no tensor in the batch; it holds {_described(batch)}"
                ) from None
        found = {
            place: value
            for place, value in tensors_in(batch)
            if value.is_floating_point() and value.shape[1:] == self._shape
        }
        if len(found) == 1:
            return next(iter(found.values())).detach()
        shape = f"(batch, {', '.join(map(str, self._shape or ()))})"
        if not found:
            raise self._cannot(
                f"the batch holds no floating-point tensor of shape {shape}, like the generator's output, that could "
                f"be the real images; it holds {_described(batch)}"
            )
        choices = " or ".join(f'real="{place}"' for place in found)
        raise self._cannot(
            f"{len(found)} tensors of the batch have the shape {shape} of the generator's output, and any could be "
            f"the real images: {', '.join(found)}. Say which, `DynamicSparsityCallback(..., real=...)` with {choices}"
        )

    def _call_on_real(self, real: Tensor, batch: Any, step: Adversarial) -> Call:
        """The discriminator's call on the real images: as seen, or with what the batch holds beside them."""
        for scored in reversed(self._scored):
            shown = dict(scored.call.tensors()).get(step.place)
            if shown is not None and shown.data_ptr() == real.data_ptr() and shown.shape == real.shape:
                return scored.call
        values: dict[int | str, Any] = {step.place: real.to(step.argument.dtype)}
        beside = [(place, own) for place, own in tensors_in(batch) if own.data_ptr() != real.data_ptr()]
        held = {own.untyped_storage().data_ptr() for _, own in beside}
        joined = len(step.argument) != len(step.made.fake)
        for other, value in step.call.tensors():
            if other == step.place or not value.dim() or len(value) != len(step.argument):
                continue  # the images, or not one entry an image
            if value.untyped_storage().data_ptr() in held:
                continue  # a condition out of the batch is the real images' as well
            if joined:
                raise self._cannot(
                    f"the discriminator was called on {len(step.argument)} images at once, generated ones and others, "
                    f"with as many entries of argument {other!r}, and which are whose cannot be seen"
                )
            # Conditions (labels) of the fakes make way for those of the real images.
            own = {p: own for p, own in beside if own.dtype == value.dtype and own.shape[1:] == value.shape[1:]}
            own = {p: own for p, own in own.items() if own.dim() == value.dim()}
            if len(own) != 1:
                raise self._cannot(
                    f"what the discriminator takes as argument {other!r} beside real images was not seen before the "
                    f"update, and {'any of the' if own else 'nothing in the'} batch's {', '.join(own) or 'tensors'} "
                    "could be it"
                )
            values[other] = next(iter(own.values()))
        return step.call.replaced(values)

    def check(self, batch: Any) -> None:
        """Ends the comparison of a whole training step with what the probe makes of it.

        Args:
            batch: The training step's batch.

        Raises:
            RuntimeError: If the discriminator is shown the batch's images shifted and scaled (as
                ``2 * x - 1``): the probe would score them as they are in the batch.
        """
        if not self.checked and self._shape is not None:
            self._check_real(batch)
            self._steps += 1
            self.checked |= self._steps >= _STEPS
            self._forget()

    def _check_real(self, batch: Any) -> None:
        if self.checked:
            return
        real = self._real_images(batch)
        fakes = {made.fake.untyped_storage().data_ptr() for made in self._generated}
        images = [dict(scored.call.tensors()).get(self._place) for scored in self._scored]
        alike = [value for value in images if value is not None and value.shape[1:] == real.shape[1:]]
        # Joined with others, they come first or last.
        shown = [part for value in alike for part in (value[: len(real)], value[-len(real) :])]
        shown = [part for part in shown if len(part) == len(real) and part.untyped_storage().data_ptr() not in fakes]
        if any(value.data_ptr() == real.data_ptr() or torch.equal(value, real) for value in shown):
            if self._changed:
                raise self._cannot(
                    "the training step changes what the generator returns before the discriminator sees it (adds it to "
                    "something, or applies an activation), and does not so with the real images"
                )
            self.checked = True
            return
        for place, other in tensors_in(batch):
            if any(value.data_ptr() == other.data_ptr() for value in shown):
                raise self._cannot(
                    f"the real images should be real={self._real!r}, but of the batch's tensors the discriminator is "
                    f'shown "{place}"'
                )
        if any(rescaled(value, real) for value in shown):
            raise self._cannot(
                "the training step shifts and scales the batch's images before the discriminator sees them, and the "
                "probe would score them as they are in the batch. Do that where the data is made"
            )

    def _cannot(self, reason: str) -> RuntimeError:
        return RuntimeError(
            f"the balance ratio cannot be measured: {reason}. What cannot be seen can be told: give the module a "
            "method `balance_scores(self, batch)` that returns the discriminator's scores of real and of generated "
            "images (docs/attach.md)."
        )

    # ---- no trace --------------------------------------------------------------------------------

    @contextmanager
    def _quietly(self, network: nn.Module, state: CallState) -> Iterator[None]:
        """For calls that training must not notice."""
        self._probing = True
        try:
            with replayed(network, state), run_eagerly(network):
                yield
        finally:
            self._probing = False


def _mean(scores: Tensor) -> Tensor:
    return scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).mean()


def _described(value: Any) -> str:
    described = [f"{place} {tuple(tensor.shape)} {tensor.dtype}".strip() for place, tensor in tensors_in(value)]
    return ", ".join(described) or "no tensor"
