"""Finds the generator and the discriminator in a module, and whether it can be sampled from."""

from torch import nn

USUAL_NAMES = {
    "generator": ("generator", "netG", "net_g", "G", "gen"),
    "discriminator": ("discriminator", "critic", "netD", "net_d", "D", "disc"),
}
"""Attributes that are tried, in order, where no name is given."""


def find_network(module: nn.Module, role: str, name: str | None) -> nn.Module:
    """Finds one of a GAN's two networks.

    Args:
        module: The module that holds it.
        role: "generator" or "discriminator".
        name: Its dotted name in the module; None to try the usual names.

    Raises:
        ValueError: If there is no such submodule.
    """
    if name is not None:
        try:
            return module.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{role}={name!r} is not a submodule of {type(module).__name__}; it has {_submodules(module)}."
            ) from None
    for usual in USUAL_NAMES[role]:
        if isinstance(found := getattr(module, usual, None), nn.Module):
            return found
    raise ValueError(
        f"no {role} was found in {type(module).__name__} under the usual names {', '.join(USUAL_NAMES[role])}: "
        f'pass its dotted name, {role}="...". It has {_submodules(module)}.'
    )


def check_sample(callback: object, module: nn.Module) -> None:
    """Raises a TypeError that names the callback, unless the module can be sampled from."""
    if not callable(getattr(module, "sample", None)):
        raise TypeError(
            f"{type(callback).__name__} needs {type(module).__name__}.sample(n, rng=...), as GANModule has it."
        )


def _submodules(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no submodules"
