"""Super-resolution (SRGAN, ESRGAN): an epoch of a pixel loss alone, then a relativistic average GAN.

python examples/gallery/super_resolution.py
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, StackDataset
from training import train

PRETRAINING = 1  # epochs


class DenseBlock(nn.Module):
    """Every convolution reads all feature maps before it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(2))
        self.last = nn.Conv2d(channels + 2 * growth, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for conv in self.convs:
            maps.append(F.leaky_relu(conv(torch.cat(maps, 1)), 0.2))
        return x + 0.2 * self.last(torch.cat(maps, 1))


class Generator(nn.Module):
    """Doubles height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.trunk = nn.Sequential(DenseBlock(8, 4), DenseBlock(8, 4), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.up(x + self.trunk(x)))


class SuperResolution(LightningModule):
    ARGUMENTS: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net_g = Generator()
        self.net_d = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 16, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(16 * 4, 1),
        )

    @staticmethod
    def data() -> DataLoader[Any]:
        rng = torch.Generator().manual_seed(0)
        high = F.interpolate(torch.rand(24, 3, 3, 3, generator=rng), 8, mode="bilinear")
        return DataLoader(StackDataset(low=F.avg_pool2d(high, 2), high=high), batch_size=4)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (g, d), real = self.optimizers(), batch["high"]
        fake = self.net_g(batch["low"])
        loss = F.l1_loss(fake, real)
        if self.current_epoch >= PRETRAINING:
            self.net_d.requires_grad_(False)
            of_fake, of_real = self.net_d(fake), self.net_d(real)
            relative = F.softplus(of_real - of_fake.mean()).mean() + F.softplus(of_real.mean() - of_fake).mean()
            loss = 0.01 * loss + 0.5 * relative
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

        if self.current_epoch >= PRETRAINING:
            self.net_d.requires_grad_(True)
            of_fake, of_real = self.net_d(fake.detach()), self.net_d(real)
            relative = F.softplus(of_fake.mean() - of_real).mean() + F.softplus(of_fake - of_real.mean()).mean()
            d.zero_grad()
            self.manual_backward(0.5 * relative)
            d.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(network.parameters(), 2e-3, betas=(0.9, 0.99)) for network in (self.net_g, self.net_d)]


if __name__ == "__main__":
    train(SuperResolution)
