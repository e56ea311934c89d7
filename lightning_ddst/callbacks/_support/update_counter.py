"""Counts generator updates where neither the module nor a `DynamicSparsityCallback` does."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.attached.checks import is_same
from lightning_ddst.sparsity.optimizers import get_parameters, has_updated
from lightning_ddst.utils.compilation import uncompiled


class UpdateCounter:
    """A counter of optimizer steps that find gradients of the generator.

    Attributes:
        updates: The number of updates so far.
    """

    def __init__(self) -> None:
        self.updates = 0
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []

    def follow(self, generator: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Counts the steps of these optimizers from now on; does nothing if they are followed already."""
        if is_same(self._optimizers, optimizers):
            return
        self.detach()
        self._optimizers = list(optimizers)
        trained = {name: parameter for name, parameter in generator.named_parameters() if parameter.requires_grad}
        for optimizer in optimizers:
            if set(trained.values()) & set(get_parameters(optimizer)):
                self._handles.append(optimizer.register_step_post_hook(partial(self._count, trained)))

    @uncompiled
    def _count(self, trained: Mapping[str, Tensor], optimizer: Optimizer, *_: Any) -> None:
        self.updates += has_updated(trained, optimizer)

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []
