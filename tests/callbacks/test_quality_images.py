"""The range of the images that SampleQuality compares, and their place in batches."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import ToyGAN, toy_trainer

from lightning_ddst import SampleQuality


class Pixels(nn.Module):
    """Mean and deviation of images; remembers the images."""

    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return torch.stack([images.flatten(1).mean(1), images.flatten(1).std(1)], 1)


class Given(ToyGAN):
    """Returns given samples."""

    def __init__(self, *samples: Tensor) -> None:
        super().__init__()
        self.samples = list(samples)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        return self.samples[0][:n] if len(self.samples) == 1 else self.samples.pop(0)[:n]

    def validation_step(self, batch, batch_idx) -> None:
        pass


def unit(seed: int = 0, count: int = 16) -> Tensor:
    """Images in [0, 1]."""
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def signed(seed: int = 0) -> Tensor:
    return unit(seed) * 2 - 1


def measured(samples: Tensor, reals: Tensor, features: nn.Module | None = None, **arguments) -> SampleQuality:
    quality = SampleQuality(features or Pixels(), "pixels", **arguments)
    evaluate(quality, Given(samples), loader(reals))
    return quality


def loader(images: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(images), batch_size=8)


def evaluate(quality: SampleQuality, gan: LightningModule, data) -> None:
    seed_everything(0, verbose=False)
    toy_trainer(quality).validate(gan, data, verbose=False)


# ---- the range ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_real_images_without_dark_pixels_are_rejected(cached: bool, tmp_path) -> None:
    arguments = {"cache": tmp_path} if cached else {}
    message = (
        r"real images have pixels from 0.* to 0.9.*, none below 0, like images in \[0, 1\]: pass value_range=\(0, 1\)"
    )
    with pytest.raises(ValueError, match=message):
        measured(signed(), unit(), **arguments)


def test_one_dark_pixel_among_all_images_is_enough() -> None:
    reals = unit(1)
    reals[-1, 0, 0, 0] = -0.5  # in the last batch
    assert measured(signed(), reals).history


@pytest.mark.parametrize("value_range", [(0, 1), (0, 255), (-1, 1), (0.0, 2.0)])
def test_images_of_a_given_range_are_mapped_to_the_features(value_range) -> None:
    low, high = value_range
    samples, reals = (unit(seed) * (high - low) + low for seed in (0, 1))
    features = Pixels()
    quality = measured(samples, reals, features, value_range=value_range)
    expected = measured(signed(0), signed(1))
    assert torch.allclose(torch.cat(features.seen), torch.cat([signed(1), signed(0)]), atol=1e-5)
    assert quality.history["frechet_distance"][0][1] == pytest.approx(
        expected.history["frechet_distance"][0][1], rel=1e-3
    )


def test_bytes_are_mapped_too() -> None:
    reals = (unit(1) * 255).round().byte()
    features = Pixels()
    measured((unit() * 255).round(), reals, features, value_range=(0, 255))
    assert torch.allclose(torch.cat(features.seen)[:16], reals / 127.5 - 1, atol=1e-6)


def test_bright_images_are_accepted_where_the_range_is_given() -> None:
    features = Pixels()
    measured(unit(0), unit(1), features, value_range=(-1, 1))
    assert torch.equal(torch.cat(features.seen), torch.cat([unit(1), unit(0)]))


@pytest.mark.parametrize(
    ("value_range", "images", "message"),
    [
        (None, unit() * 255, r"pixels from .* must be in \[-1, 1\]\. .*value_range=\(low, high\)"),
        ((0, 1), signed(), r"pixels from -0\.9.* must be in \[0, 1\]"),
        ((0, 1), unit() * 1.1, r"must be in \[0, 1\]"),
        ((0, 255), unit(), r"value_range=\(0, 255\) does not fit: .* Pass value_range=\(0, 1\)"),
    ],
)
def test_images_outside_the_range_are_rejected(value_range, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured(signed(), images, value_range=value_range)


@pytest.mark.parametrize("cached", [False, True])
def test_samples_of_another_size_than_the_real_images_are_named_once(cached: bool, tmp_path) -> None:
    quality = SampleQuality(Pixels(), "pixels", batch_size=4, cache=tmp_path if cached else None)
    larger = Given(nn.functional.interpolate(signed(), size=(8, 6)))
    message = r"pixels: samples of size 8x6 are compared with real images of size 4x4"
    with pytest.warns(UserWarning, match=message) as warned:
        evaluate(quality, larger, loader(signed(1)))
    assert sum("of size" in str(warning.message) for warning in warned) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pixels: samples of size")
        evaluate(quality, larger, loader(signed(1)))
        measured(signed(), signed(1))


def test_samples_without_dark_pixels_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"samples have pixels from 0.*, none below 0.*value_range=\(0, 1\)"):
        measured(unit(), signed())


def test_samples_of_an_untrained_generator_are_accepted() -> None:
    assert measured(unit() * 0.2 + 0.4, signed()).history


def test_a_generator_that_was_dark_may_become_bright(tmp_path) -> None:
    quality = SampleQuality(Pixels(), "pixels")
    module = Given(signed(), unit())
    evaluate(quality, module, loader(signed(1)))
    evaluate(quality, module, loader(signed(1)))
    assert len(quality.history["frechet_distance"]) == 2
    resumed = SampleQuality(Pixels(), "pixels")
    resumed.load_state_dict(quality.state_dict())
    evaluate(resumed, Given(unit()), loader(signed(1)))


def test_the_cache_tells_ranges_apart(tmp_path) -> None:
    for value_range in ((0, 1), (0, 2), (-1, 1), None):
        reals = unit(1) if value_range else signed(1)
        measured(reals, reals, value_range=value_range, cache=tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == 4


@pytest.mark.parametrize("value_range", [(1, 0), (0, 0), (0, float("nan")), (0, float("inf")), (0, 1, 2), "ab"])
def test_bad_ranges_are_rejected(value_range) -> None:
    with pytest.raises(ValueError, match=r"value_range=.* must be two numbers, the lower one first"):
        SampleQuality(Pixels(), "pixels", value_range=value_range)


# ---- batches of other forms ----------------------------------------------------------------------------


@dataclass
class Batch:
    labels: Tensor
    images: Tensor


FORMS = {
    "tensor": (lambda x: x, {}),
    "labels second": (lambda x: (x, torch.zeros(len(x)).long()), {}),
    "labels first": (lambda x: [torch.zeros(len(x)).long(), x], {}),
    "dict": (lambda x: {"path": ["a"] * len(x), "label": torch.zeros(len(x)).long(), "image": x}, {}),
    "nested": (lambda x: {"info": (["a"],), "views": {"a": x}}, {}),
    "dataclass": (lambda x: Batch(torch.zeros(len(x)).long(), x), {}),
    "attributes": (lambda x: (torch.zeros(len(x), 3), x), {}),
    "two images": (lambda x: {"input": -x, "target": x}, {"real": "target"}),
    "a path": (lambda x: {"images": [-x, x]}, {"real": "images.1"}),
    "an index": (lambda x: (-x, x), {"real": 1}),
}


@pytest.mark.parametrize("form", FORMS)
def test_real_images_are_found_in_any_batch(form: str) -> None:
    make, arguments = FORMS[form]
    features = Pixels()
    quality = SampleQuality(features, "pixels", samples=8, **arguments)
    batches = [make(images) for images in signed(1).split(8)]
    evaluate(quality, Given(signed()), DataLoader(batches, batch_size=None))
    assert torch.equal(torch.cat(features.seen[:2]), signed(1))


@pytest.mark.parametrize(
    ("batch", "arguments", "message"),
    [
        (
            {"input": signed(), "target": signed(1)},
            {},
            r'2 floating-point tensors of shape \(batch, 1, 4, 4\), .*Quality\(..., real="input"\). It holds input',
        ),
        ({"image": signed().byte()}, {}, r"no floating-point tensor .*real=.* image \(16, 1, 4, 4\) torch.uint8"),
        ({"image": signed()}, {"real": "images"}, "real='images' is no tensor in the batch; it holds image"),
    ],
)
def test_batches_without_clear_images_are_rejected(batch, arguments: dict, message: str) -> None:
    quality = SampleQuality(Pixels(), "pixels", samples=8, **arguments)
    with pytest.raises(ValueError, match=message):
        evaluate(quality, Given(signed()), DataLoader([batch], batch_size=None))
