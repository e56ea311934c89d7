"""The configurations that come with the package: the cells of the paper's tables."""

from copy import deepcopy

import numpy as np
import pytest
import yaml
from commands import parsed
from toys import for_method, toy_trainer

from lightning_ddst import DynamicSparsityCallback, SampleQuality
from lightning_ddst.balance import DensityController, DensityRamp
from lightning_ddst.cli import make_cli
from lightning_ddst.methods import Resize
from lightning_ddst.utils.config_arguments import CONFIGS

SYSTEMS = {
    "cifar10_sngan": (32, 100_000, 6),
    "stl10_sngan": (48, 100_000, 6),
    "cifar10_biggan": (32, 200_000, 5),
    "tiny_imagenet_biggan": (64, 200_000, 5),
}
"""Their image size, generator updates, and batches' worth of optimizer steps a generator update."""
METHODS = sorted(CONFIGS.keys() - SYSTEMS.keys() - {"digits", "images", "no_inception", "paper"})
DENSITIES = (0.1, 0.2, 0.3, 0.5)


def sparsity_of(name):
    """Returns a configuration's settings of sparsity."""
    return yaml.safe_load(CONFIGS[name].read_text())["sparsity"]


def cell(system, method, density):
    named = ["--config", "paper", "--config", system, "--config", method]
    return [*named, f"--sparsity.generator_density={density}"]


def test_the_papers_systems_and_methods_are_there():
    assert METHODS == [
        "dda",
        "ddst_real_sign",
        "ddst_relaxed",
        "ddst_strict",
        "dense",
        "imp",
        "posthoc",
        "ramp",
        "sdst_rigl_balanced",
        "sdst_rigl_strong",
        "sdst_set_balanced",
        "sdst_set_strong",
        "static_balanced",
        "static_strong",
    ]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_cell_of_the_papers_tables_parses(monkeypatch, system):
    command = parsed(monkeypatch, *cell(system, "dense", 0.1))
    size, updates, _ = SYSTEMS[system]
    model, data = command.config.model.init_args, command.config.data.init_args
    assert (model.generator.init_args.image_size, model.discriminator.init_args.image_size) == (size, size)
    assert command.config.trainer.max_epochs * data.batches_per_epoch == updates * model.discriminator_steps
    for method in METHODS:
        files = [argument for name in ("paper", system, method) for argument in ("--config", str(CONFIGS[name]))]
        config = command.parser.parse_args([*files, "--sparsity.generator_density=0.2"])
        assert config.model == command.config.model
        settings = for_method(**config.sparsity.as_dict())
        assert settings["generator_density"] == 0.2
        for density in DENSITIES:
            DynamicSparsityCallback(**settings | {"generator_density": density})


def test_what_the_methods_are():
    def made(name):
        return DynamicSparsityCallback(**for_method(**sparsity_of("paper") | sparsity_of(name)))

    def controller(name):
        (resize,) = (each for each in made(name).settings.mask_updates() if isinstance(each, Resize))
        return resize.controller

    for name in METHODS:
        assert made(name).generator_density == (1.0 if name in ("dense", "posthoc", "imp") else 0.1)
        starts = 1.0 if name in ("dense", "posthoc", "imp") or name.endswith("strong") else 0.1
        assert made(name).discriminator_density == starts
    assert controller("ddst_relaxed") == DensityController((0.45, 0.55), 0.05, 0.05, 1.0)
    assert controller("ddst_strict") == DensityController((0.45, 0.55), 0.05, 0.05, 0.5)
    assert controller("dda") == DensityController((0.5, 0.65), 0.05, 0.05, 1.0)
    assert controller("ddst_real_sign") == DensityController((0.5, 0.7), 0.05, 0.05, 1.0, "real_sign")
    assert controller("ramp") == DensityRamp(0.1, 1.0)
    assert [sparsity_of(name).get("interval") for name in ("paper", "ddst_relaxed", "ddst_strict")] == [
        1000,
        None,
        2000,
    ]


def test_names_and_files_can_be_mixed(monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("sparsity: {generator_density: 0.07}")
    command = parsed(monkeypatch, "--config=paper", "--config", "cifar10_sngan", "--config", str(file))
    assert command.config.sparsity.generator_density == 0.07
    assert command.config.sparsity.explore_interval == 500


def test_all_missing_files_are_listed_before_anything_is_made(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["fit", *cell("cifar10_sngan", "ddst_relaxed", 0.1)]

    def missing(*options):
        with pytest.raises(SystemExit) as error:
            make_cli([*command, *options])
        assert error.value.code == 2
        assert list(tmp_path.iterdir()) == []
        return sorted(capsys.readouterr().err.splitlines())

    def starts(option, path):
        return f"lightning-ddst: error: {option}: {path}"

    weights = "weights-inception-2015-12-05-6726825d.pth"
    of_data, of_weights = missing()
    assert of_data.startswith(starts("--data.root=data", f"neither {tmp_path}/data/cifar-10-batches-py nor "))
    assert of_weights.startswith(
        starts(
            f"--trainer.callbacks.features.weights={weights}", f"{tmp_path}/{weights} does not exist. Download https"
        )
    )
    of_data, of_weights = missing("--data.root", "elsewhere", "--trainer.callbacks.features.weights", "own.pth")
    assert of_data.startswith(starts("--data.root=elsewhere", f"neither {tmp_path}/elsewhere/"))
    assert of_weights.startswith(starts("--trainer.callbacks.features.weights=own.pth", f"{tmp_path}/own.pth does"))
    (of_data,) = missing("--config", "no_inception")
    assert of_data.startswith(starts("--data.root=data", "neither"))


def test_a_run_without_inception_needs_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    options = ["--data=lightning_ddst.data.ArrayDataModule", "--data.path=images.npz", "--data.batch_size=2"]
    command = [*cell("cifar10_sngan", "ddst_relaxed", 0.1), "--config=no_inception", *options, "--data.image_size=32"]
    callbacks = make_cli([*command, "--trainer.accelerator=cpu"], run=False).trainer.callbacks
    assert [each.names for each in callbacks if isinstance(each, SampleQuality)] == [
        ["frechet_distance/random_resnet18"]
    ]


# ---- a few updates of each ---------------------------------------------------------------------------

NARROW = {
    "cifar10_sngan": (8, 8),
    "stl10_sngan": (4, 2),
    "cifar10_biggan": (2, 2),
    "tiny_imagenet_biggan": (2, 2),
}
"""Widths of generator and discriminator."""
UPDATES = 4  # a run's length is known after two


def cells():
    """Every system and every method at least once; the whole product takes minutes."""
    for system in SYSTEMS:
        for method in METHODS:
            short = system == "cifar10_sngan" or method == "ddst_relaxed"
            yield pytest.param(system, method, marks=[] if short else pytest.mark.long)


@pytest.fixture(scope="module")
def narrow(request, tmp_path_factory):
    """A system at reduced width, on made-up images of its shape."""
    system = request.param
    size, _, steps = SYSTEMS[system]
    folder = tmp_path_factory.mktemp(system)
    images = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(8))
    generator, discriminator = NARROW[system]
    changes = [
        f"--model.init_args.generator.init_args.width={generator}",
        f"--model.init_args.discriminator.init_args.width={discriminator}",
        "--data=lightning_ddst.data.ArrayDataModule",
        f"--data.init_args.path={folder / 'images.npz'}",
        f"--data.init_args.image_size={size}",
        "--data.init_args.batch_size=2",
        f"--data.init_args.batches_per_epoch={UPDATES * (steps - 1)}",
        "--trainer.callbacks=null",
    ]
    command = make_cli([*cell(system, "ddst_relaxed", 0.5), *changes], run=False)
    return command.model, command.datamodule


@pytest.mark.parametrize(("narrow", "method"), cells(), indirect=["narrow"])
def test_every_system_trains_by_every_method(narrow, method):
    model, data = narrow
    often = {"interval": 1, "explore_interval": 1, "probe_interval": 1}
    sparsity = DynamicSparsityCallback(
        **for_method(**sparsity_of("paper") | sparsity_of(method) | {"generator_density": 0.5} | often)
    )
    toy_trainer(sparsity, limit_val_batches=0).fit(deepcopy(model), data)
    assert (sparsity.generator_updates, sparsity.measurements) == (UPDATES, UPDATES)
    final = 1.0 if method == "dense" else 0.5
    assert sparsity.generator_density == pytest.approx(final, abs=1e-4)
    if method in ("ramp", "posthoc") or method.endswith("strong"):
        assert sparsity.discriminator_density == 1.0
    for network in sparsity.networks().values():
        for name, mask in network.masks.items():
            weight = network.parameters[name]
            assert weight.isfinite().all(), name
            assert not weight[~mask].any(), name
