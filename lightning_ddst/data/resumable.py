"""A loader of shuffled batches that goes on in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_ddst.utils import distributed
from lightning_ddst.utils.validation import check_count


class ShuffledSampler(DistributedSampler[Any]):
    """Indices of a data set in an order that the seed and the epoch give, shared out over processes.

    Args:
        dataset: Has a length.
        samples: Indices an epoch of each process; more than there are make several passes.
        seed: Of the order.
    """

    def __init__(self, dataset: Dataset[Any], samples: int, seed: int) -> None:
        super().__init__(dataset, 1, 0, shuffle=True, seed=seed)
        self.num_samples = samples
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        """This process's indices, without those to skip."""
        # Asked now, because a loader may be made before the other processes are there.
        self.seed = distributed.broadcast(self.seed)
        size, total = len(self.dataset), self.num_samples * distributed.get_world_size()  # type: ignore[arg-type]
        rng = torch.Generator().manual_seed((self.seed + self.epoch) % 2**32)
        passes = [torch.randperm(size, generator=rng) for _ in range(-(-total // size))]
        order = torch.cat(passes)[distributed.get_rank() : total : distributed.get_world_size()]
        return iter(order[self.skip :].tolist())


class ResumableLoader(DataLoader[tuple[Tensor, ...]]):
    """Shuffled batches of one size, which Lightning resumes in the middle of an epoch.

    Nothing is drawn from the global random state.

    Args:
        dataset: Has a length.
        batch_size: Samples a batch of each process.
        batches: Batches an epoch; may be more than one pass over the data.
        seed: Of the order; by default torch's initial seed, which `seed_everything` sets.
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
        """The epoch's batches, or those that are left of it; the next iteration is the next epoch."""
        # Lazily: Lightning says which epoch it is after it asked for the iterator.
        loaded, self._loaded = self._loaded, {}
        self._served = loaded["batches"] if loaded.get("epoch") == self._shuffled.epoch else 0
        self._shuffled.skip = self._served * (self.batch_size or 1)
        for batch in super().__iter__():
            self._served += 1
            yield batch
        self._shuffled.set_epoch(self._shuffled.epoch + 1)
        self._served = 0

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch this is, and the seed."""
        return {"epoch": self._shuffled.epoch, "batches": self._served, "seed": self._shuffled.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there."""
        self._loaded = state
        self._shuffled.seed = state["seed"]
        self._shuffled.set_epoch(state["epoch"])
