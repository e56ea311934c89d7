"""The networks of a loop without a Trainer: their values before the masks, and who steps their weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_ddst.attached.wrapped import holds_parts, unwrap_parts
from lightning_ddst.methods.masked_pair import MaskedPair
from lightning_ddst.sparsity.optimizers import get_parameters
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.nested import tensors_in

Networks: TypeAlias = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
"""A network as a user gives it: one module, or its parts."""


class LoopNetworks(nn.Module):
    """Holds both networks under their usual names; its mode and device are not used."""

    def __init__(self, generator: Networks, discriminator: Networks) -> None:
        super().__init__()
        self.generator = unwrap_parts(generator, "generator")
        self.discriminator = unwrap_parts(discriminator, "discriminator")

    def part_names(self) -> dict[str, list[str]]:
        """Returns the dotted names of the parts of each network that was given as several."""
        return {
            role: [f"{role}.{name}" for name, _ in network.named_children()]
            for role, network in self.named_children()
            if holds_parts(network)
        }

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields every network that was given, with its role."""
        for role, network in self.named_children():
            for part in network.children() if holds_parts(network) else (network,):
                yield role, part


class UnmaskedValues:
    """The weights and buffers before the first masks, so that a run that resumes can undo these.

    Args:
        module: A module whose tensors will be changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = {name: tensor.clone() for name, tensor in self._tensors()}
        self._after: dict[str, Tensor] = {}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        named = chain(self._module.named_parameters(), self._module.named_buffers())
        return ((name, tensor.detach()) for name, tensor in named)

    def mark(self) -> None:
        """Remembers the present values, of the tensors that changed."""
        self._after = {n: tensor.clone() for n, tensor in self._tensors() if not torch.equal(tensor, self._before[n])}
        self._before = {name: self._before[name] for name in self._after}

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the values of layers that nothing has written to since `mark`.

        One tensor alone does not tell: spectral norm's left vector of a single output is 1 or -1, loaded or not.
        """
        now = dict(self._tensors())
        same = {n: torch.equal(now[n], after.to(now[n].device)) for n, after in self._after.items() if n in now}
        written = {name.rpartition(".")[0] for name, is_same in same.items() if not is_same}
        for name in same:
            if name.rpartition(".")[0] not in written:
                now[name].copy_(self._before[name])


class StepWatch:
    """Notices steps of optimizers that `sparsify` was not given.

    Args:
        pair: The masked networks.
        optimizers: The optimizers that it was given.
    """

    def __init__(self, pair: MaskedPair, optimizers: Iterable[Optimizer]) -> None:
        self._names = {p: each.full_name(n) for each in pair.networks.values() for n, p in each.parameters.items()}
        self._given = set(optimizers)
        self._stepped: set[nn.Parameter] = set()
        self._foreign: dict[nn.Parameter, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the steps inside the context.

        Raises:
            RuntimeError: If another optimizer updated a masked weight, and none of those that were given did.
        """
        self._stepped.clear()
        self._foreign.clear()
        handle = register_optimizer_step_post_hook(self._after_step)
        try:
            yield
        finally:
            handle.remove()
        for weight, optimizer in self._foreign.items():
            if weight not in self._stepped:
                raise RuntimeError(
                    f"{self._names[weight]!r} was updated in step(batch) by {optimizer}, an optimizer that "
                    "sparsify(...) was not given: give it the optimizers whose step() runs. If you created new ones, "
                    "save state_dict(), call close(), and call sparsify(...) with them."
                )

    @uncompiled
    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        updated = [p for p in get_parameters(optimizer) if p in self._names and p.grad is not None]
        if optimizer in self._given:
            self._stepped.update(updated)
        else:
            self._foreign.update(dict.fromkeys(updated, type(optimizer).__name__))


def check_device(batch: Any, networks: nn.Module) -> None:
    """Rejects a batch that was not moved to the networks' device.

    Raises:
        ValueError: If none of its floating-point tensors is there.
    """
    device = next(networks.parameters()).device
    found = {tensor.device for _, tensor in tensors_in(batch) if tensor.is_floating_point()}
    if found and device not in found:
        raise ValueError(
            f"the batch of step(batch) is on {next(iter(found))}, and the networks are on {device}: move the batch "
            "first."
        )
