"""Finds the optimizers of parameters, and whether a step updated them."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer


def get_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Returns the parameters that an optimizer updates, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def find_optimizers(parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Finds the optimizers that update given parameters.

    Args:
        parameters: The parameters by name.
        optimizers: Optimizers, which may also update other parameters.

    Raises:
        ValueError: If one of the parameters is in none of the optimizers.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    found = [optimizer for optimizer in optimizers if not names.keys().isdisjoint(get_parameters(optimizer))]
    missing = names.keys() - {parameter for optimizer in found for parameter in get_parameters(optimizer)}
    if missing:
        name = min(names[parameter] for parameter in missing)
        raise ValueError(
            f"no optimizer updates {name!r} ({len(missing)} of {len(names)} weights are in none): give it to "
            "one, or, if it must not change, name its layer in dense_layers."
        )
    return found


def has_updated(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> bool:
    """Returns whether an optimizer's last step updated one of the parameters.

    It did not if none of them has a gradient, or if a fused optimizer skipped its step after an overflow of fp16.
    """
    own = {id(parameter) for parameter in parameters.values()}
    if not any(p.grad is not None for p in get_parameters(optimizer) if id(p) in own):
        return False
    overflow = getattr(optimizer, "found_inf", None)  # set by torch's GradScaler while it steps a fused optimizer
    return overflow is None or not bool(overflow)
