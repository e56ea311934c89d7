"""Measures the cost of DDST in training: the mean step time with the callback over that of the same GAN without it.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--authors CLONE] [--steps 1 5] [--updates 1000]
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --kinds [--changes 20]
    python benchmarks/overhead.py --kinds --accelerator gpu --pair SNGAN --precision bf16-mixed --compiled

A pair of convolutional networks with spectral norm on 16x16 images, or the paper's SNGAN or BigGAN for CIFAR-10, under
Lightning's Trainer; the runs take turns in one process. With one thread on a CPU, seconds are those that its threads
computed, so that other programs disturb less.

Without `--kinds` the intervals are the defaults of a run of 100,000 generator updates, and compared are means over a
whole decision interval, so every probe, exploration and decision is in them. The paper's code masks and explores both
networks and measures no balance ratio, which is part of its training loop and not of its masking.

With `--kinds` masks change every fifth update. Each update is compared with the dense one of the same turn, by what
happens in it, and the means over runs of 100,000 and 3,000 updates at their default intervals follow from the medians.
"""

import argparse
import logging
import statistics
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from kinds import DENSITY, FIRST, KINDS, length, mean_kinds, short_runs, sort
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rows import add, origin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA
from lightning_ddst.export.benchmark import synchronize
from lightning_ddst.models import (
    BigGANDiscriminator,
    BigGANGenerator,
    SmallDiscriminator,
    SmallGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
)

INTERVAL, EXPLORE_INTERVAL = 1000, 500  # the defaults of 100,000 updates; so is BR every 10th
TURN = 5
WARM_UP = 100
USUAL = ("cpu", "32-true")


def now() -> float:
    """Seconds of the wall clock; on a CPU with one thread only those of computing, so other programs matter less."""
    synchronize()
    return time.perf_counter() if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.thread_time()


class Turns(Callback):
    """Lets several runs in threads train in turns of so many batches, and keeps the seconds of each turn.

    It is the first callback, and its `end` the last one, so that the others' work is in their run's turn.
    """

    lock = threading.Condition()
    whose = 0
    runs = 0
    failed = False

    def __init__(self, batches: int = TURN) -> None:
        self.length = batches
        self.number = Turns.runs
        Turns.runs += 1
        self.seconds: list[float] = []
        self.end = TurnEnd(self)
        self._batches = 0
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batches % self.length == 0:
            with Turns.lock:
                Turns.lock.wait_for(lambda: Turns.whose == self.number or Turns.failed)
            if Turns.failed:
                raise RuntimeError("another run failed")
            self._start = now()

    def batch_ends(self) -> None:
        self._batches += 1
        if self._batches % self.length == 0:
            self.seconds.append(now() - self._start)
            with Turns.lock:
                Turns.whose = (self.number + 1) % Turns.runs
                Turns.lock.notify_all()


class TurnEnd(Callback):
    """Ends turns after the other callbacks."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_train_batch_end(self, *args: Any) -> None:
        self._turns.batch_ends()


def together(fit: Callable[..., None], runs: Iterable[tuple[Any, ...]]) -> None:
    """Has several runs train in turns, in a thread each.

    Raises:
        RuntimeError: If one of them failed, which ends the others.
    """
    Turns.failed = False

    def one(*arguments: Any) -> None:
        try:
            fit(*arguments)
        except BaseException:
            with Turns.lock:
                if not Turns.failed:
                    traceback.print_exc()
                Turns.failed = True
                Turns.lock.notify_all()

    threads = [threading.Thread(target=one, args=arguments) for arguments in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if Turns.failed:
        raise RuntimeError("a run failed; its error is printed above")


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


@dataclass(frozen=True)
class Setting:
    """A GAN and how it is trained.

    Attributes:
        pair: A key of `PAIRS`.
        steps: Discriminator steps a generator step.
        accelerator: The Trainer's.
        precision: The Trainer's.
        compiled: Backend with which torch.compile compiles both networks; empty if it does not.
        width: Of the networks; by default that of the pair.
        batch_size: By default that of the pair.
    """

    pair: str = "small"
    steps: int = 1
    accelerator: str = USUAL[0]
    precision: str = USUAL[1]
    compiled: str = ""
    width: int | None = None
    batch_size: int | None = None

    @property
    def command(self) -> str:
        parts = [f"--pair {self.pair} --steps {self.steps} --accelerator {self.accelerator}"]
        parts += [f"--precision {self.precision}", *([f"--compiled {self.compiled}"] if self.compiled else [])]
        return f"python benchmarks/overhead.py {' '.join(parts)}"

    @property
    def unusual(self) -> list[str]:
        """Returns the unusual settings, for the page."""
        named = [self.pair, self.accelerator, self.precision, *(["compiled"] if self.compiled else [])]
        return [name for name in named if name not in ("small", *USUAL)]


class Pair(NamedTuple):
    """Networks by their width, shape of their images, batch size, and number of classes."""

    networks: Callable[..., tuple[nn.Module, nn.Module]]
    shape: tuple[int, ...]
    batch_size: int
    classes: int | None = None


PAIRS = {
    "small": Pair(
        lambda width=32: (SmallGenerator(image_size=16, width=width), SmallDiscriminator(image_size=16, width=width)),
        (1, 16, 16),
        64,
    ),
    "SNGAN": Pair(lambda **width: (SNGANGenerator(**width), SNGANDiscriminator(**width)), (3, 32, 32), 64),
    "BigGAN": Pair(lambda **width: (BigGANGenerator(**width), BigGANDiscriminator(**width)), (3, 32, 32), 50, 10),
}
"""The paper's have its batch sizes."""


class OneCall(GANModule):
    """A GAN with the hinge loss whose discriminator scores real and generated images in one call.

    torch compiles no spectral norm that is computed twice before a backward pass.
    """

    def discriminator_loss(self, real: Tensor, labels: Tensor | None) -> Tensor:
        z = torch.randn(len(real), self.latent_dim, device=real.device, dtype=real.dtype)
        with torch.no_grad():
            images = torch.cat([real, self(z, labels)])
        scores = self.discriminator(images) if labels is None else self.discriminator(images, labels.repeat(2))
        of_real, of_fake = scores.chunk(2)
        return (1 - of_real).relu().mean() + (1 + of_fake).relu().mean()


def fit(callbacks: list[Callback], setting: Setting, updates: int) -> None:
    pair = PAIRS[setting.pair]
    generator, discriminator = pair.networks(**({} if setting.width is None else {"width": setting.width}))
    if setting.compiled:
        generator.compile(backend=setting.compiled)
        discriminator.compile(backend=setting.compiled)
    kind = OneCall if setting.compiled else GANModule
    gan = kind(generator, discriminator, discriminator_steps=setting.steps, num_classes=pair.classes)
    size = setting.batch_size or pair.batch_size
    images = torch.rand(size, *pair.shape) * 2 - 1
    batch = images if pair.classes is None else (images, torch.randint(pair.classes, (size,)))
    made = trainer(callbacks, 1, setting.accelerator, precision=setting.precision)
    made.fit(gan, DataLoader([batch] * (updates * setting.steps), batch_size=None))  # type: ignore[arg-type]


def take_turns(runs: dict[str, list[Callback]], setting: Setting, updates: int, batches: int) -> dict[str, list[float]]:
    """Has runs train in turns of so many batches.

    Returns:
        Seconds of all turns, by run.
    """
    seed_everything(0, verbose=False)
    Turns.whose = Turns.runs = 0
    turns = {name: Turns(batches) for name in runs}
    every = {name: [turns[name], *callbacks, turns[name].end] for name, callbacks in runs.items()}
    together(fit, [(each, setting, updates) for each in every.values()])
    return {name: each.seconds for name, each in turns.items()}


def compare(setting: Setting, updates: int, authors: Path | None = None) -> None:
    """Adds rows of the mean over whole decision intervals."""
    sparsity = DynamicSparsityCallback(DENSITY, interval=INTERVAL, explore_interval=EXPLORE_INTERVAL)
    runs: dict[str, list[Callback]] = {"dense": [], "lightning_ddst": [sparsity]}
    if authors is not None:
        runs["authors"] = [AuthorsMasking(authors)]
    first = WARM_UP * setting.steps // TURN
    every = take_turns(runs, setting, updates + WARM_UP, TURN)
    seconds = {name: each[first:] for name, each in every.items()}
    dense = seconds.pop("dense")
    for name, each in seconds.items():
        row = {
            "what": ", ".join([name, *setting.unusual]),
            "discriminator_steps": setting.steps,
            "updates": updates,
            **over(each, dense),
            "dense_ms": round(1e3 * sum(dense) / updates, 1),
            "command": f"{setting.command} --updates {updates}",
        }
        add("overhead", row | origin())
        quartiles = row["quartiles"]
        print(
            f"{setting.steps} D step(s) a G step, {name} / dense: {row['ratio']:.3f} over {updates} updates "
            f"(turns: quartiles {quartiles[0]:.3f}, {quartiles[1]:.3f}, {quartiles[2]:.3f}), "
            f"dense {row['dense_ms']:.0f} ms an update",
            flush=True,
        )


STATIC, AVERAGE = "static masks", "GeneratorEMA"


def compare_kinds(setting: Setting, changes: int, only: Collection[str] | None = None) -> None:
    """Adds rows of each kind of update, and of the means that follow.

    Args:
        setting: The GAN.
        changes: Mask changes of each kind.
        only: The runs, besides the dense one: kinds of mask changes, `STATIC` and `AVERAGE`; by default all.
    """
    changing: dict[str, Callback] = {**short_runs()}
    steady = {STATIC: DynamicSparsityCallback(DENSITY, method="static", probe_interval=None), AVERAGE: GeneratorEMA()}
    if only is not None:
        changing, steady = ({name: each[name] for name in each if name in only} for each in (changing, steady))
    runs: dict[str, list[Callback]] = {"dense": [], **{name: [each] for name, each in (changing | steady).items()}}
    seconds = take_turns(runs, setting, length(changes), setting.steps)
    dense = seconds.pop("dense")[FIRST - 1 :]
    ratios: dict[str, list[float]] = {}
    for run, each in seconds.items():
        turns = dict(enumerate((one / d for one, d in zip(each[FIRST - 1 :], dense, strict=True)), FIRST))
        for kind, values in (sort(turns, run) if run in changing else {run: list(turns.values())}).items():
            ratios.setdefault(kind, []).extend(values)
    quartiles = {kind: statistics.quantiles(ratios[kind], n=4) for kind in (*KINDS, *steady) if kind in ratios}
    means = mean_kinds({kind: middle for kind, (_, middle, _) in quartiles.items()})
    for kind in (*quartiles, *means):
        row = {
            "pair": setting.pair,
            "what": kind,
            "discriminator_steps": setting.steps,
            "accelerator": setting.accelerator,
            "precision": setting.precision,
            "compiled": setting.compiled,
            "threads": torch.get_num_threads(),
            "ratio": round(means[kind] if kind in means else quartiles[kind][1], 4),
            "quartiles": [round(value, 4) for value in quartiles.get(kind, ())],
            "updates": len(ratios.get(kind, ())),
            "dense_ms": round(1e3 * statistics.median(dense), 2),
            "command": f"{setting.command} --kinds --changes {changes}",
        }
        add("kinds", row | origin())
        spread = "({:.3f} to {:.3f}) ".format(*row["quartiles"][::2]) if row["quartiles"] else ""
        print(f"{kind:45} {row['ratio']:.3f} {spread}of dense, {row['dense_ms']:.1f} ms", flush=True)


def prepare() -> None:
    """Makes this process ready for several runs."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    config = torch._dynamo.config  # several GANs are compiled in one process
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, 8 * getattr(config, limit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, metavar="CLONE", help="a clone of the paper's code")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5], help="discriminator steps a generator step")
    parser.add_argument("--updates", type=int, default=INTERVAL, help="of the generator, that are compared")
    parser.add_argument("--kinds", action="store_true", help="compare kinds of updates, not the mean over an interval")
    parser.add_argument("--changes", type=int, default=20, help="mask changes of each kind that are compared")
    parser.add_argument("--pair", choices=PAIRS, default="small", help="the networks")
    parser.add_argument("--compiled", nargs="?", const="inductor", default="", help="both networks, by this backend")
    parser.add_argument("--accelerator", default=USUAL[0], help="the Trainer's")
    parser.add_argument("--precision", default=USUAL[1], help="the Trainer's")
    options = parser.parse_args()
    prepare()
    for steps in options.steps:
        setting = Setting(options.pair, steps, options.accelerator, options.precision, options.compiled)
        if options.kinds:
            compare_kinds(setting, options.changes)
        else:
            compare(setting, options.updates, options.authors)


if __name__ == "__main__":
    main()
