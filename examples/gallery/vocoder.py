"""A vocoder (HiFi-GAN): weight norm, multi-period and multi-scale discriminators, feature matching, a mel loss.

Imports `pytorch_lightning`, as most public vocoders do.

python examples/gallery/vocoder.py
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset
from training import train

MELS, FRAMES, HOP = 8, 8, 8


def mel_spectrogram(audio: Tensor) -> Tensor:
    """Log mel bands of signals of shape (batch, 1, samples)."""
    spectrum = torch.stft(
        F.pad(audio[:, 0], (12, 12)), 32, HOP, window=torch.hann_window(32), center=False, return_complex=True
    )
    centers, bins = torch.linspace(0, 4, MELS).exp() / 4 + 1, torch.arange(17.0)
    bands = (1 - (bins - centers[:, None]).abs() / 3).clamp(min=0)
    return (bands @ torch.view_as_real(spectrum).square().sum(-1).add(1e-6).sqrt()).clamp(min=1e-4).log()


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, 3, padding=rate, dilation=rate)) for rate in (1, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(F.leaky_relu(x, 0.1))
        return x


class Generator(nn.Module):
    """Generates a waveform from a mel spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(MELS, 16, 5, padding=2))
        self.ups = nn.ModuleList(
            [weight_norm(nn.ConvTranspose1d(16, 8, 8, 4, 2)), weight_norm(nn.ConvTranspose1d(8, 4, 4, 2, 1))]
        )
        self.blocks = nn.ModuleList([ResidualBlock(8), ResidualBlock(4)])
        self.last = weight_norm(nn.Conv1d(4, 1, 5, padding=2))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.first(mel)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = block(up(F.leaky_relu(x, 0.1)))
        return torch.tanh(self.last(F.leaky_relu(x, 0.1)))


class Part(nn.Module):
    """Scores a signal in two dimensions; folded by a period, or at a scale."""

    def __init__(self, period: int = 1, scale: int = 1) -> None:
        super().__init__()
        self.period, self.scale = period, scale
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(n_in, n_out, (5, 1), (2, 1), (2, 0))) for n_in, n_out in ((1, 4), (4, 8))
        )
        self.last = weight_norm(nn.Conv2d(8, 1, (3, 1), padding=(1, 0)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.avg_pool1d(x, self.scale)
        x = F.pad(x, (0, -x.shape[-1] % self.period), "reflect").unflatten(2, (-1, self.period))
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.last(x)
        return x.flatten(1), [*features, x]


class Discriminator(nn.Module):
    """Scores of real and of generated signals, and the features of both, by every part."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, y: Tensor, y_hat: Tensor) -> tuple[list[Any], ...]:
        real, fake = ([part(x) for part in self.parts] for x in (y, y_hat))
        return [s for s, _ in real], [s for s, _ in fake], [f for _, f in real], [f for _, f in fake]


class Vocoder(pl.LightningModule):
    ARGUMENTS: ClassVar = {"discriminator": ["mpd", "msd"], "discriminator_output": {"real": 0, "fake": 1}}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = Generator()
        self.mpd, self.msd = Discriminator([Part(period=2), Part(period=3)]), Discriminator([Part(), Part(scale=2)])

    @staticmethod
    def data() -> DataLoader[Any]:
        rng = torch.Generator().manual_seed(0)
        pitch, phase = 0.2 + torch.rand(2, 24, 1, generator=rng)
        audio = (0.8 * torch.sin(pitch * torch.arange(FRAMES * HOP) + 6 * phase)).unsqueeze(1)
        return DataLoader(TensorDataset(mel_spectrogram(audio), audio), batch_size=4)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (mel, y), (g, d) = batch, self.optimizers()
        y_hat = self.generator(mel)

        loss = torch.zeros(())
        for part in (self.mpd, self.msd):
            real, fake, _, _ = part(y, y_hat.detach())
            loss = loss + sum((1 - a).square().mean() + b.square().mean() for a, b in zip(real, fake, strict=True))
        d.zero_grad()
        self.manual_backward(loss)
        d.step()

        loss = 45 * F.l1_loss(mel_spectrogram(y_hat), mel)
        for part in (self.mpd, self.msd):
            _, fake, of_real, of_fake = part(y, y_hat)
            loss = loss + sum((1 - b).square().mean() for b in fake)
            pairs = zip(chain(*of_real), chain(*of_fake), strict=True)
            loss = loss + 2 * sum(F.l1_loss(b, a.detach()) for a, b in pairs)
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        both = chain(self.mpd.parameters(), self.msd.parameters())
        return [torch.optim.AdamW(each, 2e-3, betas=(0.8, 0.99)) for each in (self.generator.parameters(), both)]


if __name__ == "__main__":
    train(Vocoder, pl.Trainer)
