"""BigGAN (Brock et al. 2019) for images of 32 pixels (as in its code for CIFAR-10) and 64 pixels (as in StudioGAN)."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ddst.models.residual import UpBlock, down_blocks, initialize, normalize
from lightning_ddst.utils.validation import check_choice, check_count

Initialization = Literal["orthogonal", "normal"]
INITIALIZATIONS: dict[str, Callable[[Tensor], Any]] = {
    "orthogonal": nn.init.orthogonal_,
    "normal": partial(nn.init.normal_, std=0.02),
}
_WIDTHS = {32: 64, 64: 80}
_LATENT_DIMS = {32: 128, 64: 100}
_GENERATOR = {32: (4, 4, 4, 4), 64: (16, 8, 4, 2, 1)}
_DISCRIMINATOR = {32: ((4, 4, 4, 4), 2), 64: ((1, 2, 4, 8, 16), 4)}
"""Channels of the maps as multiples of the width, and number of blocks that halve the maps, by image size."""


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose gain and bias depend on a condition: the class, or a vector.

    Args:
        condition: Function from two sizes to a layer: ``nn.Embedding`` for classes or ``nn.Linear`` for vectors.
        size: Number of classes, or size of the vectors.
        num_features: Channels of the maps.
    """

    def __init__(self, condition: Callable[[int, int], nn.Module], size: int, num_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.gain = condition(size, num_features)
        self.bias = condition(size, num_features)

    def forward(self, maps: Tensor, condition: Tensor) -> Tensor:
        """Normalizes maps ``(batch, channels, height, width)``.

        Args:
            maps: The maps.
            condition: Classes, int64 ``(batch,)``, or vectors ``(batch, size)``.
        """
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        output: Tensor = self.norm(maps) * gain[:, :, None, None] + bias[:, :, None, None]
        return output


class SelfAttention(nn.Module):
    """Self-attention between positions (Zhang et al. 2019) with pooled keys and values; initially the identity.

    Args:
        channels: Channels of the maps; queries and keys have an eighth of them, values half, at least 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, half = max(1, channels // 8), max(1, channels // 2)
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, half, 1, bias=False)
        self.output = nn.Conv2d(half, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``(batch, channels, height, width)``, of even height and width, to the same shape."""
        query = self.query(maps).flatten(2)
        key = F.max_pool2d(self.key(maps), 2).flatten(2)
        value = F.max_pool2d(self.value(maps), 2).flatten(2)
        weights = (query.transpose(1, 2) @ key).softmax(2)  # (batch, positions, positions / 4)
        attended = (value @ weights.transpose(1, 2)).unflatten(2, maps.shape[2:])
        output: Tensor = maps + self.gamma * self.output(attended)
        return output


class BigGANGenerator(nn.Module):
    """Residual blocks from 4x4 up with class-conditional BatchNorm; all layers except embeddings have spectral norm.

    With 32 pixels every BatchNorm has a gain and a bias for each class. With 64 pixels they are linear in the class's
    shared embedding and a part of the noise: the first layer and each of the 4 blocks get a fifth of the noise.
    Self-attention follows the third block, at 32x32.

    Args:
        image_size: Height and width of the images, 32 or 64.
        channels: Channels of the images.
        width: BigGAN's channel multiplier. With 32 pixels all maps have 4 times as many channels. With 64 pixels the
            largest map has as many, and the channels double with every halving, up to 16 times. By default 64 and 80.
        latent_dim: Size of the noise, with 64 pixels a multiple of 5; by default 128 and 100.
        num_classes: Number of classes.
        shared_dim: Size of the shared embedding; not used with 32 pixels.
        initialization: "orthogonal", as in the paper, or "normal", N(0, 0.02), as in its code for CIFAR-10.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        width: int | None = None,
        latent_dim: int | None = None,
        num_classes: int = 10,
        shared_dim: int = 128,
        initialization: Initialization = "orthogonal",
    ) -> None:
        super().__init__()
        width = _check(image_size, channels, width, num_classes, initialization)
        latent_dim = _LATENT_DIMS[image_size] if latent_dim is None else latent_dim
        check_count("latent_dim", latent_dim)
        check_count("shared_dim", shared_dim)
        widths = [width * multiple for multiple in _GENERATOR[image_size]]
        self.latent_dim = latent_dim
        self.shared: nn.Embedding | None = None
        self._part = latent_dim
        norm = partial(ConditionalBatchNorm2d, nn.Embedding, num_classes)
        if image_size == 64:
            self._part, rest = divmod(latent_dim, len(widths))
            if rest:
                raise ValueError(f"latent_dim={latent_dim} must be a multiple of {len(widths)} with 64 pixels.")
            self.shared = nn.Embedding(num_classes, shared_dim)
            norm = partial(ConditionalBatchNorm2d, partial(nn.Linear, bias=False), shared_dim + self._part)
        self.first = nn.Linear(self._part, widths[0] * 16)
        self.blocks = nn.ModuleList(UpBlock(n_in, n_out, norm) for n_in, n_out in pairwise(widths))
        self.attentions = nn.ModuleList(nn.Identity() for _ in self.blocks)
        if image_size == 64:
            self.attentions[2] = SelfAttention(widths[3])
        self.last = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Tanh()
        )
        initialize(self, INITIALIZATIONS[initialization])
        normalize(self, nn.Conv2d, nn.Linear)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Generates images.

        Args:
            z: Noise, ``(batch, latent_dim)``.
            labels: Classes, int64 ``(batch,)``.

        Returns:
            Images ``(batch, channels, size, size)`` in [-1, 1].
        """
        part, *parts = z.split(self._part, 1)
        if self.shared is None:
            conditions = [labels for _ in self.blocks]
        else:
            shared = self.shared(labels)
            conditions = [torch.cat([shared, part], 1) for part in parts]
        maps = self.first(part).unflatten(1, (-1, 4, 4))
        for block, attention, condition in zip(self.blocks, self.attentions, conditions, strict=True):
            maps = attention(block(maps, condition))
        images: Tensor = self.last(maps)
        return images


class BigGANDiscriminator(nn.Module):
    """Residual blocks without BatchNorm and a projection on the class (Miyato and Koyama 2018), with spectral norm.

    With 64 pixels self-attention follows the first block, at 32x32.

    Args:
        image_size: Height and width of the images, 32 or 64.
        channels: Channels of the images.
        width: BigGAN's channel multiplier. With 32 pixels all maps have 4 times as many channels. With 64 pixels the
            largest map has as many, and the channels double with every block, up to 16 times. By default 64 and 80.
        num_classes: Number of classes.
        initialization: "orthogonal", as in the paper, or "normal", N(0, 0.02), as in its code for CIFAR-10.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        width: int | None = None,
        num_classes: int = 10,
        initialization: Initialization = "orthogonal",
    ) -> None:
        super().__init__()
        width = _check(image_size, channels, width, num_classes, initialization)
        multiples, halvings = _DISCRIMINATOR[image_size]
        widths = [width * multiple for multiple in multiples]
        layers: list[nn.Module] = [*down_blocks(channels, widths, halvings), nn.ReLU()]
        if image_size == 64:
            layers.insert(1, SelfAttention(widths[0]))
        self.layers = nn.Sequential(*layers)
        self.score = nn.Linear(widths[-1], 1)
        self.embedding = nn.Embedding(num_classes, widths[-1])
        initialize(self, INITIALIZATIONS[initialization])
        normalize(self, nn.Conv2d, nn.Linear, nn.Embedding)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scores images.

        Args:
            images: Images ``(batch, channels, size, size)``.
            labels: Classes, int64 ``(batch,)``.

        Returns:
            Scores ``(batch,)``.
        """
        features = self.layers(images).sum((2, 3))
        scores: Tensor = self.score(features).squeeze(1) + (self.embedding(labels) * features).sum(1)
        return scores


def _check(image_size: int, channels: int, width: int | None, num_classes: int, initialization: str) -> int:
    """Checks the arguments of both networks, and returns the width."""
    check_choice("image_size", image_size, _WIDTHS)
    check_choice("initialization", initialization, INITIALIZATIONS)
    width = _WIDTHS[image_size] if width is None else width
    for name, value in (("channels", channels), ("width", width), ("num_classes", num_classes)):
        check_count(name, value)
    return width
