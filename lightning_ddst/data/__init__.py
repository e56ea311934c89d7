"""Data modules, and a loader that resumes in the middle of an epoch."""

from lightning_ddst.data.arrays import ArrayDataModule
from lightning_ddst.data.cifar10 import CIFAR10DataModule
from lightning_ddst.data.digits import DigitsDataModule, digits
from lightning_ddst.data.fashion_mnist import FashionMNISTDataModule
from lightning_ddst.data.folders import ImageFolderDataModule
from lightning_ddst.data.images import ImageDataModule
from lightning_ddst.data.resumable import ResumableLoader
from lightning_ddst.data.stl10 import STL10DataModule
from lightning_ddst.data.tiny_imagenet import TinyImageNetDataModule

__all__ = [
    "ArrayDataModule",
    "CIFAR10DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ResumableLoader",
    "STL10DataModule",
    "TinyImageNetDataModule",
    "digits",
]
