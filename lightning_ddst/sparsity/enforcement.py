"""Keeps inactive weights at exactly zero while optimizers train the others."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.sparsity.masked import MaskedNetwork, zero_where_inactive
from lightning_ddst.sparsity.sharding import copy_like, full_tensor, is_split, local_part
from lightning_ddst.utils import distributed
from lightning_ddst.utils.compilation import uncompiled

Unscaled = Callable[[Tensor], Tensor]
_AVERAGE_DECAY = 0.9
"""Of the averaged dense gradient, over the network's updates."""


class MaskEnforcer:
    """Holds weights, gradients and optimizer state of a sparse network at zero where it is inactive.

    - Hooks on each weight mask ``.grad`` as soon as a backward pass has added to it, before anything
      can clip it or step with it. The dense gradient is seen there, and kept when growth needs it.
    - A hook on each optimizer masks weights and weight-shaped state after every step, whatever the
      optimizer did: momentum, weight decay, noise. So a grown weight starts with fresh state. Most
      optimizers keep state at 0 where weight and gradient are 0; whether one does is looked at in the
      first step after every change of the masks, and its state is not masked again where it does.

    Args:
        network: The sparse network.
        optimizers: The optimizers that update it; others may be among them.
        unscaled: From a gradient as it arrives to what it is without the scale of the loss (fp16).

    Raises:
        ValueError: If a maskable weight is in none of the optimizers.
    """

    def __init__(
        self, network: MaskedNetwork, optimizers: Iterable[Optimizer], unscaled: Unscaled = torch.clone
    ) -> None:
        self.gradients = DenseGradients(network, unscaled)
        self._network = network
        self._names: dict[Tensor, str] = {weight.parameter: name for name, weight in network.weights.items()}
        self._owned = {
            optimizer: self._updated_by(optimizer) for optimizer in find_optimizers(network.parameters, optimizers)
        }
        self._leaves_zero: dict[Optimizer, bool] = {}  # whether its state does, where it was looked at
        self._handles: list[RemovableHandle] = []
        for parameter, name in self._names.items():
            trains = parameter.requires_grad
            parameter.requires_grad_(True)  # torch takes hooks only then; a GAN may have frozen it for the moment
            self._handles.append(parameter.register_hook(partial(self.gradients.arrived, name)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._accumulated, name)))
            parameter.requires_grad_(trains)
        for optimizer in self._owned:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        network.listeners.append(self._pruned)

    def remove(self) -> None:
        """Takes every hook away."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._network.listeners.remove(self._pruned)
        self._handles.clear()

    def _updated_by(self, optimizer: Optimizer) -> list[str]:
        return [self._names[parameter] for parameter in get_parameters(optimizer) if parameter in self._names]

    @uncompiled
    def _accumulated(self, name: str, parameter: Tensor) -> None:
        self.gradients.landed(name, parameter)
        self._mask_gradient(name, parameter)

    def _mask_gradient(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            # Past autograd's version counter, which would say that the gradient was cleared.
            zero_where_inactive(parameter.grad.data, self._network.local_mask(name))

    @uncompiled
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for name in self._owned[optimizer]:
            zero_where_inactive(self._network.weights[name].parameter, self._network.local_mask(name))
        if optimizer not in self._leaves_zero:
            self._leaves_zero[optimizer] = self._has_state(optimizer)
        if self._leaves_zero[optimizer]:
            self._mask_state(optimizer)
        self.gradients.stepped(self._owned[optimizer])

    def _pruned(self) -> None:
        self._leaves_zero.clear()
        for optimizer in self._owned:
            self._mask_state(optimizer)
        for parameter, name in self._names.items():
            self._mask_gradient(name, parameter)

    def _mask_state(self, optimizer: Optimizer) -> None:
        for value, mask in self._state(optimizer):
            zero_where_inactive(value, mask)

    def _has_state(self, optimizer: Optimizer) -> bool:
        """Whether there is state where weights are inactive; waits for the device."""
        return any(bool(local_part(value)[~mask].any()) for value, mask in self._state(optimizer))

    def _state(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight-shaped state, with its mask."""
        for name in self._owned[optimizer]:
            parameter = self._network.weights[name].parameter
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield value, self._network.local_mask(name)


def find_optimizers(parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers that update parameters.

    Args:
        parameters: The parameters by name.
        optimizers: Optimizers of these and others.

    Raises:
        ValueError: If one of the parameters is in none of the optimizers.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    found = [optimizer for optimizer in optimizers if not names.keys().isdisjoint(get_parameters(optimizer))]
    missing = names.keys() - {parameter for optimizer in found for parameter in get_parameters(optimizer)}
    if missing:
        name = min(names[parameter] for parameter in missing)
        raise ValueError(
            f"no optimizer updates {name!r} ({len(missing)} of {len(names)} weights are in none): give it to "
            "one, or, if it is to stay as it is, name its layer in dense_layers."
        )
    return found


def has_updated(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> bool:
    """Whether the step that an optimizer made just now updated one of the parameters.

    It did not where none has a gradient, or where a fused optimizer skipped its step because fp16 overflowed.
    """
    own = {id(parameter) for parameter in parameters.values()}
    if not any(p.grad is not None for p in get_parameters(optimizer) if id(p) in own):
        return False
    overflow = getattr(optimizer, "found_inf", None)  # of torch's GradScaler, while it steps a fused optimizer
    return overflow is None or not bool(overflow)


def get_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer updates, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class DenseGradients:
    """The gradients of a network's weights before masking, kept only when growth will need them.

    Gradients of several backward passes add up as they do in ``parameter.grad``, and start over
    where that was cleared. Of several processes' gradients the mean is kept.

    Args:
        network: The sparse network; its growth rule says which gradients are needed.
        unscaled: From a gradient as it arrives to a copy without the scale of the loss.

    Attributes:
        armed: Whether the gradients of the coming update will be needed. Rules that use the
            average need every update's.
    """

    def __init__(self, network: MaskedNetwork, unscaled: Unscaled = torch.clone) -> None:
        self.armed = False
        self._unscaled = unscaled
        self._kind = network.growth.gradient
        self._network = network
        self._weights = network.weights
        self._incoming: dict[str, Tensor] = {}  # seen by the hook, maybe only looked at
        self._arrived: dict[str, Tensor] = {}  # added to parameter.grad since that was cleared
        self._landed: dict[str, tuple[Tensor, int]] = {}  # parameter.grad as it was then, and its version
        self._kept: dict[str, Tensor] = {}  # of the last update, or the average
        self._finite: dict[str, Tensor] = {}  # whether the last update's were

    @property
    def wanted(self) -> bool:
        """Whether the gradients of the coming update are kept."""
        return self._kind == "average" or (self._kind == "latest" and self.armed)

    @uncompiled
    def arrived(self, name: str, gradient: Tensor) -> None:
        """Sees a dense gradient, which may be on its way to ``parameter.grad``."""
        grad = self._weights[name].parameter.grad
        adds = name in self._arrived and grad is not None and not self._cleared(name, grad)
        if self.wanted or adds:
            gradient = self._unscaled(gradient.detach())
            if adds:
                gradient += self._arrived[name]
            self._incoming[name] = gradient
        else:
            self._arrived.pop(name, None)

    def _cleared(self, name: str, grad: Tensor) -> bool:
        """Whether ``parameter.grad`` was set to 0 since a gradient was added."""
        held, version = self._landed.get(name, (None, -1))
        # Another version may also be what DistributedDataParallel wrote, or clipping.
        return not (grad is held and grad._version == version) and not bool(grad.any())

    def landed(self, name: str, parameter: Tensor) -> None:
        """Sees ``parameter.grad`` after a gradient was added."""
        if self.wanted and parameter.grad is not None and is_split(parameter):
            self._incoming[name] = self._split_gradient(name, parameter.grad)
        if name in self._incoming and parameter.grad is not None:
            self._arrived[name] = self._incoming.pop(name)
            self._landed[name] = (parameter.grad, parameter.grad._version)

    def _split_gradient(self, name: str, grad: Tensor) -> Tensor:
        """What was added to a gradient that is split over processes: only there it is already their mean."""
        gradient = self._unscaled(grad.detach())
        if name in self._arrived and self._landed.get(name, (None, -1))[0] is grad:
            # What was added before is in it, masked.
            local_part(gradient).add_(local_part(self._arrived[name]) * ~self._network.local_mask(name))
        return gradient

    def stepped(self, names: Iterable[str]) -> None:
        """Keeps what arrived for the weights that an optimizer updated just now."""
        for name in names:
            self._landed.pop(name, None)
            arrived = self._arrived.pop(name, None)
            if self._weights[name].parameter.grad is None:
                arrived = None  # cleared, and not stepped with
            if (gradient := self._mean(name, arrived)) is None:
                continue
            self._finite[name] = local_part(gradient).isfinite().all()
            if self._kind == "average":
                # What is not finite does not count, or the average would never be finite again.
                kept = self._kept.get(name, torch.zeros_like(gradient))
                weight = 1 - _AVERAGE_DECAY if name in self._kept else 1.0
                self._kept[name] = kept.lerp(torch.where(gradient.isfinite(), gradient, kept), weight)
            else:
                self._kept[name] = gradient

    def _mean(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The mean over processes, where one that saw no gradient counts as 0; None if none of them saw one."""
        if not distributed.is_distributed() or is_split(self._weights[name].parameter):
            return gradient
        if not self.wanted or not any(distributed.all_gather(gradient is not None)):
            return None
        return distributed.all_reduce_mean(
            torch.zeros_like(self._weights[name].parameter) if gradient is None else gradient
        )

    def take(self) -> dict[str, Tensor] | None:
        """What the growth rule needs, by name, or None where a gradient is missing or not finite.

        Gradients of a single update are given up, being out of date after the next.
        """
        taken = dict(self._kept)
        if self._kind == "latest":
            self._kept.clear()
        if self._kind == "none":
            return {}
        usable = taken.keys() == self._weights.keys() and all(bool(self._finite[name]) for name in taken)
        if not all(distributed.all_gather(usable)):
            return None
        return {name: full_tensor(gradient) for name, gradient in taken.items()}

    def state_dict(self) -> dict[str, Any]:
        """What was kept, and what has arrived since; loads with ``weights_only=True``."""
        kept, arrived = (
            {name: full_tensor(gradient).clone() for name, gradient in held.items()}
            for held in (self._kept, self._arrived)
        )
        return {"armed": self.armed, "kept": kept, "arrived": arrived, "finite": dict(self._finite)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.armed = state["armed"]
        for held, saved in ((self._kept, state["kept"]), (self._arrived, state["arrived"])):
            for name, gradient in saved.items():
                held[name] = copy_like(gradient, self._weights[name].parameter)
        self._finite = dict(state["finite"])
