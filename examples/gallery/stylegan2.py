"""StyleGAN2: equalized and modulated layers with bare weights, a learned constant, noise, lazy R1.

python examples/gallery/stylegan2.py
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import train

LATENT, STYLE = 8, 16


class EqualLinear(nn.Module):
    """Scales its weight at run time."""

    def __init__(self, n_in: int, n_out: int, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_out, n_in)), nn.Parameter(torch.full((n_out,), bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class EqualConv(nn.Module):
    def __init__(self, n_in: int, n_out: int, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_out, n_in, size, size)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.weight[0].numel() ** -0.5
        return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


class ModulatedConv(nn.Module):
    """A weight for every image: scaled by its style, then normalized (demodulated)."""

    def __init__(self, n_in: int, n_out: int, size: int, *, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, n_out, n_in, size, size))
        self.modulation = EqualLinear(STYLE, n_in, bias=1.0)
        self.demodulate = demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        weight = self.weight * self.weight[0, 0].numel() ** -0.5 * self.modulation(style)[:, None, :, None, None]
        if self.demodulate:
            weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        images = x.reshape(1, -1, *x.shape[2:])
        out = F.conv2d(images, weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=len(x))
        return out.unflatten(1, (len(x), -1))[0]


class StyledConv(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv, self.noise_strength = ModulatedConv(n_in, n_out, 3), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.conv(x, style)
        return F.leaky_relu(x + self.noise_strength * torch.randn_like(x[:, :1]), 0.2) * 2**0.5


class Generator(nn.Module):
    """Mapping, then synthesis from 4x4 to 8x8 with skip connections of images."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.ModuleList([EqualLinear(LATENT, STYLE), EqualLinear(STYLE, STYLE)])
        self.constant = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.first, self.to_rgb = StyledConv(16, 16), ModulatedConv(16, 3, 1, demodulate=False)
        self.second, self.third = StyledConv(16, 8), StyledConv(8, 8)
        self.last_rgb = ModulatedConv(8, 3, 1, demodulate=False)

    def forward(self, z: Tensor) -> Tensor:
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.mapping:
            w = F.leaky_relu(layer(w), 0.2) * 2**0.5
        x = self.first(self.constant.expand(len(z), -1, -1, -1), w)
        image = F.interpolate(self.to_rgb(x, w), scale_factor=2.0)
        x = self.third(self.second(F.interpolate(x, scale_factor=2.0), w), w)
        return image + self.last_rgb(x, w)


class Discriminator(nn.Module):
    """A residual block and the standard deviation over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.from_rgb, self.conv, self.down = EqualConv(3, 8, 1), EqualConv(8, 16, 3), EqualConv(8, 16, 1)
        self.last_conv, self.score = EqualConv(17, 16, 3), EqualLinear(16 * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.from_rgb(x), 0.2)
        x = (F.avg_pool2d(F.leaky_relu(self.conv(x), 0.2), 2) + F.avg_pool2d(self.down(x), 2)) / 2**0.5
        deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(x), 1, 4, 4)
        return self.score(F.leaky_relu(self.last_conv(torch.cat([x, deviation], 1)), 0.2).flatten(1))


class StyleGAN2(LightningModule):
    ARGUMENTS: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G, self.D = Generator(), Discriminator()

    @staticmethod
    def data() -> DataLoader[Any]:
        rng = torch.Generator().manual_seed(0)
        colors = torch.randn(24, 3, 1, 1, generator=rng)
        return DataLoader(
            TensorDataset(torch.tanh(colors + torch.linspace(-1, 1, 8).expand(24, 3, 8, 8))), batch_size=4
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (real,), (g, d) = batch, self.optimizers()
        fake = self.G(torch.randn(len(real), LATENT)).detach()
        loss = F.softplus(-self.D(real)).mean() + F.softplus(self.D(fake)).mean()
        d.zero_grad()
        self.manual_backward(loss)
        d.step()
        if batch_idx % 4 == 0:  # lazy regularization: an update of its own
            real = real.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.D(real).sum(), real, create_graph=True)
            d.zero_grad()
            self.manual_backward(4 * 0.5 * slope.square().sum((1, 2, 3)).mean())
            d.step()

        loss = F.softplus(-self.D(self.G(torch.randn(len(real), LATENT)))).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(network.parameters(), 2e-3, betas=(0.0, 0.99)) for network in (self.G, self.D)]


if __name__ == "__main__":
    train(StyleGAN2)
