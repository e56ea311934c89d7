"""Residual blocks of SNGAN and BigGAN, and functions for initial values and spectral norm of all layers."""

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

_FEW_COLUMNS = 4


class UpBlock(nn.Module):
    """A block that doubles a map: norm, ReLU, upsampling, 3x3 conv, norm, ReLU, 3x3 conv (Gulrajani et al. 2017).

    The shortcut is a 1x1 convolution of the upsampled input.

    Args:
        n_in: Channels of the input.
        n_out: Channels of the output.
        norm: Function from a number of channels to a norm. The norm gets the maps and the block's further arguments.
    """

    def __init__(self, n_in: int, n_out: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(n_in), norm(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, maps: Tensor, *condition: Tensor) -> Tensor:
        """Maps ``(batch, n_in, height, width)`` to ``(batch, n_out, 2 height, 2 width)``."""
        hidden = self.conv1(F.interpolate(F.relu(self.norm1(maps, *condition)), scale_factor=2))
        hidden = self.conv2(F.relu(self.norm2(hidden, *condition)))
        output: Tensor = hidden + self.shortcut(F.interpolate(maps, scale_factor=2))
        return output


class DownBlock(nn.Module):
    """A block of ReLU, 3x3 conv, ReLU, 3x3 conv, and optional 2x2 average pooling (Gulrajani et al. 2017).

    The shortcut is a 1x1 convolution, or the identity if neither size nor channels change. Both convolutions of the
    residual branch have `n_out` outputs.

    Args:
        n_in: Channels of the input.
        n_out: Channels of the output.
        down: Whether to halve the maps.
        first: Whether the input is the image. Then there is no first ReLU, and the shortcut pools before its
            convolution, which saves operations and has the same result.
    """

    def __init__(self, n_in: int, n_out: int, *, down: bool = True, first: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if down or n_in != n_out else nn.Identity()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.first = first

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``(batch, n_in, height, width)`` to ``(batch, n_out, height, width)``, or half the height and width."""
        hidden = self.conv1(maps if self.first else F.relu(maps))
        hidden = self.pool(self.conv2(F.relu(hidden)))
        output: Tensor = hidden + (self.shortcut(self.pool(maps)) if self.first else self.pool(self.shortcut(maps)))
        return output


def down_blocks(channels: int, widths: Collection[int], halvings: int) -> list[DownBlock]:
    """Makes one block for every width; the first `halvings` blocks halve the maps."""
    return [
        DownBlock(n_in, n_out, down=i < halvings, first=i == 0)
        for i, (n_in, n_out) in enumerate(pairwise([channels, *widths]))
    ]


def initialize(network: nn.Module, init: Callable[[Tensor], Any]) -> None:
    """Initializes every layer's and embedding's weight, and sets biases to 0; call it before `normalize`."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            init(layer.weight)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def normalize(network: nn.Module, *kinds: type[nn.Module]) -> None:
    """Applies spectral norm to the weight of every layer of the given kinds."""
    for layer in list(network.modules()):
        if isinstance(layer, kinds):
            # The transposed weight has the same norm. With few columns torch.compile (2.11 to 2.14) would recompute
            # the left vector in the backward pass, from a right vector that has changed by then.
            few = layer.weight[0].numel() <= _FEW_COLUMNS  # type: ignore[index]
            spectral_norm(layer, dim=1 if few else None)
