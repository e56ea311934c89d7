"""A loader of shuffled batches that resumes in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_ddst.utils import distributed
from lightning_ddst.utils.validation import check_count


class ShuffledSampler(DistributedSampler[Any]):
    """A sampler in an order that depends on the seed and the epoch; processes share the indices.

    Args:
        dataset: A data set with a length.
        samples: Indices per epoch in each process; more than the data set holds make several passes.
        seed: Seed of the order.
    """

    def __init__(self, dataset: Dataset[Any], samples: int, seed: int) -> None:
        super().__init__(dataset, 1, 0, shuffle=True, seed=seed)
        self.num_samples = samples
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        """Yields this process's indices after the first `skip`."""
        # Only now: a loader may be made before the other processes start.
        self.seed = distributed.broadcast(self.seed)
        size, total = len(self.dataset), self.num_samples * distributed.get_world_size()  # type: ignore[arg-type]
        rng = torch.Generator().manual_seed((self.seed + self.epoch) % 2**32)
        passes = [torch.randperm(size, generator=rng) for _ in range(-(-total // size))]
        order = torch.cat(passes)[distributed.get_rank() : total : distributed.get_world_size()]
        return iter(order[self.skip :].tolist())


# torchdata's StatefulDataLoader resumes the same cases only with a sampler that saves its own epoch and position, which
# is as much code as this, and it builds on private parts of torch's DataLoader.
class ResumableLoader(DataLoader[tuple[Tensor, ...]]):
    """Shuffled batches of one size; Lightning resumes them in the middle of an epoch.

    It draws nothing from the global random state.

    Args:
        dataset: A data set with a length.
        batch_size: Samples per batch in each process.
        batches: Batches per epoch; may be more than one pass over the data.
        seed: Seed of the order; by default torch's initial seed, which `seed_everything` sets.
        **loader: Further arguments of torch's DataLoader, such as `num_workers` and `collate_fn`.

    Raises:
        ValueError: If `batch_size` or `batches` is not a positive integer.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, batches: int, seed: int | None = None, **loader: Any
    ) -> None:
        check_count("batch_size", batch_size)
        check_count("batches", batches)
        seed = torch.initial_seed() if seed is None else seed
        self._shuffled = ShuffledSampler(dataset, batches * batch_size, seed)
        self._served = 0
        self._loaded: dict[str, int] = {}
        rng = torch.Generator().manual_seed(seed)
        super().__init__(dataset, batch_size, sampler=self._shuffled, drop_last=True, generator=rng, **loader)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the epoch's batches, or the rest of a resumed epoch; the next iteration is the next epoch."""
        # A generator, because Lightning sets the epoch after it made the iterator.
        loaded, self._loaded = self._loaded, {}
        self._served = loaded["batches"] if loaded.get("epoch") == self._shuffled.epoch else 0
        self._shuffled.skip = self._served * (self.batch_size or 1)
        for batch in super().__iter__():
            self._served += 1
            yield batch
        self._shuffled.set_epoch(self._shuffled.epoch + 1)
        self._served = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch, the number of batches served, and the seed."""
        return {"epoch": self._shuffled.epoch, "batches": self._served, "seed": self._shuffled.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the state returned by `state_dict`."""
        self._loaded = state
        self._shuffled.seed = state["seed"]
        self._shuffled.set_epoch(state["epoch"])
