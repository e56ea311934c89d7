"""A GAN of your own and one line: the shortest way to a sparse generator.

python examples/01_add_ddst_to_your_gan.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.data import digits


class MyGAN(LightningModule):
    """Nothing in here knows that it is trained sparsely."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(16, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.Tanh(),
            nn.Unflatten(1, (1, 8, 8)),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(), spectral_norm(nn.Linear(64, 128)), nn.LeakyReLU(0.1), spectral_norm(nn.Linear(128, 1))
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        real, _ = batch

        fake = self.generator(torch.randn(len(real), 16, device=self.device)).detach()
        loss = F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()

        loss = -self.discriminator(self.generator(torch.randn(len(real), 16, device=self.device))).mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.9))
            for network in (self.generator, self.discriminator)
        ]


def main() -> None:
    seed_everything(0)
    sparsity = DynamicSparsityCallback(generator_density=0.2)
    trainer = Trainer(max_epochs=15, callbacks=[sparsity], enable_checkpointing=False)
    trainer.fit(MyGAN(), DataLoader(digits(), batch_size=32, shuffle=True, drop_last=True))

    for update, decision in sparsity.decisions[-5:]:
        print(f"generator update {update}: {decision.action}, {decision.reason}")
    print(f"generator {sparsity.generator_density:.3f}, discriminator {sparsity.discriminator_density:.3f}")


if __name__ == "__main__":
    main()
