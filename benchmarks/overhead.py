"""What DDST costs while training: the mean step time with the callback, against the same GAN without it.

    python benchmarks/overhead.py

A pair of convolutional networks with spectral norm on 16x16 images, under Lightning's Trainer, with the default
intervals of a run of 100,000 generator updates. The dense run and the sparse one take turns of 5 batches in one
process. Compared are means over a whole decision interval, so every probe, exploration and decision is in them.
"""

import statistics
import threading
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddst import DynamicSparsityCallback, GANModule
from lightning_ddst.models import SmallDiscriminator, SmallGenerator

INTERVAL, EXPLORE_INTERVAL = 1000, 500  # the defaults of 100,000 updates; so is BR every 10th
TURN = 5
WARM_UP = 100
BATCH = 64


class Turns(Callback):
    """Lets two runs in two threads train in turns, and keeps the seconds of each turn."""

    lock = threading.Condition()
    whose = 0

    def __init__(self, number: int) -> None:
        self.number = number
        self.seconds: list[float] = []
        self._batches = 0
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batches % TURN == 0:
            with Turns.lock:
                Turns.lock.wait_for(lambda: Turns.whose == self.number)
            self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self._batches += 1
        if self._batches % TURN == 0:
            self.seconds.append(time.perf_counter() - self._start)
            with Turns.lock:
                Turns.whose = 1 - self.number
                Turns.lock.notify_all()


def fit(callbacks: list[Callback], discriminator_steps: int) -> None:
    gan = GANModule(
        SmallGenerator(image_size=16, width=32),
        SmallDiscriminator(image_size=16, width=32),
        loss="hinge",
        discriminator_steps=discriminator_steps,
    )
    batches = (INTERVAL + WARM_UP) * discriminator_steps
    images = TensorDataset(torch.rand(100 * BATCH, 1, 16, 16) * 2 - 1)
    trainer = Trainer(
        max_epochs=batches // 100,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(gan, DataLoader(images, batch_size=BATCH))


def compare(discriminator_steps: int) -> None:
    seed_everything(0, verbose=False)
    Turns.whose = 0
    turns = [Turns(0), Turns(1)]
    sparsity = DynamicSparsityCallback(0.1, interval=INTERVAL, explore_interval=EXPLORE_INTERVAL)
    runs = [
        threading.Thread(target=fit, args=(callbacks, discriminator_steps))
        for callbacks in ([turns[0]], [turns[1], sparsity])
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    dense, sparse = (turn.seconds[WARM_UP * discriminator_steps // TURN :] for turn in turns)
    low, middle, high = statistics.quantiles([s / d for s, d in zip(sparse, dense, strict=True)], n=4)
    print(
        f"{discriminator_steps} D step(s) a G step: sparse / dense {sum(sparse) / sum(dense):.3f} over {INTERVAL} "
        f"updates (turns: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}), "
        f"dense {1e3 * sum(dense) / INTERVAL:.0f} ms an update, "
        f"{sparsity.measurements} measurements, {len(sparsity.decisions)} decision(s)"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for steps in (1, 5):
        compare(steps)
