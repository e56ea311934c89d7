"""A recurrent GAN of time series (RGAN): an LSTM generates, a GRU scores every step.

python examples/gallery/time_series.py
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import train

STEPS, LATENT, SERIES = 8, 4, 2


class Generator(nn.Module):
    """Generates a series from a noise vector for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(LATENT, 16, num_layers=2, batch_first=True)
        self.out = nn.Linear(16, SERIES)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.out(self.lstm(z)[0]))


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(SERIES, 16, batch_first=True, bidirectional=True)
        self.out = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0])


class TimeSeriesGAN(LightningModule):
    ARGUMENTS: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = Generator(), Discriminator()

    @staticmethod
    def data() -> DataLoader[Any]:
        rng = torch.Generator().manual_seed(0)
        phase, speed = 6 * torch.rand(24, 1, SERIES, generator=rng), 0.3 + torch.rand(24, 1, SERIES, generator=rng)
        return DataLoader(TensorDataset(torch.sin(phase + speed * torch.arange(STEPS)[:, None])), batch_size=4)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (real,), (g, d) = batch, self.optimizers()
        fake = self.generator(torch.randn(len(real), STEPS, LATENT)).detach()
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()
        d.zero_grad()
        self.manual_backward(loss)
        d.step()

        loss = F.softplus(-self.discriminator(self.generator(torch.randn(len(real), STEPS, LATENT)))).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), 2e-3, betas=(0.5, 0.9)) for network in networks]


if __name__ == "__main__":
    train(TimeSeriesGAN)
