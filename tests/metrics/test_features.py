import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import get_model

from lightning_ddst.models import (
    CifarResNet,
    DigitsCNN,
    FeatureExtractor,
    InceptionFeatures,
    SmallClassifier,
    TorchvisionFeatures,
    trained_classifier,
    trained_digits_cnn,
    trained_fashion_cnn,
)

DATA = Path(__file__).parents[3] / "shared" / "data"


def images(n: int = 3, channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def resnet20_weights(path: Path) -> Path:
    """A file like akamaster's, with random weights."""
    weights = {}
    shapes = {"conv1": (16, 3), "layer1": (16, 16), "layer2": (32, 16), "layer3": (64, 32)}
    rng = torch.Generator().manual_seed(0)

    def norm(name: str, width: int) -> None:
        weights.update({f"{name}.weight": torch.rand(width, generator=rng) + 0.5, f"{name}.bias": torch.zeros(width)})
        weights.update({f"{name}.running_mean": torch.zeros(width), f"{name}.running_var": torch.ones(width)})
        weights[f"{name}.num_batches_tracked"] = torch.tensor(0)

    def conv(name: str, made: int, given: int) -> None:
        weights[f"{name}.weight"] = torch.randn(made, given, 3, 3, generator=rng) / (9 * given) ** 0.5

    conv("conv1", *shapes["conv1"])
    norm("bn1", 16)
    for stage in ("layer1", "layer2", "layer3"):
        made, given = shapes[stage]
        for block in range(3):
            for number, before in ((1, made if block else given), (2, made)):
                conv(f"{stage}.{block}.conv{number}", made, before)
                norm(f"{stage}.{block}.bn{number}", made)
    weights["linear.weight"], weights["linear.bias"] = torch.randn(10, 64, generator=rng), torch.zeros(10)
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}, "best_prec1": 0.0}, path)
    return path


@pytest.fixture(scope="module")
def resnet20(tmp_path_factory) -> CifarResNet:
    return CifarResNet(resnet20_weights(tmp_path_factory.mktemp("resnet") / "resnet20.th"), depth=20)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state) -> None:
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Unloaded("random", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


@pytest.fixture(scope="module")
def inception(inception_weights) -> InceptionFeatures:
    return InceptionFeatures(inception_weights)


@pytest.fixture(scope="module")
def torchvision_features() -> TorchvisionFeatures:
    return TorchvisionFeatures("resnet18", image_size=64, random=True)


@pytest.fixture(params=["resnet20", "inception", "torchvision_features", "digits"])
def extractor(request) -> FeatureExtractor:
    return trained_digits_cnn(0) if request.param == "digits" else request.getfixturevalue(request.param)


# ---- every extractor -----------------------------------------------------------------------------------


def test_extractors_give_features_and_logits(extractor) -> None:
    gray = isinstance(extractor, SmallClassifier)
    batch = images(2, 1 if gray else 3, 8 if gray else 32)
    features = extractor(batch)
    assert features.shape == (2, extractor.num_features)
    assert features.dtype == torch.float32
    assert not torch.equal(features[0], features[1])
    if hasattr(extractor, "logits"):
        classes = 1008 if isinstance(extractor, InceptionFeatures) else 10
        assert extractor.logits(features).shape == (2, classes)


def test_extractors_are_frozen_and_in_evaluation_mode_for_good(extractor) -> None:
    nn.Sequential(extractor).train()
    assert extractor.train() is extractor
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_gray_images_are_colour_of_three_equal_channels(resnet20, torchvision_features, inception) -> None:
    gray = images(1, channels=1)
    for extractor in (resnet20, torchvision_features, inception):
        assert torch.equal(extractor(gray), extractor(gray.repeat(1, 3, 1, 1)))
        with pytest.raises(ValueError, match=r"images \(1, 2, 32, 32\) .*\(batch, 1 or 3, height, width\)"):
            extractor(images(1, channels=2))


# ---- Inception -----------------------------------------------------------------------------------------


def test_inception_features_are_torch_fidelitys_of_the_same_bytes(inception, inception_weights) -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    reference = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights
    )
    features, logits = reference(pixels)
    own = inception(pixels / 127.5 - 1)
    assert torch.equal(own, features)
    assert torch.allclose(inception.logits(own), logits, rtol=1e-5, atol=1e-6)


def test_all_bytes_come_back() -> None:
    pixels = torch.arange(256).to(torch.uint8)

    class Seen(nn.Module):
        def forward(self, given: Tensor) -> tuple[Tensor]:
            return (given,)

    inception = InceptionFeatures.__new__(InceptionFeatures)
    FeatureExtractor.__init__(inception)
    inception.network = Seen()
    assert torch.equal(inception((pixels / 127.5 - 1).reshape(1, 1, 16, 16))[0, 0].flatten(), pixels)


def test_the_error_for_missing_inception_weights_names_the_download(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pth' .*https://github\.com/toshas/.*6726825d\.pth"):
        InceptionFeatures(tmp_path / "absent.pth")


def test_other_files_are_not_taken_for_weights(tmp_path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"file.pth does not hold the weights of https://"):
        InceptionFeatures(path)
    with pytest.raises(ValueError, match=r"file.pth holds weights of another network"):
        CifarResNet(path)
    with pytest.raises(ValueError, match=r"file.pth holds weights of another network"):
        TorchvisionFeatures("resnet18", path)
    path.write_bytes(b"<html>")
    for make in (InceptionFeatures, CifarResNet, lambda weights: TorchvisionFeatures("resnet18", weights)):
        with pytest.raises(ValueError, match=r"file.pth holds no weights that can be loaded"):
            make(path)


def test_files_that_would_execute_something_are_rejected(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth holds no weights that can be loaded"):
        InceptionFeatures(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


# ---- torchvision ---------------------------------------------------------------------------------------


def test_torchvision_features_are_the_layers_of_the_normalised_images(tmp_path) -> None:
    torch.manual_seed(0)
    network = get_model("resnet18", weights=None, num_classes=5).eval()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    extractor = TorchvisionFeatures("resnet18", tmp_path / "resnet18.pth", image_size=48, num_classes=5)
    assert extractor.num_features == 512
    batch = images()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    resized = F.interpolate(batch, (48, 48), mode="bilinear", antialias=True)
    inputs = ((resized + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    network.fc = nn.Identity()
    with torch.no_grad():
        assert torch.allclose(extractor(batch), network(inputs), atol=1e-5)
    earlier = TorchvisionFeatures("resnet18", tmp_path / "resnet18.pth", "layer2", image_size=48, num_classes=5)
    assert earlier.num_features == 128  # averaged over space


def test_random_features_follow_the_seed_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first, again, other = (
        TorchvisionFeatures("squeezenet1_1", layer="features", image_size=32, random=True, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    batch = images()
    assert torch.equal(first(batch), again(batch))
    assert not torch.equal(first(batch), other(batch))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "resnet17", "random": True}, ValueError, "model='resnet17' is unknown"),
        ({"model": "resnet18"}, ValueError, "weights=None, random=False: give a file, or set random=True"),
        ({"model": "resnet18", "weights": "w", "random": True}, ValueError, "weights='w', random=True: give a file"),
        ({"model": "resnet18", "weights": "/absent/w.pth"}, FileNotFoundError, "/absent/w.pth' is not there"),
        ({"model": "resnet18", "layer": "pool", "random": True}, ValueError, "pool"),
        ({"model": "resnet18", "image_size": 0, "random": True}, ValueError, "image_size=0 must be an integer"),
        (
            {"model": "vit_b_16", "layer": "encoder.ln", "random": True},
            ValueError,
            r"layer='encoder.ln' .*\(1, 197, 768\)",
        ),
    ],
)
def test_bad_arguments_of_torchvision_features_are_rejected(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        TorchvisionFeatures(**arguments)


def test_the_repr_distinguishes_settings_that_the_weights_do_not() -> None:
    made = [TorchvisionFeatures("resnet18", image_size=size, random=True) for size in (32, 64)]
    assert repr(made[0]) != repr(made[1])
    assert "image_size=32" in repr(made[0])


# ---- CIFAR-10 ------------------------------------------------------------------------------------------


def test_other_sizes_are_resized_for_the_cifar_resnet(resnet20) -> None:
    batch = images(size=48)
    resized = F.interpolate(batch, (32, 32), mode="bilinear", antialias=True)
    assert torch.equal(resnet20(batch), resnet20(resized))


@pytest.mark.parametrize("depth", [7, 2, 21])
def test_depths_that_no_such_network_has_are_rejected(depth, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth} must be 6 n \+ 2, at least 8"):
        CifarResNet(tmp_path / "absent", depth)


def test_the_error_names_the_missing_file_of_the_cifar_resnet(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.th' .*https://github\.com/akamaster"):
        CifarResNet(tmp_path / "absent.th")


@pytest.mark.skipif(not (DATA / "resnet_cifar10").exists(), reason="needs the trained weights and the images")
def test_the_trained_cifar_resnets_classify() -> None:
    from PIL import Image

    sheets = sorted((DATA / "cifar10").rglob("*test*.webp"))
    pixels = np.asarray(Image.open(sheets[0]).convert("RGB"))  # 100 rows of 50, sorted by class
    pixels = pixels.reshape(-1, 32, 50, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)[::25]
    labels = torch.tensor([index // 1000 for index in range(0, 5000, 25)])
    batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        for depth, file in ((20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th")):
            extractor = CifarResNet(DATA / "resnet_cifar10" / file, depth)
            right = (extractor.logits(extractor(batch)).argmax(1) == labels).float().mean()
            assert right >= 0.85  # of all 10,000: 91.73 % and 93.39 %


# ---- a classifier that is trained on the spot ----------------------------------------------------------


def blobs(n: int = 300, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy images whose class is the bright quarter."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (n,), generator=rng)
    drawn = torch.rand(n, 1, size, size, generator=rng) - 1
    half = size // 2
    for image, label in zip(drawn, labels.tolist(), strict=True):
        top, left = half * (label // 2), half * (label % 2)
        image[:, top : top + half : 1 + label, left : left + half] += 1
    return drawn, labels


def test_a_trained_classifier_classifies_and_gives_features() -> None:
    drawn, labels = blobs()
    network = trained_classifier(drawn, labels, epochs=6)
    assert (network.classify(drawn) == labels).float().mean() > 0.9
    features = network(drawn[:5])
    assert features.shape == (5, 64)
    assert torch.equal(network.logits(features).argmax(1), network.classify(drawn[:5]))
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("size", [4, 8, 16, 28, 32, 64])
def test_classifiers_of_every_size(size) -> None:
    network = SmallClassifier(size, channels=3, num_classes=7)
    features = network(images(2, 3, size))
    assert features.shape == (2, 64)
    assert network.logits(features).shape == (2, 7)


def test_the_digits_classifier_is_what_it_was() -> None:
    # Its features are those that published figures were measured on.
    torch.manual_seed(0)
    expected = nn.Sequential(
        *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    )
    torch.manual_seed(0)
    network = DigitsCNN()
    assert all(torch.equal(a, b) for a, b in zip(network.features.parameters(), expected.parameters(), strict=True))
    assert list(network.state_dict())[-2:] == ["classifier.weight", "classifier.bias"]


def test_a_classifier_is_trained_once_for_the_same_images(tmp_path, monkeypatch) -> None:
    drawn, labels = blobs(100)
    first = trained_classifier(drawn, labels, epochs=1, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr("lightning_ddst.metrics.classifier.train_classifier", None)
        again = trained_classifier(drawn, labels, epochs=1, cache=tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert not any(module.training for module in again.modules())
    for other in (
        lambda: trained_classifier(-drawn, labels, epochs=1, cache=tmp_path),
        lambda: trained_classifier(drawn, labels.flip(0), epochs=1, cache=tmp_path),
        lambda: trained_classifier(drawn, labels, epochs=1, seed=1, cache=tmp_path),
    ):
        before = len(list(tmp_path.iterdir()))
        other()
        assert len(list(tmp_path.iterdir())) == before + 1


def test_training_follows_the_seed_and_leaves_the_random_state_alone() -> None:
    drawn, labels = blobs(64)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    with torch.inference_mode():
        first, again, other = (trained_classifier(drawn, labels, epochs=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(drawn), again(drawn))
    assert not torch.equal(first(drawn), other(drawn))


def test_images_and_labels_that_do_not_belong_together_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"images \(3, 3, 32, 32\) and labels \(2,\) must have shapes"):
        trained_classifier(images(), torch.zeros(2, dtype=torch.int64))


@pytest.mark.skipif(not (DATA / "fashion_mnist").exists(), reason="needs Fashion-MNIST")
def test_the_fashion_classifier_reads_the_files(monkeypatch) -> None:
    seen = []

    def note(*arguments: object) -> SmallClassifier:
        seen.extend(copy.copy(argument) for argument in arguments)
        return SmallClassifier()

    monkeypatch.setattr("lightning_ddst.metrics.classifier.trained_classifier", note)
    trained_fashion_cnn(DATA / "fashion_mnist", image_size=16, epochs=2)
    drawn, labels, epochs, *_ = seen
    assert drawn.shape == (60000, 1, 16, 16)
    assert drawn.min() == -1
    assert drawn.max() <= 1
    assert labels.bincount().tolist() == [6000] * 10
    assert epochs == 2


@pytest.mark.parametrize("make", [lambda: TorchvisionFeatures("resnet18", random=True), lambda: trained_digits_cnn(0)])
def test_making_features_leaves_every_devices_random_state(make, monkeypatch) -> None:
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    make()
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)


def test_detectors_are_no_classifiers() -> None:
    with pytest.raises(ValueError, match="model='fasterrcnn_resnet50_fpn'"):
        TorchvisionFeatures("fasterrcnn_resnet50_fpn", random=True)
