"""A small image classifier, trained in minutes, whose features measure the quality of samples."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from lightning_ddst.data.fashion_mnist import FashionMNISTDataModule
from lightning_ddst.data.images import batch_of, fit_to_size
from lightning_ddst.metrics.features import FeatureExtractor, seeded
from lightning_ddst.utils.cache import digest, load_tensors, save_tensors
from lightning_ddst.utils.validation import check_count

_BATCH = 64


class SmallClassifier(FeatureExtractor):
    """A small convolutional classifier; its forward pass returns features.

    Pooling halves images of 16 pixels or more, once or several times, before the widest convolution.

    Args:
        image_size: Height and width, at least 4.
        channels: Channels of the images.
        num_classes: Number of classes.

    Attributes:
        num_features: Number of features, 64.
        image_size: The argument.
        channels: The argument.
    """

    num_features = 64

    def __init__(self, image_size: int = 28, channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("channels", channels), ("num_classes", num_classes)):
            check_count(name, value)
        self.image_size, self.channels = image_size, channels
        layers = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
        for _ in range((image_size // 8).bit_length() - 1):
            layers += [nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
        self.features = nn.Sequential(
            *layers,
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``(batch, channels, image_size, image_size)`` in [-1, 1] to features ``(batch, 64)``."""
        features: Tensor = self.features(images)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Maps features to logits ``(batch, num_classes)``."""
        logits: Tensor = self.classifier(features)
        return logits

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Maps images to their most likely classes, int64 ``(batch,)``."""
        return self.logits(self(images)).argmax(1)


def train_classifier(network: SmallClassifier, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Trains a classifier with Adam, and freezes it; draws the batches from torch's random state.

    Args:
        network: The classifier, on the device to train on; it has no dropout or batch normalization.
        images: Float ``(n, channels, height, width)`` in [-1, 1].
        labels: int64 ``(n,)``.
        epochs: Passes over the images.
    """
    device = next(network.parameters()).device
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in trange(epochs, desc="classifier", unit="epoch", leave=False, delay=2, disable=None):
        for chosen in torch.randperm(len(images)).split(_BATCH):
            optimizer.zero_grad()
            logits = network.logits(network(images[chosen].to(device)))
            F.cross_entropy(logits, labels[chosen].to(device)).backward()
            optimizer.step()
    network.freeze()


def trained_classifier(
    images: Tensor,
    labels: Tensor,
    epochs: int = 10,
    seed: int = 0,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> SmallClassifier:
    """Trains a classifier on images, or loads one that was trained on them before.

    Args:
        images: Float ``(n, channels, size, size)`` in [-1, 1].
        labels: Classes from 0, int64 ``(n,)``.
        epochs: Passes over the images.
        seed: Seed of its weights and batches; torch's own random state does not change.
        cache: A folder for its weights; the file's name is a digest of the images, labels and arguments.
        device: Device to train on; the classifier is returned on the CPU.

    Returns:
        The frozen classifier, in evaluation mode.

    Raises:
        ValueError: If the shapes of images and labels do not fit.
        OSError: If the file cannot be written.
    """
    if images.dim() != 4 or labels.shape != images.shape[:1] or not len(images):
        raise ValueError(
            f"images {tuple(images.shape)} and labels {tuple(labels.shape)} must have shapes (n, channels, size, size) "
            "and (n,)."
        )
    settings = (epochs, seed, _BATCH)
    path = None
    if cache is not None:
        path = Path(cache).expanduser() / f"classifier-{digest(images, labels, settings)}.pt"
    with seeded(seed):
        network = SmallClassifier(images.shape[-1], images.shape[1], int(labels.max()) + 1)
        weights = None if path is None else load_tensors(path)
        if weights is not None:
            network.load_state_dict(weights)
        else:
            train_classifier(network.to(device), images, labels, epochs)
            network.cpu()
            if path is not None:
                save_tensors(path, network.state_dict())
    network.freeze()
    return network


def trained_fashion_cnn(
    root: str | Path,
    image_size: int = 28,
    epochs: int = 5,
    seed: int = 0,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> SmallClassifier:
    """Trains a classifier on Fashion-MNIST's 60,000 training images, in minutes, or loads it.

    Args:
        root: Folder of Fashion-MNIST, as for `lightning_ddst.data.FashionMNISTDataModule`.
        image_size: Height and width of the images to compare.
        epochs: Passes over the images.
        seed: Seed of its weights and batches.
        cache: A folder for its weights.
        device: Device to train on.

    Returns:
        The frozen classifier, in evaluation mode.

    Raises:
        FileNotFoundError: If Fashion-MNIST is not in `root`.
    """
    images, labels = FashionMNISTDataModule(root, image_size).make_dataset(train=True).tensors
    images, labels = batch_of((fit_to_size(images, image_size, 1), labels))
    return trained_classifier(images, labels, epochs, seed, cache, device)
