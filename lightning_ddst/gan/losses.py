"""Adversarial losses and penalties."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ddst.utils.registry import Registry


class Loss(ABC):
    """Base class of losses: the discriminator's and the generator's, each from scores of any shape to a scalar.

    Example::

        @LOSSES.register("logistic")
        class Logistic(Loss):
            @staticmethod
            def discriminator(real, fake):
                return F.softplus(fake - real).mean()

            @staticmethod
            def generator(fake):
                return -fake.mean()

        GANModule(generator, discriminator, loss="logistic")
    """

    @staticmethod
    @abstractmethod
    def discriminator(real: Tensor, fake: Tensor) -> Tensor:
        """Returns the discriminator's loss from its scores of real and of generated images."""

    @staticmethod
    @abstractmethod
    def generator(fake: Tensor) -> Tensor:
        """Returns the generator's loss from the discriminator's scores of generated images."""


LOSSES: Registry[type[Loss]] = Registry("loss")
"""Every registered loss by name."""


@LOSSES.register("hinge")
class Hinge(Loss):
    """Hinge loss (Lim and Ye 2017)."""

    @staticmethod
    def discriminator(real: Tensor, fake: Tensor) -> Tensor:  # noqa: D102
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

    @staticmethod
    def generator(fake: Tensor) -> Tensor:  # noqa: D102
        return -fake.mean()


@LOSSES.register("non-saturating")
class NonSaturating(Loss):
    """Cross-entropy with the generator's non-saturating loss (Goodfellow et al. 2014)."""

    @staticmethod
    def discriminator(real: Tensor, fake: Tensor) -> Tensor:  # noqa: D102
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    @staticmethod
    def generator(fake: Tensor) -> Tensor:  # noqa: D102
        return F.softplus(-fake).mean()


@LOSSES.register("wasserstein")
class Wasserstein(Loss):
    """Wasserstein loss (Arjovsky et al. 2017)."""

    @staticmethod
    def discriminator(real: Tensor, fake: Tensor) -> Tensor:  # noqa: D102
        return fake.mean() - real.mean()

    @staticmethod
    def generator(fake: Tensor) -> Tensor:  # noqa: D102
        return -fake.mean()


@LOSSES.register("least-squares")
class LeastSquares(Loss):
    """Least-squares loss (Mao et al. 2017)."""

    @staticmethod
    def discriminator(real: Tensor, fake: Tensor) -> Tensor:  # noqa: D102
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())

    @staticmethod
    def generator(fake: Tensor) -> Tensor:  # noqa: D102
        return 0.5 * (fake - 1).square().mean()


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """Penalizes slopes of the discriminator other than 1 between real and generated images (Gulrajani et al. 2017).

    Args:
        discriminator: Function from images to scores.
        real: Real images ``(batch, ...)``.
        fake: Generated images of the same shape; with mixed precision their dtype may differ.

    Returns:
        ``E[(||grad D(x)|| - 1)^2]`` at random points on the lines between them, a scalar to differentiate.
    """
    share = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device, dtype=real.dtype)
    between = torch.lerp(fake.detach().to(real.dtype), real.detach(), share).requires_grad_()
    slopes: Tensor = torch.linalg.vector_norm(_input_gradients(discriminator, between), dim=1)
    return (slopes - 1).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Penalizes the discriminator's slope at real images: the R1 penalty (Mescheder et al. 2018).

    Args:
        discriminator: Function from images to scores.
        real: Real images ``(batch, ...)``.

    Returns:
        ``E[||grad D(x)||^2] / 2``, a scalar to differentiate.
    """
    return _input_gradients(discriminator, real.detach().requires_grad_()).square().sum(1).mean() / 2


def _input_gradients(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    (gradients,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradients.flatten(1)
