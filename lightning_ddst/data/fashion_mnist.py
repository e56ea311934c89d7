"""Fashion-MNIST."""

import gzip
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.datasets import FashionMNIST

from lightning_ddst.data.images import ImageDataModule


class FashionMNISTDataModule(ImageDataModule):
    """60,000 and 10,000 gray images of clothes, 28x28, in 10 classes (Xiao et al. 2017).

    Reads the four files ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, gzipped (``.gz``) or not, from
    `root`, or from torchvision's folder ``root/FashionMNIST/raw``.

    Args:
        root: Folder of the files.
        image_size: Height and width. At 32 the images keep their pixels and get a black margin of 2; at
            sizes other than 28 and 32 they are resized.
        channels: 1, or 3 identical ones.
        **settings: Further arguments of `ImageDataModule`.
    """

    home = "https://github.com/zalandoresearch/fashion-mnist"
    downloads = True

    def __init__(self, root: str | Path, image_size: int = 32, channels: int = 1, **settings: Any) -> None:
        super().__init__(root, image_size, channels, **settings)

    @classmethod
    def sources(cls, arguments: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[Path]]]:
        """Returns the files of the training split."""
        root = Path(arguments["root"]).expanduser()
        names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
        return [("root", cls._places(root, name)) for name in names]

    @staticmethod
    def _places(root: Path, name: str) -> list[Path]:
        plain = [folder / name for folder in (root / "FashionMNIST" / "raw", root)]
        return [path for each in plain for path in (each, each.with_name(f"{name}.gz"))]

    def prepare_data(self) -> None:
        """Downloads missing files if `download` is True."""
        if self.download:
            FashionMNIST(self.root, download=True)

    def make_dataset(self, train: bool) -> TensorDataset:
        """Reads the images and labels of a split."""
        split = "train" if train else "t10k"
        images = torch.from_numpy(self._idx(f"{split}-images-idx3-ubyte"))[:, None]
        labels = torch.from_numpy(self._idx(f"{split}-labels-idx1-ubyte"))
        return TensorDataset(F.pad(images, (2, 2, 2, 2)) if self.image_size == 32 else images, labels)

    def _idx(self, name: str) -> NDArray[np.uint8]:
        # torchvision's reader needs unpacked files in one folder, and stops at an incomplete one by a bare assert.
        places = self._places(self.root, name)
        paths = [path for path in places if path.is_file()]
        if not paths:
            raise self.missing(places[0], f"this file, also as {name}.gz, there or in {self.root}")
        with gzip.open(paths[0]) if paths[0].suffix == ".gz" else paths[0].open("rb") as file:
            content = file.read()
        # The header: two zeros, 8 for bytes, the number of dimensions, and each dimension in four bytes.
        dimensions = int(name.split("idx")[1][0])
        start = 4 + 4 * dimensions
        shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
        if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != math.prod(shape):
            raise ValueError(f"{paths[0]} is no idx file of bytes in {dimensions} dimensions, or is incomplete.")
        return np.frombuffer(bytearray(content[start:]), np.uint8).reshape(shape)
