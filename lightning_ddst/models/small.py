"""A small convolutional GAN with spectral norm, for images of 8 to 64 pixels."""

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class SmallGenerator(nn.Module):
    """A generator of transposed convolutions with BatchNorm that doubles a 2x2 map up to the image's size.

    Its architecture follows DCGAN (Radford et al. 2016).

    Args:
        image_size: Height and width of the images, a power of 2, at least 8.
        channels: Channels of the images.
        width: Channels of the largest map; they double with every halving, up to 4 times as many.
        latent_dim: Size of the noise.
        num_classes: Number of classes; their embedding is added to the noise. None for an unconditional generator.

    Raises:
        ValueError: If `image_size` is not allowed.
    """

    def __init__(
        self,
        image_size: int = 8,
        channels: int = 1,
        width: int = 32,
        latent_dim: int = 64,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        widths = _widths(image_size, width)[::-1]
        self.latent_dim = latent_dim
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, latent_dim)
        layers: list[nn.Module] = [nn.Linear(latent_dim, widths[0] * 4), nn.Unflatten(1, (widths[0], 2, 2))]
        for n_in, n_out in pairwise(widths):
            layers += [nn.BatchNorm2d(n_in), nn.ReLU(), nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps noise ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1]."""
        _check_labels(self, labels)
        if self.embedding is not None:
            z = z + self.embedding(labels)
        images: Tensor = self.layers(z)
        return images


class SmallDiscriminator(nn.Module):
    """A discriminator of convolutions with spectral norm that halve the image down to 2x2 (Miyato et al. 2018).

    Args:
        image_size: Height and width of the images, a power of 2, at least 8.
        channels: Channels of the images.
        width: Channels of the largest map; they double with every halving, up to 4 times as many.
        num_classes: Number of classes of a projection discriminator (Miyato and Koyama 2018); None for an unconditional
            discriminator.

    Raises:
        ValueError: If `image_size` is not allowed.
    """

    def __init__(self, image_size: int = 8, channels: int = 1, width: int = 32, num_classes: int | None = None) -> None:
        super().__init__()
        widths = _widths(image_size, width)
        layers: list[nn.Module] = [spectral_norm(nn.Conv2d(channels, widths[0], 3, padding=1)), nn.LeakyReLU(0.1)]
        for n_in, n_out in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(n_in, n_out, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.score = spectral_norm(nn.Linear(widths[-1] * 4, 1))
        self.embedding = None if num_classes is None else spectral_norm(nn.Embedding(num_classes, widths[-1] * 4))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps images ``(batch, channels, size, size)`` to scores ``(batch,)``."""
        _check_labels(self, labels)
        features = self.layers(images)
        scores: Tensor = self.score(features).squeeze(1)
        if self.embedding is not None:
            scores = scores + (self.embedding(labels) * features).sum(1)
        return scores


def _check_labels(network: "SmallGenerator | SmallDiscriminator", labels: Tensor | None) -> None:
    if labels is not None and network.embedding is None:
        raise ValueError(f"labels were given to {type(network).__name__}, but its num_classes=None.")


def _widths(image_size: int, width: int) -> list[int]:
    """Returns the channels of all maps, from the image's size down to 2x2."""
    halvings = round(math.log2(image_size)) - 1 if image_size > 0 else 0
    if halvings < 2 or 2 ** (halvings + 1) != image_size:
        raise ValueError(f"image_size={image_size} must be a power of 2, at least 8.")
    return [width * min(2**i, 4) for i in range(halvings + 1)]
