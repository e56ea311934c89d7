"""Keeps the gradients of all weights, active and inactive, for growth rules that need them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_ddst.sparsity.launches import all_finite, join, join_views, read, unjoin
from lightning_ddst.sparsity.masked import MaskedNetwork
from lightning_ddst.sparsity.sharding import copy_like, full_tensor, is_split, local_part
from lightning_ddst.utils import distributed
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.devices import is_launch_bound
from lightning_ddst.utils.states import FLAG, FLOATS, Form, Leaf, check_tensors, named

Unscaled = Callable[[Tensor], Tensor]
_AVERAGE_DECAY = 0.9
"""Decay of the averaged dense gradient, per update of the network."""


def unscale_by(scaler: Any) -> Unscaled:
    """Returns a function that copies a gradient and removes the loss scale of fp16.

    Args:
        scaler: The GradScaler that scales the loss; None if there is none.
    """
    if scaler is None:
        return torch.clone
    return lambda gradient: gradient / scaler.scale(torch.ones((), device=gradient.device))


def is_masked_at_end(parameter: Tensor) -> bool:
    """Returns whether a weight's gradient is masked at the end of the backward pass, together with all others.

    On devices bound by launches it is. But DistributedDataParallel and FSDP2 reduce gradients at the end of the pass,
    too, and must see masked ones.
    """
    return is_launch_bound(parameter.device) and not (distributed.is_distributed() or is_split(parameter))


def _averaged(averages: Mapping[str, Tensor], gradients: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Moves averages towards gradients, except where these are not finite: there they would never be finite again."""
    if not gradients:
        return {}
    old, new = [averages[name] for name in gradients], list(gradients.values())
    if is_masked_at_end(new[0]):
        before, now = join_views(old), join_views(new)
        return dict(zip(gradients, unjoin(_lerp_finite(before, now, weight), new), strict=True))
    pairs = zip(old, new, strict=True)
    return {name: _lerp_finite(before, now, weight) for name, (before, now) in zip(gradients, pairs, strict=True)}


def _lerp_finite(before: Tensor, now: Tensor, weight: float) -> Tensor:
    return before.lerp(torch.where(now - now == 0, now, before), weight)  # true where finite


class DenseGradients:
    """The gradients of a network's weights before masking, kept only when growth will need them.

    Under weight norm they are the gradients of the effective weight.

    Gradients of several backward passes add up as in ``parameter.grad``, and restart when ``parameter.grad`` is
    cleared. With several processes, the mean over processes is kept.

    Args:
        network: The sparse network; its growth rule determines which gradients are needed.
        unscaled: Function that copies a gradient and removes the loss scale (fp16).

    Attributes:
        recording: Whether the next update's gradients will be needed. Growth rules that use the average need every
            update's gradients anyway.
        unusable: Names of the weights whose gradient was missing or not finite at the last `pop`.
    """

    state_form: ClassVar[Form] = {
        "recording": FLAG,
        "kept": named(FLOATS),
        "accumulated": named(FLOATS),
        "finite": named(
            Leaf("a bool tensor of one entry", lambda value: value.dtype == torch.bool and value.numel() == 1)
        ),
    }
    """The form of `state_dict`."""

    def __init__(self, network: MaskedNetwork, unscaled: Unscaled = torch.clone) -> None:
        self.recording = False
        self.unusable: list[str] = []
        self._unscaled = unscaled
        self._kind = network.growth.gradient
        self._network = network
        self._weights = network.weights
        self._incoming: dict[str, Tensor] = {}  # from a backward pass, or from torch.autograd.grad
        self._fresh: set[str] = set()  # weights whose incoming gradient will be all of parameter.grad
        self._uncopied: set[str] = set()  # weights whose parameter.grad is copied at the end of the backward pass
        self._accumulated: dict[str, Tensor] = {}  # added to parameter.grad since it was cleared
        self._grads: dict[str, tuple[Tensor, int]] = {}  # parameter.grad after that, and its version
        self._kept: dict[str, Tensor] = {}  # from the last update, or the average
        self._finite: dict[str, Tensor] = {}  # whether the last update's gradients were finite

    @property
    def needed(self) -> bool:
        """Whether the next update's gradients must be kept."""
        return self._kind == "average" or (self._kind == "latest" and self.recording)

    @uncompiled
    def on_backward(self, name: str, gradient: Tensor) -> None:
        """Records a dense gradient that may be added to ``parameter.grad`` next."""
        grad = self._weights[name].parameter.grad
        adds = name in self._accumulated and grad is not None and not self._cleared(name, grad)
        self._fresh.discard(name)
        if self.needed and grad is None and self._is_copied_at_end(name):
            self._fresh.add(name)
        elif self.needed or adds:
            gradient = self._unscaled(gradient.detach())
            if (norm := self._weights[name].norm) is not None:
                gradient = norm.effective_gradient(gradient)
            if adds:
                gradient += self._accumulated[name]
            self._incoming[name] = gradient
        else:
            self._accumulated.pop(name, None)

    def _is_copied_at_end(self, name: str) -> bool:
        weight = self._weights[name]
        return weight.norm is None and is_masked_at_end(weight.parameter)

    def _cleared(self, name: str, grad: Tensor) -> bool:
        """Returns whether ``parameter.grad`` was set to 0 since a gradient was added."""
        held, version = self._grads.get(name, (None, -1))
        # DistributedDataParallel and clipping also change the version.
        return not (grad is held and grad._version == version) and not bool(grad.any())

    def on_accumulated(self, name: str, parameter: Tensor) -> None:
        """Records ``parameter.grad`` after a gradient was added and before it is masked."""
        if self.needed and parameter.grad is not None and is_split(parameter):
            self._incoming[name] = self._split_gradient(name, parameter.grad)
        if name in self._incoming and parameter.grad is not None:
            self._accumulated[name] = self._incoming.pop(name)
            self._grads[name] = (parameter.grad, parameter.grad._version)
        if name in self._fresh:
            self._fresh.remove(name)
            self._uncopied.add(name)

    def on_pass_end(self) -> None:
        """Records every ``parameter.grad`` at the end of a backward pass, before they are masked, if that was left."""
        # In the order of the weights, in which an optimizer steps, so that they need not be joined again there.
        grads = {
            name: grad
            for name, weight in self._weights.items()
            if name in self._uncopied and (grad := weight.parameter.grad) is not None
        }
        self._uncopied.clear()
        if not grads:
            return
        gradients = [grad.detach() for grad in grads.values()]
        joined = join(gradients)
        if self._unscaled is not torch.clone:
            joined = self._unscaled(joined)
        self._accumulated |= zip(grads, unjoin(joined, gradients), strict=True)
        self._grads |= {name: (grad, grad._version) for name, grad in grads.items()}

    def _split_gradient(self, name: str, grad: Tensor) -> Tensor:
        """Returns the accumulated gradient of a sharded weight; only here is its mean over processes known."""
        gradient = self._unscaled(grad.detach())
        if name in self._accumulated and self._grads.get(name, (None, -1))[0] is grad:
            # It contains the earlier gradients, but masked.
            local_part(gradient).add_(local_part(self._accumulated[name]) * ~self._network.local_mask(name))
        return gradient

    def on_step(self, names: Iterable[str]) -> None:
        """Keeps the gradients of the weights that an optimizer has just updated."""
        self.on_pass_end()  # where an optimizer steps within the backward pass
        if not (self._accumulated or self._grads or distributed.is_distributed()):
            return  # nothing was recorded
        gradients: dict[str, Tensor] = {}
        for name in names:
            self._grads.pop(name, None)
            accumulated = self._accumulated.pop(name, None)
            if self._weights[name].parameter.grad is None:
                accumulated = None  # cleared, so the step did not use the gradients
            if (gradient := self._average_over_processes(name, accumulated)) is not None:
                gradients[name] = gradient
        if not gradients:
            return
        self._finite |= zip(gradients, all_finite(list(gradients.values())).unbind(), strict=True)
        if self._kind != "average":
            self._kept |= gradients
            return
        known = {name: gradient for name, gradient in gradients.items() if name in self._kept}
        zeros = {name: torch.zeros_like(gradient) for name, gradient in gradients.items() if name not in known}
        self._kept |= _averaged(zeros, {name: gradients[name] for name in zeros}, 1.0)
        self._kept |= _averaged(self._kept, known, 1 - _AVERAGE_DECAY)

    def _average_over_processes(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """Returns the mean over processes; a missing gradient counts as 0. None if no process has a gradient."""
        if not distributed.is_distributed() or is_split(self._weights[name].parameter):
            return gradient
        if not self.needed or not any(distributed.all_gather(gradient is not None)):
            return None
        return distributed.all_reduce_mean(
            torch.zeros_like(self._weights[name].parameter) if gradient is None else gradient
        )

    def pop(self) -> dict[str, Tensor] | None:
        """Returns the gradients that the growth rule needs, by name; None if one is missing or not finite.

        Those of frozen weights are 0. Gradients of a single update are removed, because they are out of date after the
        next update; but where one is missing, the others wait for it, since each optimizer may step in a batch of its
        own.
        """
        if self._kind == "none":
            return {}
        kept = {name: self._kept[name] for name in self._weights if name in self._kept}
        missing = self._weights.keys() - kept.keys() - self._network.frozen
        (finite,) = read([torch.stack([self._finite[name].flatten()[0] for name in kept])]) if kept else ([],)
        infinite = {name for name, is_finite in zip(kept, finite, strict=True) if not is_finite}
        if self._kind == "latest" and (infinite or not missing):
            self._kept.clear()
        self.unusable = [name for name in self._weights if name in missing | infinite]
        if any(distributed.all_gather(bool(self.unusable))):
            return None
        frozen = {name: torch.zeros_like(self._weights[name].parameter) for name in self._network.frozen - kept.keys()}
        return {name: full_tensor(gradient) for name, gradient in (kept | frozen).items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the kept gradients and those accumulated for the next update; loads with ``weights_only=True``."""
        kept, accumulated = (
            {name: full_tensor(gradient).clone() for name, gradient in held.items()}
            for held in (self._kept, self._accumulated)
        )
        finite = dict(self._finite)
        return {"recording": self.recording, "kept": kept, "accumulated": accumulated, "finite": finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: If it has gradients of other weights, or an average that is not finite.
        """
        for saved in (state["kept"], state["accumulated"]):
            check_tensors("the saved gradients", saved, self._network.parameters, complete=False)
        if unknown := sorted(state["kept"].keys() - state["finite"].keys()):
            raise ValueError(f"finite must hold whether the saved gradient of {unknown[0]!r} was finite.")
        if self._kind == "average":
            for name, gradient in state["kept"].items():
                if not bool(all_finite([gradient])):
                    raise ValueError(f"the saved average gradient of {name!r} must be finite.")
        self.recording = state["recording"]
        for held, saved in ((self._kept, state["kept"]), (self._accumulated, state["accumulated"])):
            for name, gradient in saved.items():
                held[name] = copy_like(gradient, self._weights[name].parameter)
        self._finite = {n: flag.to(self._weights[n].parameter.device) for n, flag in state["finite"].items()}
