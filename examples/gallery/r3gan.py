"""R3GAN: a relativistic pairing loss, with R1 on real and R2 on detached generated images.

Convolutions hold the weights, and `torch.nn.functional` uses them; the layers themselves are never called.

python examples/gallery/r3gan.py
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import train

LATENT, GAMMA = 8, 0.1


class Convolution(nn.Module):
    def __init__(self, n_in: int, n_out: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.layer = nn.Conv2d(n_in, n_out, size, bias=False, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.to(x.dtype)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=self.layer.groups)


class ResidualBlock(nn.Module):
    """1x1, grouped 3x3, 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand, self.grouped = Convolution(channels, 16, 1), Convolution(16, 16, 3, groups=4)
        self.reduce = Convolution(16, channels, 1)
        self.biases = nn.ParameterList(torch.zeros(16, 1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.expand(x) + self.biases[0], 0.2)
        return x + self.reduce(F.leaky_relu(self.grouped(y) + self.biases[1], 0.2))


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.basis, self.embed = nn.Parameter(torch.randn(8, 4, 4)), nn.Linear(LATENT, 8, bias=False)
        self.blocks = nn.ModuleList([ResidualBlock(8), ResidualBlock(8)])
        self.to_rgb = Convolution(8, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.basis * F.linear(z, self.embed.weight)[:, :, None, None]
        return self.to_rgb(self.blocks[1](F.interpolate(self.blocks[0](x), scale_factor=2.0)))


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.from_rgb = Convolution(3, 8, 1)
        self.blocks = nn.ModuleList([ResidualBlock(8), ResidualBlock(8)])
        self.basis, self.score = nn.Conv2d(8, 8, 4, groups=8, bias=False), nn.Linear(8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](F.avg_pool2d(self.blocks[0](self.from_rgb(x)), 2))
        return F.linear(self.basis(x).flatten(1), self.score.weight).flatten()


class R3GAN(LightningModule):
    ARGUMENTS: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = Generator(), Discriminator()

    @staticmethod
    def data() -> DataLoader[Any]:
        rng = torch.Generator().manual_seed(0)
        colors = torch.randn(24, 3, 1, 1, generator=rng)
        return DataLoader(
            TensorDataset(torch.tanh(colors + torch.linspace(-1, 1, 8).expand(24, 3, 8, 8))), batch_size=4
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (real,), (g, d) = batch, self.optimizers()
        fake = self.generator(torch.randn(len(real), LATENT)).detach().requires_grad_()
        real = real.detach().requires_grad_()
        of_real, of_fake = self.discriminator(real), self.discriminator(fake)
        slopes = torch.autograd.grad(of_real.sum() + of_fake.sum(), (real, fake), create_graph=True)
        penalty = sum(slope.square().sum((1, 2, 3)) for slope in slopes)
        d.zero_grad()
        self.manual_backward((F.softplus(of_fake - of_real) + GAMMA / 2 * penalty).mean())
        d.step()

        fake = self.generator(torch.randn(len(real), LATENT))
        loss = F.softplus(self.discriminator(real.detach()) - self.discriminator(fake)).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), 2e-3, betas=(0.0, 0.99)) for network in networks]


if __name__ == "__main__":
    train(R3GAN)
