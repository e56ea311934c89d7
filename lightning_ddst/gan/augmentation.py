"""Differentiable augmentation of all images that a discriminator sees (DiffAugment, Zhao et al. 2020)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ddst.utils.registry import Registry

DIFF_AUGMENTS: Registry[Callable[[Tensor], Tensor]] = Registry("augmentation")
"""Augmentations by name, each from images to images of the same shape. Register others to use them by name."""

_LARGEST_SHIFT = 1 / 8  # of the size
_CUT = 1 / 2  # of the size


def diff_augment(images: Tensor, policy: Sequence[str]) -> Tensor:
    """Augments each image at random; gradients flow through.

    Applied to real and to generated images, in both networks' losses, it lets a GAN learn from few images
    ("Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020, arXiv 2006.10738). The
    augmentations have the distribution of the paper's code. They draw from torch's random state on the images'
    device. Some copies of that code seed this state in each call, which makes training's noise depend on the
    augmentation; do not imitate them.

    Args:
        images: ``(batch, channels, height, width)``, floats in [-1, 1].
        policy: Names of `DIFF_AUGMENTS`, applied in this order; an empty list changes nothing.

    Returns:
        Images of the same shape and dtype; "color" may leave [-1, 1].

    Raises:
        ValueError: For an unknown name, or images of another shape.
    """
    if isinstance(policy, str):
        raise ValueError(f"policy={policy!r} must be a sequence of names, such as ['color', 'cutout'].")
    augmentations = [DIFF_AUGMENTS.find("policy", name) for name in policy]
    if images.ndim != 4:
        raise ValueError(f"images of shape {tuple(images.shape)} must have shape (batch, channels, height, width).")
    for augment in augmentations:
        images = augment(images)
    return images


@DIFF_AUGMENTS.register("color")
def color(images: Tensor) -> Tensor:
    """Changes brightness by up to 0.5, saturation by a factor of up to 2, and contrast by one from 0.5 to 1.5.

    Saturation is the distance from a pixel's mean over channels, contrast from an image's mean.
    """
    images = images + (_uniform(images) - 0.5)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (_uniform(images) * 2)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_uniform(images) + 0.5)


@DIFF_AUGMENTS.register("translation")
def translation(images: Tensor) -> Tensor:
    """Shifts by up to 1/8 of the height and of the width, in whole pixels; pads with zeros."""
    padded = F.pad(images, (1, 1, 1, 1))
    for dimension in (2, 3):
        size = images.shape[dimension]
        largest = _rounded(size * _LARGEST_SHIFT)
        shifts = _integers(-largest, largest, images)
        # Position in the padded image of each pixel of the result; in the margin if it is outside the image.
        places = (torch.arange(size, device=images.device) + shifts + 1).clamp(0, size + 1)
        places = places[:, None, :, None] if dimension == 2 else places[:, None, None, :]
        shape = list(padded.shape)
        shape[dimension] = size
        padded = padded.gather(dimension, places.expand(shape))
    return padded


@DIFF_AUGMENTS.register("cutout")
def cutout(images: Tensor) -> Tensor:
    """Sets a rectangle of half the height and half the width to 0, centered anywhere in the image."""
    inside = []
    for dimension in (2, 3):
        size = images.shape[dimension]
        cut = _rounded(size * _CUT)
        first = _integers(0, size - cut % 2, images) - cut // 2
        places = torch.arange(size, device=images.device)
        inside.append((places >= first) & (places < first + cut))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _rounded(value: float) -> int:
    """Rounds a positive number, halves up."""
    return int(value + 0.5)


def _uniform(images: Tensor) -> Tensor:
    """Draws one number from 0 to 1 per image."""
    return torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)


def _integers(low: int, high: int, images: Tensor) -> Tensor:
    """Draws one integer from `low` to `high`, both included, per image: ``(batch, 1)``."""
    return torch.randint(low, high + 1, (len(images), 1), device=images.device)
