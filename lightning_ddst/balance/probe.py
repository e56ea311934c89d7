"""Measures the balance ratio's three scores during one generator update, and leaves no trace."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Call:
    """The arguments of a forward call; tensors are detached."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def items(self) -> list[tuple[int | str, Any]]:
        return [*enumerate(self.args), *self.kwargs.items()]

    def replaced(self, values: dict[int | str, Any]) -> "_Call":
        args = tuple(values.get(i, value) for i, value in enumerate(self.args))
        return _Call(args, {name: values.get(name, value) for name, value in self.kwargs.items()})


class BalanceProbe:
    """Watches a GAN's own forward calls, and repeats them around a generator update.

    What the generator was fed and which argument of the discriminator its output became is seen by
    forward hooks, so nothing of the user's training step has to change. `before_update` scores the
    real images and the old generator, `after_update` the new generator on the same input.

    The repeated calls run in the mode (training or evaluation, autocast) of the training step,
    without gradients; buffers and random number generators are put back after each of them. So
    training is the same, bit for bit, and all three scores come from the same discriminator.

    Args:
        generator: Its input is repeated.
        discriminator: Gives the scores: any shape, the mean is taken; of a tuple or list, its
            first tensor.
        autocast: Makes the precision context of the training step.

    Attributes:
        watching: Whether calls are recorded; switched on for updates that will be measured.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.watching = False
        self._generator = generator
        self._discriminator = discriminator
        self._autocast = autocast
        self._probing = False
        self._forget()
        self._handles = [
            generator.register_forward_hook(self._generator_called, with_kwargs=True),
            discriminator.register_forward_hook(self._discriminator_called, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- what training does ----------------------------------------------------------------------

    def _forget(self) -> None:
        self._input: _Call | None = None  # of the generator's last call
        self._fake: Tensor | None = None  # what it returned
        self._scored: tuple[_Call, int | str] | None = None  # the discriminator's call, and where the image stood
        self._scored_fake = False  # whether that image was the generator's last
        self._before: Tensor | None = None

    def _generator_called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Without gradients it is a call for the discriminator's sake, or for somebody to look at.
        if self.watching and not self._probing and torch.is_grad_enabled():
            self._input = _detached(args, kwargs)
            self._fake = first_tensor(output).detach()
            self._scored_fake = False

    def _discriminator_called(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self.watching or self._probing or self._fake is None:
            return
        call = _detached(args, kwargs)
        images = [
            (place, value)
            for place, value in call.items()
            if isinstance(value, Tensor) and value.shape[1:] == self._fake.shape[1:]
        ]
        for place, value in images:
            if value.untyped_storage().data_ptr() == self._fake.untyped_storage().data_ptr():
                self._scored, self._scored_fake = (call, place), True
                return
        if images and not self._scored_fake:  # augmented, or joined with real images
            self._scored = (call, images[0][0])

    # ---- the measurement -------------------------------------------------------------------------

    @property
    def measuring(self) -> bool:
        """Whether `before_update` has scored what comes before the update."""
        return self._before is not None

    def before_update(self, batch: Any) -> None:
        """Scores the real images and the old generator; does nothing before the generator was called.

        Args:
            batch: The training step's batch, any nesting of dicts, lists and tuples. The real
                images are its floating-point tensor of the fakes' shape but for the batch size.

        Raises:
            RuntimeError: If the discriminator was not seen to score an image, or the real images
                are not found.
        """
        if self._input is None or self._fake is None:
            return
        if self._scored is None:
            raise RuntimeError(
                "the balance ratio cannot be measured: the discriminator "
                f"({type(self._discriminator).__name__}) was not called on anything shaped like the generator's "
                f"output, {tuple(self._fake.shape)}."
            )
        real = self._real_images(batch)
        self._before = torch.stack([self._score(real, batch), self._score_generated()])

    def after_update(self) -> Tensor:
        """Scores the new generator, and forgets what was recorded.

        Returns:
            ``(3,)``: the mean scores of real images, of the old generator's and the new one's.

        Raises:
            RuntimeError: If `before_update` had nothing to score.
        """
        if self._before is None:
            raise RuntimeError(
                f"the balance ratio cannot be measured: no forward call of the generator "
                f"({type(self._generator).__name__}) with gradients was seen before its update. The training step must "
                "call the module itself, `generator(z)`; other methods, and `generator.forward(z)`, are not seen."
            )
        scores = torch.cat([self._before, self._score_generated()[None]])
        self._forget()
        return scores

    def _score_generated(self) -> Tensor:
        assert self._input is not None
        with self._traceless():
            images = first_tensor(self._generator(*self._input.args, **self._input.kwargs))
            return self._call_discriminator({self._place: images})

    def _score(self, real: Tensor, batch: Any) -> Tensor:
        assert self._scored is not None
        values: dict[int | str, Any] = {self._place: real}
        # Conditions (labels) of the fakes make way for those of the real images.
        for place, value in self._scored[0].items():
            if place != self._place and isinstance(value, Tensor):
                for own in tensors_in(batch):
                    if own is not real and own.dtype == value.dtype and own.shape[1:] == value.shape[1:]:
                        values[place] = own
                        break
        with self._traceless():
            return self._call_discriminator(values)

    @property
    def _place(self) -> int | str:
        assert self._scored is not None
        return self._scored[1]

    def _call_discriminator(self, values: dict[int | str, Any]) -> Tensor:
        assert self._scored is not None
        call = self._scored[0].replaced(values)
        return first_tensor(self._discriminator(*call.args, **call.kwargs)).float().mean()

    def _real_images(self, batch: Any) -> Tensor:
        assert self._fake is not None
        shape = self._fake.shape[1:]
        found = [value for value in tensors_in(batch) if value.is_floating_point() and value.shape[1:] == shape]
        if len(found) != 1:
            seen = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in tensors_in(batch)) or "no tensor"
            raise RuntimeError(
                "the balance ratio cannot be measured: the batch must hold exactly one floating-point tensor of "
                f"shape (batch, {', '.join(map(str, shape))}), like the generator's output, as the real images; "
                f"it holds {seen}."
            )
        return found[0].detach()

    @contextmanager
    def _traceless(self) -> Iterator[None]:
        buffers = {id(b): b for network in (self._generator, self._discriminator) for b in network.buffers()}
        saved = [(buffer, buffer.clone()) for buffer in buffers.values()]
        devices = {p.device.index for p in self._discriminator.parameters() if p.device.type == "cuda"}
        self._probing = True
        try:
            with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), self._autocast():
                yield
        finally:
            self._probing = False
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)


def _detached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    def detach(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return _Call(tuple(map(detach, args)), {name: detach(value) for name, value in kwargs.items()})


def first_tensor(output: Any) -> Tensor:
    """The first tensor in any nesting of dicts, lists and tuples."""
    for tensor in tensors_in(output):
        return tensor
    raise TypeError(f"no tensor in what a network returned: {type(output).__name__}.")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in any nesting of dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
