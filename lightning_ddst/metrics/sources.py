"""Where compared images come from: the loaders of an evaluation and the generator, shared out among processes."""

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

_SLACK = 1e-3  # of the range of images


def in_turn(own: Iterator[T]) -> Iterator[T]:
    """What the processes have, in every one of them: each one's first in order, then each one's second.

    Every process must go through it to the end. With several, what is passed on must be on the CPU.

    Args:
        own: This process's share; others' may be longer or shorter.
    """
    while True:
        present = [item for item in distributed.all_gather(next(own, None)) if item is not None]
        if not present:
            return
        yield from present


def check_range(images: Tensor, whose: str) -> None:
    """Refuses images ``(n, channels, height, width)`` outside [-1, 1]; NaN passes, and so does what is no image.

    Raises:
        ValueError: If a pixel is outside.
    """
    if images.dim() == 4 and images.numel():
        low, high = (float(end) for end in torch.aminmax(images))
        if low < -1 - _SLACK or high > 1 + _SLACK:
            raise ValueError(
                f"{whose} have pixels from {low:.4g} to {high:.4g}; images that are compared must be in [-1, 1]."
            )


class RealImages:
    """The images of an evaluation's loaders.

    Of a loader without a sampler of its own these are the data set's, each once and in its order, with
    any number of processes; of another, what it gives each process. Batches have the loader's size and
    go through the hooks around their transfer. ``Trainer(limit_val_batches=...)`` limits them as it
    limits the evaluation.

    Args:
        trainer: It evaluates at present.

    Attributes:
        datasets: Where the images are from.
        count: Number of images in all processes, None if the loaders do not say.
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
        """This process's share."""
        for index, (loader, limit) in enumerate(self._loaders):
            count = _count(loader, limit)
            shared = loader if count is None else _shared(loader, count)
            limited = shared if count is not None or limit == float("inf") else islice(shared, int(limit))
            for batch in limited:
                batch = transfer_batch(self._trainer, batch, index)
                yield batch if isinstance(batch, Tensor) else batch[0]

    def same_as(self, datasets: list[Dataset[Any]], count: int | None) -> bool:
        """Whether these are the images of other loaders, too."""
        alike = len(datasets) == len(self.datasets)
        return alike and count == self.count and all(a is b for a, b in zip(datasets, self.datasets, strict=True))


def _count(loader: Any, limit: float) -> int | None:
    """How many images of a loader are taken, by their place in its data set; None where that cannot be said."""
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
    # Lightning's own for several processes; where it wraps another sampler, its data set is not the loader's.
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
        generator=torch.Generator(),  # or it would draw from training's random state
    )


def sampled(module: LightningModule, total: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Generates this process's share of the samples: one batch in every `world_size`.

    Each batch draws its noise from its own seed, so the samples do not depend on the number of processes.

    Args:
        module: Has ``sample(n, rng=...)``.
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
