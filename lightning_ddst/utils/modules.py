"""Context managers for evaluation mode and hooks."""

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
