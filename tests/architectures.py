"""Parts of well-known architectures, in a few channels: what masks of channels and export must follow."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNormGenerator(nn.Module):
    """4 groups of 4 channels, then 4 groups of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 16 * 4), nn.GroupNorm(4, 16)
        self.up, self.last_norm = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.GroupNorm(4, 8, affine=False)
        self.image = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.norm(self.linear(z).unflatten(1, (-1, 2, 2))).relu()
        return self.image(self.last_norm(self.up(h)).relu()).tanh()


class StyleGenerator(nn.Module):
    """A learned constant, styles that scale and shift channels, biases of the class's own."""

    def __init__(self) -> None:
        super().__init__()
        self.const, self.strength = nn.Parameter(torch.randn(1, 6, 4, 4)), nn.Parameter(torch.tensor(0.5))
        self.mapping = nn.Linear(4, 8)
        self.style, self.conv = nn.Linear(8, 12), nn.Conv2d(6, 10, 3, padding=1)
        self.last_style, self.image = nn.Linear(8, 20), nn.Conv2d(10, 3, 1)
        self.bias, self.norm, self.act = nn.Parameter(torch.randn(10)), nn.InstanceNorm2d(10, affine=True), nn.PReLU(10)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z).relu()
        scale, shift = self.style(w)[..., None, None].chunk(2, 1)
        h = self.conv(self.const.repeat(len(z), 1, 1, 1) * scale + shift)
        h = h + self.strength * h.new_ones(len(z), 1, 4, 4) + self.bias[:, None, None]
        scale, shift = self.last_style(w)[..., None, None].chunk(2, 1)
        return self.image(self.act(self.norm(h) * scale + shift)).tanh()


class FeatureDiscriminator(nn.Module):
    """A score, and the feature maps before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.score = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = self.first(x).relu()
        second = self.second(first).relu()
        return self.score(second), [first, second]


class Modulated(nn.Module):
    """A convolution whose weight is a bare parameter, scaled by a style and normalized."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.affine = nn.Parameter(torch.randn(n_out, n_in, 3, 3)), nn.Linear(4, n_in)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        weight = self.weight * self.affine(w)[:, None, :, None, None]
        weight = weight * (weight.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
        out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), padding=1, groups=len(x))
        return out.view(len(x), -1, *x.shape[2:])


class ModulatedGenerator(nn.Module):
    """A constant, a modulated convolution, and plain ones; returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.const, self.mapping = nn.Parameter(torch.randn(1, 6, 4, 4)), nn.Linear(4, 4)
        self.conv, self.plain, self.image = Modulated(6, 5), nn.Conv2d(5, 7, 1), nn.Conv2d(7, 3, 1)

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        w = self.mapping(z).relu()
        h = self.conv(self.const.expand(len(z), -1, -1, -1), w).relu()
        return {"w": w, "image": self.image(self.plain(h)).tanh()}
