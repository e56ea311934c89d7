"""Beside torch.compile: which networks are compiled, and what must not be."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule


def is_compiled(network: nn.Module) -> bool:
    """Whether a network, or a part of it, is compiled."""
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in network.modules())


def eagerly(network: nn.Module) -> AbstractContextManager[Any]:
    """For calls that are none of training's: they would be compiled anew, and count against the limit of that."""
    if not is_compiled(network):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that stays out of what is compiled, so that nothing in it is a reason to compile again."""
    outside: Callable[..., Any] = torch.compiler.disable(hook)
    return outside
