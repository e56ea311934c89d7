"""Generators, discriminators, and feature extractors."""

from lightning_ddst.metrics.classifier import SmallClassifier, trained_classifier, trained_fashion_cnn
from lightning_ddst.metrics.digits_cnn import DigitsCNN, trained_digits_cnn
from lightning_ddst.metrics.features import CifarResNet, FeatureExtractor, InceptionFeatures, TorchvisionFeatures
from lightning_ddst.models.biggan import BigGANDiscriminator, BigGANGenerator
from lightning_ddst.models.dcgan import DCGANDiscriminator, DCGANGenerator
from lightning_ddst.models.small import SmallDiscriminator, SmallGenerator
from lightning_ddst.models.sngan import SNGANDiscriminator, SNGANGenerator

__all__ = [
    "BigGANDiscriminator",
    "BigGANGenerator",
    "CifarResNet",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DigitsCNN",
    "FeatureExtractor",
    "InceptionFeatures",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "SmallClassifier",
    "SmallDiscriminator",
    "SmallGenerator",
    "TorchvisionFeatures",
    "trained_classifier",
    "trained_digits_cnn",
    "trained_fashion_cnn",
]
