"""Random changes to images that a discriminator sees, real and generated alike (DiffAugment, Zhao et al. 2020)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ddst.utils.validation import check_choice

Policy = Literal["color", "translation", "cutout"]

_LARGEST_SHIFT = 1 / 8  # of the size
_CUT = 1 / 2  # of the size


def diff_augment(images: Tensor, policy: Sequence[Policy]) -> Tensor:
    """Changes images at random, each in its own way and so that gradients flow through.

    Used on real and on generated images, for both networks' losses, it lets a GAN learn from few
    images ("Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020, arXiv
    2006.10738). The changes have the distribution of that paper's code. Everything is drawn from torch's random
    state on the images' device; some copies of that code seed it anew in each call, which makes the noise of
    training depend on the augmentation, and must not be followed.

    Args:
        images: ``(batch, channels, height, width)``, floats in [-1, 1].
        policy: Names of `DIFF_AUGMENTS`, done in this order; none for no change.

    Returns:
        Images of the same shape and dtype; "color" may leave [-1, 1].

    Raises:
        ValueError: For an unknown name, or images of another shape.
    """
    if isinstance(policy, str):
        raise ValueError(f"policy={policy!r} must be a sequence of names, such as ['color', 'cutout'].")
    for name in policy:
        check_choice("policy", name, DIFF_AUGMENTS)
    if images.ndim != 4:
        raise ValueError(f"images of shape {tuple(images.shape)} must have shape (batch, channels, height, width).")
    for name in policy:
        images = DIFF_AUGMENTS[name](images)
    return images


def color(images: Tensor) -> Tensor:
    """Changes brightness by up to 0.5, saturation by a factor of up to 2, and contrast by one from 0.5 to 1.5.

    Saturation is the distance from a pixel's mean over channels, contrast from an image's mean.
    """
    images = images + (_uniform(images) - 0.5)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (_uniform(images) * 2)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_uniform(images) + 0.5)


def translation(images: Tensor) -> Tensor:
    """Shifts by up to 1/8 of the height and of the width, by whole pixels; zeros come in."""
    padded = F.pad(images, (1, 1, 1, 1))
    for dimension in (2, 3):
        size = images.shape[dimension]
        largest = _rounded(size * _LARGEST_SHIFT)
        shifts = _integers(-largest, largest, images)
        # Of each place in the result, the place in the padded image: its margin for what was outside.
        places = (torch.arange(size, device=images.device) + shifts + 1).clamp(0, size + 1)
        places = places[:, None, :, None] if dimension == 2 else places[:, None, None, :]
        shape = list(padded.shape)
        shape[dimension] = size
        padded = padded.gather(dimension, places.expand(shape))
    return padded


def cutout(images: Tensor) -> Tensor:
    """Sets a rectangle of half the height and half the width to 0; its middle is anywhere in the image."""
    inside = []
    for dimension in (2, 3):
        size = images.shape[dimension]
        cut = _rounded(size * _CUT)
        first = _integers(0, size - cut % 2, images) - cut // 2
        places = torch.arange(size, device=images.device)
        inside.append((places >= first) & (places < first + cut))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


DIFF_AUGMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}
"""Changes by name."""


def _rounded(value: float) -> int:
    """The nearest integer, of two the larger; for positive numbers."""
    return int(value + 0.5)


def _uniform(images: Tensor) -> Tensor:
    """A number from 0 to 1 an image."""
    return torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)


def _integers(low: int, high: int, images: Tensor) -> Tensor:
    """An integer from `low` to `high`, both included, an image: ``(batch, 1)``."""
    return torch.randint(low, high + 1, (len(images), 1), device=images.device)
