"""Finds the real images in a batch, and checks that the training step does not change them before scoring."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ddst.balance.recorder import Adversarial, Call, Generated, Scored, cannot_measure
from lightning_ddst.utils.nested import Place, describe_tensors, get_entry, get_first_tensor, tensors_in

_SAME = 1e-2
"""Relative deviation up to which images count as the batch's images, shifted and scaled."""


# ---- finding ---------------------------------------------------------------------------------------------


def find_real_images(batch: Any, place: Place | None, shape: torch.Size) -> Tensor:
    """Finds the real images in a batch.

    Args:
        batch: Any nesting of mappings, sequences and dataclasses.
        place: Place of the real images; None means the only floating-point tensor of this shape.
        shape: The shape of one image.

    Raises:
        RuntimeError: If there is no tensor at that place, or not exactly one tensor of that shape.
    """
    if place is not None:
        try:
            return get_first_tensor(get_entry(batch, place)).detach()
        except (KeyError, TypeError):
            raise cannot_measure(
                f"real={place!r} is no tensor in the batch; it holds {describe_tensors(batch)}"
            ) from None
    found = {name: value for name, value in tensors_in(batch) if value.is_floating_point() and value.shape[1:] == shape}
    if len(found) == 1:
        return next(iter(found.values())).detach()
    described = f"(batch, {', '.join(map(str, shape))})"
    if not found:
        raise cannot_measure(
            f"the batch holds no floating-point tensor of shape {described}, like the generator's output, that could "
            f"be the real images; it holds {describe_tensors(batch)}"
        )
    choices = " or ".join(f'real="{name}"' for name in found)
    raise cannot_measure(
        f"{len(found)} tensors of the batch have the shape {described} of the generator's output, and any could be "
        f"the real images: {', '.join(found)}. Name one, `DynamicSparsityCallback(..., real=...)` with {choices}"
    )


def find_call_on_real(real: Tensor, batch: Any, step: Adversarial, scored: Sequence[Scored]) -> Call:
    """Finds the arguments with which the discriminator scores the real images.

    They come from a recorded call on the real images. If there is none, they come from the generator's step, with the
    real images instead of the fakes. Other arguments with one entry per image (labels, for example) are then replaced
    by the only tensor of the batch that fits.

    Args:
        real: The real images.
        batch: The training step's batch.
        step: The discriminator's call that trained the generator.
        scored: The discriminator's calls, oldest first.

    Raises:
        RuntimeError: If such an argument cannot be found.
    """
    for earlier in reversed(scored):
        shown = earlier.call.tensor_at(step.place)
        if shown is not None and shown.data_ptr() == real.data_ptr() and shown.shape == real.shape:
            return earlier.call
    values: dict[int | str, Any] = {step.place: real.to(step.argument.dtype)}
    others = {name: value for name, value in tensors_in(batch) if value.data_ptr() != real.data_ptr()}
    held = {value.untyped_storage().data_ptr() for value in others.values()}
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
        shape: The shape of one image.
        changes_fakes: Whether the training step changes the generator's output before it passes it on.
    """

    place: int | str
    shape: torch.Size
    changes_fakes: bool

    @classmethod
    def of_step(cls, step: Adversarial) -> "ImageArgument":
        """Reads the argument from the call that trained the generator; waits for the device."""
        return cls(step.place, step.made.fake.shape[1:], _changes_fakes(step))

    def find_shown(self, real: Tensor, generated: Iterable[Generated], scored: Iterable[Scored]) -> list[Tensor]:
        """Finds images that the discriminator scored and that may be the real ones: as many, and not fakes."""
        fakes = {made.fake.untyped_storage().data_ptr() for made in generated}
        images = [earlier.call.tensor_at(self.place) for earlier in scored]
        alike = [value for value in images if value is not None and value.shape[1:] == real.shape[1:]]
        # If they were concatenated with others, they come first or last.
        parts = [part for value in alike for part in (value[: len(real)], value[-len(real) :])]
        return [part for part in parts if len(part) == len(real) and part.untyped_storage().data_ptr() not in fakes]


def check_shown(
    shown: Sequence[Tensor], real: Tensor, batch: Any, *, place: Place | None = None, changes_fakes: bool = False
) -> bool:
    """Compares images that the discriminator scored with the real images of the batch.

    Args:
        shown: Images that may be the real ones.
        real: The real images in the batch.
        batch: The training step's batch.
        place: The user's argument `real`, for the error.
        changes_fakes: Whether the training step changes the generator's output.

    Returns:
        Whether the unchanged real images are among them.

    Raises:
        RuntimeError: If they are other images of the batch, if the real images were shifted and scaled, or if the
            training step changes only the fakes.
    """
    if any(value.data_ptr() == real.data_ptr() or torch.equal(value, real) for value in shown):
        if changes_fakes:
            raise cannot_measure(
                "the training step changes what the generator returns before the discriminator sees it (adds it to "
                "something, or applies an activation), but not the real images"
            )
        return True
    for name, other in tensors_in(batch):
        if any(value.data_ptr() == other.data_ptr() for value in shown):
            raise cannot_measure(
                f"the real images should be real={place!r}, but among the batch's tensors the "
                f'discriminator is shown "{name}"'
            )
    if any(is_rescaled(value, real) for value in shown):
        raise cannot_measure(
            "the training step shifts and scales the batch's images before the discriminator sees them, and the "
            "probe would score them as they are in the batch. Do this in the data pipeline"
        )
    return False


def _changes_fakes(step: Adversarial) -> bool:
    """Returns whether the discriminator's argument neither begins nor ends with the unchanged fakes."""
    argument, fake = step.argument, step.made.fake.to(step.argument.dtype)
    if argument.data_ptr() == fake.data_ptr() and argument.shape == fake.shape:
        return not step.as_it_is  # an in-place operation may have changed it
    return not any(torch.equal(part, fake) for part in (argument[: len(fake)], argument[-len(fake) :]))


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
