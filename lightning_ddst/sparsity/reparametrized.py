"""Weights that a layer computes from other parameters: weight norm and other parametrizations, made plain."""

from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as _WeightNormHook

from lightning_ddst.sparsity.stored_tensors import modules_with_tensors, stored_tensors, weight_norms

M = TypeVar("M", bound=nn.Module)


def has_weight_norm(network: nn.Module) -> bool:
    """Returns whether a tensor of a network is under weight norm."""
    return any(True for _ in weight_norms(network))


def fold_weight_norm(network: nn.Module) -> None:
    """Replaces every tensor under weight norm by a plain parameter of its value, in place.

    The network computes the same; its ``state_dict`` has ``weight`` instead of g and v, exactly 0 where v is. Other
    parametrizations do not change.

    Args:
        network: Any module; `copy_network` keeps the original.
    """
    for _, module in list(modules_with_tensors(network)):
        for name, stored in stored_tensors(module).items():
            if (norm := stored.norm) is not None:
                # Not -0, nor NaN in a group without weights.
                _make_plain(module, name, norm.effective().masked_fill(norm.v == 0, 0.0))


def fold_all(network: nn.Module) -> None:
    """Replaces every tensor under a parametrization or a spectral norm by a plain parameter of its value, in place.

    Args:
        network: A module in evaluation mode.
    """
    fold_weight_norm(network)
    for module in network.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                _make_plain(module, name, getattr(module, name).detach())
        if any(isinstance(hook, _SpectralNormHook) for hook in module._forward_pre_hooks.values()):
            remove_spectral_norm(module)


def copy_network(network: M) -> M:
    """Copies a network, also while torch's old norms hold computed weights, which `deepcopy` rejects."""
    memo: dict[int, Any] = {
        id(held): held.detach().clone()
        for module in network.modules()
        for held in vars(module).values()
        if isinstance(held, Tensor) and not held.is_leaf
    }
    return deepcopy(network, memo)


def _make_plain(module: nn.Module, name: str, value: Tensor) -> None:
    """Replaces one computed tensor of a module by a parameter.

    Torch's `remove_parametrizations` would also change the network that this one was copied from: copies share their
    class.
    """
    if parametrize.is_parametrized(module, name):
        kind, plain, chains = type(module), parametrize.type_before_parametrizations(module), module.parametrizations
        del chains[name]  # type: ignore[operator, union-attr]
        if chains:
            held = {key: of for key, of in vars(kind).items() if key not in (name, "__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, held)
        else:
            module.__class__ = plain
            del module._modules["parametrizations"]
    else:
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _WeightNormHook) and hook.name == name:
                del module._forward_pre_hooks[key]
        delattr(module, name)
        for part in (f"{name}_g", f"{name}_v"):
            del module._parameters[part]
    setattr(module, name, nn.Parameter(value))  # recurrent layers keep a list of their weights
