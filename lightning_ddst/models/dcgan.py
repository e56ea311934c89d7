"""DCGAN (Radford et al. 2016) as in Miyato et al. 2018, table 3, with spectral norm."""

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from lightning_ddst.models.residual import initialize, normalize
from lightning_ddst.utils.validation import check_count

_init = partial(nn.init.normal_, std=0.02)


class DCGANGenerator(nn.Module):
    """A generator that doubles a map three times by transposed convolutions with BatchNorm.

    Args:
        image_size: Height and width of the images, a multiple of 8; 32 for CIFAR-10 and 48 for STL-10.
        channels: Channels of the images.
        width: Channels of the largest map; they double with every halving, up to 8 times as many.
        latent_dim: Size of the noise.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    def __init__(self, image_size: int = 32, channels: int = 3, width: int = 64, latent_dim: int = 128) -> None:
        super().__init__()
        bottom, widths = _checked(image_size, channels, width)
        check_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        widths = widths[::-1]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, widths[0] * bottom**2),
            nn.Unflatten(1, (widths[0], bottom, bottom)),
        ]
        for n_in, n_out in pairwise(widths):
            layers += [nn.BatchNorm2d(n_in), nn.ReLU(), nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        initialize(self, _init)

    def forward(self, z: Tensor) -> Tensor:
        """Maps noise ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1]."""
        images: Tensor = self.layers(z)
        return images


class DCGANDiscriminator(nn.Module):
    """A discriminator that halves the image three times by 4x4 convolutions, with 3x3 convolutions in between.

    All layers have spectral norm.

    Args:
        image_size: Height and width of the images, a multiple of 8; 32 for CIFAR-10 and 48 for STL-10.
        channels: Channels of the images.
        width: Channels of the largest map; they double after every halving, up to 8 times as many.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    def __init__(self, image_size: int = 32, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        bottom, widths = _checked(image_size, channels, width)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.1)]
        for n_in, n_out in pairwise(widths):
            layers += [nn.Conv2d(n_in, n_in, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * bottom**2, 1))
        initialize(self, _init)
        normalize(self, nn.Conv2d, nn.Linear)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(batch, channels, size, size)`` to scores ``(batch,)``."""
        scores: Tensor = self.layers(images).squeeze(1)
        return scores


def _checked(image_size: int, channels: int, width: int) -> tuple[int, list[int]]:
    """Returns the size of the smallest map, and the channels of all maps from the largest to the smallest."""
    check_count("channels", channels)
    check_count("width", width)
    if image_size < 8 or image_size % 8:
        raise ValueError(f"image_size={image_size} must be a multiple of 8, at least 8.")
    return image_size // 8, [width * multiple for multiple in (1, 2, 4, 8)]
