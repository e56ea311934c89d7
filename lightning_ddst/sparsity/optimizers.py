"""Finds the optimizers of parameters, and the updates that their steps make up."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.utils.compilation import uncompiled


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


def register_step_post_hook(optimizer: Optimizer, hook: Callable[[Optimizer], None]) -> RemovableHandle:
    """Calls a function with an optimizer after each of its steps.

    torch passes the object whose ``step`` ran, which may be a wrapper around the optimizer.
    """
    return optimizer.register_step_post_hook(lambda *_: hook(optimizer))


class UpdateSteps:
    """Joins the steps of a network's optimizers to updates.

    One step of each of them is an update; so are the steps of some of them at the end of a batch.

    Args:
        parameters: The network's parameters by name. A step counts if one of them has a gradient, since an optimizer of
            two networks may step without this one.
        optimizers: The optimizers that update them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
        self._parameters = parameters
        self._optimizers = set(optimizers)
        self._stepped: set[Optimizer] = set()

    @property
    def begun(self) -> bool:
        """Whether there were steps since the last update."""
        return bool(self._stepped)

    def add(self, optimizer: Optimizer) -> bool:
        """Adds the last step of an optimizer, and returns whether it completed an update."""
        if not has_updated(self._parameters, optimizer):
            return False
        self._stepped.add(optimizer)
        return self._stepped == self._optimizers and self.end_batch()

    def end_batch(self) -> bool:
        """Ends a batch, and returns whether steps since the last update make up another one."""
        begun = self.begun
        self._stepped.clear()
        return begun


class UpdateHooks:
    """Calls a function after every update of a network, until `remove`.

    It hooks into all optimizers that hold one of the network's parameters, behind all hooks that they have.

    Args:
        network: The network.
        optimizers: The optimizers of the run.
        updated: The function.
    """

    def __init__(self, network: nn.Module, optimizers: Iterable[Optimizer], updated: Callable[[], None]) -> None:
        parameters = dict(network.named_parameters())  # also frozen ones, which may thaw
        own = set(parameters.values())
        updating = [each for each in optimizers if not own.isdisjoint(get_parameters(each))]
        self._steps = UpdateSteps(parameters, updating)
        self._updated = updated
        self._handles = [register_step_post_hook(each, self._after_step) for each in updating]

    @uncompiled
    def _after_step(self, optimizer: Optimizer) -> None:
        if self._steps.add(optimizer):
            self._updated()

    def end_batch(self) -> None:
        """Ends a training step: steps of some of the optimizers, without the others, are an update, too."""
        if self._steps.end_batch():
            self._updated()

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
