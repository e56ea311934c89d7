"""Networks and optimizers inside the wrappers of Fabric and DistributedDataParallel."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_ddst.sparsity.sharding import is_split
from lightning_ddst.utils.lightning_private import fabric_strategy

_WRAPPERS = ("_FabricModule", "DistributedDataParallel")
"""Classes that wrap a network, which is their attribute ``module``."""
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
"""Strategies of Fabric that keep parameters in one piece."""


def unwrap_network(network: Any, role: str) -> nn.Module:
    """Returns the network inside Fabric's wrapper and DistributedDataParallel.

    Args:
        network: The network, wrapped or not.
        role: "generator" or "discriminator", for errors.

    Raises:
        ValueError: If it is no module, or its parameters are split or copied over devices in another way.
    """
    if (strategy := fabric_strategy(network)) is not None:
        kinds = {kind.__name__ for kind in type(strategy).__mro__}
        if kinds.isdisjoint(_STRATEGIES) or "DeepSpeedStrategy" in kinds:
            raise ValueError(
                f"Fabric's {type(strategy).__name__} keeps the {role}'s parameters in a form that cannot be masked "
                'here: use Fabric(strategy="ddp") or a single device.'
            )
    while type(network).__name__ in _WRAPPERS:
        network = network.module
    if not isinstance(network, nn.Module):
        raise ValueError(f"{role}={network!r} must be a torch.nn.Module, or a list or dict of these.")
    whole = type(network).__name__ not in ("DataParallel", "FullyShardedDataParallel")
    if not whole or any(is_split(parameter) for parameter in network.parameters()):
        raise ValueError(
            f"the {role} is split or copied over devices by {type(network).__name__}, which cannot be masked here: use "
            "DistributedDataParallel."
        )
    return network


def holds_parts(network: Any) -> bool:
    """Returns whether this is a container of modules, which cannot be called itself."""
    return isinstance(network, nn.ModuleDict | nn.ModuleList) and type(network).forward is nn.Module.forward


def unwrap_parts(network: Any, role: str) -> nn.Module:
    """Returns a network, or a container of its parts, without wrappers.

    Args:
        network: The network, or a list or dict of its parts.
        role: "generator" or "discriminator", for errors.

    Raises:
        ValueError: The errors of `unwrap_network`.
    """
    if isinstance(network, Mapping) or (holds_parts(network) and isinstance(network, nn.ModuleDict)):
        return nn.ModuleDict({name: unwrap_network(part, role) for name, part in network.items()})
    if isinstance(network, list | tuple) or holds_parts(network):
        return nn.ModuleList(unwrap_network(part, role) for part in network)
    return unwrap_network(network, role)


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """Returns torch's own optimizer, whose hooks every step calls.

    Raises:
        ValueError: If it is no optimizer.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizers must be a list of torch.optim.Optimizer, and one is {type(optimizer).__name__}.")
    return optimizer


def find_scaler(optimizer: Any) -> Any:
    """Returns the GradScaler of an optimizer's Fabric, or None."""
    strategy = fabric_strategy(optimizer)
    return None if strategy is None else getattr(strategy.precision, "scaler", None)
