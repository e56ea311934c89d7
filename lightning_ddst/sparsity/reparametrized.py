"""Weights that a layer computes from other parameters: weight norm and other parametrizations, made plain."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as _WeightNormHook

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class WeightNorm:
    """A tensor under weight norm, in one of torch's two forms: the weight is ``g * v / |v|``.

    Attributes:
        module: The module that uses it.
        name: Its attribute in the module, such as "weight".
        direction: The parameter v, of the weight's shape; where an entry is 0, the weight is 0.
        dim: The dimension whose slices have a norm each; -1 if there is one norm.
    """

    module: nn.Module
    name: str
    direction: nn.Parameter
    dim: int

    def value(self) -> Tensor:
        """Returns the weight, which is exactly 0 where v is."""
        hooks = self.module._forward_pre_hooks.values()
        hook = next((h for h in hooks if isinstance(h, _WeightNormHook) and h.name == self.name), None)
        weight: Tensor = getattr(self.module, self.name) if hook is None else hook.compute_weight(self.module)
        return weight.detach().masked_fill(self.direction == 0, 0.0)  # not -0, nor NaN in a slice without weights


def weight_norms(network: nn.Module) -> Iterator[WeightNorm]:
    """Yields every tensor under weight norm in a network."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
                if len(chain) == 1 and isinstance(chain[0], _WeightNorm):
                    yield WeightNorm(module, name, chain.original1, chain[0].dim)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _WeightNormHook):
                yield WeightNorm(module, hook.name, module.get_parameter(f"{hook.name}_v"), hook.dim)


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
    for norm in list(weight_norms(network)):
        _make_plain(norm.module, norm.name, norm.value())


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
