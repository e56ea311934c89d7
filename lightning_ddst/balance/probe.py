"""Measures the balance ratio's three scores during one generator update, and leaves no trace."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CALLS = 16
"""How many of the discriminator's calls are remembered: more than lie between a scored batch and the update."""


@dataclass(frozen=True)
class _Call:
    """The arguments of a forward call; tensors are detached."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[tuple[int | str, Tensor]]:
        """Each tensor with its position or name."""
        items: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return [(place, value) for place, value in items if isinstance(value, Tensor)]

    def replaced(self, values: dict[int | str, Any]) -> "_Call":
        args = tuple(values.get(i, value) for i, value in enumerate(self.args))
        return _Call(args, {name: values.get(name, value) for name, value in self.kwargs.items()})


class BalanceProbe:
    """Watches a GAN's own forward calls, and repeats them around a generator update.

    What the generator was fed and which argument of the discriminator its output became is seen by
    forward hooks, so nothing of the user's training step has to change. `before_update` scores the
    real images and the old generator, `after_update` the new generator on the same input.

    The repeated calls run in the mode (training or evaluation, autocast) of the training step,
    without gradients; buffers and the random states of torch and Python are put back after each of them. So
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
        self._generated: tuple[_Call, Tensor] | None = None  # the generator's last call, and what it returned
        self._scored: deque[_Call] = deque(maxlen=_CALLS)  # the discriminator's last calls
        self._before: Tensor | None = None
        self._random_states: tuple[Any, list[Tensor]] = (None, [])  # Python's, and torch's by device

    def _generator_called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Without gradients it is a call for the discriminator's sake, or for somebody to look at.
        if self.watching and not self._probing and torch.is_grad_enabled():
            self._generated = (_detached(args, kwargs), first_tensor(output).detach())

    def _discriminator_called(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.watching and not self._probing:
            self._scored.append(_detached(args, kwargs))

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
        if self._generated is None:
            return
        real = _real_images(batch, self._generated[1])
        of_torch = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices())]
        self._random_states = (random.getstate(), of_torch)
        with self._traceless():
            real_score = self._discriminate(self._call_on_real(real, batch))
        self._before = torch.stack([real_score, self._score_generated()])

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
        assert self._generated is not None
        call, fake = self._generated
        scored, place = self._call_on_fake(fake)
        with self._traceless():
            images = first_tensor(self._generator(*call.args, **call.kwargs))
            return self._discriminate(scored.replaced({place: images}))

    def _discriminate(self, call: _Call) -> Tensor:
        scores = first_tensor(self._discriminator(*call.args, **call.kwargs))
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).mean()

    def _call_on_fake(self, fake: Tensor) -> tuple[_Call, int | str]:
        """The discriminator's last call on a generated image, and which argument that was."""
        for call in reversed(self._scored):
            for place, value in call.tensors():
                if value.untyped_storage().data_ptr() == fake.untyped_storage().data_ptr():
                    return call, place
        for call in reversed(self._scored):  # augmented, or joined with real images
            for place, value in call.tensors():
                if value.shape[1:] == fake.shape[1:]:
                    return call, place
        raise RuntimeError(
            f"the balance ratio cannot be measured: the discriminator ({type(self._discriminator).__name__}) was not "
            f"called on anything shaped like the generator's output, {tuple(fake.shape)}."
        )

    def _call_on_real(self, real: Tensor, batch: Any) -> _Call:
        """The discriminator's call on the real images: as seen, or with what the batch holds beside them."""
        for call in reversed(self._scored):
            for _, value in call.tensors():
                if value.data_ptr() == real.data_ptr() and value.shape == real.shape:
                    return call
        assert self._generated is not None
        call, place = self._call_on_fake(self._generated[1])
        values: dict[int | str, Any] = {place: real}
        # Conditions (labels) of the fakes make way for those of the real images.
        for other, value in call.tensors():
            for own in tensors_in(batch):
                if other != place and own.dtype == value.dtype and own.shape[1:] == value.shape[1:]:
                    values.setdefault(other, own)
        return call.replaced(values)

    def _devices(self) -> list[int]:
        return sorted({p.device.index for p in self._discriminator.parameters() if p.device.type == "cuda"})

    @contextmanager
    def _traceless(self) -> Iterator[None]:
        """For calls that training must not notice: they work on copies of the buffers, and of the random state."""
        kept = [
            (module, name, buffer)
            for network in (self._generator, self._discriminator)
            for module in network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        # The originals stay as they are, so a backward pass that is still to come finds what it saved.
        copies = {id(buffer): buffer.clone() for _, _, buffer in kept}
        caching, of_python_now = torch.is_autocast_cache_enabled(), random.getstate()
        self._probing = True
        try:
            for module, name, buffer in kept:
                module._buffers[name] = copies[id(buffer)]
            with torch.random.fork_rng(devices=self._devices()), torch.no_grad(), self._autocast():
                # Inside a training step's autocast, half-precision copies from before the update may be cached.
                torch.set_autocast_cache_enabled(False)
                of_python, (state, *device_states) = self._random_states
                random.setstate(of_python)
                torch.set_rng_state(state)
                for device, device_state in zip(self._devices(), device_states, strict=True):
                    torch.cuda.set_rng_state(device_state, device)
                yield
        finally:
            torch.set_autocast_cache_enabled(caching)
            random.setstate(of_python_now)
            for module, name, buffer in kept:
                module._buffers[name] = buffer
            self._probing = False


def _real_images(batch: Any, fake: Tensor) -> Tensor:
    shape = fake.shape[1:]
    found = [value for value in tensors_in(batch) if value.is_floating_point() and value.shape[1:] == shape]
    if len(found) != 1:
        seen = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in tensors_in(batch)) or "no tensor"
        raise RuntimeError(
            "the balance ratio cannot be measured: the batch must hold exactly one floating-point tensor of "
            f"shape (batch, {', '.join(map(str, shape))}), like the generator's output, as the real images; "
            f"it holds {seen}."
        )
    return found[0].detach()


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
