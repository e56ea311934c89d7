"""Evaluation mode, and hooks, for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation mode, and every module of it back into its own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def remove_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Takes hooks away afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
