"""The ``results.json`` of a fit."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from toys import LATENT, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, SampleQuality
from lightning_ddst.balance import DensityController
from lightning_ddst.methods import DDST
from lightning_ddst.report.results import RunResults, read_results


class Features(nn.Module):
    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :3]


class Sampled(ToyGAN):
    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        return self.generator(torch.randn(n, LATENT, generator=rng)).detach()

    def validation_step(self, batch, batch_idx) -> None:
        pass


class Raises(Callback):
    """Ends a run after a batch."""

    def __init__(self, error: BaseException, batch: int) -> None:
        self.error, self.batch = error, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.batch:
            raise self.error


def fitted(logger: Logger, *callbacks: Callback, gan: Any = None, epochs: int = 2, **settings: Any) -> None:
    seed_everything(5, verbose=False)
    trainer = toy_trainer(*callbacks, epochs=epochs, logger=logger, log_every_n_steps=5, **settings)
    trainer.fit(gan or Sampled(), toy_data(), toy_data())


def results_of(folder: Path, **settings: Any) -> tuple[DynamicSparsityCallback, RunResults]:
    sparsity = DynamicSparsityCallback(**{"generator_density": 0.25, "interval": 5, "probe_interval": 1} | settings)
    fitted(CSVLogger(folder), sparsity)
    return sparsity, read_results(folder)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_finished_run(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "--fast"])
    sparsity = DynamicSparsityCallback(0.25, interval=5, bounds=(0.0, 1e-9), probe_interval=1)
    quality = SampleQuality(Features(), "three", ["frechet_distance", "precision"])
    logger = kind(tmp_path)
    fitted(logger, sparsity, quality, num_sanity_val_steps=-1)
    assert (Path(logger.log_dir) / "results.json").is_file()
    results = read_results(tmp_path)
    assert (results.status, results.error, results.seed, results.resumed_from) == ("finished", None, 5, None)
    assert results.command == ["train.py", "--fast"]
    assert results.config is None
    assert results.versions["python"] == platform.python_version()
    assert results.versions["torch"] == torch.__version__.partition("+")[0]

    pair = results.pair
    assert pair.method == "ddst"
    assert pair.settings == {"generator_density": 0.25, "bounds": [0.0, 1e-9], "interval": 5, "probe_interval": 1}
    assert pair.updates == pair.planned_updates == 20
    generator, discriminator = pair.networks["generator"], pair.networks["discriminator"]
    assert (generator.active_weights, generator.maskable_weights) == (192, 768)
    assert generator.initial_density == generator.final_density == generator.mean_density == 0.25
    grown = [decision.action for decision in pair.decisions].count("grow")
    assert grown > 0
    assert discriminator.active_weights == sparsity.networks()["discriminator"].active
    assert discriminator.maskable_weights == 544
    assert discriminator.initial_density == 0.25
    assert discriminator.final_density == discriminator.active_weights / 544
    assert 0.25 < discriminator.mean_density < discriminator.final_density
    assert pair.balance_ratio == sparsity.balance_ratio is not None
    assert [decision.update for decision in pair.decisions] == [5, 10, 15, 20]
    assert [(d.action, d.density, d.reason) for d in pair.decisions] == [
        (d.action, d.density, d.reason) for _, d in sparsity.decisions
    ]
    assert pair.flops.ratio == sparsity.flops_ratio == pair.flops.training / pair.flops.dense
    assert 0 < pair.flops.measuring < pair.flops.training

    frechet, precision = results.quality
    assert (frechet.metric, frechet.features, frechet.weights) == ("frechet_distance", "three", "average")
    assert frechet.values == quality.history["frechet_distance"]
    assert [update for update, _ in frechet.values] == [0, 10, 20]
    assert (frechet.real_halves, precision.real_halves) == (quality.real_halves, None)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (RuntimeError("out of\nmemory"), "failed", "out of"),
        (ValueError(), "failed", "ValueError"),
    ],
)
def test_a_run_that_ends_early(error: BaseException, status: str, line: str | None, tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.25, interval=5, probe_interval=1)
    with pytest.raises((SystemExit, RuntimeError, ValueError)):
        fitted(CSVLogger(tmp_path), sparsity, Raises(error, batch=6))
    results = read_results(tmp_path)
    assert (results.status, results.error) == (status, line)
    assert (results.pair.updates, results.pair.planned_updates) == (7, 20)
    assert [decision.update for decision in results.pair.decisions] == [5]


def test_an_evaluation_writes_nothing(tmp_path) -> None:
    sparsity, gan, logger = DynamicSparsityCallback(0.25, method="static"), Sampled(), CSVLogger(tmp_path)
    trainer = toy_trainer(sparsity, logger=logger)
    trainer.fit(gan, toy_data(), toy_data())
    (Path(logger.log_dir) / "results.json").unlink()
    trainer.validate(gan, toy_data())
    with pytest.raises(RuntimeError, match="broken"):
        toy_trainer(sparsity, Broken(), logger=logger).validate(gan, toy_data())
    assert not list(tmp_path.rglob("results.json"))


class Broken(Callback):
    def on_validation_start(self, trainer, pl_module) -> None:
        raise RuntimeError("broken")


def test_a_resumed_run_names_its_checkpoint_and_keeps_its_history(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sparsity = DynamicSparsityCallback(0.25, interval=5, probe_interval=1)
    fitted(CSVLogger(tmp_path / "first"), sparsity, epochs=1, enable_checkpointing=True)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    trainer = toy_trainer(
        DynamicSparsityCallback(0.25, interval=5, probe_interval=1), epochs=2, logger=CSVLogger(tmp_path / "second")
    )
    trainer.fit(Sampled(), toy_data(), toy_data(), ckpt_path=str(checkpoint.relative_to(tmp_path)))
    results = read_results(tmp_path / "second")
    assert results.resumed_from == str(checkpoint)
    assert [decision.update for decision in results.pair.decisions] == [5, 10, 15, 20]


class Twice(ToyGAN):
    """Two GANs in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.other = ToyGAN()

    def training_step(self, batch, batch_idx) -> None:
        own, others = self.optimizers()[:2], self.optimizers()[2:]
        for gan, optimizers in ((self, own), (self.other, others)):
            gan.optimizers = lambda optimizers=optimizers: optimizers
            gan.manual_backward = lambda loss: loss.backward()
            ToyGAN.training_step(gan, batch, batch_idx)
            del gan.optimizers

    def configure_optimizers(self) -> list[Any]:
        return [*super().configure_optimizers(), *self.other.configure_optimizers()]


def test_every_pair_has_its_results(tmp_path) -> None:
    first = DynamicSparsityCallback(0.25, method="static", generator="generator", discriminator="discriminator")
    second = DynamicSparsityCallback(
        0.5, method="sdst", generator="other.generator", discriminator="other.discriminator"
    )
    fitted(CSVLogger(tmp_path), first, second, gan=Twice())
    results = read_results(tmp_path)
    assert list(results.pairs) == ["generator", "other.generator"]
    assert [pair.method for pair in results.pairs.values()] == ["static", "sdst"]
    assert results.pairs["other.generator"].networks["generator"].final_density == 0.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "dense"}, {}),
        ({"method": "dense", "discriminator_density": 0.5}, {}),
        ({"method": "posthoc", "dense_layers": [], "interval": None}, {"generator_density": 0.25}),
        (
            {"method": "ramp", "discriminator_density": 0.5, "max_discriminator_density": 0.75},
            {"generator_density": 0.25, "discriminator_density": 0.5, "max_discriminator_density": 0.75},
        ),
        (
            {"growth": "random", "dense_layers": ["generator.0"], "seed": 3, "stop_on_divergence": True},
            {
                "generator_density": 0.25,
                "growth": "random",
                "seed": 3,
                "dense_layers": ["generator.0"],
                "stop_on_divergence": True,
            },
        ),
        ({"generator_density": None, "method": DDST(generator_density=0.5)}, {"generator_density": 0.5}),
    ],
)
def test_settings_are_those_that_differ_from_the_defaults(settings: dict, expected: dict) -> None:
    given = {"generator_density": 0.25} | settings
    assert DynamicSparsityCallback(**given).changed_settings == expected


def test_an_object_among_the_settings_is_written_in_words(tmp_path) -> None:
    method = DDST(generator_density=0.25, controller=DensityController((0.1, 0.2)))
    _, results = results_of(tmp_path, generator_density=None, method=method)
    assert results.pair.settings["controller"].startswith("DensityController(bounds=(0.1, 0.2)")


def test_a_dense_run_has_density_1(tmp_path) -> None:
    _, results = results_of(tmp_path, method="dense", probe_interval=None)
    assert "generator_density" not in results.pair.settings
    assert {network.final_density for network in results.pair.networks.values()} == {1.0}
    assert results.pair.balance_ratio is None
    assert results.pair.decisions == []


class OtherLogger(Logger):
    """A logger of runs that has no folder of its own, such as MLFlowLogger."""

    name, version = "experiment", "run_3"

    def __init__(self, folder: str | None) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str | None:
        return self.folder

    def log_metrics(self, metrics, step=None) -> None:
        pass

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass


def test_the_folder_under_other_loggers_is_that_of_checkpoints(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    fitted(OtherLogger("mlruns"), DynamicSparsityCallback(0.25, method="static"), enable_checkpointing=True)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (results,) = tmp_path.rglob("results.json")
    assert checkpoint.parents[1] == results.parent == tmp_path / "mlruns" / "experiment" / "run_3"


@pytest.mark.parametrize("logger", [OtherLogger(None), OtherLogger("s3://bucket"), False])
def test_without_a_local_folder_nothing_is_written(logger: Any, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    fitted(logger, DynamicSparsityCallback(0.25, method="static"))
    assert not list(tmp_path.rglob("results.json"))


def test_a_trial_writes_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    fitted(CSVLogger(tmp_path), DynamicSparsityCallback(0.25, method="static"), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path) -> None:
    class Blocked(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            (Path(trainer.logger.log_dir) / "results.json").mkdir()

    with pytest.warns(UserWarning, match="the results could not be written to"):
        fitted(CSVLogger(tmp_path), DynamicSparsityCallback(0.25, method="static"), Blocked())


def test_the_file_is_json(tmp_path) -> None:
    results_of(tmp_path)
    (path,) = tmp_path.rglob("results.json")
    assert json.loads(path.read_text())["schema"] == 1
