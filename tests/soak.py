"""A long run on digits, started again and again by tests/test_soak.py: `python tests/soak.py FOLDER UPDATES`."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer
from toys import WEIGHTS_ONLY

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA
from lightning_ddst.data import DigitsDataModule
from lightning_ddst.models import SmallDiscriminator, SmallGenerator

SAVED_EVERY = 1000
PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch(Callback):
    """Checks every step of an optimizer, and writes down updates of this process and its memory."""

    def __init__(self, folder: Path) -> None:
        self._lines = folder / f"memory-{os.getpid()}.txt"
        self._updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self._sparsity,) = (c for c in trainer.callbacks if isinstance(c, DynamicSparsityCallback))
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._check)

    def _check(self, optimizer: Optimizer, *_: Any) -> None:
        for network in self._sparsity.networks().values():
            assert network.active == round(network.target * network.total)
            for name, mask in network.masks.items():
                assert int(mask.sum()) == network.layer_counts[name]
                assert not network.parameters[name].detach()[~mask].any()

    def on_train_batch_end(self, *_: Any) -> None:
        self._updates += 1
        if self._updates % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with self._lines.open("a") as file:
                file.write(f"{self._updates} {pages * PAGE / 2**20}\n")


def main(folder: Path, updates: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    gan = GANModule(SmallGenerator(8, 1, 4, 16), SmallDiscriminator(8, 1, 4))
    sparsity = DynamicSparsityCallback(0.2, interval=200, explore_interval=100, probe_interval=5)
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=2 * SAVED_EVERY)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=updates // 700,
        callbacks=[sparsity, GeneratorEMA(), checkpoint, Watch(folder)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    saved = sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime)
    data = DigitsDataModule(batch_size=16, batches_per_epoch=700)
    trainer.fit(gan, data, ckpt_path=saved[-1] if saved else None, **WEIGHTS_ONLY)
    weights = {name: value.clone() for name, value in gan.state_dict().items()}
    masks = {**sparsity.masks("generator"), **sparsity.masks("discriminator")}
    decisions = [(update, decision.action) for update, decision in sparsity.decisions]
    torch.save(
        {"updates": sparsity.generator_updates, "weights": weights, "masks": masks, "decisions": decisions},
        folder / "end.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
