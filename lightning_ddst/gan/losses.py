"""Adversarial losses and penalties."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Loss(NamedTuple):
    """A discriminator's and a generator's loss, each from scores of any shape to a scalar."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    """From the scores of real and of generated images."""
    generator: Callable[[Tensor], Tensor]
    """From the scores of generated images."""


LOSSES: dict[str, Loss] = {
    "hinge": Loss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda fake: -fake.mean(),
    ),
    "non-saturating": Loss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
    "wasserstein": Loss(
        lambda real, fake: fake.mean() - real.mean(),
        lambda fake: -fake.mean(),
    ),
    "least-squares": Loss(
        lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
        lambda fake: 0.5 * (fake - 1).square().mean(),
    ),
}
"""Losses by name: hinge (Lim and Ye 2017), non-saturating (Goodfellow et al. 2014), Wasserstein
(Arjovsky et al. 2017), least squares (Mao et al. 2017)."""


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """How far the discriminator is from slope 1 between real and generated images (Gulrajani et al. 2017).

    Args:
        discriminator: From images to scores.
        real: ``(batch, ...)``.
        fake: Of the same shape.

    Returns:
        ``E[(||grad D(x)|| - 1)^2]`` at random points on the lines between them, a scalar to differentiate.
    """
    share = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device, dtype=real.dtype)
    between = torch.lerp(fake.detach(), real.detach(), share).requires_grad_()
    slopes: Tensor = torch.linalg.vector_norm(_input_gradients(discriminator, between), dim=1)
    return (slopes - 1).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """How steep the discriminator is at real images (Mescheder et al. 2018).

    Args:
        discriminator: From images to scores.
        real: ``(batch, ...)``.

    Returns:
        ``E[||grad D(x)||^2] / 2``, a scalar to differentiate.
    """
    return _input_gradients(discriminator, real.detach().requires_grad_()).square().sum(1).mean() / 2


def _input_gradients(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    (gradients,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradients.flatten(1)
