"""Measures how the discriminator scores one generator update, without side effects."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_ddst.balance.calls import Adversarial, Call, Generated, get_weights_version
from lightning_ddst.balance.layout import move
from lightning_ddst.balance.normalized import NormalizedWeights
from lightning_ddst.balance.real_images import RealImages, has_changed_fakes
from lightning_ddst.balance.recorder import CallRecorder
from lightning_ddst.balance.replay import CallState, replay, swap_weights
from lightning_ddst.balance.scores import ScorePlaces, ScoreReader, average_all, cannot_measure
from lightning_ddst.sparsity.sharding import reshard
from lightning_ddst.utils.compilation import is_compiled, run_eagerly
from lightning_ddst.utils.nested import Place, tensors_in
from lightning_ddst.utils.networks import get_parts
from lightning_ddst.utils.states import FLAG, Form, each
from lightning_ddst.utils.together import clone_together

_Scores = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Scores of a part of the discriminator: of real images, of fakes before and of fakes after the update."""


@runtime_checkable
class ScoresItself(Protocol):
    """A module that returns the scores itself, for GANs whose calls cannot be recorded."""

    def balance_scores(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns the discriminator's scores for a batch.

        The probe calls this around a generator update, without gradients, and each time with the same random state, so
        that it draws the same noise.

        Args:
            batch: The training step's batch.

        Returns:
            Scores of real and of generated images, of any shapes; the probe takes their means.
        """
        ...


class BalanceProbe:
    """A probe that records a GAN's forward calls and repeats them after a generator update.

    Forward hooks record the generator's input and the discriminator's argument that its output became, so the user's
    training step need not change. `before_update` keeps the weights that the update will change. `after_update` scores
    the real images, and the generator's images with the old and with the new weights on the same input.

    The repeated calls run in the mode (training or evaluation) of the training step, without gradients, with the
    discriminator's weights from before the update, and from the buffers, autocast and random states (of torch, NumPy
    and Python) of the recorded calls. Everything is restored after each call. So training is unchanged, bit for bit,
    and all three scores come from the same discriminator. The old generator's score is taken from training if training
    computed it with these weights.

    Where the discriminator has several parts, a score is the mean over the parts' mean scores, each on the images that
    the part takes. Where a part returns several scores, its mean score is the mean of their means.

    While the generator is trained without the discriminator, nothing is measured: until the discriminator is called or
    trained with a loss whose weight is not 0, and at later updates before which it was not called since its own last
    update.

    Args:
        generator: The generator; `SeveralParts` if it is not one module.
        discriminator: The discriminator, or its parts; its scores may have any shape except the images'.
        real: Place of the real images in the batch; by default its only floating-point tensor that has the shape of the
            images that the discriminator takes, apart from the batch size and the order of axes.
        discriminator_output: Place of the scores in the discriminator's output; by default its only floating-point
            tensor. ``{"real": place, "fake": place}`` for a discriminator that scores both kinds of images in one call;
            ``{"difference": place}`` for one that then returns how much more real the real images look.
        module: A `ScoresItself` that holds both networks, for GANs whose calls cannot be recorded.

    Attributes:
        used: Whether the discriminator was called or trained at an update so far.
    """

    state_form: ClassVar[Form] = {"used": FLAG, "measured": FLAG, "real": each(RealImages.state_form)}
    """The form of `state_dict`."""

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        real: Place | None = None,
        discriminator_output: ScorePlaces | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self.used = False
        self._generator = generator
        self._discriminator = discriminator
        self._parts = get_parts(discriminator)
        self._module = module
        self._reader = ScoreReader.of_argument(discriminator_output)
        self._real = [RealImages(real, one_call=discriminator_output is not None) for _ in self._parts]
        self._measured = False  # whether calls were seen by which the generator was trained
        self._expected: int | None = None  # the version of the discriminator's weights after the last update
        self._recorder = CallRecorder(generator, discriminator, self._reader)
        self._forget()
        self._recorder.attach(generator=module is None)

    @property
    def checked(self) -> bool:
        """Whether the probe has checked that the training step scores the batch's real images unchanged."""
        return self._module is not None or all(real.checked for real in self._real)

    @property
    def watching(self) -> bool:
        """Whether calls are recorded; set it before every update."""
        return self._recorder.recording

    @watching.setter
    def watching(self, watching: bool) -> None:
        if watching and self._expected is None:
            self._expected = get_weights_version(self._discriminator)
        self._recorder.recording = watching

    def remove(self) -> None:
        """Removes the hooks."""
        self._recorder.remove()

    def _forget(self) -> None:
        self._recorder.clear()
        self._before: dict[nn.Parameter, Tensor] = {}  # the weights before the update
        self._versions: tuple[int, list[int]] | None = None  # of the networks' weights then
        self._normalized: list[NormalizedWeights] = []  # of the discriminator's parts then

    # ---- the measurement -------------------------------------------------------------------------

    def before_update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps copies of the current weights.

        Args:
            parameters: The parameters that the update may change.
        """
        updated = list(parameters)
        self._before = dict(zip(updated, clone_together(updated), strict=True))
        self._versions = (get_weights_version(self._generator), [get_weights_version(part) for part in self._parts])

    def after_update(self, batch: Any, *, counted: bool = False) -> Tensor | None:
        """Measures the update, and clears the records.

        Args:
            batch: The training step's batch, any nesting of mappings, sequences and dataclasses.
            counted: Whether operations are being counted, so that none of training's results may be reused that a
                product of weights depends on.

        Returns:
            ``(4,)``: the mean scores of real images, of fakes before and of fakes after the update, and the mean sign
            of the real images' scores. None if the generator was trained without the discriminator, or the order of
            the real images' axes is not known yet.

        Raises:
            RuntimeError: If a call of the generator, a call of the discriminator on its output, or the real images are
                missing; the message names what is missing and the remedy.
        """
        for network in (self._generator, self._discriminator):
            reshard(network)
        try:
            in_use = self._is_in_use()
            self.used |= in_use
            self._recorder.watches_gradients = not self.used
            if self.used and self._module is not None:  # the calls only told whether the discriminator is used
                self._recorder.remove()
            scores = self._score_calls(batch, in_use, counted) if self._module is None else self._score_module(batch)
            if not scores:
                return None
            real, before, after = zip(*scores, strict=True)
            means = [_average_parts(each) for each in (real, before, after)]
            return torch.stack([*means, _average_parts([[score.sign() for score in each] for each in real])])
        finally:
            self._expected = None
            self._forget()

    def _is_in_use(self) -> bool:
        """Returns whether the discriminator was called, trained, or given gradients since the last update.

        Until it is used, losses of weight 0 do not count (VQGAN's `disc_factor`): all gradients of its outputs are 0.
        """
        reached = [each for scored in self._recorder.scored for each in scored.reached.values()]
        if reached and not torch.stack(reached).any():
            return False
        if any(scored.trains for scored in self._recorder.scored) or self._expected is None:
            return True
        version = sum(self._part_versions())
        # Before its first step it has no gradients, unless a loss of the generator came through it.
        has_gradients = any(parameter.grad is not None for parameter in self._discriminator.parameters())
        return version != self._expected or (not self.used and has_gradients)

    def _part_versions(self) -> list[int]:
        """Returns the versions of the discriminator's weights before the update, which may change them, too."""
        return [get_weights_version(part) for part in self._parts] if self._versions is None else self._versions[1]

    def _is_gap(self) -> bool:
        """Returns whether the generator was updated without the discriminator, not by calls that cannot be seen."""
        if not self._measured:
            return False
        versions = self._part_versions()
        return not any(each.trains and each.version == versions[each.part] for each in self._recorder.scored)

    def _score_calls(self, batch: Any, in_use: bool, counted: bool) -> list[_Scores]:
        seen = any(map(self._recorder.has_generator_step, range(len(self._parts))))
        if not in_use or (not seen and self._is_gap()):
            return []
        steps = [self._recorder.find_generator_step(part) for part in range(len(self._parts))]
        calls = [self._find_call_on_real(batch, step) for step in steps]
        found = [(step, call) for step, call in zip(steps, calls, strict=True) if call is not None]
        if len(found) < len(steps):
            return []
        self._measured = True
        versions = self._part_versions()
        self._normalized = [
            step.normalized if step.version == version and not counted else NormalizedWeights(part)
            for step, version, part in zip(steps, versions, self._parts, strict=True)
        ]
        generator, discriminator = self._generator.parameters(), [*self._discriminator.parameters()]
        apart = {*generator} - {*discriminator}  # on these, scores of real images do not depend
        with swap_weights(self._before, only=self._before.keys() - apart):
            real = [self._discriminate(call, step, self._reader.read_real) for step, call in found]
        before = self._score_before(steps)
        with swap_weights(self._before, only=discriminator):
            return [*zip(real, before, self._score_generated(steps), strict=True)]

    def _find_call_on_real(self, batch: Any, step: Adversarial) -> Call | None:
        """Returns the arguments with which a part of the discriminator scores the real images, if they are known."""
        images, scored = self._real[step.part], self._recorder.scored_by(step.part)
        if self._reader.real is not None:  # it scored them in the same call
            if not images.checked and has_changed_fakes(step):
                raise cannot_measure("the training step changes what the generator returns before one call scores both")
            images.checked = True
            return step.call
        return images.find_call(batch, step, self._recorder.generated, scored)

    def _score_module(self, batch: Any) -> list[_Scores]:
        assert isinstance(self._module, ScoresItself)
        if not self.used:
            return []
        state = CallState.capture(self._module)
        with swap_weights(self._before), self._replay(self._module, state):
            real, fake = self._module.balance_scores(batch)
        with (
            swap_weights(self._before, only=self._discriminator.parameters()),
            self._replay(self._module, state),
        ):
            return [([real], [fake], [self._module.balance_scores(batch)[1]])]

    def _score_before(self, steps: Sequence[Adversarial]) -> list[list[Tensor]]:
        """Returns the fakes' scores from training, or scores them again if weights or fakes have changed since."""
        generator, parts = self._versions or (-1, self._part_versions())
        # Compiled calls may round differently from the eager calls of the other scores.
        compiled = is_compiled(self._generator) or is_compiled(self._discriminator)
        again = [
            step
            for step in steps
            if compiled or not step.as_it_is or (step.made.version, step.version) != (generator, parts[step.part])
        ]
        with swap_weights(self._before) if again else nullcontext():
            scored = dict(zip([step.part for step in again], self._score_generated(again), strict=True))
        return [scored.get(step.part, [step.score]) for step in steps]

    def _score_generated(self, steps: Sequence[Adversarial]) -> list[list[Tensor]]:
        made: dict[tuple[int, int], Tensor] = {}  # by their call and place in it: several parts may score them
        for step in steps:
            key = (id(step.made.mark), step.made.output)
            if key not in made:
                made[key] = self._generate(step.made)
        return [self._score_images(made[id(step.made.mark), step.made.output], step) for step in steps]

    def _score_images(self, images: Tensor, step: Adversarial) -> list[Tensor]:
        argument = step.argument
        images = move(images, step.order, argument.shape[1:]).to(argument.dtype)
        return self._discriminate(step.call.replaced({step.place: images}), step, self._reader.read)

    def _generate(self, made: Generated) -> Tensor:
        """Repeats a call of the generator, after the calls whose outputs it takes."""
        inputs = {place: self._generate(earlier) for place, earlier in (made.inputs or {}).items()}
        call = made.call.cloned().replaced(inputs)  # networks may write to their arguments
        with self._replay(made.network, made.state):
            return [tensor for _, tensor in tensors_in(made.network(*call.args, **call.kwargs))][made.output]

    def _discriminate(self, call: Call, step: Adversarial, read: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        call, part = call.cloned(), self._parts[step.part]
        with self._replay(part, step.state), self._normalized[step.part].reused():
            return read(part(*call.args, **call.kwargs))

    @contextmanager
    def _replay(self, network: nn.Module, state: CallState) -> Iterator[None]:
        """Runs calls inside the context without side effects on training."""
        with self._recorder.paused(), replay(network, state), run_eagerly(network):
            yield

    # ---- the check -------------------------------------------------------------------------------

    def check(self, batch: Any) -> None:
        """Checks that a whole training step scores the batch's real images unchanged, and clears the records.

        Args:
            batch: The training step's batch.

        Raises:
            RuntimeError: If the training step changes the values of the batch's images (as in ``2 * x - 1``) before the
                discriminator scores them: the probe would score them as they are in the batch.
        """
        if self.checked or not any(images.measured for images in self._real):
            return
        for part, images in enumerate(self._real):
            images.check(batch, self._recorder.generated, self._recorder.scored_by(part))
        self._forget()

    # ---- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the results of the checks so far; loads with ``weights_only=True``."""
        used = self.used or self._is_in_use()
        return {"used": used, "measured": self._measured, "real": [images.state_dict() for images in self._real]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.used, self._measured = state["used"], state["measured"]
        for images, saved in zip(self._real, state["real"], strict=True):
            images.load_state_dict(saved)


def _average_parts(scores: Iterable[Sequence[Tensor]]) -> Tensor:
    return average_all([average_all(each) for each in scores])
