"""Image to image: from the left half of a digit to the whole of it.

The discriminator scores pairs, `D(torch.cat([source, image], 1))`, which nothing tells from any other picture of two
channels; so the module gives the scores that the balance ratio is made of: `balance_scores`.

python examples/04_pix2pix.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, StackDataset

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.data import digits


class Generator(nn.Module):
    """A U-Net with one skip connection; dropout is its only noise."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 32, 4, stride=2, padding=1)
        self.bottom = nn.Sequential(
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.Dropout(0.2),
        )
        self.up = nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1)

    def forward(self, source: Tensor) -> Tensor:
        x = self.down(source)
        return torch.tanh(self.up(F.relu(torch.cat([x, self.bottom(x)], 1))))


class Pix2Pix(LightningModule):
    """Shows the discriminator pairs, and so gives the scores itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G = Generator()
        self.D = nn.Sequential(
            nn.Conv2d(2, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 1, 3, padding=1),  # a score for each of 4x4 patches
        )

    def score(self, source: Tensor, image: Tensor) -> Tensor:
        return self.D(torch.cat([source, image], 1))

    def balance_scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores real and generated pairs: around a generator update, without gradients, on the same noise."""
        source, target = batch["source"], batch["target"]
        return self.score(source, target), self.score(source, self.G(source))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        source, target = batch["source"], batch["target"]
        fake = self.G(source)

        real_score, fake_score = self.score(source, target), self.score(source, fake.detach())
        loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()

        loss = F.softplus(-self.score(source, fake)).mean() + 2 * F.l1_loss(fake, target)
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.99)) for network in (self.G, self.D)]


def main() -> None:
    seed_everything(0)
    whole, _ = digits().tensors
    half = whole.clone()
    half[..., 4:] = -1
    data = StackDataset(source=half, target=whole)
    sparsity = DynamicSparsityCallback(generator_density=0.2)
    trainer = Trainer(max_epochs=5, callbacks=[sparsity], enable_checkpointing=False)
    trainer.fit(Pix2Pix(), DataLoader(data, batch_size=32, shuffle=True, drop_last=True))

    for update, decision in sparsity.decisions[-5:]:
        print(f"generator update {update}: {decision.action}, {decision.reason}")
    print(f"generator {sparsity.generator_density:.3f}, discriminator {sparsity.discriminator_density:.3f}")


if __name__ == "__main__":
    main()
