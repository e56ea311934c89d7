"""Support for torch.compile: finds compiled networks, and keeps hooks and measurements out of compilation."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._dynamo import OptimizedModule

F = TypeVar("F", bound=Callable[..., Any])


def is_compiled(network: nn.Module) -> bool:
    """Returns whether a network, or a part of it, is compiled."""
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in network.modules())


def run_eagerly(network: nn.Module) -> AbstractContextManager[Any]:
    """Runs a compiled network eagerly inside the context, so that other calls than training's do not recompile it.

    Raises:
        RuntimeError: For a compiled network before torch 2.6, which has no such context.
    """
    if not is_compiled(network):
        return nullcontext()
    if not hasattr(torch.compiler, "set_stance"):
        raise RuntimeError(f"a compiled {type(network).__name__} needs torch 2.6; this is {torch.__version__}.")
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def is_called_by_compiled() -> bool:
    """Returns whether compiled code is running further up the stack, such as a compiled training step.

    Torch restores its dispatch keys when such code returns, so modes must not begin or end inside.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def uncompiled(hook: F) -> F:
    """Excludes a hook from compilation, so that nothing in it causes recompilation."""
    return cast(F, torch.compiler.disable(hook))
