"""Images in NumPy files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightning_ddst.data.images import ImageDataModule
from lightning_ddst.utils.cache import first_line
from lightning_ddst.utils.validation import check_choice

Layout = Literal["NHW", "NHWC", "NCHW"]

_CHUNK = 1000


class ArrayDataModule(ImageDataModule):
    """Images from a ``.npz`` file, with or without labels, or from a ``.npy`` file.

    A ``.npz`` file holds ``images`` and optionally ``labels``, integers ``(n,)``; it is read into memory. A ``.npy``
    file holds images; it is memory-mapped, so it may be larger than memory. Without labels, all labels are 0.

    Args:
        path: The file to train on.
        image_size: Height and width.
        channels: 1 or 3.
        test_path: The file that ``reference="test"`` uses.
        layout: "NHW", "NHWC" or "NCHW". By default, three dimensions mean "NHW"; with four, the dimension
            of size 1 or 3 holds the channels.
        value_range: The values of black and white, which become -1 and 1. By default (0, 255) for uint8; for
            floats, (-1, 1) if the lowest value is at most -0.5, and (0, 1) if none is negative. Floats are
            not rounded to 8 bits.
        **settings: Further arguments of `ImageDataModule`.

    Raises:
        ValueError: For an invalid argument; in `setup`, if the layout or the range of an array is ambiguous
            and not given, or differs from the given one.
        FileNotFoundError: In `setup`, for a missing file.
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int,
        channels: int = 3,
        test_path: str | Path | None = None,
        layout: Layout | None = None,
        value_range: tuple[float, float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, image_size, channels, **settings)
        if layout is not None:
            check_choice("layout", layout, ("NHW", "NHWC", "NCHW"))
        if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
            raise ValueError(f"value_range={value_range} must be two numbers, black's lower than white's.")
        if self.reference == "test" and test_path is None:
            raise ValueError('test_path=None, but reference="test" needs a file.')
        self.test_path = None if test_path is None else Path(test_path).expanduser()
        self.layout = layout
        self.value_range = value_range

    @classmethod
    def sources(cls, arguments: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[Path]]]:
        """Returns the given files."""
        given = [(name, arguments.get(name)) for name in ("path", "test_path")]
        return [(name, [Path(file).expanduser()]) for name, file in given if file is not None]

    def make_dataset(self, train: bool) -> Dataset[Any]:
        """Reads the images and labels of a file."""
        path = self.root if train or self.test_path is None else self.test_path
        if not path.is_file():
            raise self.missing(path, "images of a .npz or .npy file")
        if path.suffix == ".npy":
            with _reading(path):
                mapped = np.load(path, mmap_mode="r")
            return _Mapped(path, self._layout(path, mapped), self._range(path, mapped))
        if path.suffix != ".npz":
            raise ValueError(f"{path} must be a .npz or .npy file.")
        with _reading(path), np.load(path) as arrays:
            held = {name: arrays[name] for name in ("images", "labels") if name in arrays}
            others = ", ".join(arrays) or "nothing"
        if "images" not in held:
            raise ValueError(f"{path} must hold images; it holds {others}.")
        images = held["images"]
        labels = held.get("labels", np.zeros(images.shape[:1], np.int64))
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: labels {labels.dtype}{labels.shape} must be integers, one per image: {images.shape[:1]}."
            )
        layout, value_range = self._layout(path, images), self._range(path, images)
        return TensorDataset(_tensor(images, layout, value_range), torch.from_numpy(labels.astype(np.int64)))

    def _layout(self, path: Path, images: NDArray[Any]) -> Layout:
        shape = images.shape
        fits: dict[Layout, bool] = {
            "NHW": len(shape) == 3,
            "NHWC": len(shape) == 4 and shape[3] in (1, 3),
            "NCHW": len(shape) == 4 and shape[1] in (1, 3),
        }
        found = [layout for layout, fit in fits.items() if fit and self.layout in (None, layout)]
        if not found:
            expected = self.layout or "NHW, NHWC or NCHW"
            raise ValueError(f"{path}: images of shape {shape} must be {expected}, where C is 1 or 3.")
        if len(found) > 1:
            raise ValueError(f"{path}: images of shape {shape} may be NHWC or NCHW; set layout.")
        return found[0]

    def _range(self, path: Path, images: NDArray[Any]) -> tuple[float, float]:
        if images.dtype == np.uint8:
            if self.value_range is None or self.value_range == (0, 255):
                return 0, 255
        elif images.dtype.kind not in "fiub":
            raise ValueError(f"{path}: images of {images.dtype} must be numbers.")
        elif images.dtype.kind != "f" and self.value_range is None:
            raise ValueError(f"{path}: images of {images.dtype}; set value_range to the values of black and white.")
        chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
        ends = [(float(chunk.min()), float(chunk.max())) for chunk in chunks]  # NaN if a value is NaN
        low, high = np.min(ends or [(0.0, 0.0)], 0)[0], np.max(ends or [(0.0, 0.0)], 0)[1]
        if self.value_range is not None:
            black, white = self.value_range
            if not (black <= low and high <= white):
                raise ValueError(f"{path}: values from {low} to {high} are outside value_range={self.value_range}.")
            return black, white
        if -1 <= low <= -0.5 and high <= 1:
            return -1, 1
        if low >= 0 and high <= 1:
            return 0, 1
        raise ValueError(
            f"{path}: floats from {low} to {high} are neither in [0, 1], nor in [-1, 1] and down to -0.5 at least; "
            "set value_range to the values of black and white."
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever NumPy raises for a damaged file into a ValueError of one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged, or holds no plain arrays: {first_line(error)}") from error


def _tensor(images: NDArray[Any], layout: Layout, value_range: tuple[float, float]) -> Tensor:
    """Converts images to ``(n, channels, height, width)``: uint8 unchanged, others to float32 in [-1, 1]."""
    if layout == "NHW":
        images = images[:, None]
    elif layout == "NHWC":
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or value_range != (0, 255):
        black, white = value_range
        images = (images.astype(np.float32) - black) * (2 / (white - black)) - 1
        images = np.clip(images, -1, 1).astype(np.float32)
    return torch.from_numpy(np.array(images))


class _Mapped(Dataset[Any]):
    """Images of a ``.npy`` file, memory-mapped by each process that reads them."""

    def __init__(self, path: Path, layout: Layout, value_range: tuple[float, float]) -> None:
        self._path, self._layout, self._range = path, layout, value_range
        self._images: NDArray[Any] | None = None

    def _mapped(self) -> NDArray[Any]:
        if self._images is None:
            self._images = np.load(self._path, mmap_mode="r")
        return self._images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}  # pickling would copy the file

    def __len__(self) -> int:
        return len(self._mapped())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return _tensor(self._mapped()[index][None], self._layout, self._range)[0], 0
