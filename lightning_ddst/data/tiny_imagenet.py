"""Tiny ImageNet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lightning_ddst.data.image_files import ImageFiles, OnBadImage
from lightning_ddst.data.images import ImageDataModule
from lightning_ddst.utils.validation import check_choice

_FOLDER = "tiny-imagenet-200"


class TinyImageNetDataModule(ImageDataModule):
    """100,000 and 10,000 colour images, 64x64, in 200 classes of ImageNet (Stanford's course CS231n).

    Reads the unpacked original zip file: ``wnids.txt``, ``train/<class>/images/*.JPEG``,
    ``val/images/*.JPEG`` and ``val/val_annotations.txt``, in `root` or in ``root/tiny-imagenet-200``.
    A label is the position of its class in the sorted ``wnids.txt``. The original test images have no labels
    and are not used. Images are read when they are needed, so `num_workers` helps.

    Args:
        root: Folder of the files.
        image_size: Height and width.
        channels: 3, or 1 for gray.
        horizontal_flips: As in `ImageDataModule`, but True by default.
        on_bad_image: "error" raises an error for a file that cannot be read; "skip" warns, and returns the next file in
            its place, always the same.
        **settings: Further arguments of `ImageDataModule`; ``reference="test"`` uses the 10,000 images.
    """

    home = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

    def __init__(
        self,
        root: str | Path,
        image_size: int = 64,
        channels: int = 3,
        horizontal_flips: bool = True,
        on_bad_image: OnBadImage = "error",
        **settings: Any,
    ) -> None:
        super().__init__(root, image_size, channels, horizontal_flips=horizontal_flips, **settings)
        check_choice("on_bad_image", on_bad_image, get_args(OnBadImage))
        self.on_bad_image: OnBadImage = on_bad_image

    @classmethod
    def sources(cls, arguments: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[Path]]]:
        """Returns the list of classes."""
        root = Path(arguments["root"]).expanduser()
        return [("root", (root / "wnids.txt", root / _FOLDER / "wnids.txt"))]

    def make_dataset(self, train: bool) -> ImageFiles:
        """Lists the images and labels of a split."""
        nested = self.root / _FOLDER
        folder = nested if nested.is_dir() else self.root
        wnids = sorted(self._existing(folder / "wnids.txt").read_text().split())
        if train:  # torchvision's ImageFolder would shift the labels after a missing class
            images = [
                (path, label)
                for label, wnid in enumerate(wnids)
                for path in sorted(self._existing(folder / "train" / wnid / "images").glob("*.JPEG"))
            ]
        else:
            table = self._existing(folder / "val" / "val_annotations.txt")
            # A line holds the name of a file, its class, and the four corners of a box.
            names = [line.split("\t")[:2] for line in table.read_text().splitlines()]
            unknown = sorted({wnid for _, wnid in names} - set(wnids))
            if unknown:
                raise ValueError(f"{table} names classes that are not in wnids.txt: {', '.join(unknown)}.")
            images = [(self._existing(folder / "val" / "images" / name), wnids.index(wnid)) for name, wnid in names]
        return ImageFiles([path for path, _ in images], [label for _, label in images], self.on_bad_image)

    def _existing(self, path: Path) -> Path:
        if not path.exists():
            raise self.missing(path, f"the files of {_FOLDER}.zip as they are unpacked, in {self.root / _FOLDER}")
        return path
