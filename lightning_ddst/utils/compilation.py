"""Beside torch.compile: which networks are compiled, and what must not be."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._dynamo import OptimizedModule

F = TypeVar("F", bound=Callable[..., Any])


def is_compiled(network: nn.Module) -> bool:
    """Whether a network, or a part of it, is compiled."""
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in network.modules())


def run_eagerly(network: nn.Module) -> AbstractContextManager[Any]:
    """For calls that are none of training's: they would be compiled anew, and count against the limit of that."""
    if not is_compiled(network):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def uncompiled(hook: F) -> F:
    """Decorates a hook that stays out of what is compiled, so that nothing in it is a reason to compile again."""
    return cast(F, torch.compiler.disable(hook))
