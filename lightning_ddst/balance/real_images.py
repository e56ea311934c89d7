"""Finds the real images in a batch as the discriminator takes them, and checks that the step does not change them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_ddst.balance.calls import Adversarial, Call, Generated, Scored
from lightning_ddst.balance.layout import Order, find_order, list_orders, move
from lightning_ddst.balance.scores import cannot_measure
from lightning_ddst.utils import distributed
from lightning_ddst.utils.nested import Place, describe_tensors, get_entry, get_first_tensor, tensors_in
from lightning_ddst.utils.states import FLAG, Form, Leaf, maybe

_SAME = 1e-2
"""Relative deviation up to which images count as the batch's images, shifted and scaled."""
_ENOUGH = 16
"""Pairs of values in the same order that are no chance."""
_STEPS = 20
"""Training steps after which the search for a discriminator call on the real images ends."""


class RealImages:
    """The real images as one part of the discriminator takes them.

    They are scored as they are in the batch. Where the training step moves their axes or reshapes them, the probe does
    the same, in the order that a recorded call of the discriminator on them shows; until there was one, nothing is
    measured.

    Args:
        place: Place of the real images in the batch; None finds them by their shape.
        one_call: Whether one call of the discriminator may take the real images and the generated ones.

    Attributes:
        checked: Whether no more calls are compared with the batch's images: a call on them was seen, unchanged apart
            from their axes, or none was in 20 training steps.
    """

    state_form: ClassVar[Form] = {
        "checked": FLAG,
        "order": maybe(
            Leaf("a permutation of 1 to n", lambda value: sorted(value) == [*range(1, len(value) + 1)] != [])
        ),
    }
    """The form of `state_dict`."""

    def __init__(self, place: Place | None, *, one_call: bool = False) -> None:
        self.checked = False
        self._place = place
        self._one_call = one_call
        self._order: Order | None = None  # of the real images' axes, once it was seen
        self._argument: ImageArgument | None = None  # of the last update measured before the check ended
        self._steps = 0  # training steps checked so far

    @property
    def measured(self) -> bool:
        """Whether an update was measured before the check ended."""
        return self._argument is not None

    def find_call(
        self, batch: Any, step: Adversarial, generated: Iterable[Generated], scored: Sequence[Scored]
    ) -> Call | None:
        """Returns the arguments with which the discriminator scores the real images; waits for the device if unchecked.

        Args:
            batch: The training step's batch.
            step: The discriminator's call that trained the generator.
            generated: The generator's calls.
            scored: The discriminator's calls, oldest first.

        Returns:
            The call; None if the order of the images' axes is not known yet.

        Raises:
            RuntimeError: If the real images or other arguments are missing, or the training step changes values.
        """
        if not self.checked:
            self._argument = ImageArgument.of_step(step)
        shape = step.argument.shape[1:]
        real = find_real_images(batch, self._place, shape)
        if not self._one_call and _takes_both(step, real):
            raise cannot_measure(
                "the discriminator takes the generated and the real images in one call and returns one tensor. Pass "
                'discriminator_output={"difference": ""} if it says how much more real the real images look, or '
                'discriminator_output="" if it scores the generated images'
            )
        self._look(real, batch, generated, scored)
        order = self._order if self._order is not None and len(self._order) == real.dim() - 1 else None
        if order is None and real.shape[1:] != shape:
            shown = [earlier.call.tensor_at(step.place) for earlier in scored]
            if any(value is not None and is_itself(value, real) for value in shown):  # a network that takes any size
                return find_call_on_real(real, batch, step, scored)
            if _size(real) != shape.numel():
                raise cannot_measure(
                    f"real={self._place!r} has the shape {tuple(real.shape)} in the batch, and the discriminator takes "
                    f"images of shape {_describe(shape)}"
                )
            if real.shape[1:] != step.made.fake.shape[1:]:
                return None
            order = step.order  # fakes of the same shape show it
        return find_call_on_real(move(real, order, shape), batch, step, scored, source=real)

    def check(self, batch: Any, generated: Iterable[Generated], scored: Sequence[Scored]) -> None:
        """Compares the calls of a whole training step with the batch's real images; waits for the device.

        Raises:
            RuntimeError: If the training step changes the images' values (as in ``2 * x - 1``), or no call on them was
                seen that shows the order of their axes.
        """
        if self.checked or self._argument is None:
            return
        real = find_real_images(batch, self._place, self._argument.shape)
        self._look(real, batch, generated, scored)
        self._steps += 1
        if self.checked or self._steps < _STEPS:
            return
        self.checked = True
        if real.shape[1:] not in (self._argument.shape, self._argument.fake_shape):
            raise cannot_measure(
                f"the discriminator takes images of shape {_describe(self._argument.shape)}, and the batch's real "
                f"images have the shape {_describe(real.shape[1:])}, but in {_STEPS} training steps the discriminator "
                "was not called on these with their axes moved or reshaped. Bring them into its shape in the data "
                "pipeline"
            )
        if not self._argument.changes_fakes:  # else they may be augmented alike
            distributed.warn(
                f"in {_STEPS} training steps the discriminator was not called on the batch's real images as they are, "
                "but the generated ones are not changed. The balance ratio scores them as they are in the "
                "batch; if the training step changes them, give the module a method `balance_scores(self, "
                "batch)` (docs/attach.md)."
            )

    def _look(self, real: Tensor, batch: Any, generated: Iterable[Generated], scored: Sequence[Scored]) -> None:
        if self.checked or self._argument is None:
            return
        taken = [each.call.tensor_at(self._argument.place) for each in scored]
        if not self._argument.changes_fakes and any(value is not None and _is_part(value, real) for value in taken):
            self.checked = True  # the step takes a part of the batch, as it is
            return
        shown = self._argument.find_shown(real, generated, scored)
        order = check_shown(shown, real, batch, place=self._place, changes_fakes=self._argument.changes_fakes)
        if order is not None:
            self.checked = True
            self._order = order if real.shape[1:] != self._argument.shape or order != tuple(sorted(order)) else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the result of the check so far; loads with ``weights_only=True``."""
        return {"checked": self.checked, "order": None if self._order is None else list(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.checked = state["checked"]
        self._order = None if state["order"] is None else tuple(state["order"])


# ---- finding ---------------------------------------------------------------------------------------------


def find_real_images(batch: Any, place: Place | None, shape: torch.Size) -> Tensor:
    """Finds the real images in a batch; those at a given place may have any shape.

    Args:
        batch: Any nesting of mappings, sequences and dataclasses.
        place: Place of the real images; None means the only floating-point tensor of this shape, or of as many values
            per image.
        shape: The shape of one image as the discriminator takes it.

    Raises:
        RuntimeError: If there is no tensor at that place, or not exactly one tensor that could be the real images.
    """
    described = _describe(shape)
    if place is not None:
        try:
            return get_first_tensor(get_entry(batch, place)).detach()
        except (KeyError, TypeError):
            raise cannot_measure(
                f"real={place!r} is no tensor in the batch; it holds {describe_tensors(batch)}"
            ) from None
    values = {name: value for name, value in tensors_in(batch) if value.is_floating_point() and value.dim()}
    fitting = {name: value for name, value in values.items() if value.shape[1:] == shape}
    fitting = fitting or {name: value for name, value in values.items() if _size(value) == shape.numel()}
    if len(fitting) == 1:
        return next(iter(fitting.values())).detach()
    if not fitting:
        raise cannot_measure(
            f"the batch holds no floating-point tensor of shape {described}, like the images that the discriminator "
            f"takes, that could be the real images; it holds {describe_tensors(batch)}"
        )
    choices = " or ".join(f'real="{name}"' for name in fitting)
    raise cannot_measure(
        f"{len(fitting)} tensors of the batch could be images of the shape {described} that the discriminator takes, "
        f"and any could be the real images: {', '.join(fitting)}. Name one, "
        f"`DynamicSparsityCallback(..., real=...)` with {choices}"
    )


def find_call_on_real(
    real: Tensor, batch: Any, step: Adversarial, scored: Sequence[Scored], source: Tensor | None = None
) -> Call:
    """Finds the arguments with which the discriminator scores the real images.

    They come from a recorded call on the real images. If there is none, they come from the generator's step, with the
    real images instead of the fakes. Other arguments with one entry per image (labels, for example) are then replaced
    by the only tensor of the batch that fits.

    Args:
        real: The real images as the discriminator takes them.
        batch: The training step's batch.
        step: The discriminator's call that trained the generator.
        scored: The discriminator's calls, oldest first.
        source: The real images in the batch, where their axes were moved.

    Raises:
        RuntimeError: If such an argument cannot be found.
    """
    source = real if source is None else source
    for earlier in reversed(scored):
        shown = earlier.call.tensor_at(step.place)
        if shown is not None and shown.shape == real.shape:
            copied = source.shape != real.shape and torch.equal(shown, real.to(shown.dtype))
            if copied or is_itself(shown, real):
                return earlier.call
    values: dict[int | str, Any] = {step.place: real.to(step.argument.dtype)}
    others = {name: value for name, value in tensors_in(batch) if value.data_ptr() != source.data_ptr()}
    held = {value.untyped_storage().data_ptr() for value in (source, *others.values())}
    for place, value in step.call.tensors():
        per_image = value.dim() and len(value) == len(step.argument)
        # A condition that came from the batch also belongs to the real images.
        if place != step.place and per_image and value.untyped_storage().data_ptr() not in held:
            values[place] = _find_condition(place, value, others, step)
    return step.call.replaced(values)


def _find_condition(place: int | str, value: Tensor, others: Mapping[str, Tensor], step: Adversarial) -> Tensor:
    """Finds the real images' condition (labels) among the batch's other tensors, to replace the fakes' one."""
    if len(step.argument) != len(step.made.fake):
        raise cannot_measure(
            f"the discriminator was called on {len(step.argument)} images at once, generated ones and others, "
            f"with as many entries of argument {place!r}, and it is unknown which belong to which"
        )
    fitting = {
        name: other
        for name, other in others.items()
        if (other.dtype, other.dim(), other.shape[1:]) == (value.dtype, value.dim(), value.shape[1:])
    }
    if len(fitting) != 1:
        raise cannot_measure(
            f"the value that the discriminator takes as argument {place!r} for real images was not seen before the "
            f"update, and {'any of the' if fitting else 'none of the'} batch's {', '.join(fitting) or 'tensors'} "
            "could be it"
        )
    return next(iter(fitting.values()))


# ---- checking --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageArgument:
    """The argument by which the training step passes images to the discriminator.

    Attributes:
        place: Position or name of the argument.
        shape: The shape of one image in it.
        changes_fakes: Whether the training step changes the generator's output before it passes it on.
        fake_shape: The shape of one image of the generator.
    """

    place: int | str
    shape: torch.Size
    changes_fakes: bool
    fake_shape: torch.Size

    @classmethod
    def of_step(cls, step: Adversarial) -> "ImageArgument":
        """Reads the argument from the call that trained the generator; waits for the device."""
        return cls(step.place, step.argument.shape[1:], has_changed_fakes(step), step.made.fake.shape[1:])

    def find_shown(self, real: Tensor, generated: Iterable[Generated], scored: Iterable[Scored]) -> list[Tensor]:
        """Finds images that the discriminator scored and that may be the real ones: as many, and not fakes."""
        fakes = {made.fake.untyped_storage().data_ptr() for made in generated}
        images = [earlier.call.tensor_at(self.place) for earlier in scored]
        alike = [value for value in images if value is not None and value.shape[1:] == self.shape]
        # If they were concatenated with others, they come first or last.
        parts = [part for value in alike for part in (value[: len(real)], value[-len(real) :])]
        return [part for part in parts if len(part) == len(real) and part.untyped_storage().data_ptr() not in fakes]


def check_shown(
    shown: Sequence[Tensor], real: Tensor, batch: Any, *, place: Place | None = None, changes_fakes: bool = False
) -> Order | None:
    """Compares images that the discriminator scored with the real images of the batch.

    Args:
        shown: Images that may be the real ones.
        real: The real images in the batch.
        batch: The training step's batch.
        place: The user's argument `real`, for the error.
        changes_fakes: Whether the training step changes the generator's output.

    Returns:
        The order of the real images' axes, if they are among them; None if they are not.

    Raises:
        RuntimeError: If they are other images of the batch, if the real images were shifted and scaled, or if the
            training step changes only the fakes.
    """
    for value in shown:
        if (order := find_order(real, value)) is not None:
            if changes_fakes:
                raise cannot_measure(
                    "the training step changes what the generator returns before the discriminator sees it (adds it to "
                    "something, or applies an activation), but not the real images"
                )
            return order
    for name, other in tensors_in(batch):
        if any(value.data_ptr() == other.data_ptr() or find_order(other, value) is not None for value in shown):
            raise cannot_measure(
                f"the real images should be real={place!r}, but among the batch's tensors the "
                f'discriminator is shown "{name}"'
            )
    for value in shown:
        moved = [move(real, order, value.shape[1:]) for order in _orders(real, value)]
        # Fakes that change, too, may be augmented alike, image by image.
        if any(is_rescaled(value, each) or (not changes_fakes and is_remapped(value, each)) for each in moved):
            raise cannot_measure(
                "the training step changes the values of the batch's images (rescales, normalizes or clamps them) "
                "before the discriminator sees them, and the probe would score them as they are in the batch. "
                "Do this in the data pipeline"
            )
    return None


def has_changed_fakes(step: Adversarial) -> bool:
    """Returns whether the discriminator's argument neither begins nor ends with the fakes, apart from their axes."""
    argument = step.argument
    fake = move(step.made.fake, step.order, argument.shape[1:]).to(argument.dtype)
    if argument.data_ptr() == fake.data_ptr() and argument.shape == fake.shape:
        return not step.as_it_is  # an in-place operation may have changed it
    return not any(torch.equal(part, fake) for part in (argument[: len(fake)], argument[-len(fake) :]))


def _orders(real: Tensor, shown: Tensor) -> list[Order | None]:
    same = real.shape[1:] == shown.shape[1:]
    return [None] if same else [*list_orders(real.shape[1:], shown.shape[1:])]


def _takes_both(step: Adversarial, real: Tensor) -> bool:
    """Returns whether the discriminator takes the batch's real images as another argument."""
    storage = real.untyped_storage().data_ptr()
    others = [value for place, value in step.call.tensors() if place != step.place]
    return any(value.untyped_storage().data_ptr() == storage and value.numel() == real.numel() for value in others)


def is_itself(shown: Tensor, real: Tensor) -> bool:
    """Returns whether shown images are the real images, by their memory."""
    return shown.data_ptr() == real.data_ptr() and shown.shape == real.shape


def _is_part(shown: Tensor, real: Tensor) -> bool:
    """Returns whether shown images are fewer of the real images, by their memory."""
    same_memory = shown.untyped_storage().data_ptr() == real.untyped_storage().data_ptr()
    return same_memory and shown.shape[1:] == real.shape[1:] and len(shown) < len(real)


def _size(images: Tensor) -> int:
    return images.shape[1:].numel() if images.dim() else 0


def _describe(shape: torch.Size) -> str:
    return f"(batch, {', '.join(map(str, shape))})"


def is_remapped(value: Tensor, real: Tensor) -> bool:
    """Returns whether values grow with those of `real` in all channels of all images, as under tanh or clamping."""
    dims = min(2, real.dim() - 1)
    if dims < 1:
        return False
    x, y = (tensor.detach().flatten(dims).flatten(0, dims - 1) for tensor in (real, value))
    steps = y.gather(1, x.argsort(1)).double().diff(dim=1)
    return bool((steps >= 0).all() and (steps > 0).sum() >= _ENOUGH)


def is_rescaled(value: Tensor, real: Tensor) -> bool:
    """Returns whether values are ``a * real + b`` in every channel, with a and b other than 1 and 0."""
    channels = real.shape[1] if real.dim() > 2 else 1
    if channels > 1:
        value, real = value.transpose(0, 1), real.transpose(0, 1)
    x, y = (tensor.reshape(channels, -1).double() for tensor in (real, value))
    offset = y.mean(1) - x.mean(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    slope = (x * y).mean(1) / x.square().mean(1)
    spread, rest = y.std(1, correction=0), (y - slope[:, None] * x).std(1, correction=0)
    alike = (rest < _SAME * spread).all()
    return bool(alike and ((slope - 1).abs() > _SAME).logical_or(offset.abs() > _SAME * spread).any())
