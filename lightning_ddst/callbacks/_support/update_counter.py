"""Counts generator updates where neither the module nor a `DynamicSparsityCallback` does."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_ddst.attached.checks import is_same
from lightning_ddst.sparsity.optimizers import UpdateHooks


class UpdateCounter:
    """A counter of generator updates.

    Attributes:
        updates: The number of updates so far.
    """

    def __init__(self) -> None:
        self.updates = 0
        self._optimizers: list[Optimizer] = []
        self._hooks: UpdateHooks | None = None

    def follow(self, generator: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Counts the updates by these optimizers from now on; does nothing if they are followed already."""
        if is_same(self._optimizers, optimizers):
            return
        self.detach()
        self._optimizers = list(optimizers)
        self._hooks = UpdateHooks(generator, optimizers, self._count)

    def _count(self) -> None:
        self.updates += 1

    def end_batch(self) -> None:
        """Ends a training step."""
        if self._hooks is not None:
            self._hooks.end_batch()

    def detach(self) -> None:
        """Removes the hooks."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks, self._optimizers = None, []
