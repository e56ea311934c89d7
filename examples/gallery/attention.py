"""Attention (TransGAN): a transformer generates, and multi-head attention scores patches.

Embeddings of positions are declared dense, since they are no weights of a layer.

python examples/gallery/attention.py
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import train

LATENT, WIDTH, TOKENS, PATCH = 8, 16, 16, 2


class Generator(nn.Module):
    """A token for every patch of 2x2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LATENT, TOKENS * WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True, norm_first=True),
            num_layers=2,
            enable_nested_tensor=False,
        )
        self.last = nn.Linear(WIDTH, PATCH**2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.blocks(self.first(z).unflatten(1, (TOKENS, WIDTH)) + self.positions)
        return torch.tanh(F.fold(self.last(x).mT, 8, PATCH, stride=PATCH))


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.1 * torch.randn(1, TOKENS, WIDTH))
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.score = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.positions
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.score(x.mean(1))


class AttentionGAN(LightningModule):
    ARGUMENTS: ClassVar = {"dense_layers": ["*.positions"]}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = Generator(), Discriminator()

    @staticmethod
    def data() -> DataLoader[Any]:
        rng = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.tanh(torch.randn(24, 1, 8, 1, generator=rng).expand(-1, -1, -1, 8))), 4)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (real,), (g, d) = batch, self.optimizers()
        fake = self.generator(torch.randn(len(real), LATENT)).detach()
        loss = F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean()
        d.zero_grad()
        self.manual_backward(loss)
        d.step()

        loss = -self.discriminator(self.generator(torch.randn(len(real), LATENT))).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), 2e-3, betas=(0.0, 0.9)) for network in networks]


if __name__ == "__main__":
    train(AttentionGAN)
