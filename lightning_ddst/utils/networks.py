"""Finds a module's generator and discriminator, and checks its `sample` method and other weight averages."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

USUAL_NAMES = {
    "generator": ("generator", "netG", "net_g", "G", "gen"),
    "discriminator": ("discriminator", "critic", "netD", "net_d", "D", "disc"),
}
"""Attributes to try, in order, if no name is given."""
_WRITERS = {
    "WeightAveraging": "does not respect changing masks: its average makes every weight that was ever active "
    "non-zero, averages the discriminator too, and counts the steps of both optimizers.",
    "StochasticWeightAveraging": "writes averages into the weights at the end, outside the masks.",
    "ModelPruning": "replaces the weights by masked copies, which these masks do not reach.",
}
"""Callbacks of Lightning that average or change weights without the masks, and the reason to reject each."""


def find_network(module: nn.Module, role: str, name: str | None) -> nn.Module:
    """Finds one of a GAN's two networks.

    Args:
        module: The module that holds it.
        role: "generator" or "discriminator".
        name: Its dotted name in the module; None tries the usual names.

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


def check_not_shared(networks: Mapping[Any, nn.Module]) -> None:
    """Checks that the two networks share no parameter: it would have two masks, and both networks' updates.

    Raises:
        ValueError: If they share one; names it in both.
    """
    (one, first), (other, second) = networks.items()
    names = {id(parameter): name for name, parameter in first.named_parameters()}
    for name, parameter in second.named_parameters():
        if id(parameter) in names:
            raise ValueError(
                f"the {one}'s {names[id(parameter)]!r} is the {other}'s {name!r}: a shared weight cannot have two "
                "masks."
            )


def name_in(module: nn.Module, network: nn.Module) -> str:
    """Returns the dotted name of a submodule."""
    names: dict[int, str] = {id(submodule): name for name, submodule in module.named_modules()}
    return names[id(network)]


def refuse_other_averages(trainer: Trainer, module: nn.Module, generator: nn.Module) -> None:
    """Rejects weight averages that ignore masks, for a generator whose masks change.

    Raises:
        ValueError: If Lightning's WeightAveraging is among the callbacks, or the module holds torch's
            AveragedModel of the generator.
    """
    instead = "`GeneratorEMA` averages only the generator and respects masks; use it instead."
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind in type(callback).__mro__:
            if kind.__name__ in _WRITERS:
                raise ValueError(f"{type(callback).__name__} {_WRITERS[kind.__name__]} {instead}")
    shapes = {name: parameter.shape for name, parameter in generator.named_parameters()}
    for name, average in module.named_modules():
        if isinstance(average, AveragedModel):
            averaged = {n: parameter.shape for n, parameter in average.module.named_parameters()}
            if averaged == shapes:
                raise ValueError(
                    f"{name}, torch's AveragedModel of the generator, does not respect changing masks: its average "
                    f"makes every weight that was ever active non-zero. {instead}"
                )


def check_sample(callback: object, module: nn.Module) -> None:
    """Raises a TypeError that names the callback, unless the module has a method `sample`."""
    if not callable(getattr(module, "sample", None)):
        raise TypeError(
            f"{type(callback).__name__} needs {type(module).__name__}.sample(n, rng=...), as GANModule has it."
        )


def _submodules(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no submodules"
