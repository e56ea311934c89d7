"""A style-based generator, whose parts the training step calls one by one: `G.mapping`, then `G.synthesis`.

The step mixes styles between these calls, so the callback cannot repeat them, and the module returns scores itself, by
`balance_scores`. (Without mixing, `generator=["G.mapping", "G.synthesis"]` is enough.) The mapping network stays dense.

python examples/03_style_based.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.data import digits


class StyledConv(nn.Module):
    """A convolution, normalised, and then scaled and shifted by a style."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(32, 2 * out_channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.affine(style)[:, :, None, None].chunk(2, dim=1)
        return F.leaky_relu((1 + scale) * F.instance_norm(self.conv(x)) + shift, 0.2)


class Synthesis(nn.Module):
    """Generates a picture from two styles; if they differ, styles are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 32, 4, 4))
        self.coarse = StyledConv(32, 32)
        self.fine = StyledConv(32, 16)
        self.to_gray = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        x = self.coarse(self.start.expand(len(coarse), -1, -1, -1), coarse)
        x = self.fine(F.interpolate(x, scale_factor=2), fine)
        return torch.tanh(self.to_gray(x))


class Generator(nn.Module):
    """Holds both parts."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LayerNorm(32))
        self.synthesis = Synthesis()


class StyleGAN(LightningModule):
    """Mixes styles between the generator's parts, so it returns the scores itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G = Generator()
        self.D = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, 1),
        )

    def generate(self, count: int) -> Tensor:
        style, other = self.G.mapping(torch.randn(2, count, 16, device=self.device))
        mixed = torch.rand(count, 1, device=self.device) < 0.5
        return self.G.synthesis(style, torch.where(mixed, other, style))

    def balance_scores(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores real and generated images: around a generator update, without gradients, on the same noise."""
        real, _ = batch
        return self.D(real), self.D(self.generate(len(real)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        real, _ = batch

        fake = self.generate(len(real)).detach()
        loss = F.softplus(-self.D(real)).mean() + F.softplus(self.D(fake)).mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()

        loss = F.softplus(-self.D(self.generate(len(real)))).mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(network.parameters(), lr=lr, betas=(0.0, 0.99))
            for network, lr in ((self.G, 2e-3), (self.D, 4e-3))
        ]


def main() -> None:
    seed_everything(0)
    sparsity = DynamicSparsityCallback(generator_density=0.2, dense_layers=["G.mapping.*"])
    trainer = Trainer(max_epochs=5, callbacks=[sparsity], enable_checkpointing=False)
    trainer.fit(StyleGAN(), DataLoader(digits(), batch_size=32, shuffle=True, drop_last=True))

    for update, decision in sparsity.decisions[-5:]:
        print(f"generator update {update}: {decision.action}, {decision.reason}")
    print(f"synthesis {sparsity.generator_density:.3f}, discriminator {sparsity.discriminator_density:.3f}")


if __name__ == "__main__":
    main()
