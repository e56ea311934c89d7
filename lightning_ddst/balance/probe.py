"""Measures how the discriminator scores one generator update, and leaves no trace."""

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
"""Training steps after which the probe no longer waits for the discriminator to be shown real images."""


@runtime_checkable
class ScoresItself(Protocol):
    """A module that gives the scores itself, where recording its networks' calls cannot."""

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
    """Records a GAN's own forward calls, and repeats them after a generator update.

    Forward hooks see what the generator was fed and which argument of the discriminator its output
    became, so nothing of the user's training step has to change. `before_update` keeps the weights
    that the update is about to change; `after_update` scores the real images, the generator with
    the old weights, and with the new ones on the same input.

    The repeated calls run in the mode (training or evaluation) of the training step, without
    gradients, from the buffers, autocast and random states (of torch and Python) that the generator's
    training began from, and with the discriminator's weights from before the update; everything is
    put back after each of them. So training is the same, bit for bit, and all three scores come from
    the same discriminator. The old generator's score is taken from training, if that computed it
    from these weights.

    Args:
        generator: Its input is repeated.
        discriminator: Gives the scores: any shape, the mean is taken.
        real: Where the real images are in the batch; by default they are its one floating-point
            tensor of the fakes' shape but for the batch size.
        discriminator_output: Where the scores are in what the discriminator returns; by default
            they are its first tensor.
        module: A `ScoresItself` that holds both networks, where recording their calls cannot give
            the scores.

    Attributes:
        checked: Whether a whole training step was compared with the probe's view of it.
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
        self._argument: ImageArgument | None = None  # of the last update that was measured before the check ended
        self._steps = 0  # training steps that were checked
        self._recorder = CallRecorder(generator, discriminator, discriminator_output)
        self._forget()
        if module is None:
            self._recorder.attach()

    @property
    def watching(self) -> bool:
        """Whether calls are recorded; switched on for updates that will be measured."""
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
        """Keeps the present weights.

        Args:
            parameters: Those that the update may change.
        """
        self._before = {parameter: parameter.detach().clone() for parameter in parameters}
        self._versions = (get_weights_version(self._generator), get_weights_version(self._discriminator))

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
        """The score of the fakes in training, or of the same fakes again if anything changed since or on the way."""
        unchanged = (step.made.version, step.version) == self._versions
        # Compiled calls may round differently from those of the other scores.
        compiled = is_compiled(self._generator) or is_compiled(self._discriminator)
        if unchanged and step.as_it_is and not compiled:
            return step.score
        return self._score_generated(step)

    def _score_generated(self, step: Adversarial) -> Tensor:
        call = step.made.call.cloned()  # networks may write into their arguments
        with self._replay(self._generator, step.made.state):
            images = get_first_tensor(self._generator(*call.args, **call.kwargs))
        return self._discriminate(step.call.replaced({step.place: images.to(step.argument.dtype)}), step)

    def _discriminate(self, call: Call, step: Adversarial) -> Tensor:
        call = call.cloned()
        with self._replay(self._discriminator, step.state):
            return get_scores(self._discriminator(*call.args, **call.kwargs), self._output)

    @contextmanager
    def _replay(self, network: nn.Module, state: CallState) -> Iterator[None]:
        """Training does not notice calls in this context."""
        with self._recorder.paused(), replay(network, state), run_eagerly(network):
            yield

    # ---- the check -------------------------------------------------------------------------------

    def check(self, batch: Any) -> None:
        """Compares a whole training step with the probe's view of it, and forgets what was recorded.

        Args:
            batch: The training step's batch.

        Raises:
            RuntimeError: If the discriminator is shown the batch's images shifted and scaled (as
                ``2 * x - 1``): the probe would score them as they are in the batch.
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
