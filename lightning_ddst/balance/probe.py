"""Measures how the discriminator scores one generator update, without side effects."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_ddst.balance.real_images import ImageArgument, check_shown, find_call_on_real, find_real_images
from lightning_ddst.balance.recorder import (
    Adversarial,
    Call,
    CallRecorder,
    average,
    get_scores,
    get_weights_version,
)
from lightning_ddst.balance.replay import CallState, replay, swap_weights
from lightning_ddst.sparsity.sharding import reshard
from lightning_ddst.utils.compilation import is_compiled, run_eagerly
from lightning_ddst.utils.nested import Place, get_first_tensor

_STEPS = 20
"""Training steps after which the probe stops looking for a discriminator call on the real images."""


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
    discriminator's weights from before the update, and from the buffers, autocast and random states (of torch and
    Python) of the recorded calls. Everything is restored after each call. So training is unchanged, bit for bit, and
    all three scores come from the same discriminator. The old generator's score is taken from training if training
    computed it with these weights.

    Args:
        generator: The generator.
        discriminator: The discriminator; its scores may have any shape, the probe takes their mean.
        real: Place of the real images in the batch; by default its only floating-point tensor that has the fakes'
            shape apart from the batch size.
        discriminator_output: Place of the scores in the discriminator's output; by default its first tensor.
        module: A `ScoresItself` that holds both networks, for GANs whose calls cannot be recorded.

    Attributes:
        checked: Whether the probe has checked that the training step scores the batch's real images unchanged.
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
        self.checked = module is not None
        self._generator = generator
        self._discriminator = discriminator
        self._real = real
        self._output = discriminator_output
        self._module = module
        self._argument: ImageArgument | None = None  # of the last update measured before the check ended
        self._steps = 0  # training steps checked so far
        self._recorder = CallRecorder(generator, discriminator, discriminator_output)
        self._forget()
        if module is None:
            self._recorder.attach()

    @property
    def watching(self) -> bool:
        """Whether calls are recorded; set it before updates to measure."""
        return self._recorder.recording

    @watching.setter
    def watching(self, watching: bool) -> None:
        self._recorder.recording = watching

    def remove(self) -> None:
        """Removes the hooks."""
        self._recorder.remove()

    def _forget(self) -> None:
        self._recorder.clear()
        self._before: dict[nn.Parameter, Tensor] = {}  # the weights before the update
        self._versions = (-1, -1)  # of both networks' weights then

    # ---- the measurement -------------------------------------------------------------------------

    def before_update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps copies of the current weights.

        Args:
            parameters: The parameters that the update may change.
        """
        self._before = {parameter: parameter.detach().clone() for parameter in parameters}
        self._versions = (get_weights_version(self._generator), get_weights_version(self._discriminator))

    def after_update(self, batch: Any) -> Tensor:
        """Measures the update, and clears the records.

        Args:
            batch: The training step's batch, any nesting of mappings, sequences and dataclasses.

        Returns:
            ``(4,)``: the mean scores of real images, of fakes before and of fakes after the update, and the mean sign
            of the real images' scores.

        Raises:
            RuntimeError: If a call of the generator, a call of the discriminator on its output, or the real images are
                missing; the message names what is missing and the remedy.
        """
        for network in (self._generator, self._discriminator):
            reshard(network)
        try:
            scores = self._score_calls(batch) if self._module is None else self._score_module(batch)
            return torch.stack([*map(average, scores), average(scores[0].sign())])
        finally:
            self._forget()

    def _score_calls(self, batch: Any) -> list[Tensor]:
        step = self._recorder.find_generator_step()
        if not self.checked:
            self._argument = ImageArgument.of_step(step)
        real = find_real_images(batch, self._real, step.made.fake.shape[1:])
        self._check_shown(real, batch)
        call_on_real = find_call_on_real(real, batch, step, self._recorder.scored)
        with swap_weights(self._before):
            scores = [self._discriminate(call_on_real, step), self._score_before(step)]
        with swap_weights(self._before, only=self._discriminator.parameters()):
            return [*scores, self._score_generated(step)]

    def _score_module(self, batch: Any) -> list[Tensor]:
        assert isinstance(self._module, ScoresItself)
        state = CallState.capture(self._module)
        with swap_weights(self._before), self._replay(self._module, state):
            real, fake = self._module.balance_scores(batch)
        with (
            swap_weights(self._before, only=self._discriminator.parameters()),
            self._replay(self._module, state),
        ):
            return [real, fake, self._module.balance_scores(batch)[1]]

    def _score_before(self, step: Adversarial) -> Tensor:
        """Returns the fakes' score from training, or scores them again if weights or fakes have changed since."""
        unchanged = (step.made.version, step.version) == self._versions
        # Compiled calls may round differently from the eager calls of the other scores.
        compiled = is_compiled(self._generator) or is_compiled(self._discriminator)
        if unchanged and step.as_it_is and not compiled:
            return step.score
        return self._score_generated(step)

    def _score_generated(self, step: Adversarial) -> Tensor:
        call = step.made.call.cloned()  # networks may write to their arguments
        with self._replay(self._generator, step.made.state):
            images = get_first_tensor(self._generator(*call.args, **call.kwargs))
        return self._discriminate(step.call.replaced({step.place: images.to(step.argument.dtype)}), step)

    def _discriminate(self, call: Call, step: Adversarial) -> Tensor:
        call = call.cloned()
        with self._replay(self._discriminator, step.state):
            return get_scores(self._discriminator(*call.args, **call.kwargs), self._output)

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
            RuntimeError: If the training step shifts and scales the batch's images (as in ``2 * x - 1``) before the
                discriminator scores them: the probe would score them as they are in the batch.
        """
        if self.checked or self._argument is None:
            return
        self._check_shown(find_real_images(batch, self._real, self._argument.shape), batch)
        self._steps += 1
        self.checked |= self._steps >= _STEPS
        self._forget()

    def _check_shown(self, real: Tensor, batch: Any) -> None:
        if self.checked or self._argument is None:
            return
        shown = self._argument.find_shown(real, self._recorder.generated, self._recorder.scored)
        self.checked = check_shown(shown, real, batch, place=self._real, changes_fakes=self._argument.changes_fakes)
