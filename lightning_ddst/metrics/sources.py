"""Sources of the images to compare: an evaluation's loaders, and the generator; processes share the work."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_ddst.utils import distributed
from lightning_ddst.utils.lightning_private import evaluation_loaders, train_loaders, transfer_batch
from lightning_ddst.utils.nested import Place, find_images, tensors_in
from lightning_ddst.utils.networks import draw_samples

T = TypeVar("T")

_WIDE = 0.5  # span of pixels of a generator that is trained
_TOLERANCE = 1e-3  # of values of images in [-1, 1]


def in_turn(own: Iterator[T]) -> Iterator[T]:
    """Yields all processes' items in every process: the first of each in order of rank, then the second of each.

    Every process must exhaust the iterator. With several processes, items must be on the CPU.

    Args:
        own: This process's items; other processes may have more or fewer.
    """
    while True:
        present = [item for item in distributed.all_gather(next(own, None)) if item is not None]
        if not present:
            return
        yield from present


class PixelRange:
    """Checks and maps the pixels of one set of images ``(n, channels, height, width)``; ignores other shapes and NaN.

    Args:
        whose: Name of the images in errors.
        allowed: The lowest and highest value that pixels may have; None means -1 and 1.

    Attributes:
        dark: Whether there were pixels below 0, after `finish`.
    """

    def __init__(self, whose: str, allowed: tuple[float, float] | None) -> None:
        self._whose = whose
        self._allowed = allowed
        self._seen: tuple[float, float] | None = None
        self.dark = False

    def check(self, images: Tensor) -> None:
        """Checks that pixels are in the range, and remembers the lowest and the highest.

        Raises:
            ValueError: If a pixel is outside the range.
        """
        if images.dim() != 4 or not images.numel():
            return
        low, high = (float(end) for end in torch.aminmax(images))
        lowest, highest = self._allowed or (-1, 1)
        tolerance = _TOLERANCE * (highest - lowest) / 2
        if low < lowest - tolerance or high > highest + tolerance:
            raise ValueError(
                f"{self._whose} have pixels from {low:.4g} to {high:.4g}; images that are compared must be in "
                f"[{lowest:g}, {highest:g}]. If theirs is another range, give it: value_range=(low, high)."
            )
        self._seen = (low, high) if self._seen is None else (min(low, self._seen[0]), max(high, self._seen[1]))

    def finish(self, doubt: Literal["none", "bright", "wide"]) -> None:
        """Checks the pixels of all processes' images together; every process must call it.

        Args:
            doubt: Images that are taken for images in [0, 1] where no range was given: "bright", all that have no
                pixel below 0; "wide", only those that also span a half of [0, 1], because an untrained generator
                makes images of about one value; "none".

        Raises:
            ValueError: For such images, and if the given range is that of bytes and all pixels are in [0, 1].
        """
        seen = [each for each in distributed.all_gather(self._seen) if each is not None]
        if not seen:
            return
        low, high = min(low for low, _ in seen), max(high for _, high in seen)
        self.dark = low < -_TOLERANCE
        if self._allowed is None:
            if doubt == "bright" or (doubt == "wide" and spans_wide(low, high)):
                check_below_zero(self._whose, low, high)
        elif self._allowed[1] > 2 and low >= -_TOLERANCE and high <= 1 + _TOLERANCE:
            raise ValueError(
                f"value_range=({self._allowed[0]:g}, {self._allowed[1]:g}) does not fit: {self._whose} have pixels "
                f"from {low:.4g} to {high:.4g}, like images in [0, 1]. Pass value_range=(0, 1)."
            )

    def mapped(self, images: Tensor) -> Tensor:
        """Maps images from the range to [-1, 1]."""
        lowest, highest = self._allowed or (-1, 1)
        if (lowest, highest) == (-1, 1):
            return images
        images = images if images.is_floating_point() else images.float()
        return (images - lowest) * (2 / (highest - lowest)) - 1


def spans_wide(low: float, high: float) -> bool:
    """Returns whether pixels span as much as a trained generator's; those of an untrained one are about equal."""
    return high - low >= _WIDE


def check_below_zero(whose: str, low: float, high: float) -> None:
    """Raises a ValueError if images that should be in [-1, 1] have no pixel below 0; accepts NaN."""
    if low >= -_TOLERANCE:
        raise ValueError(
            f"{whose} have pixels from {low:.4g} to {high:.4g}, none below 0, like images in [0, 1]: pass "
            "value_range=(0, 1). If they are images in [-1, 1], none of them darker than gray, pass "
            "value_range=(-1, 1)."
        )


def check_value_range(value: tuple[float, float] | None) -> tuple[float, float] | None:
    """Checks an argument `value_range`: None, or two finite numbers in ascending order."""
    if value is None:
        return None
    if isinstance(value, str) or len(value) != 2 or not -float("inf") < value[0] < value[1] < float("inf"):
        raise ValueError(f"value_range={value!r} must be two numbers, the lower one first, such as (0, 1) or (-1, 1).")
    return float(value[0]), float(value[1])


class RealImages:
    """The images to compare samples with: those of a given loader, or of an evaluation's loaders.

    A loader without a custom sampler returns every image of its data set once, in order, with any number of
    processes. A loader with a custom sampler returns to each process the images that its sampler draws. Batches have
    the loader's size, and pass the hooks around their transfer to the device. ``Trainer(limit_val_batches=...)``
    limits them like the evaluation.

    Args:
        trainer: A Trainer that is evaluating, unless a loader is given.
        sample_shape: Returns the shape of one sample.
        loader: The loader; None means the evaluation's loaders.
        real: Place of the images in a batch; None means the only floating-point tensor, or of several the only one
            shaped like the module's samples.

    Attributes:
        datasets: The loaders' data sets.
        count: Number of images in all processes; None if unknown.
        sizes: Sizes of this process's images so far, height and width.
    """

    def __init__(
        self,
        trainer: Trainer,
        sample_shape: Callable[[], torch.Size],
        loader: Iterable[Any] | None = None,
        real: Place | None = None,
    ) -> None:
        self._trainer = trainer
        self._sample_shape = cache(sample_shape)
        self._real = real
        if loader is not None:
            self._loaders: list[tuple[Any, float]] = [(loader, float("inf"))]
        else:
            limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
            self._loaders = list(zip(evaluation_loaders(trainer), limits, strict=True))
        self.datasets = [getattr(loader, "dataset", loader) for loader, _ in self._loaders]
        counts = [_count(loader, limit) for loader, limit in self._loaders]
        known = [count for count in counts if count is not None]
        self.count = sum(known) if len(known) == len(counts) else None
        self.sizes: set[torch.Size] = set()

    def batches(self) -> Iterator[Tensor]:
        """Yields this process's share of the images, batch by batch."""
        for index, (loader, limit) in enumerate(self._loaders):
            count = _count(loader, limit)
            shared = loader if count is None else _shared(loader, count)
            limited = shared if count is not None or limit == float("inf") else islice(shared, int(limit))
            for batch in limited:
                batch = transfer_batch(self._trainer, batch, index)
                images = self._images(batch)
                self.sizes.add(images.shape[2:])
                yield images

    def _images(self, batch: Any) -> Tensor:
        first = batch[0] if isinstance(batch, list | tuple) and batch else None
        floating = any(tensor.is_floating_point() for _, tensor in tensors_in(batch))
        if self._real is None and not floating and isinstance(first, Tensor):
            return first  # bytes
        return find_images(batch, self._real, self._sample_shape, "SampleQuality")

    def same_as(self, datasets: list[Dataset[Any]], count: int | None) -> bool:
        """Returns whether other loaders, with these data sets and this count, return the same images."""
        alike = len(datasets) == len(self.datasets)
        return alike and count == self.count and all(a is b for a, b in zip(datasets, self.datasets, strict=True))


def training_images(trainer: Trainer) -> DataLoader[Any]:
    """Makes a loader of the training data: every image of the data set once, in order, without a fit's sampler.

    Raises:
        ValueError: If the training data are a stream, or of several loaders.
    """
    loaders = train_loaders(trainer)
    loader = loaders[0] if len(loaders) == 1 else None
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or not isinstance(loader.batch_size, int)
    ):
        kinds = ", ".join(type(getattr(each, "dataset", each)).__name__ for each in loaders)
        raise ValueError(
            f"loader=None: the fit has no validation, and the training data ({kinds}) are not one data set with "
            "indices, in batches of one size: give SampleQuality(..., loader=...) the images to compare samples with."
        )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _count(loader: Any, limit: float) -> int | None:
    """Counts the images to take from a loader's data set by index; None if its sampler must choose them."""
    plain = (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and isinstance(loader.batch_size, int)
    )
    if not plain:
        return None
    sampler, length = loader.sampler, len(loader.dataset)
    if isinstance(sampler, RandomSampler) and (sampler.replacement or len(sampler) != length):
        return None
    # Lightning's sampler for several processes. If it wraps a custom sampler, its dataset is not the loader's.
    of_processes = isinstance(sampler, DistributedSampler) and sampler.dataset is loader.dataset
    if not of_processes and type(sampler) not in (SequentialSampler, RandomSampler):
        return None
    return int(min(length, limit * loader.batch_size * distributed.get_world_size()))


def _shared(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    size = loader.batch_size
    assert size is not None
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    return DataLoader(
        loader.dataset,
        batch_sampler=batches[distributed.get_rank() :: distributed.get_world_size()],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # the default would draw from training's random state
    )


def sampled(module: LightningModule, total: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Generates this process's share of the samples: one batch in every `world_size`.

    Each batch draws its noise from its own seed, so the samples do not depend on the number of processes.

    Args:
        module: A module with a method ``sample(n, rng=...)``.
        total: Number of samples in all processes.
        batch_size: Samples generated at once.
        seed: Seed of the batches' seeds.

    Raises:
        TypeError: If `sample` returns no tensor.
        ValueError: If `sample` returns another number of images.
    """
    batches = [min(batch_size, total - start) for start in range(0, total, batch_size)]
    # Drawn, not counted up from `seed`: runs with the seeds 0 and 1 must not share noise.
    seeds = torch.randint(2**32, (len(batches),), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(batches), distributed.get_world_size()):
        number = start + distributed.get_rank()
        # Every process calls `sample` equally often, also without a batch of its own in the last round: FSDP
        # gathers parameters in all processes at once.
        place = min(number, len(batches) - 1)
        images = draw_samples(module, batches[place], torch.Generator().manual_seed(seeds[place]))
        if number < len(batches):
            yield images
