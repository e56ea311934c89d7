"""The residual GANs with spectral norm for CIFAR-10 and STL-10 (Miyato et al. 2018, tables 4 and 5)."""

from itertools import pairwise

from torch import Tensor, nn

from lightning_ddst.models.residual import DownBlock, UpBlock, down_blocks, initialize, normalize
from lightning_ddst.utils.validation import check_choice, check_count

_GENERATOR = {32: (256, (1, 1, 1, 1)), 48: (64, (8, 4, 2, 1))}
_DISCRIMINATOR = {32: (128, (1, 1, 1, 1), 2), 48: (64, (1, 2, 4, 8, 16), 4)}
"""Default width, channels of the maps as multiples of the width, and (D) number of halving blocks, by image size."""


class SNGANGenerator(nn.Module):
    """A generator of three residual blocks with BatchNorm, from an eighth of the image's size up.

    Args:
        image_size: Height and width of the images, 32 (CIFAR-10) or 48 (STL-10).
        channels: Channels of the images.
        width: Channels of the largest map; by default the paper's, 256 for 32 pixels and 64 for 48 pixels. With 32
            pixels all maps have as many; with 48 pixels the first map has 8 times as many, and they halve with every
            doubling of the size.
        latent_dim: Size of the noise.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    def __init__(
        self, image_size: int = 32, channels: int = 3, width: int | None = None, latent_dim: int = 128
    ) -> None:
        super().__init__()
        check_choice("image_size", image_size, _GENERATOR)
        default, multiples = _GENERATOR[image_size]
        width = default if width is None else width
        for name, value in (("channels", channels), ("width", width), ("latent_dim", latent_dim)):
            check_count(name, value)
        widths = [width * multiple for multiple in multiples]
        bottom = image_size // 8
        self.latent_dim = latent_dim
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, widths[0] * bottom**2),
            nn.Unflatten(1, (widths[0], bottom, bottom)),
            *(UpBlock(n_in, n_out) for n_in, n_out in pairwise(widths)),
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(),
            nn.Conv2d(widths[-1], channels, 3, padding=1),
            nn.Tanh(),
        )
        _glorot(self)

    def forward(self, z: Tensor) -> Tensor:
        """Maps noise ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1]."""
        images: Tensor = self.layers(z)
        return images


class SNGANDiscriminator(nn.Module):
    """A discriminator of residual blocks without BatchNorm, a sum over positions and a linear score.

    All layers have spectral norm.

    Args:
        image_size: Height and width of the images, 32 (CIFAR-10) or 48 (STL-10).
        channels: Channels of the images.
        width: Channels of the first map; by default the paper's, 128 for 32 pixels and 64 for 48 pixels. With 32
            pixels all maps have as many; with 48 pixels they double with every block, up to 16 times as many.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    def __init__(self, image_size: int = 32, channels: int = 3, width: int | None = None) -> None:
        super().__init__()
        check_choice("image_size", image_size, _DISCRIMINATOR)
        default, multiples, halvings = _DISCRIMINATOR[image_size]
        width = default if width is None else width
        check_count("channels", channels)
        check_count("width", width)
        widths = [width * multiple for multiple in multiples]
        self.layers = nn.Sequential(*down_blocks(channels, widths, halvings), nn.ReLU())
        self.score = nn.Linear(widths[-1], 1, bias=False)
        _glorot(self)
        normalize(self, nn.Conv2d, nn.Linear)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(batch, channels, size, size)`` to scores ``(batch,)``."""
        scores: Tensor = self.score(self.layers(images).sum((2, 3))).squeeze(1)
        return scores


def _glorot(network: nn.Module) -> None:
    """Applies Glorot's uniform initialization, with gain sqrt(2) on residual branches, as in Miyato's code."""
    initialize(network, nn.init.xavier_uniform_)
    for block in network.modules():
        if isinstance(block, UpBlock | DownBlock):
            for conv in (block.conv1, block.conv2):
                nn.init.xavier_uniform_(conv.weight, gain=2**0.5)
