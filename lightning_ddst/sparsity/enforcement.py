"""Keeps inactive weights at exactly 0 while optimizers train the others."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.sparsity.dense_gradients import DenseGradients, Unscaled, is_masked_at_end
from lightning_ddst.sparsity.launches import zero_where_inactive
from lightning_ddst.sparsity.masked import MaskedNetwork
from lightning_ddst.sparsity.optimizers import find_optimizers, get_parameters, register_step_post_hook
from lightning_ddst.sparsity.sharding import local_part
from lightning_ddst.utils import distributed
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.validation import check_choice

Masks = Mapping[nn.Parameter, Tensor]
"""The mask of each parameter; of this process's part if the parameter is sharded."""
OptimizerState = Literal["reset", "keep"]


def mask_weights(masks: Masks) -> None:
    """Sets inactive weights to 0."""
    zero_where_inactive(list(masks), list(masks.values()))


def mask_gradients(masks: Masks) -> None:
    """Sets the gradients of inactive weights to 0."""
    # Bypasses autograd's version counter, so that `DenseGradients` can tell this from zero_grad.
    gradients = {parameter: parameter.grad.data for parameter in masks if parameter.grad is not None}
    zero_where_inactive(list(gradients.values()), [masks[parameter] for parameter in gradients])


class StateMasker:
    """A masker of one optimizer's weight-shaped state: it sets the state of inactive weights to 0.

    Most optimizers keep state at 0 where weight and gradient are 0. A step after a mask change shows whether this one
    does, and once it does with inactive weights, it is trusted: its state is then masked only when masks change, and
    after the first step that follows.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._leaves_zero: bool | None = None  # unknown until a step shows it
        self._trusted = False
        self._changed = False
        self._warned = False
        self._begun = False

    def on_step(self, masks: Masks) -> None:
        """Masks the state after the optimizer's step; the first call after a mask change waits if it is not trusted."""
        if not self._begun:  # the state of an optimizer that was used before the masks is not written by this step
            self._begun, self._changed = True, False
            self._mask(masks)
            return
        if self._leaves_zero is None:
            used, inactive, written = _look_at_inactive(self._state(masks))
            if written and not self._warned:
                self._warned = True
                distributed.warn(
                    f"{type(self._optimizer).__name__} writes state of inactive weights, which is set to 0 after every "
                    "step. For state that is not in the weights' own coordinates, such as SOAP's, pass "
                    'optimizer_state="keep".'
                )
            self._trusted = used and inactive and not written
            self._leaves_zero = None if not (used or written) else not written  # SOAP writes nothing in its first step
        if self._changed or self._leaves_zero is False:
            self._mask(masks)
        self._changed = False

    def on_change(self, masks: Masks) -> None:
        """Masks the state after a mask change."""
        self._changed = True
        self._leaves_zero = True if self._trusted else None
        self._mask(masks)

    def _mask(self, masks: Masks) -> None:
        values = list(self._state(masks))
        zero_where_inactive([value for value, _ in values], [mask for _, mask in values])

    def _state(self, masks: Masks) -> Iterator[tuple[Tensor, Tensor]]:
        for optimizer in _with_inner(self._optimizer):
            for parameter, mask in masks.items():
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        yield value, mask


def _with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """Returns an optimizer and those that it wraps, as Lookahead does."""
    found = [optimizer]
    for each in found:
        found += [inner for inner in vars(each).values() if isinstance(inner, Optimizer) and inner not in found]
    return found


def _look_at_inactive(state: Iterable[tuple[Tensor, Tensor]]) -> tuple[bool, bool, bool]:
    """Returns whether a value is not 0, whether a mask is false, and whether a value is not 0 there; one transfer."""
    looks = []
    for value, mask in state:
        written, inactive = local_part(value) != 0, mask == 0
        looks.append(torch.stack([written.any(), inactive.any(), written.logical_and_(inactive).any()]))
    if not looks:
        return True, False, False  # an optimizer without state
    used, any_inactive, any_written = torch.stack(looks).any(0).tolist()
    return used, any_inactive, any_written


class MaskEnforcer:
    """Hooks that keep weights, gradients and optimizer state at 0 where a network is inactive.

    - Hooks on each weight mask ``.grad`` as soon as a backward pass has added to it, before it can be clipped or used
      in a step; on devices bound by launches, all at once at the end of the backward pass. `DenseGradients` sees the
      gradient first and keeps it if growth needs it.
    - A hook on each optimizer masks weights and, unless it is kept, optimizer state after every step. So neither
      momentum nor weight decay nor noise can make an inactive weight non-zero.

    Args:
        network: The sparse network.
        optimizers: Optimizers, among them those that update the network.
        unscaled: Function that copies a gradient and removes the loss scale (fp16).
        optimizer_state: "reset" keeps the state of inactive weights at 0, so that grown weights start with fresh
            state; "keep" leaves it to the optimizer, as the authors' code does with Adam: it decays as with gradients
            of 0, and grown weights continue from it.

    Attributes:
        gradients: The dense gradients.

    Raises:
        ValueError: If a maskable weight is in none of the optimizers, or `optimizer_state` is unknown.
    """

    def __init__(
        self,
        network: MaskedNetwork,
        optimizers: Iterable[Optimizer],
        unscaled: Unscaled = torch.clone,
        *,
        optimizer_state: OptimizerState = "reset",
    ) -> None:
        check_choice("optimizer_state", optimizer_state, get_args(OptimizerState))
        self.gradients = DenseGradients(network, unscaled)
        self._network = network
        names = {weight.parameter: name for name, weight in network.weights.items()}
        self._names = {
            optimizer: [names[parameter] for parameter in get_parameters(optimizer) if parameter in names]
            for optimizer in find_optimizers(network.parameters, optimizers)
        }
        self._states = {optimizer: StateMasker(optimizer) for optimizer in self._names if optimizer_state == "reset"}
        self._unmasked: list[str] = []  # whose gradients wait for the end of the backward pass
        self._handles: list[RemovableHandle] = []
        for parameter, name in names.items():
            trains = parameter.requires_grad
            parameter.requires_grad_(True)  # hooks require it; a GAN may freeze weights temporarily
            self._handles.append(parameter.register_hook(partial(self.gradients.on_backward, name)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._after_backward, name)))
            parameter.requires_grad_(trains)
        for optimizer in self._names:
            self._handles.append(register_step_post_hook(optimizer, self._after_step))
        network.listeners.append(self._after_pruning)

    def remove(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._network.listeners.remove(self._after_pruning)
        self._handles.clear()

    def _masks(self, names: Iterable[str]) -> dict[nn.Parameter, Tensor]:
        return {self._network.weights[name].parameter: self._network.multiplier(name) for name in names}

    @uncompiled
    def _after_backward(self, name: str, parameter: Tensor) -> None:
        self.gradients.on_accumulated(name, parameter)
        if not self._unmasked and not is_masked_at_end(parameter):
            mask_gradients(self._masks([name]))
            return
        # Each weight requests the end of the pass, so that a pass that raised an error leaves nothing behind.
        self._unmasked.append(name)
        torch.autograd.Variable._execution_engine.queue_callback(self._after_pass)

    @uncompiled
    def _after_pass(self) -> None:
        names, self._unmasked = self._unmasked, []
        if names:
            self.gradients.on_pass_end()
            mask_gradients(self._masks(names))

    @uncompiled
    def _after_step(self, optimizer: Optimizer) -> None:
        masks = self._masks(self._names[optimizer])
        mask_weights(masks)
        self._find_frozen(self._names[optimizer])
        if optimizer in self._states:
            self._states[optimizer].on_step(masks)
        self.gradients.on_step(self._names[optimizer])

    def _find_frozen(self, names: Iterable[str]) -> None:
        trained = {name for name, weight in self._network.weights.items() if weight.parameter.requires_grad}
        if trained:  # else the network is frozen as a whole while the other one is trained
            self._network.frozen.difference_update(trained)
            self._network.frozen.update(set(names) - trained)

    def _after_pruning(self) -> None:
        for optimizer, state in self._states.items():
            state.on_change(self._masks(self._names[optimizer]))
        mask_gradients(self._masks(self._network.weights))
