"""A loader of shuffled batches that resumes in the middle of an epoch."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_ddst.utils import distributed
from lightning_ddst.utils.states import COUNT, INTEGER, check_state
from lightning_ddst.utils.validation import check_count

_STATE_FORM = {"epoch": COUNT, "samples": COUNT, "seed": INTEGER, "batch_size": COUNT, "images": COUNT}


class ShuffledSampler(DistributedSampler[Any]):
    """A sampler in an order that depends on the seed and the epoch; processes share the indices.

    Args:
        dataset: A data set with a length.
        samples: Indices per epoch in each process; more than the data set holds make several passes.
        seed: Seed of the order.
        order: Indices to yield instead, over and over, such as a SequentialSampler.

    Attributes:
        start: Indices of the epoch, in all processes, that are skipped.
        stop: Indices of the epoch, in all processes, after which it ends; None for the whole epoch.
    """

    def __init__(self, dataset: Dataset[Any], samples: int, seed: int, order: Iterable[int] | None = None) -> None:
        super().__init__(dataset, 1, 0, shuffle=order is None, seed=seed)
        self.num_samples = samples
        self.order = order
        self.start = 0
        self.stop: int | None = None

    def __iter__(self) -> Iterator[int]:
        """Yields this process's indices from `start` to `stop`."""
        # Only now: a loader may be made before the other processes start.
        self.seed = distributed.broadcast(self.seed)
        total = self.num_samples * distributed.get_world_size() if self.stop is None else self.stop
        own = slice(self.start + distributed.get_rank(), total, distributed.get_world_size())
        if self.order is not None:
            return iter(list(islice(chain.from_iterable(repeat(self.order, total)), total))[own])
        size = len(self.dataset)  # type: ignore[arg-type]
        rng = torch.Generator().manual_seed((self.seed + self.epoch) % 2**32)
        passes = [torch.randperm(size, generator=rng) for _ in range(-(-total // size))]
        return iter(torch.cat(passes)[own].tolist() if passes else [])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, also of `order` if that has epochs."""
        super().set_epoch(epoch)
        if callable(set_epoch := getattr(self.order, "set_epoch", None)):
            set_epoch(epoch)


# torchdata's StatefulDataLoader resumes the same cases only with a sampler that saves its own epoch and position, which
# is as much code as this, and it builds on private parts of torch's DataLoader.
class ResumableLoader(DataLoader[tuple[Tensor, ...]]):
    """Shuffled batches of one size; Lightning resumes them in the middle of an epoch.

    It draws nothing from the global random state. The place in the epoch is saved as a number of samples in all
    processes, so a run may resume with another `batch_size`, another `batches`, or another number of processes: the
    epoch continues with the first sample that was not seen. Samples that no longer fill a batch are left out, with a
    warning. Lightning itself counts batches; `DynamicSparsityCallback` and `GANModule` correct its count.

    ``Trainer(overfit_batches=...)`` turns shuffling off.

    Args:
        dataset: A data set with a length.
        batch_size: Samples per batch in each process.
        batches: Batches per epoch; may be more than one pass over the data.
        seed: Seed of the order; by default torch's initial seed, which `seed_everything` sets.
        **loader: Further arguments of torch's DataLoader, such as `num_workers` and `collate_fn`. A `sampler` yields
            the order instead of shuffling, over and over until the epoch has all its batches; processes share its
            indices. With a `batch_sampler`, `batch_size` and `batches` have no effect.

    Attributes:
        batches: The argument.
        seed: Seed of the order.

    Raises:
        ValueError: If `batch_size` or `batches` is not a positive integer, if the data set is empty, or if `shuffle`
            or `sampler` does not fit; when resuming, for a state that an earlier version or another loader saved, or
            in the middle of an epoch of a data set of another size.
    """

    # Lightning makes another loader with a sampler of its own for `overfit_batches` and for prediction: it looks for
    # the arguments among the attributes, and passes all arguments of DataLoader.
    def __init__(
        self, dataset: Dataset[Any], batch_size: int, batches: int, seed: int | None = None, **loader: Any
    ) -> None:
        check_count("batch_size", batch_size)
        check_count("batches", batches)
        if not len(dataset):  # type: ignore[arg-type]
            raise ValueError(f"dataset={type(dataset).__name__}(...) must hold at least one image, and is empty.")
        sampler, batch_sampler = loader.pop("sampler", None), loader.pop("batch_sampler", None)
        if loader.pop("shuffle", None) is False and sampler is None and batch_sampler is None:
            raise ValueError("shuffle=False: ResumableLoader shuffles; give another order by sampler=...")
        if isinstance(sampler, DistributedSampler):
            raise ValueError(
                f"sampler={type(sampler).__name__} must not share its indices among processes: ResumableLoader does."
            )
        loader.pop("drop_last", None)  # every batch is full
        self.batches = batches
        self.seed = torch.initial_seed() if seed is None else seed
        self._shuffled = ShuffledSampler(dataset, batches * batch_size, self.seed, sampler)
        self._served = 0
        self._loaded: dict[str, int] = {}
        loader["generator"] = loader.get("generator") or torch.Generator().manual_seed(self.seed)
        if batch_sampler is None:
            super().__init__(dataset, batch_size, sampler=self._shuffled, drop_last=True, **loader)
        else:
            super().__init__(dataset, batch_sampler=batch_sampler, **loader)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the epoch's batches, or the rest of a resumed epoch; the next iteration is the next epoch."""
        # A generator, because Lightning sets the epoch after it made the iterator.
        loaded, self._loaded = self._loaded, {}
        self._served = loaded["samples"] if loaded.get("epoch") == self._shuffled.epoch else 0
        if self._served:
            self._check_resumed(loaded)
        self._shuffled.start, self._shuffled.stop = self._served, self._served + self._left(self._served)
        try:
            for batch in super().__iter__():
                self._served += self._together
                yield batch
        finally:
            self._shuffled.start, self._shuffled.stop = 0, None  # prediction takes the sampler alone
        self._shuffled.set_epoch(self._shuffled.epoch + 1)
        self._served = 0

    @property
    def resumed_batches(self) -> int | None:
        """The number of batches before the place to resume from; None if the saved batches had the same size."""
        if not self._loaded or self._loaded["batch_size"] == self._together:
            return None
        return self.batches - self._left(self._loaded["samples"]) // self._together

    @property
    def _together(self) -> int:
        """Samples per batch in all processes."""
        return (self.batch_size or 0) * distributed.get_world_size()

    def _left(self, served: int) -> int:
        """Returns how many samples of an epoch follow in full batches."""
        if self.batch_size is None:
            return 0
        return max(0, self.batches - -(-served // self._together)) * self._together

    def _check_resumed(self, loaded: Mapping[str, int]) -> None:
        images = len(self.dataset)  # type: ignore[arg-type]
        if self.batch_size is None:
            raise ValueError("batch_sampler: a loader that has one cannot resume in the middle of an epoch.")
        if loaded["images"] != images:
            raise ValueError(
                f"dataset has {images} samples, but {loaded['images']} when the checkpoint was saved in the middle of "
                "an epoch: resume with the same data set, or from a checkpoint of an epoch's end."
            )
        total = self.batches * self._together
        left_out = total - loaded["samples"] - self._left(loaded["samples"])
        if left_out > 0:
            rank_zero_warn(
                f"batch_size={self.batch_size}: the epoch resumes after {loaded['samples']} of {total} samples, and "
                f"{left_out} of the rest are left out, because they do not fill a batch."
            )

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch, the number of samples served in all processes, the seed, and what they depend on."""
        return {
            "epoch": self._shuffled.epoch,
            "samples": self._served,
            "seed": self._shuffled.seed,
            "batch_size": self._together,
            "images": len(self.dataset),  # type: ignore[arg-type]
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: For another form of state, such as another loader's.
        """
        check_state("ResumableLoader", state, _STATE_FORM)
        self._loaded = dict(state)
        self._shuffled.seed = state["seed"]
        self._shuffled.set_epoch(state["epoch"])
