"""Residual blocks of SNGAN and BigGAN, and what happens to all layers of a network: initial values, spectral norm."""

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

_FEW_COLUMNS = 4


class UpBlock(nn.Module):
    """Doubles a map: norm, ReLU, doubling, 3x3 convolution, norm, ReLU, 3x3 convolution (Gulrajani et al. 2017).

    The shortcut is a 1x1 convolution of the doubled input.

    Args:
        n_in: Channels of the input.
        n_out: Channels of the output.
        norm: From a number of channels to a norm, called with the maps and whatever else the block is called with.
    """

    def __init__(self, n_in: int, n_out: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(n_in), norm(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, maps: Tensor, *condition: Tensor) -> Tensor:
        """From maps ``(batch, n_in, height, width)`` to ``(batch, n_out, 2 height, 2 width)``."""
        hidden = self.conv1(F.interpolate(F.relu(self.norm1(maps, *condition)), scale_factor=2))
        hidden = self.conv2(F.relu(self.norm2(hidden, *condition)))
        output: Tensor = hidden + self.shortcut(F.interpolate(maps, scale_factor=2))
        return output


class DownBlock(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 3x3 convolution, and perhaps 2x2 average pooling (Gulrajani et al. 2017).

    The shortcut is a 1x1 convolution, or nothing at all where neither size nor channels change. Both
    convolutions of the residual branch have `n_out` outputs.

    Args:
        n_in: Channels of the input.
        n_out: Channels of the output.
        down: Whether to halve the maps.
        first: Whether the input is the image, which passes no ReLU, and whose shortcut is pooled before its
            convolution: fewer operations, same result.
    """

    def __init__(self, n_in: int, n_out: int, *, down: bool = True, first: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if down or n_in != n_out else nn.Identity()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.first = first

    def forward(self, maps: Tensor) -> Tensor:
        """From maps ``(batch, n_in, height, width)`` to ``(batch, n_out, height, width)``, or half as high and wide."""
        hidden = self.conv1(maps if self.first else F.relu(maps))
        hidden = self.pool(self.conv2(F.relu(hidden)))
        output: Tensor = hidden + (self.shortcut(self.pool(maps)) if self.first else self.pool(self.shortcut(maps)))
        return output


def down_blocks(channels: int, widths: Collection[int], halvings: int) -> list[DownBlock]:
    """From images to maps: a block for every width, the first `halvings` of which halve."""
    return [
        DownBlock(n_in, n_out, down=i < halvings, first=i == 0)
        for i, (n_in, n_out) in enumerate(pairwise([channels, *widths]))
    ]


def initialize(network: nn.Module, init: Callable[[Tensor], Any]) -> None:
    """Draws every layer's and embedding's weight anew, and sets biases to 0; comes before `normalize`."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            init(layer.weight)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def normalize(network: nn.Module, *kinds: type[nn.Module]) -> None:
    """Puts the weight of every layer of the given kinds under spectral norm."""
    for layer in list(network.modules()):
        if isinstance(layer, kinds):
            # The norm is the transposed weight's, too. With few columns torch.compile (2.11 to 2.14) would recompute
            # the left vector in the backward pass, from a right vector that has changed by then.
            few = layer.weight[0].numel() <= _FEW_COLUMNS  # type: ignore[index]
            spectral_norm(layer, dim=1 if few else None)
