"""Gradients that wait for their optimizer's next step while a checkpoint is made."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from lightning_ddst.sparsity.optimizers import get_parameters
from lightning_ddst.sparsity.sharding import copy_like, full_tensor
from lightning_ddst.utils.compilation import uncompiled

Pending = list[tuple[int, int, Tensor]]
"""Number of the optimizer, number of its parameter, gradient."""


class PendingGradients:
    """Knows which gradients were added to since their optimizer's last step: checkpoints leave these out.

    Args:
        optimizers: Of the whole training, always in the same order.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        # The gradient of the last step, without keeping it alive, and its version then.
        self._used: dict[Tensor, tuple[TensorWeakRef, int]] = {}
        self._handles: list[RemovableHandle] = [o.register_step_post_hook(self._stepped) for o in self._optimizers]

    def remove(self) -> None:
        """Takes the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()

    @uncompiled
    def _stepped(self, optimizer: Optimizer, *_: object) -> None:
        for parameter in get_parameters(optimizer):
            if parameter.grad is not None:
                self._used[parameter] = (TensorWeakRef(parameter.grad), parameter.grad._version)

    def state_dict(self) -> Pending:
        """The gradients that wait; loads with ``weights_only=True``."""
        return [
            (number, place, full_tensor(parameter.grad).clone())
            for number, optimizer in enumerate(self._optimizers)
            for place, parameter in enumerate(get_parameters(optimizer))
            if parameter.grad is not None and not self._is_used(parameter, parameter.grad)
        ]

    def _is_used(self, parameter: Tensor, gradient: Tensor) -> bool:
        if parameter not in self._used:
            return False
        used, version = self._used[parameter]
        return used() is gradient and gradient._version == version

    def load_state_dict(self, state: Pending) -> None:
        """Puts them back."""
        for number, place, gradient in state:
            parameter = get_parameters(self._optimizers[number])[place]
            parameter.grad = copy_like(gradient, parameter)
