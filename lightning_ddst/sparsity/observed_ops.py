"""Shows torch's operations to functions, in periods that may overlap each other and other modes."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils.flop_counter import flop_registry

Observe = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], object]
"""A function of an operation, its arguments, its keyword arguments and its result."""

_thread = threading.local()  # as modes are


@contextmanager
def observed(observe: Observe) -> Iterator[None]:
    """Calls a function after each of torch's operations in this thread, backward passes included.

    Contexts may overlap: several callbacks count from one optimizer step to another. Modes must be left in reverse
    order, so one mode serves all functions, below all modes of other code.

    Args:
        observe: The function.
    """
    observer: _Observer | None = getattr(_thread, "observer", None)
    if observer is None:
        observer = _thread.observer = _Observer()
    observer.add(observe)
    try:
        yield
    finally:
        observer.remove(observe)


class _Observer(TorchDispatchMode):
    """The mode of a thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._functions: list[Observe] = []
        self._active = ExitStack()

    def add(self, observe: Observe) -> None:
        if not self._functions:
            # Backward passes stay in this thread, in which the numbers of autograd's nodes are unique.
            self._active.enter_context(torch.autograd.set_multithreading_enabled(False))
            with _without_modes():
                self.__enter__()  # type: ignore[no-untyped-call]
        self._functions.append(observe)

    def remove(self, observe: Observe) -> None:
        self._functions.remove(observe)
        if not self._functions:
            with _without_modes(above=self):
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._active.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._overloadpacket not in flop_registry:
            with self:  # in this mode layers arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        for observe in self._functions:
            observe(func, args, kwargs, result)
        return result


@contextmanager
def _without_modes(above: TorchDispatchMode | None = None) -> Iterator[None]:
    """Takes modes off the stack, all or those above one of them, and puts them back."""
    modes = _get_current_dispatch_mode_stack()
    taken = [_pop_mode() for mode in modes[modes.index(above) + 1 if above in modes else 0 :]]
    try:
        yield
    finally:
        for mode in reversed(taken):
            _push_mode(mode)
