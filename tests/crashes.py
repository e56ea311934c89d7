"""Runs that are killed and resumed, to be compared with runs that were not."""

import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_ddst import DynamicSparsityCallback, GeneratorEMA
from lightning_ddst.sparsity.sharding import full_tensor
from lightning_ddst.utils import distributed


class KilledError(Exception):
    """Stands for the death of the process."""


class Kill(Callback):
    """Ends a run before a batch, counted from the beginning of the run."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self._batch:
            raise KilledError


class Signal(Callback):
    """Sends a signal to this process in the middle of a batch, counted from the beginning of the run."""

    def __init__(self, number: int, batch: int, times: int = 1) -> None:
        self._number, self._batch, self._times = number, batch, times

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self._batch:
            for _ in range(self._times):
                signal.raise_signal(self._number)  # handled at once: two that wait to be handled are one


class History(Callback):
    """Records the data, logs and masks of every batch, by the number of the batch."""

    def __init__(self) -> None:
        self.batches: dict[int, tuple[Any, ...]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        (sparsity,) = (c for c in trainer.callbacks if isinstance(c, DynamicSparsityCallback))
        self.batches[trainer.fit_loop.total_batch_idx + 1] = (
            args[1][0].sum().item(),
            sparsity.generator_updates,
            sparsity.generator_density,
            sparsity.discriminator_density,
            sparsity.balance,
            tuple(network.checksum for network in sparsity.networks().values()),
            sparsity.decisions[-1:],
            torch.get_rng_state().sum().item(),
            sum(full_tensor(p.detach()).double().sum().item() for p in pl_module.parameters()),
        )


class Logs(CSVLogger):
    """Keeps what was logged, by step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lines: dict[tuple[int, str], float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines |= {(step or 0, name): value for name, value in metrics.items()}


def fit(
    make: Any,
    data: Any,
    folder: Path,
    *,
    every: int | None,
    kill: int | None = None,
    resume: Path | None = None,
    epochs: int = 4,
    accelerator: str = "cpu",
    devices: int = 1,
    strategy: Any = "auto",
    **sparsity: Any,
) -> tuple[dict[str, Tensor], dict[int, tuple[Any, ...]], dict[tuple[int, str], float], DynamicSparsityCallback]:
    """Fits a GAN with a checkpoint every few batches, or every epoch, until it is killed or done."""
    seed_everything(5, verbose=False)
    gan = make()
    history, logs = History(), Logs(folder)
    callback = DynamicSparsityCallback(**sparsity)
    steps = {} if every is None else {"train_time_interval": None, "every_n_train_steps": every}
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, **steps)
    ema = GeneratorEMA(0.9)
    callbacks: list[Callback] = [callback, ema, history, checkpoint]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy() if callable(strategy) else strategy,
        logger=logs,
        log_every_n_steps=1,
        callbacks=callbacks if kill is None else [*callbacks, Kill(kill)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    try:
        trainer.fit(gan, data(), ckpt_path=resume)
    except KilledError:
        assert kill is not None
    weights = {**gan.state_dict(), **{f"average {name}": value for name, value in ema.averages().items()}}
    weights = {name: full_tensor(value) for name, value in weights.items()}
    return weights, history.batches, logs.lines, callback


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))


def assert_resumed_alike(make: Any, data: Any, folder: Path, *, every: int | None, kill: int, **settings: Any) -> Any:
    """Kills a run before a batch, resumes it from its last checkpoint, and compares it with one never killed."""
    weights, history, logs, callback = fit(make, data, folder / "whole", every=every, **settings)
    fit(make, data, folder / "killed", every=every, kill=kill, **settings)
    checkpoint = last_checkpoint(folder / "killed")
    if checkpoint.is_file():
        torch.load(checkpoint, weights_only=True)
    resumed, rest, lines, again = fit(make, data, folder / "resumed", every=every, resume=checkpoint, **settings)
    assert rest
    assert min(rest) <= kill
    first = min(rest)
    assert history[first] == rest[first]
    assert {batch: history[batch] for batch in rest} == rest
    assert max(rest) == max(history)
    assert {line: logs[line] for line in lines} == lines
    assert weights.keys() == resumed.keys()
    for name in weights:
        if distributed.get_rank() and "running_" in name:
            continue  # each process has statistics of its own, and the first one's are saved
        assert torch.equal(weights[name], resumed[name]), name
    for role in ("generator", "discriminator"):
        masks, own = callback.masks(role), again.masks(role)
        assert all(torch.equal(masks[name], own[name]) for name in masks)
    assert callback.decisions == again.decisions
    return callback
