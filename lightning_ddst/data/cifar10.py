"""CIFAR-10."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10

from lightning_ddst.data.images import ImageDataModule


class CIFAR10DataModule(ImageDataModule):
    """50,000 and 10,000 colour images of things and animals, 32x32, in 10 classes (Krizhevsky 2009).

    Reads the original files from torchvision's folder ``root/cifar-10-batches-py``, or else
    ``root/train.npz`` and ``root/test.npz`` with ``images``, uint8 ``(n, 32, 32, 3)``, ``labels``, integers
    ``(n,)``, and optionally ``lossless``, bool ``(n,)``, which marks images with the original pixels.

    Args:
        root: Folder of the files.
        image_size: Height and width.
        channels: 3, or 1 for gray.
        horizontal_flips: As in `ImageDataModule`, but True by default.
        lossless_reference: Whether samples are compared with lossless images only. Training uses all images.
        **settings: Further arguments of `ImageDataModule`.
    """

    home = "https://www.cs.toronto.edu/~kriz/cifar.html"
    downloads = True

    def __init__(
        self,
        root: str | Path,
        image_size: int = 32,
        channels: int = 3,
        horizontal_flips: bool = True,
        lossless_reference: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(root, image_size, channels, horizontal_flips=horizontal_flips, **settings)
        self.lossless_reference = lossless_reference
        self._lossless: dict[bool, list[int]] = {}

    @classmethod
    def sources(cls, arguments: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[Path]]]:
        """Returns the folder of the original files, or this split's ``.npz`` files."""
        root = Path(arguments["root"]).expanduser()
        splits = ("train", "test") if arguments.get("reference") == "test" else ("train",)
        return [("root", (root / CIFAR10.base_folder, root / f"{split}.npz")) for split in splits]

    def prepare_data(self) -> None:
        """Downloads the original files if `download` is True and they are missing."""
        if self.download:
            CIFAR10(self.root, download=True)

    def make_dataset(self, train: bool) -> TensorDataset:
        """Reads the images and labels of a split."""
        original = self.root / CIFAR10.base_folder
        if original.is_dir():
            try:
                dataset = CIFAR10(self.root, train)
            except RuntimeError as error:
                raise self.not_original(original) from error
            images, labels = dataset.data, np.asarray(dataset.targets, np.int64)
        else:
            path = self.root / ("train.npz" if train else "test.npz")
            if not path.is_file():
                raise self.missing(original, f"the original files there, or this split's images from {path}")
            with np.load(path) as arrays:
                if not {"images", "labels"} <= set(arrays):
                    raise ValueError(f"{path} must hold images and labels; it holds {', '.join(arrays) or 'nothing'}.")
                images, labels = arrays["images"], arrays["labels"].astype(np.int64)
                lossless = arrays["lossless"] if "lossless" in arrays else np.ones(len(images), bool)
            if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
                raise ValueError(f"{path}: images {images.dtype}{images.shape} must be uint8 (n, 32, 32, 3).")
            if not len(images) == len(labels) == len(lossless):
                lengths = f"{len(images)} images, {len(labels)} labels and {len(lossless)} flags"
                raise ValueError(f"{path}: {lengths} must be equally many.")
            self._lossless[train] = np.flatnonzero(lossless).tolist()
        return TensorDataset(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.tensor(labels))

    def reference_indices(self) -> list[int] | None:
        """Returns the indices of the lossless images, or None to use all."""
        return self._lossless.get(self.reference == "train") if self.lossless_reference else None
