"""A classifier of handwritten digits, whose features measure Frechet distances."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ddst.data.digits import digits


class DigitsCNN(nn.Module):
    """A small convolutional classifier of 8x8 digits; its forward pass gives features.

    Attributes:
        num_features: Number of features, 64.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """From images ``(batch, 1, 8, 8)`` in [-1, 1] to features ``(batch, 64)``."""
        features: Tensor = self.features(images)
        return features

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """From images to their most likely digits, int64 ``(batch,)``."""
        logits: Tensor = self.classifier(self(images))
        return logits.argmax(1)


def trained_digits_cnn(epochs: int = 10, seed: int = 0) -> DigitsCNN:
    """Trains the classifier on all of scikit-learn's digits, in seconds.

    Args:
        epochs: Passes over the images.
        seed: Of its weights and batches; torch's own random state is left as it was.

    Returns:
        The frozen classifier, in evaluation mode.
    """
    images, labels = digits().tensors
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = DigitsCNN()
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(network.classifier(network(images[chosen])), labels[chosen]).backward()
                optimizer.step()
    return network.requires_grad_(False).eval()
