"""The same classes for Trainers of the package `pytorch_lightning`.

Its Trainer also takes the callbacks of `lightning_ddst`, in a list. It takes modules, data modules and plugins only of
its own classes, and its LightningCLI takes callbacks only of its own class, too. Checkpoints are the same.

Example::

    from pytorch_lightning import Trainer

    from lightning_ddst.pytorch_lightning import DynamicSparsityCallback, GANModule
"""

from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Callback, LightningDataModule, LightningModule

from lightning_ddst import callbacks, data
from lightning_ddst.gan.module import GANMixin
from lightning_ddst.utils import checkpoints

# mypy: disable-error-code="misc"
# The hooks of both packages have the same parameters, annotated with classes of their own.


class GANModule(GANMixin, LightningModule):
    """`lightning_ddst.GANModule` as a LightningModule of `pytorch_lightning`."""


class DynamicSparsityCallback(callbacks.DynamicSparsityCallback, Callback):
    """`lightning_ddst.DynamicSparsityCallback` as a callback of `pytorch_lightning`."""


class GeneratorEMA(callbacks.GeneratorEMA, Callback):
    """`lightning_ddst.GeneratorEMA` as a callback of `pytorch_lightning`."""


class InterruptCheckpoint(callbacks.InterruptCheckpoint, Callback):
    """`lightning_ddst.InterruptCheckpoint` as a callback of `pytorch_lightning`."""


class RunSummary(callbacks.RunSummary, Callback):
    """`lightning_ddst.RunSummary` as a callback of `pytorch_lightning`."""


class SampleGrid(callbacks.SampleGrid, Callback):
    """`lightning_ddst.SampleGrid` as a callback of `pytorch_lightning`."""


class SampleQuality(callbacks.SampleQuality, Callback):
    """`lightning_ddst.SampleQuality` as a callback of `pytorch_lightning`."""


class SparsityPlots(callbacks.SparsityPlots, Callback):
    """`lightning_ddst.SparsityPlots` as a callback of `pytorch_lightning`."""


class AtomicCheckpointIO(checkpoints.AtomicCheckpointIO, TorchCheckpointIO):
    """`lightning_ddst.AtomicCheckpointIO` as a plugin of `pytorch_lightning`."""


class ArrayDataModule(data.ArrayDataModule, LightningDataModule):
    """`lightning_ddst.data.ArrayDataModule` as a data module of `pytorch_lightning`."""


class CIFAR10DataModule(data.CIFAR10DataModule, LightningDataModule):
    """`lightning_ddst.data.CIFAR10DataModule` as a data module of `pytorch_lightning`."""


class DigitsDataModule(data.DigitsDataModule, LightningDataModule):
    """`lightning_ddst.data.DigitsDataModule` as a data module of `pytorch_lightning`."""


class FashionMNISTDataModule(data.FashionMNISTDataModule, LightningDataModule):
    """`lightning_ddst.data.FashionMNISTDataModule` as a data module of `pytorch_lightning`."""


class ImageDataModule(data.ImageDataModule, LightningDataModule):
    """`lightning_ddst.data.ImageDataModule` as a data module of `pytorch_lightning`."""


class ImageFolderDataModule(data.ImageFolderDataModule, LightningDataModule):
    """`lightning_ddst.data.ImageFolderDataModule` as a data module of `pytorch_lightning`."""


class STL10DataModule(data.STL10DataModule, LightningDataModule):
    """`lightning_ddst.data.STL10DataModule` as a data module of `pytorch_lightning`."""


class TinyImageNetDataModule(data.TinyImageNetDataModule, LightningDataModule):
    """`lightning_ddst.data.TinyImageNetDataModule` as a data module of `pytorch_lightning`."""
