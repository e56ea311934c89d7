"""Bytes of the tensors that code makes: held afterwards, and at the peak."""

import gc
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NewTensors:
    """Counts the bytes of tensors that are made inside the context.

    On a GPU, torch's allocator counts, so that workspaces of operations are in the peak. On a CPU, storages of
    operations' results are counted, without workspaces.

    Args:
        device: Where the tensors are.

    Attributes:
        held: Bytes at the end of the context.
        peak: The most bytes at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.held = self.peak = 0
        self._tracker = None if device.type == "cuda" else _Tracker()

    def __enter__(self) -> "NewTensors":
        gc.collect()
        if self._tracker is None:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._tracker.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._tracker is None:
            self.peak = torch.cuda.max_memory_allocated() - self._before
            gc.collect()
            self.held = torch.cuda.memory_allocated() - self._before
        else:
            self._tracker.__exit__(*raised)
            self.peak = self._tracker.peak
            gc.collect()
            self.held = self._tracker.live()


class _Tracker(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes: dict[StorageWeakRef, int] = {}

    def live(self) -> int:
        self._bytes = {storage: size for storage, size in self._bytes.items() if not storage.expired()}
        return sum(self._bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in known:
                self._bytes[storage] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.live())
        return result


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
