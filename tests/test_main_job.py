"""The README's main job, and what must hold of it: ``pytest -m long tests/test_main_job.py``, on one thread."""

import time

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ddst import DynamicSparsityCallback, SampleQuality
from lightning_ddst.cli import make_cli
from lightning_ddst.models import trained_digits_cnn

pytestmark = pytest.mark.long


class ExactCounts(Callback):
    """Checks the generator's active count after every step of every optimizer."""

    def __init__(self) -> None:
        self.steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (sparsity,) = (c for c in trainer.callbacks if isinstance(c, DynamicSparsityCallback))
        parameters = dict(pl_module.named_parameters())
        masks = sparsity.masks("generator")
        target = round(0.1 * sum(mask.numel() for mask in masks.values()))

        def check(*_: object) -> None:
            self.steps += 1
            assert sum(int(mask.count_nonzero()) for mask in sparsity.masks("generator").values()) == target
            for name, mask in sparsity.masks("generator").items():
                assert not parameters[name].detach()[~mask].any()

        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(check)


def test_the_main_job_ends_near_the_dense_pair(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cli = make_cli([], run=False)
    counts = ExactCounts()
    cli.trainer.callbacks.append(counts)
    start = time.monotonic()
    cli.trainer.fit(cli.model, cli.datamodule)
    seconds = time.monotonic() - start
    printed = capsys.readouterr().out
    print(printed, f"\n{seconds:.0f} s of fitting")

    (sparsity,) = (c for c in cli.trainer.callbacks if isinstance(c, DynamicSparsityCallback))
    (distance,) = (c for c in cli.trainer.callbacks if isinstance(c, SampleQuality))
    dense = float(next(line for line in printed.splitlines() if "dense baseline" in line).split()[-1])
    assert counts.steps == 2 * sparsity.generator_updates
    assert distance.history["frechet_distance"][0][0] == 0
    assert distance.history["frechet_distance"][-1][1] <= 3 * dense

    resized = [decision for _, decision in sparsity.decisions if decision.action in ("grow", "prune")]
    assert resized
    assert all(decision.reason for decision in resized)

    samples = cli.model.sample(1000, rng=torch.Generator().manual_seed(1))
    shares = torch.bincount(trained_digits_cnn().classify(samples), minlength=10) / 1000
    assert shares.min() >= 0.02
