"""Sources of the images to compare: an evaluation's loaders, and the generator; processes share the work."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

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
from lightning_ddst.utils.lightning_private import evaluation_loaders, transfer_batch

T = TypeVar("T")

_TOLERANCE = 1e-3  # of the range of images


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


def check_range(images: Tensor, whose: str) -> None:
    """Checks that images ``(n, channels, height, width)`` are in [-1, 1]; accepts NaN, and tensors of other shapes.

    Args:
        images: The images.
        whose: Their name in the error.

    Raises:
        ValueError: If a pixel is outside [-1, 1].
    """
    if images.dim() == 4 and images.numel():
        low, high = (float(end) for end in torch.aminmax(images))
        if low < -1 - _TOLERANCE or high > 1 + _TOLERANCE:
            raise ValueError(
                f"{whose} have pixels from {low:.4g} to {high:.4g}; images that are compared must be in [-1, 1]."
            )


class RealImages:
    """The images of an evaluation's loaders.

    A loader without a custom sampler returns every image of its data set once, in order, with any number of
    processes. A loader with a custom sampler returns to each process the images that its sampler draws. Batches have
    the loader's size, and pass the hooks around their transfer to the device. ``Trainer(limit_val_batches=...)``
    limits them like the evaluation.

    Args:
        trainer: A Trainer that is evaluating.

    Attributes:
        datasets: The loaders' data sets.
        count: Number of images in all processes; None if unknown.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        self._loaders = list(zip(evaluation_loaders(trainer), limits, strict=True))
        self.datasets = [getattr(loader, "dataset", loader) for loader, _ in self._loaders]
        counts = [_count(loader, limit) for loader, limit in self._loaders]
        known = [count for count in counts if count is not None]
        self.count = sum(known) if len(known) == len(counts) else None

    def batches(self) -> Iterator[Tensor]:
        """Yields this process's share of the images, batch by batch."""
        for index, (loader, limit) in enumerate(self._loaders):
            count = _count(loader, limit)
            shared = loader if count is None else _shared(loader, count)
            limited = shared if count is not None or limit == float("inf") else islice(shared, int(limit))
            for batch in limited:
                batch = transfer_batch(self._trainer, batch, index)
                yield batch if isinstance(batch, Tensor) else batch[0]

    def same_as(self, datasets: list[Dataset[Any]], count: int | None) -> bool:
        """Returns whether other loaders, with these data sets and this count, return the same images."""
        alike = len(datasets) == len(self.datasets)
        return alike and count == self.count and all(a is b for a, b in zip(datasets, self.datasets, strict=True))


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
    """
    sample: Callable[..., Tensor] = module.sample  # type: ignore[assignment]
    batches = [min(batch_size, total - start) for start in range(0, total, batch_size)]
    # Drawn, not counted up from `seed`: runs with the seeds 0 and 1 must not share noise.
    seeds = torch.randint(2**32, (len(batches),), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(batches), distributed.get_world_size()):
        number = start + distributed.get_rank()
        # Every process calls `sample` equally often, also without a batch of its own in the last round: FSDP
        # gathers parameters in all processes at once.
        place = min(number, len(batches) - 1)
        images = sample(batches[place], rng=torch.Generator().manual_seed(seeds[place]))
        if number < len(batches):
            yield images
