"""The command gives networks the size of the data's images: ``--config images``, and data modules of every kind."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from test_cli import CALLBACKS

from lightning_ddst.cli import make_cli
from lightning_ddst.utils.config_arguments import CONFIGS

NETWORK = "--model.init_args.{}.init_args.{}={}"


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of forty images of one size and mode."""

    def make(size=(16, 16), mode="RGB"):
        for i in range(40):
            Image.effect_noise(size, 50).convert(mode).save(tmp_path / f"{i}.png")
        return tmp_path

    return make


def images(root, *options):
    """The objects of a configuration for a folder, with networks of a width of 4 and no callbacks."""
    narrow = [NETWORK.format(role, "width", 4) for role in ("generator", "discriminator")]
    quiet = ["--trainer.accelerator=cpu", "--trainer.callbacks=null"]
    return make_cli(["--config", "images", f"--data.root={root}", *narrow, *quiet, *options], run=False)


def sizes(cli):
    """Size and channels of the data, of what the generator makes and of what the discriminator takes."""
    real, _ = next(iter(cli.datamodule.val_dataloader()))
    made = cli.model.sample(2)
    assert cli.model.discriminator(real).shape == (len(real),)
    assert made.shape[1:] == real.shape[1:]
    return made.shape[2], made.shape[1]


@pytest.mark.parametrize(
    ("size", "mode", "options", "expected"),
    [
        ((16, 16), "RGB", [], (16, 3)),
        ((16, 16), "L", [], (16, 1)),
        ((40, 60), "RGB", [], (32, 3)),
        ((16, 16), "L", ["--data.channels=3"], (16, 3)),
        ((16, 16), "RGB", ["--data.channels=1", "--data.image_size=8"], (8, 1)),
        ((16, 16), "RGB", [NETWORK.format("generator", "image_size", 16)], (16, 3)),
        (
            (16, 16),
            "RGB",
            [
                f"--model.init_args.{role}=lightning_ddst.models.DCGAN{role.capitalize()}"
                for role in ("generator", "discriminator")
            ],
            (16, 3),
        ),
    ],
    ids=["color", "gray", "oblong", "as color", "as small and gray", "given twice", "other networks"],
)
def test_the_networks_fit_the_folder(size, mode, options, expected, folder):
    assert sizes(images(folder(size, mode), *options)) == expected


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_run_records_the_sizes_and_measures_without_weights_from_elsewhere(mode, folder, tmp_path):
    run = tmp_path / "run"
    arguments = {
        "data.root": folder(mode=mode),
        "data.batches_per_epoch": 2,
        "data.batch_size": 4,
        "data.num_workers": 0,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": run,
        "trainer.enable_progress_bar": "false",
    }
    cli = make_cli(["fit", "--config", "images", *(f"--{name}={value}" for name, value in arguments.items())])
    assert cli.trainer.callback_metrics["frechet_distance/random_resnet18"].isfinite()
    (recorded,) = run.rglob("config.yaml")
    networks = yaml.safe_load(recorded.read_text())["model"]["init_args"]
    channels = 1 if mode == "L" else 3
    for role in ("generator", "discriminator"):
        assert networks[role]["init_args"] == networks[role]["init_args"] | {"image_size": 16, "channels": channels}


def test_arrays_fit_too(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 32, 32), np.uint8))
    cli = make_cli(
        [
            *("--config", "cifar10_sngan", "--data=lightning_ddst.data.ArrayDataModule"),
            *(
                f"--data.init_args.path={tmp_path}/a.npy",
                "--data.init_args.channels=1",
                "--data.init_args.image_size=32",
            ),
            *("--sparsity.generator_density=0.5", "--trainer.accelerator=cpu"),
            *(NETWORK.format(role, "width", 4) for role in ("generator", "discriminator")),
        ],
        run=False,
    )
    assert cli.model.sample(1).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (NETWORK.format("generator", "image_size", 32), "generator.init_args.image_size=32 .* is 16"),
        (NETWORK.format("discriminator", "channels", 1), "discriminator.init_args.channels=1 .* is 3"),
        (f"--data.root={CONFIGS['digits'].parent}/nowhere", "nowhere does not exist; ImageFolderDataModule reads it"),
        ("--data.on_bad_image=error", "1 of 41 images .*bad.png is no image of a known format"),
    ],
)
def test_what_does_not_fit_ends_with_one_line(option, message, folder, capsys):
    root = folder()
    (root / "bad.png").write_text("bad")
    with pytest.raises(SystemExit) as end:
        images(root, option)
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.image_size=8", "--data.channels=1"], None),
        (["--data.image_size=16"], "features=DigitsCNN are made for images of image_size=8, .* have image_size=16"),
        (["--data.image_size=8"], "features=DigitsCNN are made for images of channels=1, .* have channels=3"),
    ],
)
def test_features_for_other_images_end_with_one_line(options, message, folder, capsys):
    quality = [f"--trainer.callbacks={json.dumps(CALLBACKS)}"]
    if message is None:
        images(folder(), *options, *quality)
        return
    with pytest.raises(SystemExit) as end:
        images(folder(), *options, *quality)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_digits_networks_do_not_fit_a_folder(folder, capsys):
    with pytest.raises(SystemExit) as end:
        make_cli(
            ["--data=lightning_ddst.data.ImageFolderDataModule", f"--data.root={folder()}", "--data.image_size=16"],
            run=False,
        )
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-ddst: error: "))
    assert "generator.init_args.image_size=8 does not fit" in line
    assert "--config images" in line
