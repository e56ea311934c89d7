"""Results of a Trainer's run, as ``results.json`` holds them."""

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ddst.attached.readings import RunReadings
from lightning_ddst.methods.base import ROLES, Role
from lightning_ddst.report.results import (
    DecisionResults,
    FlopsResults,
    NetworkResults,
    PairResults,
    QualityResults,
    RunResults,
    Status,
    write_results,
)
from lightning_ddst.sparsity import LayerFlops
from lightning_ddst.utils.cache import first_line
from lightning_ddst.utils.lightning_packages import is_a

_PACKAGES = (
    *("lightning-ddst", "torch", "lightning", "pytorch-lightning", "torchvision", "torchmetrics", "torch-fidelity"),
    *("numpy", "jsonargparse"),
)


class Measured(Protocol):
    """The part of `SampleQuality` that results need."""

    name: str
    history: dict[str, list[tuple[int, float]]]
    real_halves: float | None


def is_interruption(exception: BaseException) -> bool:
    """Returns whether an exception ends a run by Ctrl-C or SIGTERM."""
    return isinstance(exception, KeyboardInterrupt) or is_a(exception, "SIGTERMException")


def gather_results(
    trainer: Trainer,
    pairs: Mapping[str, tuple[RunReadings, Mapping[str, Any]]],
    measured: Iterable[Measured],
    *,
    status: Status = "running",
    error: str | None = None,
) -> RunResults:
    """Gathers the results of a run so far.

    Args:
        trainer: The Trainer.
        pairs: Sparse training and its changed settings by the pair's name.
        measured: The callbacks that measure samples.
        status: Status of the run.
        error: The first line of the error that ended it.
    """
    return RunResults(
        status=status,
        error=error,
        seed=torch.initial_seed(),
        pairs={name: _of_pair(readings, settings) for name, (readings, settings) in pairs.items()},
        quality=[
            QualityResults.of_logged(metric, each.name, values, each.real_halves)
            for each in measured
            for metric, values in each.history.items()
        ],
        versions=_versions(),
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        config=_config(trainer),
        resumed_from=None if trainer.ckpt_path is None else str(trainer.ckpt_path),
    )


def _of_pair(readings: RunReadings, settings: Mapping[str, Any]) -> PairResults:
    ledger = readings.flops_ledger
    flops = LayerFlops.total(ledger.values())
    return PairResults(
        method=readings.method,
        settings=dict(settings),
        updates=readings.generator_updates,
        planned_updates=readings.plan.updates,
        networks={role: _of_network(readings, role) for role in ROLES},
        balance_ratio=readings.balance_ratio,
        decisions=[
            DecisionResults(update=update, action=each.action, density=each.density, reason=each.reason)
            for update, each in readings.decisions
        ],
        flops=FlopsResults(training=flops.sparse, measuring=flops.probes, dense=flops.dense, ratio=flops.ratio)
        if flops.dense
        else None,
    )


def _of_network(readings: RunReadings, role: Role) -> NetworkResults:
    network = readings.networks()[role]
    sizes = {name: mask.numel() for name, mask in readings.masks(role).items()}
    means = readings.mean_layer_densities
    known = all(name in means for name in sizes) and readings.generator_updates > 0
    return NetworkResults(
        initial_density=readings.settings.initial_densities[role],
        final_density=network.density,
        mean_density=sum(means[name] * size for name, size in sizes.items()) / sum(sizes.values()) if known else None,
        active_weights=network.active,
        maskable_weights=network.total,
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _config(trainer: Trainer) -> dict[str, Any] | None:
    """Returns the configuration that LightningCLI saves, in the types of JSON."""
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if is_a(callback, "SaveConfigCallback"):
            config: dict[str, Any] = json.loads(json.dumps(callback.config.as_dict(), default=str))
            return config
    return None


def run_folder(trainer: Trainer) -> str | None:
    """Returns the folder or URL of a run's logs in the first process: of the first logger that has one.

    A logger without its own folder for every run, such as MLFlowLogger, gets the one that its checkpoints have:
    ``<save_dir>/<name>/<version>``. `Trainer.log_dir` does not tell its runs apart, and is a collective call.
    """
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if folder is None and logger.save_dir is not None:
            folder = os.path.join(logger.save_dir, str(logger.name), str(logger.version))
        if folder is not None:
            return str(folder)
    return None


def save_results(trainer: Trainer, results: RunResults) -> None:
    """Writes ``results.json`` to the run's folder in the first process; warns if that is impossible.

    Nothing is written without a local folder.
    """
    folder = run_folder(trainer) if trainer.is_global_zero else None
    if folder is None or "://" in folder:
        return
    try:
        write_results(Path(folder), results)
    except OSError as error:  # a full disk should not end a long run
        rank_zero_warn(f"the results could not be written to {folder}: {first_line(error)}")
