"""Image files: lists those of a folder, checks their headers, and reads them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from lightning_ddst.utils import distributed
from lightning_ddst.utils.cache import first_line

OnBadImage = Literal["error", "skip"]


class BadImageError(OSError, ValueError):
    """An image file that cannot be read, or does not have 8 bits per channel.

    Args:
        message: One line, also where a loader's worker process raised the error.
    """

    def __init__(self, message: str) -> None:
        # torch raises a worker's error again with its traceback as the message, which ends with the error itself.
        super().__init__(message.strip().rpartition(f"{BadImageError.__name__}: ")[2])


@dataclass(frozen=True)
class Header:
    """The header of an image file.

    Attributes:
        side: The shorter of height and width.
        gray: Whether the file has gray values only.
    """

    side: int
    gray: bool


def list_images(folder: Path, below: Path) -> list[Path]:
    """Lists the image files in a folder and its subfolders, sorted by folder, then by name, as in torchvision.

    Hidden files and folders (their names begin with a dot) are left out, and so are links that lead back to a folder
    above them.

    Args:
        folder: The folder.
        below: The folder above it.
    """
    found: list[Path] = []
    top = Path(os.path.realpath(below))
    _visit(folder, frozenset(map(str, (top, *top.parents))), found)
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def _visit(folder: Path, above: frozenset[str], found: list[Path]) -> None:
    real = os.path.realpath(folder)
    if real in above:  # a loop of links
        return
    for path in list_entries(folder):
        if path.is_dir():
            _visit(path, above | {real}, found)
        elif is_image(path):
            found.append(path)


def list_entries(folder: Path) -> list[Path]:
    """Lists the entries of a folder whose names do not begin with a dot, sorted."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def is_image(path: Path) -> bool:
    """Returns whether a path is a file, or a broken link, with the suffix of an image."""
    return path.name.lower().endswith(IMG_EXTENSIONS) and (path.is_file() or not path.exists())


def check_headers(paths: Sequence[Path]) -> tuple[list[Header], dict[Path, str]]:
    """Reads the headers of image files.

    Args:
        paths: The files.

    Returns:
        The headers of the usable files, and for each other file the reason why it cannot be used.
    """
    headers, bad = [], {}
    for path in tqdm(paths, "checking images", leave=False, delay=2, disable=None):
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    bad[path] = f"must have 8 bits per channel; its mode is {image.mode}"
                else:
                    headers.append(Header(min(image.size), image.mode in ("1", "L", "LA", "La")))
        except Exception as error:  # PIL raises many kinds of errors for damaged files
            bad[path] = _reason(error)
    return headers, bad


class ImageFiles(Dataset[Any]):
    """Images in any files, read when they are needed; torchvision's ImageFolder needs one folder per class.

    Args:
        paths: Paths of the files.
        labels: Labels of the images.
        on_bad_image: "error" raises an error for a file that cannot be read. "skip" returns the next file in its
            place, with one warning per file: so an index stands for the same image in every epoch, process and
            resumed run.

    Raises:
        BadImageError: When an image is read that is damaged, or, with "skip", if all are.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], on_bad_image: OnBadImage = "error") -> None:
        self._samples = list(zip(paths, labels, strict=True))
        self._skips = on_bad_image == "skip"
        # Shared by the loader's worker processes, which would otherwise warn again in every epoch.
        self._damaged = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        places = range(len(self))
        for place in chain(places[index:], places[:index]) if self._skips else (index,):
            path, label = self._samples[place]
            if self._damaged[place]:
                continue
            try:
                return open_image(path), label
            except BadImageError as error:
                if not self._skips:
                    raise BadImageError(f'{error}; on_bad_image="skip" leaves such files out.') from error
                self._damaged[place] = True
                distributed.warn(f"{error}; the next file takes its place.")
        raise BadImageError(f"none of {len(self):,} images can be read, such as {self._samples[index][0]}.")


def open_image(path: str | Path) -> Image.Image:
    """Reads an image in its own mode; torchvision's loader converts it to RGB, which cuts 16 bits.

    Raises:
        BadImageError: For a damaged file.
        OSError: If the operating system cannot read it.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise  # the file itself may be fine
        raise BadImageError(f"{path} {_reason(error)}") from error
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is no image of a known format"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    return f"cannot be read ({first_line(error)})"
