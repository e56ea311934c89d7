"""What DDST costs while training: the mean step time with the callback, against the same GAN without it.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--authors CLONE] [--steps 1 5] [--updates 1000]
    python benchmarks/overhead.py --accelerator gpu --sngan --precision bf16-mixed --compiled

A pair of convolutional networks with spectral norm on 16x16 images, or the paper's SNGAN pair on 32x32, under
Lightning's Trainer, with the default intervals of a run of 100,000 generator updates. The runs take turns of 5 batches
in one process. Compared are means over a whole decision interval, so every probe, exploration and decision is in them.
The paper's code masks and explores both networks and measures no balance ratio, which is part of its training loop and
not of its masking.
"""

import argparse
import os
import statistics
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peers
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rows import add, origin
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddst import DynamicSparsityCallback, GANModule
from lightning_ddst.export.benchmark import synchronize
from lightning_ddst.models import SmallDiscriminator, SmallGenerator, SNGANDiscriminator, SNGANGenerator

INTERVAL, EXPLORE_INTERVAL = 1000, 500  # the defaults of 100,000 updates; so is BR every 10th
DENSITY = 0.1
TURN = 5
WARM_UP = 100
BATCH = 64
USUAL = ("cpu", "32-true")


class Turns(Callback):
    """Lets several runs in threads train in turns of so many batches, and keeps the seconds of each turn."""

    lock = threading.Condition()
    whose = 0
    runs = 0

    def __init__(self, batches: int = TURN) -> None:
        self.length = batches
        self.number = Turns.runs
        Turns.runs += 1
        self.seconds: list[float] = []
        self._batches = 0
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batches % self.length == 0:
            with Turns.lock:
                Turns.lock.wait_for(lambda: Turns.whose == self.number)
            synchronize()
            self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self._batches += 1
        if self._batches % self.length == 0:
            synchronize()
            self.seconds.append(time.perf_counter() - self._start)
            with Turns.lock:
                Turns.whose = (self.number + 1) % Turns.runs
                Turns.lock.notify_all()


def together(fit: Callable[..., None], runs: Iterable[tuple[Any, ...]]) -> None:
    """Has several runs train in turns, in a thread each; where one fails, the process ends."""

    def one(*arguments: Any) -> None:
        try:
            fit(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the others would wait for its turn

    threads = [threading.Thread(target=one, args=arguments) for arguments in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class AuthorsMasking(Callback):
    """The paper's masking code: masks after every step of an optimizer, RigL's exploration of both networks."""

    def __init__(self, clone: Path) -> None:
        self._clone = clone

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for network, optimizer in zip((pl_module.generator, pl_module.discriminator), trainer.optimizers, strict=True):
            masking = peers.authors_masking(self._clone, network, optimizer, DENSITY, EXPLORE_INTERVAL)
            optimizer.register_step_post_hook(self._masked(masking))

    @staticmethod
    def _masked(masking: Any) -> Any:
        def hook(*_: Any) -> None:
            with torch.no_grad():
                masking.apply_mask()
                masking.steps += 1
                if masking.steps % EXPLORE_INTERVAL == 0:
                    with peers.quiet():
                        masking.truncate_weights()

        return hook


def trainer(callbacks: list[Callback], epochs: int, accelerator: str = "cpu", **options: Any) -> Trainer:
    """One that does nothing but train."""
    return Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )


def over(each: list[float], dense: list[float]) -> dict[str, Any]:
    """Seconds over those of the dense pair, turn by turn and together, as rows have it."""
    quartiles = statistics.quantiles([one / d for one, d in zip(each, dense, strict=True)], n=4)
    return {
        "threads": torch.get_num_threads(),
        "ratio": round(sum(each) / sum(dense), 4),
        "quartiles": [round(value, 4) for value in quartiles],
    }


def fit(callbacks: list[Callback], discriminator_steps: int, options: argparse.Namespace) -> None:
    shape = (3, 32, 32) if options.sngan else (1, 16, 16)
    generator = SNGANGenerator() if options.sngan else SmallGenerator(image_size=16, width=32)
    discriminator = SNGANDiscriminator() if options.sngan else SmallDiscriminator(image_size=16, width=32)
    if options.compiled:
        generator.compile()
        discriminator.compile()
    gan = GANModule(generator, discriminator, loss="hinge", discriminator_steps=discriminator_steps)
    batches = (options.updates + WARM_UP) * discriminator_steps
    images = TensorDataset(torch.rand(100 * BATCH, *shape) * 2 - 1)
    made = trainer(callbacks, batches // 100, options.accelerator, precision=options.precision)
    made.fit(gan, DataLoader(images, batch_size=BATCH))


def compare(discriminator_steps: int, options: argparse.Namespace) -> None:
    updates = options.updates
    seed_everything(0, verbose=False)
    Turns.whose = Turns.runs = 0
    sparsity = DynamicSparsityCallback(DENSITY, interval=INTERVAL, explore_interval=EXPLORE_INTERVAL)
    runs: dict[str, list[Callback]] = {"dense": [Turns()], "lightning_ddst": [Turns(), sparsity]}
    if options.authors is not None:
        runs["authors"] = [Turns(), AuthorsMasking(options.authors)]
    together(fit, [(each, discriminator_steps, options) for each in runs.values()])
    first = WARM_UP * discriminator_steps // TURN
    seconds = {name: callbacks[0].seconds[first:] for name, callbacks in runs.items()}
    dense = seconds.pop("dense")
    chosen = [name for name in ("sngan", "compiled") if getattr(options, name)]
    settings = [*chosen, options.accelerator, options.precision]
    command = f"python benchmarks/overhead.py --steps {discriminator_steps} --updates {updates}"
    command += f" --accelerator {options.accelerator} --precision {options.precision}"
    command += "".join(f" --{name}" for name in chosen)
    for name, each in seconds.items():
        row = {
            "what": ", ".join([name, *(setting for setting in settings if setting not in USUAL)]),
            "discriminator_steps": discriminator_steps,
            "updates": updates,
            **over(each, dense),
            "dense_ms": round(1e3 * sum(dense) / updates, 1),
            "command": command,
        }
        add("overhead", row | origin())
        quartiles = row["quartiles"]
        print(
            f"{discriminator_steps} D step(s) a G step, {name} / dense: {row['ratio']:.3f} over {updates} updates "
            f"(turns: quartiles {quartiles[0]:.3f}, {quartiles[1]:.3f}, {quartiles[2]:.3f}), "
            f"dense {row['dense_ms']:.0f} ms an update",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, metavar="CLONE", help="a clone of the paper's code")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5], help="discriminator steps a generator step")
    parser.add_argument("--updates", type=int, default=INTERVAL, help="of the generator, that are compared")
    parser.add_argument("--sngan", action="store_true", help="the paper's SNGAN pair, not a smaller one")
    parser.add_argument("--compiled", action="store_true", help="both networks, by torch.compile")
    parser.add_argument("--accelerator", default=USUAL[0], help="the Trainer's")
    parser.add_argument("--precision", default=USUAL[1], help="the Trainer's")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit *= 8  # several GANs are compiled in one process
    for steps in options.steps:
        compare(steps, options)
