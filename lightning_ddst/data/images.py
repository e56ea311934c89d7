"""Base class of the data modules for images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from lightning_ddst.data.resumable import ResumableLoader
from lightning_ddst.utils import distributed
from lightning_ddst.utils.validation import check_choice, check_count

Split = Literal["train", "test"]

_GRAY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as in PIL
_CHUNK = 1000
_SUBSET_SEED = 0


class ImageDataModule(LightningDataModule):
    """Images from files, for training and for comparing samples with them.

    Batches are tuples of images, float32 ``(batch, channels, size, size)`` in [-1, 1], and labels,
    int64 ``(batch,)``. A value x of 8 bits becomes x / 127.5 - 1.

    A subclass must implement `make_dataset` only. Nothing is downloaded unless `download` is True.

    Args:
        root: Folder of the files.
        image_size: Height and width. For images of another size, the middle square is resized bilinearly
            with antialiasing.
        channels: 1 for gray (color images become 0.299 R + 0.587 G + 0.114 B), or 3 (identical for gray images).
        batch_size: Images per batch in each process; training drops a smaller last batch.
        batches_per_epoch: Length of an epoch, which may be more than one pass over the images; by
            default one pass.
        horizontal_flips: Whether to mirror each training image with probability 1/2, independently in each batch,
            drawn from torch's random state on the batch's device.
        images: Number of images to train on, drawn uniformly over all classes: always the same ones; a smaller
            number draws a subset of a larger one. By default all.
        reference: The split for validation, test and prediction, with which samples are compared: "train" or
            "test". It is always complete, in order, and never mirrored.
        num_workers: Processes that read images; 0 reads them in the training process.
        download: Whether to download missing files, if torchvision can.

    Raises:
        ValueError: For an invalid argument; in `setup`, for `images` or `batch_size` above the number of images.
        FileNotFoundError: In `setup`, for missing files.
    """

    home: ClassVar[str | None] = None
    """Address where users get the data."""

    downloads: ClassVar[bool] = False
    """Whether `prepare_data` downloads."""

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        channels: int = 3,
        batch_size: int = 64,
        batches_per_epoch: int | None = None,
        horizontal_flips: bool = False,
        images: int | None = None,
        reference: Split = "train",
        num_workers: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__()
        counts = {"image_size": image_size, "batch_size": batch_size}
        counts |= {} if batches_per_epoch is None else {"batches_per_epoch": batches_per_epoch}
        counts |= {} if images is None else {"images": images}
        counts |= {} if num_workers == 0 else {"num_workers": num_workers}
        for name, value in counts.items():
            check_count(name, value)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels!r} must be 1 or 3.")
        check_choice("reference", reference, ("train", "test"))
        if download and not self.downloads:
            raise ValueError(f"download=True: {type(self).__name__} downloads nothing.{self._where_to_get_it()}")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.channels = channels
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.horizontal_flips = horizontal_flips
        self.images = images
        self.reference = reference
        self.num_workers = num_workers
        self.download = download
        self._read: dict[bool, Dataset[Any]] = {}

    # ---- for subclasses --------------------------------------------------------------------------------

    def make_dataset(self, train: bool) -> Dataset[Any]:
        """Makes the data set of a split. Subclasses must implement this method.

        Args:
            train: True for the training split, False for the test split.

        Returns:
            A data set with a length, whose samples are an image, either PIL's or a tensor
            ``(channels, height, width)``, and a label, an integer. Tensors are uint8, or floats in
            [-1, 1]. A TensorDataset of images ``(n, channels, height, width)`` and labels ``(n,)``
            is resized once and kept in memory; other data sets are read image by image, in every epoch.
        """
        raise NotImplementedError(f"{type(self).__name__} must override make_dataset.")

    def reference_indices(self) -> Sequence[int] | None:
        """Returns the indices of the reference images with which samples are compared; None for all."""
        return None

    @classmethod
    def sources(cls, arguments: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[Path]]]:
        """Returns the files or folders without which nothing can be read.

        Args:
            arguments: All arguments of the class by name.

        Returns:
            Pairs of the argument that sets a path, and alternative paths, of which one must exist.
        """
        return []

    @classmethod
    def missing_files(cls, arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Finds all `sources` that are missing; ``lightning-ddst`` calls it before anything is made.

        Args:
            arguments: All arguments of the class by name.

        Returns:
            Pairs of an argument's name, and a sentence with the full paths of the missing files.
        """
        found = [] if arguments.get("download") else cls.sources(arguments)
        return [(name, cls._say_missing(paths)) for name, paths in found if not any(path.exists() for path in paths)]

    @classmethod
    def _say_missing(cls, paths: Sequence[Path]) -> str:
        places = " nor ".join(str(path.absolute()) for path in paths)
        text = f"{'neither ' if len(paths) > 1 else ''}{places} {'exists' if len(paths) > 1 else 'does not exist'}"
        hint = " Or set download=true." if cls.downloads else ""
        return (
            f"{text}; {cls.__name__} reads {'one of them' if len(paths) > 1 else 'it'}.{cls._where_to_get_it()}{hint}"
        )

    def missing(self, path: Path, expected: str) -> FileNotFoundError:
        """Makes the error to raise for a missing path.

        Args:
            path: The missing path.
            expected: Description of the files that belong there.
        """
        message = f"{path} is not there: {type(self).__name__} reads {expected}.{self._where_to_get_it()}"
        if self.downloads:
            message += " Or let download=True download it, before training."
        return FileNotFoundError(message)

    def not_original(self, folder: Path) -> ValueError:
        """Makes the error to raise if torchvision finds files whose MD5 is not that of the original ones."""
        message = f"{folder} lacks a file, or has one that is not the original (by its MD5)."
        return ValueError(message + self._where_to_get_it())

    @classmethod
    def _where_to_get_it(cls) -> str:
        return "" if cls.home is None else f" Get it from {cls.home}."

    # ---- reading ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Reads the data that the stage needs, so that errors appear before training."""
        if stage == "fit":
            self._batches(len(self._training()))
        self._compared()

    def _dataset(self, train: bool) -> Any:
        if train not in self._read:
            dataset = self.make_dataset(train)
            if len(dataset) == 0:  # type: ignore[arg-type]
                raise ValueError(f"{self.root} holds no images to {'train on' if train else 'compare samples with'}.")
            if isinstance(dataset, TensorDataset):
                read: Dataset[Any] = _InMemory(dataset, self.image_size, self.channels)
            else:
                read = _OneByOne(dataset, self.image_size, self.channels)
            _ = read[0]  # raises if images cannot be read
            self._read[train] = read
        return self._read[train]

    def _training(self) -> Any:
        dataset = self._dataset(True)
        if self.images is None:
            return dataset
        if self.images > len(dataset):
            raise ValueError(f"images={self.images} must not be above the number of images, {len(dataset)}.")
        return Subset(dataset, draw_subset(len(dataset), self.images))

    def _compared(self) -> Any:
        dataset, indices = self._dataset(self.reference == "train"), self.reference_indices()
        return dataset if indices is None else Subset(dataset, indices)

    def _batches(self, images: int) -> int:
        """Returns the number of batches per epoch for a number of images."""
        together = self.batch_size * distributed.get_world_size()
        if self.batches_per_epoch is None and together > images:
            processes = f" in each of {distributed.get_world_size()} processes" if distributed.is_distributed() else ""
            raise ValueError(
                f"batch_size={self.batch_size}{processes} must not be above the number of images, {images}."
            )
        return self.batches_per_epoch or images // together

    # ---- loaders ---------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Makes a loader of shuffled images and labels that resumes in the middle of an epoch."""
        dataset = self._training()
        batches = self._batches(len(dataset))
        return ResumableLoader(dataset, self.batch_size, batches, num_workers=self.num_workers, collate_fn=batch_of)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Makes a loader of every image of the reference split once, in order."""
        rng = torch.Generator()  # the default would draw from training's random state
        return DataLoader(
            self._compared(), batch_size=256, generator=rng, num_workers=self.num_workers, collate_fn=batch_of
        )

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mirrors half of the images in training."""
        # Not in the loader: no checkpoint holds the random states of its worker processes.
        if not (self.horizontal_flips and self.trainer is not None and self.trainer.training):
            return batch
        images, labels = batch
        flipped = torch.rand(len(images), device=images.device) < 0.5
        return torch.where(flipped[:, None, None, None], images.flip(3), images), labels


def draw_subset(total: int, number: int) -> list[int]:
    """Draws different indices below `total`: always the same ones; fewer are the first of more."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(_SUBSET_SEED))[:number].tolist()


def fit_to_size(images: Tensor, image_size: int, channels: int) -> Tensor:
    """Crops and resizes images to a size and a number of channels.

    torchvision's transforms round gray values down and resize bytes in other arithmetic: up to half of the pixels
    differ, by 1 or 2 of 255.

    Args:
        images: ``(n, 1 or 3, height, width)``, uint8 or float.
        image_size: Height and width of the result: the middle square, resized bilinearly with antialiasing.
        channels: Channels of the result, 1 or 3.

    Returns:
        ``(n, channels, image_size, image_size)``, rounded to uint8 if `images` are uint8, else float32.

    Raises:
        ValueError: If the images have another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {tuple(images.shape)} must have shape (n, 1 or 3, height, width).")
    given, height, width = images.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if given == 1 and channels == 3 and side == image_size:
        return images.expand(-1, 3, -1, -1)
    if given == channels and side == image_size:
        return images
    values = images.float()
    if given > channels:
        values = (values * values.new_tensor(_GRAY)[:, None, None]).sum(1, keepdim=True)
    if side != image_size:
        values = F.interpolate(values, (image_size, image_size), mode="bilinear", antialias=True)
    values = values.expand(-1, channels, -1, -1)
    return values.round().to(torch.uint8) if images.dtype == torch.uint8 else values


def batch_of(samples: Any) -> tuple[Tensor, Tensor]:
    """Collates samples to a batch for networks.

    Args:
        samples: A list of images and labels, or a tuple of stacked images and stacked labels.

    Returns:
        Images, float32 in [-1, 1], and labels, int64.
    """
    if isinstance(samples, tuple):
        images, labels = samples
    else:
        images = torch.stack([image for image, _ in samples])
        labels = torch.tensor([label for _, label in samples])
    images = images / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    return images, labels.to(torch.int64)


class _InMemory(Dataset[Any]):
    """Images of a TensorDataset, resized once."""

    def __init__(self, dataset: TensorDataset, image_size: int, channels: int) -> None:
        images, self._labels = dataset.tensors
        self._images = torch.cat([fit_to_size(chunk, image_size, channels) for chunk in images.split(_CHUNK)])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], int(self._labels[index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Returns a batch at once, as the loader asks for."""
        return self._images[indices], self._labels[indices]


class _OneByOne(Dataset[Any]):
    """Images of a data set, resized whenever they are read."""

    def __init__(self, dataset: Dataset[Any], image_size: int, channels: int) -> None:
        self._dataset, self._image_size, self._channels = dataset, image_size, channels

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._dataset[index]
        if not isinstance(image, Tensor):
            if image.mode.startswith(("I", "F")):
                name = getattr(image, "filename", None) or f"image {index}"
                raise ValueError(f"{name} must have 8 bits per channel; its mode is {image.mode}.")
            image = pil_to_tensor(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        return fit_to_size(image[None], self._image_size, self._channels)[0], int(label)
