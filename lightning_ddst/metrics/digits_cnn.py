"""A classifier of handwritten digits, whose features measure the quality of samples."""

from lightning_ddst.data.digits import digits
from lightning_ddst.metrics.classifier import SmallClassifier, train_classifier
from lightning_ddst.metrics.features import seeded


class DigitsCNN(SmallClassifier):
    """A small convolutional classifier of 8x8 digits; its forward pass returns features."""

    def __init__(self) -> None:
        super().__init__(image_size=8)


def trained_digits_cnn(epochs: int = 10, seed: int = 0) -> DigitsCNN:
    """Trains the classifier on all of scikit-learn's digits, in seconds.

    Args:
        epochs: Passes over the images.
        seed: Seed of its weights and batches; torch's own random state does not change.

    Returns:
        The frozen classifier, in evaluation mode.
    """
    images, labels = digits().tensors
    with seeded(seed):
        network = DigitsCNN()
        train_classifier(network, images, labels, epochs)
    return network
