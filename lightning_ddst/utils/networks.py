"""Finds a module's generator and discriminator, and checks its `sample` method."""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

Name = str | Sequence[str]
"""Dotted name of a network in the module that holds it, or the names of its parts."""
USUAL_NAMES = {
    "generator": ("generator", "netG", "net_g", "G", "gen"),
    "discriminator": ("discriminator", "critic", "netD", "net_d", "D", "disc"),
}
"""Attributes to try, in order, if no name is given."""


class SeveralParts(nn.Module):
    """Several submodules of a module as one network, for masks and weights; it cannot be called.

    Weights have the names that they have in the module.

    Args:
        module: The module that holds the parts.
        role: "generator" or "discriminator", for errors.
        names: The dotted names of the parts.

    Attributes:
        part_names: The dotted names of the parts.
        parts: The parts.
        holders: The modules that hold a part, the innermost first.

    Raises:
        ValueError: If there is no such submodule, or one of them is named twice or holds another.
    """

    def __init__(self, module: nn.Module, role: str, names: Sequence[str]) -> None:
        super().__init__()
        self.part_names = tuple(names)
        self.parts = tuple(_get_submodule(module, role, name) for name in names)
        for (name, part), (other, inner) in permutations(zip(names, self.parts, strict=True), 2):
            if any(inner is each for each in part.modules()):
                raise ValueError(f"{role}={list(names)!r}: {name!r} holds {other!r}, so its weights would count twice.")
        for name, part in zip(names, self.parts, strict=True):
            *path, last = name.split(".")
            place: nn.Module = self
            for each in path:
                if each not in dict(place.named_children()):
                    place.add_module(each, nn.Module())
                place = place.get_submodule(each)
            place.add_module(last, part)
        paths = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
        self.holders = tuple(module.get_submodule(path) for path in sorted({"", *paths}, key=len, reverse=True))


def get_parts(network: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the modules that a network consists of: its parts if they are several, else the network itself."""
    return network.parts if isinstance(network, SeveralParts) else (network,)


def is_same_network(one: nn.Module | None, other: nn.Module | None) -> bool:
    """Returns whether two networks consist of the same modules."""
    if one is None or other is None:
        return False
    return [id(part) for part in get_parts(one)] == [id(part) for part in get_parts(other)]


def find_network(module: nn.Module, role: str, name: Name | None) -> nn.Module:
    """Finds one of a GAN's two networks.

    Args:
        module: The module that holds it.
        role: "generator" or "discriminator".
        name: Its dotted name in the module, or the names of its parts; None tries the usual names, in the module, then
            in its submodules, then in theirs.

    Returns:
        The network; `SeveralParts` for several names.

    Raises:
        ValueError: If there is no such submodule, or several have a usual name.
    """
    if isinstance(name, str):
        return _get_submodule(module, role, name)
    if name is not None:
        if not name:
            raise ValueError(f"{role}={name!r} must name at least one submodule.")
        return SeveralParts(module, role, name) if len(name) > 1 else _get_submodule(module, role, name[0])
    found: dict[str, nn.Module] = {}
    level = {"": module}
    while level and not found:
        found = {
            prefix + usual: network
            for prefix, submodule in level.items()
            for usual, network in _find_usual(submodule, role).items()
        }
        level = {
            f"{prefix}{name}.": child
            for prefix, submodule in level.items()
            for name, child in submodule.named_children()
        }
    if len({id(network) for network in found.values()}) > 1:
        raise ValueError(
            f"{len(found)} submodules of {type(module).__name__} could be the {role}: {', '.join(found)}; pass the "
            f'name of one, {role}="{next(iter(found))}".'
        )
    if found:
        return next(iter(found.values()))
    raise ValueError(
        f"no {role} was found in {type(module).__name__} or its submodules under the usual names "
        f'{", ".join(USUAL_NAMES[role])}: pass its dotted name, {role}="...". It has '
        f"{_submodules(module)}."
    )


def _get_submodule(module: nn.Module, role: str, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{role}={name!r} is not a submodule of {type(module).__name__}; it has {_submodules(module)}."
        ) from None


def _find_usual(module: nn.Module, role: str) -> dict[str, nn.Module]:
    """Returns the first submodule under one of the usual names, with its name."""
    for usual in USUAL_NAMES[role]:
        if isinstance(found := getattr(module, usual, None), nn.Module):
            return {usual: found}
    return {}


def check_not_shared(networks: Mapping[Any, nn.Module]) -> None:
    """Checks that the two networks share no trained parameter: it would have two masks, and both networks' updates.

    Raises:
        ValueError: If they share one; names it in both.
    """
    (one, first), (other, second) = networks.items()
    names = {id(parameter): name for name, parameter in first.named_parameters()}
    for name, parameter in second.named_parameters():
        if parameter.requires_grad and id(parameter) in names:
            raise ValueError(
                f"the {one}'s {names[id(parameter)]!r} is the {other}'s {name!r}: the networks cannot share a "
                "parameter, which would have two masks and the updates of both, unless it is frozen."
            )


def name_in(module: nn.Module, network: nn.Module) -> str:
    """Returns the dotted name of a network in the module that holds it; of several parts, their names with ``+``."""
    if isinstance(network, SeveralParts):
        return "+".join(network.part_names)
    names: dict[int, str] = {id(submodule): name for name, submodule in module.named_modules()}
    return names[id(network)]


def prefix_in(module: nn.Module, network: nn.Module) -> str:
    """Returns the prefix that turns names of a network's layers into names in the module that holds it."""
    return "" if isinstance(network, SeveralParts) else name_in(module, network)


def check_sample(callback: object, module: nn.Module) -> None:
    """Raises a TypeError that names the callback, unless the module has a method `sample`."""
    if not callable(getattr(module, "sample", None)):
        raise TypeError(
            f"{type(callback).__name__} needs {type(module).__name__}.sample(n, rng=...), as GANModule has it."
        )


def draw_samples(module: nn.Module, n: int, rng: torch.Generator) -> Tensor:
    """Returns the images of a module's method `sample`.

    Raises:
        TypeError: If it returns no tensor.
        ValueError: If it returns another number of images.
    """
    images = module.sample(n, rng=rng)  # type: ignore[operator]
    returned = f"{type(module).__name__}.sample({n}, rng=...) must return a tensor of {n} images, and returned"
    if not isinstance(images, Tensor):
        raise TypeError(f"{returned} {type(images).__name__}.")
    if not images.dim() or len(images) != n:
        raise ValueError(f"{returned} one of shape {tuple(images.shape)}.")
    return images


def _submodules(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no submodules"
