"""Feature extractors for `SampleQuality`: Inception, torchvision's classifiers, and a ResNet for CIFAR-10."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchvision.models import get_model, list_models
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_ddst.utils.validation import check_choice, check_count

Self = TypeVar("Self", bound="FeatureExtractor")

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue in [0, 1]


class FeatureExtractor(nn.Module):
    """A network from images to features.

    Its forward pass takes float images ``(batch, channels, height, width)`` in [-1, 1], and returns
    float features ``(batch, num_features)``. A classifier also has a method `logits`, from features
    to ``(batch, classes)``. Once frozen, it stays frozen and in evaluation mode.

    Attributes:
        num_features: Number of features.
    """

    num_features: int

    weights_advice: ClassVar[str] = "Put the file of weights there"
    """Advice in the message about a missing file of `weights`."""

    @classmethod
    def missing_files(cls, arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Finds a missing file of weights; ``lightning-ddst`` calls it before anything is made.

        Args:
            arguments: All arguments of the class by name.

        Returns:
            Pairs of an argument's name, and a sentence with the full path of the missing file.
        """
        weights = arguments.get("weights")
        if weights is None or (path := Path(weights).expanduser()).is_file():
            return []
        return [("weights", f"{path.absolute()} does not exist. {cls.weights_advice}.")]

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, object] = {}

    def freeze(self) -> None:
        """Turns gradients off and evaluation mode on, permanently."""
        self.requires_grad_(False)
        self.eval()

    def train(self: Self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        """Lists the settings that determine the features, next to the weights."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings.items())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU's random state for a while, with gradients on; restores torch's random states afterwards.

    Args:
        seed: The seed.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        # torch.manual_seed would also seed all devices, permanently.
        torch.default_generator.manual_seed(seed)
        yield


class InceptionFeatures(FeatureExtractor):
    """The Inception network that defines the FID, the KID and the Inception Score; torch-fidelity's version.

    It returns 2,048 features, and logits of 1,008 classes without bias. Images are rounded to 8 bits first, as
    if they had been saved; gray images become color images. The network resizes them to 299x299 as the original does.

    Args:
        weights: torch-fidelity's file ``weights-inception-2015-12-05-6726825d.pth``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it does not hold these weights.
    """

    num_features = 2048
    weights_advice = (
        f"Download {URL_INCEPTION_V3} and put it there; with --config no_inception, a run needs no weights of Inception"
    )

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        path = Path(weights).expanduser()
        _read(path, self.weights_advice)  # torch-fidelity would unpickle it unsafely
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{path} does not hold the weights of {URL_INCEPTION_V3}: {_first_line(error)}") from error
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(batch, 1 or 3, height, width)`` in [-1, 1] to features ``(batch, 2048)``."""
        pixels = (_in_colour(images) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        features: Tensor = self.network(pixels)[0]
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Maps features to logits without bias, ``(batch, 1008)``."""
        logits: Tensor = features @ self.network.fc.weight.T
        return logits


class TorchvisionFeatures(FeatureExtractor):
    """A layer of one of torchvision's classifiers.

    Gray images become color images; all are resized bilinearly with antialiasing, and normalized. The layer's
    output is averaged over space. There are no logits.

    Args:
        model: Its name in ``torchvision.models.list_models()``.
        weights: A file with its ``state_dict``, as torchvision provides.
        layer: Dotted name of the layer, such as "avgpool" of a ResNet.
        image_size: Height and width of the network's input.
        mean: Mean of red, green and blue in [0, 1], subtracted; by default ImageNet's.
        std: Standard deviation, divided by; by default ImageNet's.
        num_classes: Number of classes of the classifier in `weights`.
        random: Uses random weights drawn from `seed` instead of a file. Random features tell sets of images
            apart, too; mention it in the name that you give them.
        seed: Seed of random weights; torch's own random state does not change.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If `model` or `layer` is unknown, if the layer does not output one vector or map per image,
            if the file holds other weights, or unless exactly one of `weights` and `random` is given.
    """

    weights_advice = "torchvision's weights of the model belong there"

    def __init__(
        self,
        model: str,
        weights: str | Path | None = None,
        layer: str = "avgpool",
        image_size: int = 224,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
        num_classes: int = 1000,
        random: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("model", model, list_models(module=torchvision.models))  # models of other modules download parts
        check_count("image_size", image_size)
        if (weights is None) != random:
            raise ValueError(f"weights={weights!r}, random={random}: give a file, or set random=True.")
        with seeded(seed):
            network = get_model(model, weights=None, num_classes=num_classes)
        if weights is not None:
            _load(network, Path(weights).expanduser(), self.weights_advice)
        self.network: nn.Module = create_feature_extractor(network.eval(), {layer: "features"})
        self._image_size = image_size
        self.register_buffer("_mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(std)[:, None, None], persistent=False)
        self._settings = {
            "model": model,
            "layer": layer,
            "image_size": image_size,
            "mean": tuple(mean),
            "std": tuple(std),
        }
        self.freeze()
        with torch.no_grad():
            self.num_features = self(torch.zeros(1, 3, 1, 1)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(batch, 1 or 3, height, width)`` in [-1, 1] to features ``(batch, num_features)``."""
        features: Tensor = self.network(_normalised(_in_colour(images), self._image_size, self._mean, self._std))[
            "features"
        ]
        if features.dim() == 4:
            features = features.mean((2, 3))
        if features.dim() != 2:
            raise ValueError(
                f"layer={self._settings['layer']!r} returns shape {tuple(features.shape)}; (batch, features) or "
                "(batch, features, height, width) are expected."
            )
        return features


class CifarResNet(FeatureExtractor):
    """A ResNet that classifies CIFAR-10 (He et al. 2016, section 4.2), with shortcuts of option A.

    It returns 64 features, averaged over space, and logits of 10 classes. Gray images become color images;
    images of other sizes are resized to 32x32, bilinearly with antialiasing.

    Args:
        weights: A file of github.com/akamaster/pytorch_resnet_cifar10, such as ``resnet56-4bfd9763.th``.
        depth: Number of layers, 6 n + 2, as in the file's name.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it holds other weights, or `depth` is not 8, 14, 20, ...
    """

    num_features = 64
    weights_advice = "Get it from https://github.com/akamaster/pytorch_resnet_cifar10 and put it there"

    def __init__(self, weights: str | Path, depth: int = 56) -> None:
        super().__init__()
        check_count("depth", depth)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth} must be 6 n + 2, at least 8.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, 10)
        path = Path(weights).expanduser()
        _load(self, path, self.weights_advice)
        self.register_buffer("_mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(_STD)[:, None, None], persistent=False)
        self._settings = {"depth": depth}
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(batch, 1 or 3, height, width)`` in [-1, 1] to features ``(batch, 64)``."""
        x = F.relu(self.bn1(self.conv1(_normalised(_in_colour(images), 32, self._mean, self._std))))
        features: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Maps features to logits ``(batch, 10)``."""
        logits: Tensor = self.linear(features)
        return logits


class _Block(nn.Module):
    """Two convolutions, and a shortcut without weights: subsampled pixels, and zeros for new channels."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self._stride = made // given
        self._padding = (made - given) // 2
        self.conv1 = nn.Conv2d(given, made, 3, self._stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, self._padding, self._padding))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


def _stage(given: int, made: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Block(given, made), *(_Block(made, made) for _ in range(blocks - 1)))


def _in_colour(images: Tensor) -> Tensor:
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images {tuple(images.shape)} must have shape (batch, 1 or 3, height, width).")
    return images.expand(-1, 3, -1, -1)


def _normalised(images: Tensor, size: int, mean: Any, std: Any) -> Tensor:
    if images.shape[2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    normalised: Tensor = ((images + 1) / 2 - mean) / std
    return normalised


def _read(path: Path, advice: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r} is not there. {advice}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for other files
        raise ValueError(f"{path} holds no weights that can be loaded: {_first_line(error)}") from error


def _load(network: nn.Module, path: Path, advice: str) -> None:
    """Loads a ``state_dict``, also from inside a checkpoint or of a module in DataParallel."""
    held = _read(path, advice)
    held = held.get("state_dict", held) if isinstance(held, Mapping) else held
    try:
        network.load_state_dict({name.removeprefix("module."): value for name, value in held.items()})
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds weights of another network: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
