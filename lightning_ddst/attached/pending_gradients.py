"""Gradients that wait for their optimizer's next step when a checkpoint is saved."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from lightning_ddst.sparsity.optimizers import get_parameters, register_step_post_hook
from lightning_ddst.sparsity.sharding import copy_like, full_tensor
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.states import COUNT, FLOATS, Form, check_tensors, each

Pending = list[tuple[int, int, Tensor]]
"""Index of the optimizer, index of its parameter, gradient."""


class PendingGradients:
    """Gradients that were accumulated since their optimizer's last step; Lightning's checkpoints omit them.

    Args:
        optimizers: All optimizers of the training, always in the same order.
    """

    state_form: ClassVar[Form] = each((COUNT, COUNT, FLOATS))
    """The form of `state_dict`."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        # A weak reference to the gradient of the last step, and its version then.
        self._used: dict[Tensor, tuple[TensorWeakRef, int]] = {}
        self._handles = [register_step_post_hook(each, self._stepped) for each in self._optimizers]

    def remove(self) -> None:
        """Removes the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out hooks and references to gradients, which no copy has."""
        return {"_optimizers": self._optimizers, "_used": {}, "_handles": []}

    @uncompiled
    def _stepped(self, optimizer: Optimizer) -> None:
        for parameter in get_parameters(optimizer):
            if parameter.grad is not None:
                self._used[parameter] = (TensorWeakRef(parameter.grad), parameter.grad._version)

    def state_dict(self) -> Pending:
        """Returns the pending gradients; loads with ``weights_only=True``."""
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
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: If it has gradients of other parameters.
        """
        own = {
            f"parameter {place} of optimizer {number}": parameter
            for number, optimizer in enumerate(self._optimizers)
            for place, parameter in enumerate(get_parameters(optimizer))
        }
        saved = {f"parameter {place} of optimizer {number}": gradient for number, place, gradient in state}
        check_tensors("the saved gradients that wait for a step", saved, own, complete=False)
        for name, gradient in saved.items():
            own[name].grad = copy_like(gradient, own[name])
