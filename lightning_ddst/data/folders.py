"""Images in folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from lightning_ddst.data.images import ImageDataModule


class ImageFiles(Dataset[Any]):
    """Images in any files, read when they are needed; torchvision's ImageFolder needs one folder per class.

    Args:
        paths: Paths of the files.
        labels: Labels of the images.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self._samples = list(zip(paths, labels, strict=True))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self._samples[index]
        return open_image(path), label


def open_image(path: str | Path) -> Image.Image:
    """Reads an image in its own mode; torchvision's loader converts it to RGB, which cuts 16 bits."""
    image = Image.open(path)
    image.load()
    return image


class ImageFolderDataModule(ImageDataModule):
    """Images of a folder: one subfolder per class, or all images in the folder itself.

    With subfolders, a label is the position of the subfolder in alphabetical order, as in torchvision's
    ImageFolder; without subfolders, all labels are 0. Images are read when they are needed, so `num_workers` helps.

    Args:
        root: The folder to train on.
        image_size: Height and width.
        channels: 3, or 1 for gray.
        test_root: The folder that ``reference="test"`` uses, with the same subfolders.
        **settings: Further arguments of `ImageDataModule`.

    Raises:
        ValueError: For an invalid argument; in `setup`, for a folder without images, with images both in it
            and in subfolders, or for a test folder with other classes.
        FileNotFoundError: In `setup`, for a missing folder, or a subfolder without images.
    """

    def __init__(
        self, root: str | Path, image_size: int, channels: int = 3, test_root: str | Path | None = None, **settings: Any
    ) -> None:
        super().__init__(root, image_size, channels, **settings)
        if self.reference == "test" and test_root is None:
            raise ValueError('test_root=None, but reference="test" needs a folder.')
        self.test_root = None if test_root is None else Path(test_root).expanduser()

    def make_dataset(self, train: bool) -> Dataset[Any]:
        """Lists the images and labels of a folder."""
        if train or self.test_root is None:
            return self._folder(self.root)
        dataset = self._folder(self.test_root)
        classes, own = self._classes(self.root), self._classes(self.test_root)
        if classes != own:
            raise ValueError(f"test_root={self.test_root} has the classes {own}, but root={self.root} has {classes}.")
        return dataset

    def _folder(self, folder: Path) -> Dataset[Any]:
        if not folder.is_dir():
            raise self.missing(folder, "a folder of images, or of one subfolder of images per class")
        paths = sorted(
            path
            for path in folder.iterdir()
            if path.is_file() and has_file_allowed_extension(path.name, IMG_EXTENSIONS)
        )
        if paths and self._classes(folder):
            raise ValueError(f"{folder} must hold either images or subfolders of images; it holds both.")
        if self._classes(folder):
            dataset: Dataset[Any] = ImageFolder(folder, loader=open_image)
            return dataset
        if not paths:
            raise ValueError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)}) and no subfolders.")
        return ImageFiles(paths, [0] * len(paths))

    @staticmethod
    def _classes(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
