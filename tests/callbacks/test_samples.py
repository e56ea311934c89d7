import io
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor
from toys import ToyGAN, toy_trainer

from lightning_ddst import GANModule, SampleGrid

ONE = DataLoader(torch.zeros(1, 1, 8, 8))


class Painter(nn.Module):
    """Paints an image in one gray for all its pixels, the first number of the noise."""

    latent_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.gain * z[:, :1, None, None]).expand(-1, 1, 4, 4)


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images.flatten(1).mean(1)


def painting(lr: float = 0.0, **arguments) -> GANModule:
    def optimizer(parameters) -> SGD:
        return SGD(parameters, lr=lr)

    return GANModule(Painter(), Judge(), generator_optimizer=optimizer, discriminator_optimizer=optimizer, **arguments)


def grids(folder, *callbacks, gan: GANModule | None = None, epochs: int = 1, **settings) -> list[tuple[int, Tensor]]:
    """The images logged, with their places on the x-axis."""
    seed_everything(0, verbose=False)
    trainer = toy_trainer(*callbacks, folder=folder, epochs=epochs, **settings)
    trainer.fit(gan or painting(), DataLoader(torch.zeros(4, 1, 4, 4)), ONE)
    events = EventAccumulator(str(folder / "lightning_logs" / "version_0"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] in ([], ["samples"])
    if not events.Tags()["images"]:
        return []
    return [
        (event.step, pil_to_tensor(Image.open(io.BytesIO(event.encoded_image_string))))
        for event in events.Images("samples")
    ]


@pytest.mark.parametrize(
    ("arguments", "height", "width"),
    [
        # Images of 4x4 with 2 pixels between and around.
        ({}, 8 * 6 + 2, 8 * 6 + 2),
        ({"samples": 6, "columns": 3}, 2 * 6 + 2, 3 * 6 + 2),
        ({"samples": 7, "columns": 3}, 3 * 6 + 2, 3 * 6 + 2),
        ({"samples": 2, "columns": 3}, 6 + 2, 2 * 6 + 2),
        ({"samples": 6, "columns": 3, "scale": 5}, 5 * (2 * 6 + 2), 5 * (3 * 6 + 2)),
    ],
)
def test_the_grid_has_rows_and_columns(arguments: dict, height: int, width: int, tmp_path) -> None:
    (_, image), *_ = grids(tmp_path, SampleGrid(**arguments))
    assert image.shape == (3, height, width)


def test_the_grid_shows_the_samples_in_their_range(tmp_path) -> None:
    _, (_, image) = grids(tmp_path, SampleGrid(samples=6, columns=3, scale=2, seed=5))
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(5))
    expected = (torch.tanh(z[:, 0]) + 1) / 2 * 255
    assert expected.max() - expected.min() > 50
    for i in range(6):
        row, column = 2 * (2 + 6 * (i // 3)), 2 * (2 + 6 * (i % 3))
        square = image[:, row : row + 8, column : column + 8].float()
        assert square.min() == square.max()
        assert square.mean().item() == pytest.approx(expected[i].item(), abs=1)


def test_the_grid_is_drawn_at_every_validation_from_the_same_noise(tmp_path) -> None:
    shown = grids(tmp_path, SampleGrid(), epochs=3, gan=painting(discriminator_steps=2))
    # Before training, and after epochs of 4 batches with 2 generator updates.
    assert [step for step, _ in shown] == [0, 2, 4, 6]
    assert all(torch.equal(image, shown[0][1]) for _, image in shown)
    other = grids(tmp_path / "other", SampleGrid(seed=1))
    assert not torch.equal(other[0][1], shown[0][1])


def test_the_grid_follows_the_generator(tmp_path) -> None:
    (_, before), (_, after) = grids(tmp_path, SampleGrid(), gan=painting(lr=10.0))
    assert not torch.equal(before, after)


def test_drawing_leaves_training_as_it_is(tmp_path) -> None:
    drawn, plain = painting(lr=1.0), painting(lr=1.0)
    grids(tmp_path / "drawn", SampleGrid(), gan=drawn)
    assert grids(tmp_path / "plain", gan=plain) == []
    expected = plain.state_dict()
    assert expected["generator.gain"].item() != 1
    assert all(torch.equal(value, expected[name]) for name, value in drawn.state_dict().items())


class UnitPainter(Painter):
    """Paints images in [0, 1]."""

    def forward(self, z: Tensor) -> Tensor:
        return (super().forward(z) + 1) / 2


def unit_painting() -> GANModule:
    gan = painting()
    gan.generator = UnitPainter()
    return gan


def test_samples_from_0_to_1_are_shown_in_their_range(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"samples have pixels from 0\..*, none below 0, .*pass value_range=\(0, 1\)"):
        grids(tmp_path / "default", SampleGrid(), gan=unit_painting())
    expected = grids(tmp_path / "signed", SampleGrid())
    shown = grids(tmp_path / "unit", SampleGrid(value_range=(0, 1)), gan=unit_painting())
    assert [step for step, _ in shown] == [step for step, _ in expected]
    for (_, image), (_, other) in zip(shown, expected, strict=True):
        assert (image.int() - other.int()).abs().max() <= 1
    (_, bright), *_ = grids(tmp_path / "bright", SampleGrid(value_range=(-1, 1)), gan=unit_painting())
    assert bright[:, 4, 4].min() >= 127


def test_samples_that_become_bright_later_are_shown(tmp_path) -> None:
    class Brightens(GANModule):
        def sample(self, n: int, labels: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
            images = super().sample(n, labels, rng)
            return (images + 1) / 2 if self.generator_updates else images

    gan = Brightens(Painter(), Judge(), generator_optimizer=SGD, discriminator_optimizer=SGD)
    assert len(grids(tmp_path, SampleGrid(), gan=gan)) == 2


def test_samples_of_another_module_are_looked_at_anew(tmp_path) -> None:
    grid = SampleGrid()
    grids(tmp_path / "first", grid)
    assert grid.state_dict() == {"dark": True}
    with pytest.raises(ValueError, match=r"pass value_range=\(0, 1\)"):
        grids(tmp_path / "second", grid, gan=unit_painting())


def test_without_a_logger_nothing_is_drawn() -> None:
    class Counting(GANModule):
        drawn = 0

        def sample(self, *args, **kwargs) -> Tensor:
            self.drawn += 1
            return super().sample(*args, **kwargs)

    gan = Counting(Painter(), Judge())
    toy_trainer(SampleGrid(), logger=False).fit(gan, DataLoader(torch.zeros(4, 1, 4, 4)), ONE)
    assert gan.drawn == 0


def test_a_csv_logger_gets_the_same_grid_as_files(tmp_path) -> None:
    (_, expected), (update, _) = grids(tmp_path, SampleGrid(), gan=painting(discriminator_steps=2))
    logger = CSVLogger(tmp_path / "csv")
    seed_everything(0, verbose=False)
    trainer = toy_trainer(SampleGrid(), logger=logger)
    trainer.fit(painting(discriminator_steps=2), DataLoader(torch.zeros(4, 1, 4, 4)), ONE)
    files = sorted((Path(logger.log_dir) / "samples").iterdir())
    assert [path.name for path in files] == ["00000000.png", f"{update:08d}.png"]
    assert torch.equal(pil_to_tensor(Image.open(files[0])), expected)


def test_a_module_that_cannot_be_sampled_from_is_rejected() -> None:
    gan: LightningModule = ToyGAN()
    with pytest.raises(TypeError, match=r"SampleGrid needs ToyGAN\.sample\(n, rng=\.\.\.\)"):
        toy_trainer(SampleGrid()).fit(gan, ONE)


@pytest.mark.parametrize("name", ["samples", "columns", "scale"])
@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_bad_arguments_are_rejected(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be an integer, at least 1"):
        SampleGrid(**{name: value})


def test_a_bad_range_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"value_range=\(1, 0\) must be two numbers, the lower one first"):
        SampleGrid(value_range=(1, 0))


def test_a_fit_without_validation_shows_samples_at_the_ends_of_epochs(tmp_path) -> None:
    def run(*callbacks) -> dict[str, Tensor]:
        seed_everything(0, verbose=False)
        gan = painting(lr=0.1)
        trainer = toy_trainer(*callbacks, folder=tmp_path / str(len(callbacks)), epochs=2)
        trainer.fit(gan, DataLoader(torch.zeros(4, 1, 4, 4)))
        return gan.state_dict()

    plain, shown = run(), run(SampleGrid(4))
    assert all(torch.equal(value, plain[name]) for name, value in shown.items())
    events = EventAccumulator(str(tmp_path / "1" / "lightning_logs" / "version_0"))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [4, 8]
