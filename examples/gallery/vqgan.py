"""VQGAN: encoder, codebook and decoder; the discriminator joins later, with an adaptive weight.

The codebook is an embedding, so it stays dense.

python examples/gallery/vqgan.py
"""

from itertools import chain
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import train

DISC_START = 8  # steps of optimizers


class Codebook(nn.Module):
    """Replaces every vector by the nearest of 16 codes; gradients pass straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(16, 4)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.movedim(1, -1)
        code = self.codes(torch.cdist(z.flatten(0, 2), self.codes.weight).argmin(1)).view_as(z)
        loss = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(code.detach(), z)
        return (z + (code - z).detach()).movedim(-1, 1), loss


class VQGAN(LightningModule):
    ARGUMENTS: ClassVar = {"generator": ["encoder", "decoder"]}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 4, 1),
        )  # fmt: skip
        self.quantize = Codebook()
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 1, 3, padding=1),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 1, 3, padding=1),
        )  # fmt: skip

    @staticmethod
    def data() -> DataLoader[Any]:
        rng = torch.Generator().manual_seed(0)
        images = F.interpolate(torch.randn(24, 1, 4, 4, generator=rng), 8, mode="bilinear")
        return DataLoader(TensorDataset(images), batch_size=4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code, loss = self.quantize(self.encoder(x))
        return self.decoder(code), loss

    def adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """The ratio of both losses' gradients at the last layer."""
        last = self.decoder[-1].weight
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
        return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,), (g, d) = batch, self.optimizers()
        adversarial = self.global_step >= DISC_START
        fake, codebook_loss = self(x)
        reconstruction = F.l1_loss(fake, x)
        loss = reconstruction + codebook_loss
        if adversarial:
            score = -self.discriminator(fake).mean()
            loss = loss + 0.8 * self.adaptive_weight(reconstruction, score) * score
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

        if adversarial:
            hinge = F.relu(1 - self.discriminator(x)).mean() + F.relu(1 + self.discriminator(fake.detach())).mean()
            d.zero_grad()
            self.manual_backward(0.5 * hinge)
            d.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = chain(self.encoder.parameters(), self.quantize.parameters(), self.decoder.parameters())
        return [torch.optim.Adam(each, 2e-3, betas=(0.5, 0.9)) for each in (parts, self.discriminator.parameters())]


if __name__ == "__main__":
    train(VQGAN)
