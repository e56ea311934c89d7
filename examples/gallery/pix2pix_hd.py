"""Multi-scale pix2pix (pix2pixHD): conditional patch discriminators at two scales, with feature matching.

The discriminator takes source and image, and returns a list of feature maps for each scale, the score last.

python examples/gallery/pix2pix_hd.py
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, StackDataset
from training import train


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(4, 8, 4, 2, 1), nn.LeakyReLU(0.2)),
                nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.LeakyReLU(0.2)),
                nn.Conv2d(16, 1, 3, padding=1),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList([Patches(), Patches()])

    def forward(self, source: Tensor, image: Tensor) -> list[list[Tensor]]:
        x, maps = torch.cat([source, image], 1), []
        for scale in self.scales:
            maps.append(scale(x))
            x = F.avg_pool2d(x, 2)
        return maps


class Pix2PixHD(LightningModule):
    ARGUMENTS: ClassVar = {"discriminator_output": "*.-1"}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 4, 2, 1), nn.InstanceNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.InstanceNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 3, 3, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = Discriminator()

    @staticmethod
    def data() -> DataLoader[Any]:
        rng = torch.Generator().manual_seed(0)
        source = F.interpolate(torch.randn(24, 1, 4, 4, generator=rng), 16, mode="nearest")
        return DataLoader(StackDataset(source=source, target=torch.tanh(torch.cat([source, -source, source**2], 1))), 4)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (source, target), (g, d) = (batch["source"], batch["target"]), self.optimizers()
        fake = self.generator(source)
        of_fake, of_real = self.discriminator(source, fake.detach()), self.discriminator(source, target)
        pairs = list(zip(of_fake, of_real, strict=True))
        loss = 0.5 * sum(a[-1].square().mean() + (b[-1] - 1).square().mean() for a, b in pairs)
        d.zero_grad()
        self.manual_backward(loss)
        d.step()

        of_fake, of_real = self.discriminator(source, fake), self.discriminator(source, target)
        loss = torch.zeros(())
        for a, b in zip(of_fake, of_real, strict=True):
            loss = loss + (a[-1] - 1).square().mean()
            loss = loss + 10 / 2 * sum(F.l1_loss(x, y.detach()) for x, y in zip(a[:-1], b[:-1], strict=True))
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), 2e-3, betas=(0.5, 0.999)) for network in networks]


if __name__ == "__main__":
    train(Pix2PixHD)
