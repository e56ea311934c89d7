"""Images in folders."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_ddst.data.image_files import (
    BadImageError,
    Header,
    ImageFiles,
    OnBadImage,
    check_headers,
    is_image,
    list_entries,
    list_images,
)
from lightning_ddst.data.images import ImageDataModule, draw_subset
from lightning_ddst.utils import distributed
from lightning_ddst.utils.cache import digest
from lightning_ddst.utils.validation import check_choice, check_count

_SMALLEST, _LARGEST = 8, 64
"""Image sizes that are chosen where none is given."""
_LISTED = 10
"""Number of files that a message lists."""


class ImageFolderDataModule(ImageDataModule):
    """Images of a folder: one subfolder per class, or all images in the folder itself.

    With subfolders, a label is the position of the subfolder in alphabetical order, as in torchvision's
    ImageFolder; without subfolders, all labels are 0. Images are read when they are needed, so `num_workers` helps.

    Hidden files and folders, and links that lead back to a folder above, are left out. Subfolders without images are
    left out with a warning. The headers of all files are checked once, before training, and their contents when they
    are first read.

    Args:
        root: The folder to train on.
        image_size: Height and width. By default the power of 2 from 8 to 64 that is nearest to the shorter side of
            the images (the median).
        channels: 3, or 1 for gray. By default 1 if all files have gray values only.
        test_root: The folder that ``reference="test"`` uses, with the same subfolders.
        on_bad_image: "error" rejects the folder if a file cannot be read or does not have 8 bits per channel, and
            lists such files. "skip" leaves them out with a warning that lists them. A file that turns out to be damaged
            only when it is read, such as a truncated one, is replaced by the next one, always the same.
        reference_images: Largest number of images to compare samples with; of more, so many are drawn uniformly,
            always the same ones. By default all.
        **settings: Further arguments of `ImageDataModule`.

    Raises:
        ValueError: For an invalid argument; in `setup`, for a folder without images, with images both in it
            and in subfolders, or for a test folder with other classes.
        FileNotFoundError: In `setup`, for a missing folder.
        BadImageError: In `setup`, for files that cannot be used; in training, for a damaged file. It is a ValueError
            and an OSError. If `image_size` or `channels` is None, the errors of `setup` are raised at once.
        RuntimeError: In `setup`, if the processes of a run see different files.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        channels: int | None = None,
        test_root: str | Path | None = None,
        on_bad_image: OnBadImage = "error",
        reference_images: int | None = None,
        **settings: Any,
    ) -> None:
        size, depth = _LARGEST if image_size is None else image_size, 3 if channels is None else channels
        super().__init__(root, size, depth, **settings)
        if self.reference == "test" and test_root is None:
            raise ValueError('test_root=None, but reference="test" needs a folder.')
        check_choice("on_bad_image", on_bad_image, get_args(OnBadImage))
        if reference_images is not None:
            check_count("reference_images", reference_images)
        self.test_root = None if test_root is None else Path(test_root).expanduser()
        self.on_bad_image: OnBadImage = on_bad_image
        self.reference_images = reference_images
        self._found: dict[Path, _Found] = {}
        if image_size is None or channels is None:
            found = self._find(self.root)
            self._check_bad(found, found.bad)
            self.image_size = _nearest_size(found.headers) if image_size is None else image_size
            self.channels = (1 if all(header.gray for header in found.headers) else 3) if channels is None else channels

    @classmethod
    def sources(cls, arguments: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[Path]]]:
        """Returns the given folders."""
        given = [(name, arguments.get(name)) for name in ("root", "test_root")]
        return [(name, [Path(folder).expanduser()]) for name, folder in given if folder is not None]

    def make_dataset(self, train: bool) -> Dataset[Any]:
        """Lists the images and labels of a folder."""
        folder = self.root if train or self.test_root is None else self.test_root
        found = self._find(folder)
        if folder != self.root and (classes := self._find(self.root).classes) != found.classes:
            raise ValueError(f"test_root={folder} has the classes {found.classes}, but root={self.root} has {classes}.")
        bad = {path: reason for each in distributed.all_gather(found.bad) for path, reason in each.items()}
        self._check_bad(found, bad)
        if bad:
            distributed.warn(f"{_describe(found, bad)}; skipped.")
        if found.empty:
            distributed.warn(f"subfolders of {folder} without images are skipped: {', '.join(found.empty)}.")
        samples = [(path, label) for path, label in found.samples if path not in bad]
        names = [(path.relative_to(folder).as_posix(), label) for path, label in samples]
        distributed.check_same(f"the images of {folder} (their number, and a digest)", (len(names), digest(names)))
        return ImageFiles([path for path, _ in samples], [label for _, label in samples], self.on_bad_image)

    def reference_indices(self) -> Sequence[int] | None:
        """Returns the indices of the reference images, at most `reference_images`."""
        total = len(self._dataset(self.reference == "train"))
        if self.reference_images is None or self.reference_images >= total:
            return None
        return sorted(draw_subset(total, self.reference_images))

    def _check_bad(self, found: "_Found", bad: Mapping[Path, str]) -> None:
        if len(bad) == len(found.samples) or (bad and self.on_bad_image == "error"):
            hint = "" if self.on_bad_image == "skip" else ' Pass on_bad_image="skip" to leave them out.'
            raise BadImageError(f"{_describe(found, bad)}.{hint}")

    def _find(self, folder: Path) -> "_Found":
        if folder not in self._found:
            if folder.is_file():
                raise NotADirectoryError(f"root={folder} is a file; it must be a folder of images, or of subfolders.")
            if not folder.is_dir():
                raise self.missing(folder, "a folder of images, or of one subfolder of images per class")
            self._found[folder] = _find_images(folder)
        return self._found[folder]


@dataclass(frozen=True)
class _Found:
    """The images of a folder.

    Attributes:
        folder: The folder.
        classes: Names of the subfolders with images; empty if the folder itself holds the images.
        samples: Paths and labels of all image files.
        headers: Headers of the files that can be used.
        bad: The other files, with the reasons.
        empty: Names of the subfolders without images.
    """

    folder: Path
    classes: list[str]
    samples: list[tuple[Path, int]]
    headers: list[Header]
    bad: dict[Path, str]
    empty: list[str]


def _find_images(folder: Path) -> _Found:
    entries = list_entries(folder)
    own = [path for path in entries if is_image(path)]
    subfolders = {path.name: list_images(path, below=folder) for path in entries if path.is_dir()}
    classes = [name for name, paths in subfolders.items() if paths]
    if own and classes:
        raise ValueError(f"{folder} must hold either images or subfolders of images; it holds both.")
    if not own and not classes:
        raise ValueError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)}) and no subfolders of images.")
    samples = [(path, 0) for path in own]
    samples += [(path, label) for label, name in enumerate(classes) for path in subfolders[name]]
    headers, bad = check_headers([path for path, _ in samples])
    return _Found(folder, classes, samples, headers, bad, [name for name, paths in subfolders.items() if not paths])


def _nearest_size(headers: Sequence[Header]) -> int:
    side = median(header.side for header in headers)
    return min(max(1 << round(math.log2(side)), _SMALLEST), _LARGEST)


def _describe(found: _Found, bad: Mapping[Path, str]) -> str:
    names = [f"{path.relative_to(found.folder)} {reason}" for path, reason in list(bad.items())[:_LISTED]]
    more = f", and {len(bad) - _LISTED:,} more" if len(bad) > _LISTED else ""
    return f"{len(bad):,} of {len(found.samples):,} images of {found.folder} cannot be used: {', '.join(names)}{more}"
