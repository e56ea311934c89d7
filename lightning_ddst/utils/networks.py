"""Finds the generator and the discriminator in a module, whether it can be sampled from, and who else averages it."""

from lightning.pytorch import Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

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


def name_in(module: nn.Module, network: nn.Module) -> str:
    """The dotted name of a submodule."""
    names: dict[int, str] = {id(submodule): name for name, submodule in module.named_modules()}
    return names[id(network)]


def refuse_other_averages(trainer: Trainer, module: nn.Module, generator: nn.Module) -> None:
    """Refuses averages of a generator whose masks change, that know nothing of masks.

    Raises:
        ValueError: If Lightning's WeightAveraging is among the callbacks, or the module holds torch's
            AveragedModel of the generator.
    """
    instead = "`GeneratorEMA` averages the generator alone and knows of masks; use it instead."
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__):
            raise ValueError(
                f"{type(callback).__name__} beside changing masks: in its average every weight is active that ever was "
                f"for a while, it averages the discriminator too, and counts the steps of both optimizers. {instead}"
            )
    shapes = {name: parameter.shape for name, parameter in generator.named_parameters()}
    for name, average in module.named_modules():
        if isinstance(average, AveragedModel):
            averaged = {n: parameter.shape for n, parameter in average.module.named_parameters()}
            if averaged == shapes:
                raise ValueError(
                    f"{name}, torch's AveragedModel of the generator, beside changing masks: in its average every "
                    f"weight is active that ever was for a while. {instead}"
                )


def check_sample(callback: object, module: nn.Module) -> None:
    """Raises a TypeError that names the callback, unless the module can be sampled from."""
    if not callable(getattr(module, "sample", None)):
        raise TypeError(
            f"{type(callback).__name__} needs {type(module).__name__}.sample(n, rng=...), as GANModule has it."
        )


def _submodules(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no submodules"
