"""Both masked networks of a GAN, with the names of their weights in the module that holds them."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_ddst.methods.base import ROLES, Role
from lightning_ddst.sparsity import MaskedNetwork, find_units
from lightning_ddst.sparsity.selection import count_true
from lightning_ddst.utils.states import TEXT, Form, named

T = TypeVar("T")


class MaskedPair:
    """The masked generator and discriminator of a module.

    Args:
        module: The module that holds both networks.
        networks: The two networks, masked.

    Attributes:
        module: The module.
        networks: The networks by role.
        names: Names in ``module.named_parameters()`` by the weights' names in their network, by role.
    """

    def __init__(self, module: nn.Module, networks: Mapping[Role, MaskedNetwork]) -> None:
        self.module = module
        self.networks = dict(networks)
        full = {id(parameter): name for name, parameter in module.named_parameters()}
        self.names = {
            role: {name: full[id(parameter)] for name, parameter in network.parameters.items()}
            for role, network in self.networks.items()
        }

    def masks(self, role: Role) -> dict[str, Tensor]:
        """Returns the masks of a network by the names of its weights in the module."""
        masks = self.networks[role].masks
        return {full: masks[name] for name, full in self.names[role].items()}

    def layer_densities(self, role: Role) -> dict[str, float]:
        """Returns the densities of a network's weights by their names in the module."""
        densities = self.networks[role].layer_densities
        return {full: densities[name] for name, full in self.names[role].items()}

    def by_full_name(self, of_networks: Iterable[Mapping[str, T]]) -> dict[str, T]:
        """Joins values of each network's weights in one dict, by the weights' names in the module."""
        pairs = zip(self.names.values(), of_networks, strict=True)
        return {names[name]: value for names, values in pairs for name, value in values.items()}

    @staticmethod
    def state_form(granularity: str) -> Form:
        """Returns the form of `state_dict` for masks of a granularity."""
        form = MaskedNetwork.state_form | find_units(granularity).state_form | {"names": named(TEXT)}
        return dict.fromkeys(ROLES, form)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the state of both networks with the names in the module; loads with ``weights_only=True``."""
        return {role: network.state_dict() | {"names": self.names[role]} for role, network in self.networks.items()}


def saved_masks(state: Mapping[str, Any], role: Role) -> dict[str, Tensor]:
    """Returns the masks in a state of `MaskedPair.state_dict`, by the names of their weights in the module."""
    saved = state[role]
    return {saved["names"][name]: mask for name, mask in saved["masks"].items()}


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Returns the share of true entries in masks."""
    return sum(count_true(mask) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
