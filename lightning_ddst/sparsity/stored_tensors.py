"""The parameters that store a module's tensors: plain ones, and those under spectral norm or weight norm."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as _WeightNormHook

from lightning_ddst.sparsity.weight_norm import WeightNorm


@dataclass(frozen=True)
class StoredTensor:
    """How a module stores one of its tensors.

    Attributes:
        parameter: The parameter that stores it: under spectral norm the one before normalization, under weight norm v.
            None if it is computed from parameters in another way.
        norm: Its weight norm; None without.
    """

    parameter: nn.Parameter | None
    norm: WeightNorm | None = None


def stored_tensors(module: nn.Module) -> dict[str, StoredTensor]:
    """Returns the tensors of a module, without its submodules, by their names in it, such as ``"weight"``."""
    tensors = {name: StoredTensor(p) for name, p in module._parameters.items() if p is not None}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _SpectralNormHook):
            tensors[hook.name] = tensors.pop(f"{hook.name}_orig")
        elif isinstance(hook, _WeightNormHook):
            g, v = (tensors.pop(f"{hook.name}_{part}").parameter for part in "gv")
            assert g is not None
            assert v is not None
            tensors[hook.name] = StoredTensor(v, WeightNorm.make(g, v, hook.dim))
        elif isinstance(hook, BasePruningMethod):
            tensors.pop(f"{hook._tensor_name}_orig", None)
            tensors[hook._tensor_name] = StoredTensor(None)
    if parametrize.is_parametrized(module):
        chains = cast(nn.ModuleDict, module.parametrizations)
        tensors |= {name: _parametrized(cast(parametrize.ParametrizationList, c)) for name, c in chains.items()}
    return tensors


def _parametrized(chain: parametrize.ParametrizationList) -> StoredTensor:
    if len(chain) == 1 and isinstance(chain[0], _SpectralNorm):
        return StoredTensor(chain.original)  # type: ignore[arg-type]
    if len(chain) == 1 and isinstance(chain[0], _WeightNorm):
        g, v = chain.original0, chain.original1
        return StoredTensor(v, WeightNorm.make(g, v, chain[0].dim))  # type: ignore[arg-type]
    return StoredTensor(None)


def weight_norms(network: nn.Module) -> Iterator[WeightNorm]:
    """Yields the weight norm of every tensor that has one in a network, for any kind of module."""
    for _, module in modules_with_tensors(network):
        yield from (stored.norm for stored in stored_tensors(module).values() if stored.norm is not None)


def modules_with_tensors(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields a network's modules by name, without those that only store the parameters of parametrizations."""
    for name, module in network.named_modules():
        if not isinstance(module, parametrize.ParametrizationList):
            yield name, module
