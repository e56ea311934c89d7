"""A GAN of a user's own, small enough for a test to train it in a second."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddst.attached.options import METHOD_ARGUMENTS
from lightning_ddst.methods.base import unused_arguments

PIXELS = 16
LATENT = 8
WEIGHTS_ONLY = {"weights_only": True} if "weights_only" in signature(Trainer.fit).parameters else {}
"""The argument of `Trainer.fit`, which came with Lightning 2.6."""


class Toy:
    """A ToyGAN without its base class, the LightningModule of either package."""

    def __init__(self, names: tuple[str, str] = ("generator", "discriminator")) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.names = names
        self.example_input_array = torch.zeros(2, LATENT)  # which masks of whole channels are traced with
        generator = nn.Sequential(nn.Linear(LATENT, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, PIXELS))
        discriminator = nn.Sequential(
            spectral_norm(nn.Linear(PIXELS, 32)), nn.ReLU(), nn.Dropout(0.1), spectral_norm(nn.Linear(32, 1))
        )
        setattr(self, names[0], generator)
        setattr(self, names[1], discriminator)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return getattr(self, self.names[0]), getattr(self, self.names[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        generator, discriminator = self.networks()
        (real,) = batch
        fake = generator(torch.randn(len(real), LATENT)).detach()
        loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()
        loss = -discriminator(generator(torch.randn(len(real), LATENT))).mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()

    def configure_optimizers(self) -> list[Adam]:
        return [Adam(network.parameters(), lr=1e-2, betas=(0.0, 0.9)) for network in self.networks()]


class ToyGAN(Toy, LightningModule):
    """Hinge loss, discriminator first; knows nothing of this package."""


@contextmanager
def toggled(module: LightningModule, optimizer: Any) -> Iterator[None]:
    """Lightning's `toggled_optimizer`, which came with 2.6."""
    module.toggle_optimizer(optimizer)
    yield
    module.untoggle_optimizer(optimizer)


class OwnLinear(nn.Module):
    """A layer of a user's own with a bare weight that is scaled at run time, as in StyleGAN2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5)


class Recurrent(nn.Module):
    """Reads a vector as a sequence of four steps."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs // 4, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unflatten(1, (4, -1)))[0].flatten(1)


class OtherLayersGAN(ToyGAN):
    """Weight norm, a recurrent layer and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            weight_norm(nn.Linear(LATENT, 16)), nn.ReLU(), Recurrent(16), OwnLinear(32, PIXELS)
        )
        self.discriminator = nn.Sequential(
            weight_norm(nn.Linear(PIXELS, 32)), nn.ReLU(), nn.Dropout(0.1), weight_norm(nn.Linear(32, 1), dim=1)
        )


def toy_data(batches: int = 10, batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """Correlated vectors away from the origin, always the same, in a fixed order."""
    rng = torch.Generator().manual_seed(0)
    mixed = torch.randn(batches * batch_size, 4, generator=rng) @ torch.randn(4, PIXELS, generator=rng)
    return DataLoader(TensorDataset(mixed + 2), batch_size=batch_size)


def toy_trainer(*callbacks: Callback, epochs: int = 1, folder: Path | None = None, **settings: Any) -> Trainer:
    """A quiet Trainer; it logs and saves only where it has a folder."""
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": folder is not None,
        "enable_checkpointing": folder is not None,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | settings
    return Trainer(callbacks=list(callbacks), **settings)


def for_method(method: str, **settings: Any) -> dict[str, Any]:
    """The arguments without those that belong to other methods."""
    unused = unused_arguments(method, [name for name in settings if name in METHOD_ARGUMENTS])
    return {"method": method} | {name: value for name, value in settings.items() if name not in unused}


def trained(*callbacks: Callback, seed: int = 0, gan: ToyGAN | None = None, epochs: int = 1, **settings: Any) -> ToyGAN:
    """A toy GAN after `epochs` times 10 updates of each network."""
    seed_everything(seed, verbose=False)
    gan = gan or ToyGAN()
    toy_trainer(*callbacks, epochs=epochs, **settings).fit(gan, toy_data())
    return gan
