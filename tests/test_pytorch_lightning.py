"""The package under Trainers of `pytorch_lightning`, whose classes are not those of `lightning.pytorch`.

`pytest -m long tests/test_pytorch_lightning.py` runs all other tests that train with it, too; see lightning_package.py.
"""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from inspect import isclass
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_processes import assert_alike, results_of
from torch import nn
from toys import LATENT, Toy, toy_data

import lightning_ddst
from lightning_ddst import (
    DynamicSparsityCallback,
    GeneratorEMA,
    InterruptCheckpoint,
    RunSummary,
    SampleGrid,
    SampleQuality,
    SparsityPlots,
)
from lightning_ddst import pytorch_lightning as ours
from lightning_ddst.data import ResumableLoader
from lightning_ddst.export.command import export
from lightning_ddst.models import SmallDiscriminator, SmallGenerator

PACKAGES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
BATCHES = 10


class Images(Toy):
    """A toy GAN whose vectors are images of 4 x 4."""

    def validation_step(self, batch, batch_idx):
        pass

    def sample(self, n, rng=None):
        return self.generator(torch.randn(n, LATENT, generator=rng)).view(n, 1, 4, 4)


class Pixels(nn.Module):
    num_features = 16

    def forward(self, images):
        return images.flatten(1)


def fit(package, folder, *others, resume=None):
    """A run with everything of this package that a Trainer takes."""
    pl = PACKAGES[package]
    pl.seed_everything(1, verbose=False)
    gan = type("GAN", (Images, pl.LightningModule), {})()
    io = ours.AtomicCheckpointIO() if pl is pytorch_lightning else lightning_ddst.AtomicCheckpointIO()
    callbacks = [
        DynamicSparsityCallback(0.3, interval=5, explore_interval=4, probe_interval=1, bounds=(0.2, 0.3), seed=0),
        GeneratorEMA(0.9),
        SampleQuality(Pixels(), "pixels", samples=64, value_range=(-50, 50)),
        SampleGrid(4, value_range=(-50, 50)),
        RunSummary(),
        InterruptCheckpoint(),
        pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=14),  # of two steps a batch
        *others,
    ]
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=pl.loggers.TensorBoardLogger(folder),
        log_every_n_steps=5,
        plugins=[io],
        callbacks=callbacks,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images = toy_data().dataset.tensors[0].view(-1, 1, 4, 4)
    trainer.fit(
        gan,
        ResumableLoader(toy_data().dataset, 8, BATCHES, seed=0),
        torch.utils.data.DataLoader(images, batch_size=16),
        ckpt_path=resume,
    )
    return gan, trainer


def outcome(gan, trainer):
    """Weights, masks, decisions, BR, the average, and the measured quality."""
    sparsity, ema, quality = trainer.callbacks[:3]
    return {
        **{name: value.clone() for name, value in gan.state_dict().items()},
        **{f"mask of {name}": mask for role in sparsity.networks() for name, mask in sparsity.masks(role).items()},
        **{f"average of {name}": value for name, value in ema.averages().items()},
        "decisions": sparsity.decisions,
        "balance": sparsity.balance,
        "updates": (sparsity.generator_updates, sparsity.plan.updates),
        "quality": quality.history,
        "operations": sparsity.flops_ratio,
    }


def assert_same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder and the outcome of a run under the Trainer of each package."""
    made = {}
    for package in PACKAGES:
        folder = tmp_path_factory.mktemp(package)
        gan, trainer = fit(package, folder, SparsityPlots(every_n_validations=4))  # once, when training ends
        made[package] = folder, outcome(gan, trainer), trainer
    return made


def test_a_run_is_the_same_to_the_last_bit_under_either_trainer(runs):
    (_, one, _), (_, other, _) = runs.values()
    assert one["updates"] == (30, 30)
    assert len(one["quality"]["frechet_distance"]) == 3
    assert len(one["decisions"]) == 6
    assert_same(one, other)


def test_tensorboard_gets_the_same_scalars_texts_images_and_pages(runs):
    logged = {}
    for package, (_, _, trainer) in runs.items():
        events = EventAccumulator(trainer.log_dir, {"tensors": 0, "scalars": 0, "images": 0}).Reload()
        scalars = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        times = ("epoch", "hp_metric")
        logged[package] = {tag: values for tag, values in scalars.items() if tag not in times}
        assert {"custom_scalars__config__", "about/what_happened/text_summary"} <= set(events.Tags()["tensors"])
        assert {"samples", "plots/balance"} <= set(events.Tags()["images"])
    one, other = logged.values()
    assert {"balance/ratio", "density/discriminator", "frechet_distance/pixels"} <= set(one)
    assert one == other


@pytest.mark.parametrize("saved_by", PACKAGES)
@pytest.mark.parametrize("resumed_by", PACKAGES)
def test_a_run_resumes_exactly_in_the_middle_of_an_epoch_also_under_the_other_trainer(
    runs, saved_by, resumed_by, tmp_path
):
    folder, whole, _ = runs[saved_by]
    assert_same(whole, outcome(*fit(resumed_by, tmp_path, resume=folder / "step=42.ckpt")))  # after 21 batches of 30


class Interrupting:
    """Sends SIGTERM in the fifth batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 4:
            signal.raise_signal(signal.SIGTERM)


def test_an_interrupted_run_is_saved_and_ends_with_the_packages_own_exception(tmp_path, capsys):
    callback = type("Interrupts", (Interrupting, pytorch_lightning.Callback), {})()
    with pytest.raises(pytorch_lightning.utilities.exceptions.SIGTERMException):
        fit("pytorch_lightning", tmp_path, callback)
    (path,) = tmp_path.glob("lightning_logs/version_0/checkpoints/interrupted.ckpt")
    assert "ddst, 5 generator updates" in capsys.readouterr().out  # RunSummary
    saved = torch.load(path, weights_only=True)
    assert saved["callbacks"]["DynamicSparsityCallback"]["training"]["updates"] == 5


def test_max_time_gives_the_runs_length():
    sparsity = DynamicSparsityCallback(0.3)
    gan = type("GAN", (Toy, pytorch_lightning.LightningModule), {})()
    pytorch_lightning.Trainer(
        max_epochs=-1,
        max_time=timedelta(seconds=0.3),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[sparsity],
    ).fit(gan, toy_data())
    assert sparsity.plan.updates >= sparsity.generator_updates > 0


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "WeightAveraging"])
def test_its_callbacks_that_write_weights_are_rejected(name, tmp_path):
    if not hasattr(pytorch_lightning.callbacks, name):
        pytest.skip("it came with a later version of Lightning")
    arguments = {"swa_lrs": 1e-2} if name.startswith("Stochastic") else {}
    other = getattr(pytorch_lightning.callbacks, name)(**arguments)
    with pytest.raises(ValueError, match=rf"^{name} .*`GeneratorEMA`"):
        fit("pytorch_lightning", tmp_path, other)


# ---- classes of lightning_ddst.pytorch_lightning ---------------------------------------------------------


def test_every_class_that_inherits_from_lightnings_has_a_counterpart():
    public = {name: getattr(lightning_ddst, name) for name in lightning_ddst.__all__}
    public |= {name: getattr(lightning_ddst.data, name) for name in lightning_ddst.data.__all__}
    bases = {
        lightning.pytorch.Callback: pytorch_lightning.Callback,
        lightning.pytorch.LightningModule: pytorch_lightning.LightningModule,
        lightning.pytorch.LightningDataModule: pytorch_lightning.LightningDataModule,
        lightning.pytorch.plugins.CheckpointIO: pytorch_lightning.plugins.CheckpointIO,
    }
    checked = 0
    for name, kind in public.items():
        for base, other in bases.items():
            if isclass(kind) and issubclass(kind, base):
                counterpart = getattr(ours, name)
                assert issubclass(counterpart, other)
                assert counterpart.__qualname__ == name  # the key of its state in checkpoints
                checked += 1
    assert checked == 17


def train_module(pl, module, data):
    pl.seed_everything(0, verbose=False)
    gan = module(
        SmallGenerator(image_size=8, channels=1, width=4, latent_dim=4),
        SmallDiscriminator(image_size=8, channels=1, width=4),
    )
    sparsity = DynamicSparsityCallback(0.3, interval=5, explore_interval=4, seed=1)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[sparsity],
        limit_val_batches=1,
    )
    trainer.fit(gan, datamodule=data(batch_size=8, batches_per_epoch=6))
    return gan, sparsity


def test_gan_module_and_a_data_module_train_as_under_the_other_package():
    gan, sparsity = train_module(pytorch_lightning, ours.GANModule, ours.DigitsDataModule)
    same, _ = train_module(lightning.pytorch, lightning_ddst.GANModule, lightning_ddst.data.DigitsDataModule)
    assert gan.generator_updates == sparsity.generator_updates == 12
    assert_same(dict(gan.state_dict()), dict(same.state_dict()))


CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: lightning_ddst.pytorch_lightning.DynamicSparsityCallback
    init_args: {generator_density: 0.3}
  - lightning_ddst.pytorch_lightning.GeneratorEMA
model:
  class_path: lightning_ddst.pytorch_lightning.GANModule
  init_args:
    generator:
      class_path: lightning_ddst.models.SmallGenerator
      init_args: {image_size: 8, channels: 1, width: 4}
    discriminator:
      class_path: lightning_ddst.models.SmallDiscriminator
      init_args: {image_size: 8, channels: 1, width: 4}
data:
  class_path: lightning_ddst.pytorch_lightning.DigitsDataModule
  init_args: {batch_size: 8, batches_per_epoch: 3}
"""


def test_its_command_line_takes_them_and_what_it_saved_is_exported(tmp_path, monkeypatch):
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    cli = LightningCLI(
        pytorch_lightning.LightningModule,
        pytorch_lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=["fit", "--config", str(path)],
    )
    assert cli.trainer.callbacks[0].generator_updates == 3
    assert cli.trainer.callbacks[0].generator_density == pytest.approx(0.3, abs=1e-3)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    export([str(checkpoint), "--formats", "dense"])
    (exported,) = tmp_path.rglob("generator.safetensors")
    weights = cli.model.generator.state_dict()
    assert weights.keys() == load_file(exported).keys()


# ---- two processes ---------------------------------------------------------------------------------------


def test_two_processes_train_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_PACKAGE", "pytorch_lightning")
    results = results_of(tmp_path, "methods ddst", "GANModule ddp")
    assert results.code == 0, results.printed[-4000:]
    for case in ("methods ddst", "GANModule ddp"):
        assert_alike(*results(case))


# ---- all tests that train --------------------------------------------------------------------------------

COVERED = [
    "callbacks",
    "gan",
    "methods",
    "balance",
    "utils",
    "test_resume.py",
    "test_processes.py",
    "test_precision.py",
]
THE_COMMANDS = "not command and not own_is_known and not from_yaml and not test_run_folders"
"""`lightning-ddst` makes Trainers of lightning.pytorch."""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_tests_that_train_pass_with_it():
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *(str(here / each) for each in COVERED), "-k", THE_COMMANDS],
        env=os.environ | {"LIGHTNING_PACKAGE": "pytorch_lightning"},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
