"""`SampleQuality` in two processes; started by torchrun, results go to files that a test reads.

torchrun --standalone --nproc-per-node 2 tests/two_processes_quality.py FOLDER
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddst import GANModule, SampleQuality
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.utils import progress

METRICS = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall")


class Counted(nn.Module):
    """Six features of 8x8 images and three logits; counts what it was given."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, 6, generator=rng) / 8)
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return torch.tanh(images.flatten(1) @ self.weight)

    def logits(self, features: Tensor) -> Tensor:
        return features[:, :3] * 2


class Bars(progress.tqdm):
    """Remembers which bars may be shown."""

    made: list[Any] = []  # noqa: RUF012

    def __init__(self, *args: Any, disable: bool | None = False, **settings: Any) -> None:
        self.made.append(disable)
        super().__init__(*args, disable=True, **settings)


def measured(processes: int, cache: Path | None = None, **loader: Any) -> Any:
    """Measures a conditional GAN on 31 images in batches of 4, so that nothing is divisible."""
    seed_everything(0, verbose=False)
    gan = GANModule(
        SmallGenerator(image_size=8, channels=1, width=4, latent_dim=4, num_classes=3),
        SmallDiscriminator(image_size=8, channels=1, width=4, num_classes=3),
        num_classes=3,
    )
    images = torch.rand(31, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = Counted()
    callback = SampleQuality(features, "counted", METRICS, samples=45, batch_size=7, kept_features=25, cache=cache)
    bars, Bars.made = Bars.made, []
    progress.tqdm = Bars
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=[callback],
        logger=False,
        enable_model_summary=False,
    )
    trainer.validate(gan, DataLoader(TensorDataset(images), batch_size=4, **loader), verbose=False)
    shown, Bars.made = Bars.made, bars
    reals = sorted(features.sizes, reverse=True)
    return {"history": callback.history, "halves": callback.real_halves, "sizes": reals, "bars": shown}


class WithoutSample(GANModule):
    """Has no method `sample`; every process has noise of its own."""

    sample = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(10 * batch_idx + self.trainer.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for network, optimizer in zip((self.generator, self.discriminator), self.optimizers(), strict=True):
            loss = self.discriminator(self(torch.randn(5, 4))).mean() * (1 if network is self.generator else -1)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.generator_updates += 1


def recorded(processes: int, folder: Path) -> Any:
    """Measures a GAN without `sample` and validation, before and after a checkpoint of its first epoch."""
    seed_everything(0, verbose=False)
    images = torch.rand(31, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def run(epochs: int, path: Path | None) -> SampleQuality:
        networks = SmallGenerator(8, 1, 4, latent_dim=4), SmallDiscriminator(8, 1, 4)
        callback = SampleQuality(Counted(), "counted", METRICS, samples=36, kept_features=25)
        trainer = Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
            callbacks=[callback],
            logger=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            max_epochs=epochs,
            limit_train_batches=2,
        )
        trainer.fit(WithoutSample(*networks), DataLoader(TensorDataset(images), batch_size=4), ckpt_path=path)
        trainer.save_checkpoint(folder / "first.ckpt")
        return callback

    first, resumed = run(1, None), run(2, folder / "first.ckpt")
    return {"first": first.history, "resumed": resumed.history, "halves": resumed.real_halves}


def cases(processes: int, folder: Path) -> dict[str, Any]:
    """Every case, by name."""
    return {
        "plain": measured(processes),
        "shuffled": measured(processes, shuffle=True),
        "first of cache": measured(processes, cache=folder / "cache"),
        "second of cache": measured(processes, cache=folder / "cache"),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    torch.save(cases(2, folder) | {"recorded": recorded(2, folder)}, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
