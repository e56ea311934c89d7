"""Context managers for evaluation mode and hooks, and the module that raised an error."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Sets a network to evaluation mode inside the context, and restores each module's mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def remove_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_raising_module(network: nn.Module, error: BaseException) -> nn.Module:
    """Returns the innermost module of a network whose code raised an error; the network if none is known."""
    parts = {id(module) for module in network.modules()}
    found, trace = network, error.__traceback__
    while trace is not None:
        running = trace.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module) and id(running) in parts:
            found = running
        trace = trace.tb_next
    return found
