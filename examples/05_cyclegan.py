"""Two generators and two discriminators: digits to inverted digits, and back.

One callback for each pair. Each measures a balance ratio of its own and resizes its own discriminator; both generators
share an optimizer, and so do both discriminators.

python examples/05_cyclegan.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.data import digits


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
        nn.Tanh(),
    )


def discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 1),
    )


class CycleGAN(LightningModule):
    """Nothing in here knows that it is trained sparsely."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G_AB, self.G_BA = generator(), generator()
        self.D_A, self.D_B = discriminator(), discriminator()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        a, b = batch["a"], batch["b"]

        fake_a, fake_b = self.G_BA(b), self.G_AB(a)
        cycle = F.l1_loss(self.G_BA(fake_b), a) + F.l1_loss(self.G_AB(fake_a), b)
        loss = cycle + (1 - self.D_A(fake_a)).square().mean() + (1 - self.D_B(fake_b)).square().mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()

        loss = (1 - self.D_A(a)).square().mean() + self.D_A(fake_a.detach()).square().mean()
        loss = loss + (1 - self.D_B(b)).square().mean() + self.D_B(fake_b.detach()).square().mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam([*first.parameters(), *second.parameters()], lr=2e-3, betas=(0.5, 0.99))
            for first, second in ((self.G_AB, self.G_BA), (self.D_A, self.D_B))
        ]


def main() -> None:
    seed_everything(0)
    images, _ = digits().tensors
    data = {  # no image is in both
        "a": DataLoader(images[::2], batch_size=32, shuffle=True, drop_last=True),
        "b": DataLoader(-images[1::2], batch_size=32, shuffle=True, drop_last=True),
    }
    pairs = {
        "a to b": DynamicSparsityCallback(0.2, 0.5, generator="G_AB", discriminator="D_B", real="b"),
        "b to a": DynamicSparsityCallback(0.2, 0.5, generator="G_BA", discriminator="D_A", real="a"),
    }
    trainer = Trainer(max_epochs=8, callbacks=list(pairs.values()), enable_checkpointing=False)
    trainer.fit(CycleGAN(), data)

    for name, pair in pairs.items():
        for update, decision in pair.decisions[-3:]:
            print(f"{name}, generator update {update}: {decision.action}, {decision.reason}")
    for name, pair in pairs.items():
        print(f"{name}: generator {pair.generator_density:.3f}, discriminator {pair.discriminator_density:.3f}")


if __name__ == "__main__":
    main()
