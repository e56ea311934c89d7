"""Repeating a network's call as if nothing had happened since, and as if it was never repeated."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.sharding import reshard


@dataclass(frozen=True)
class CallState:
    """What a call depends on beside its arguments and weights: buffers, autocast, random states of torch and Python."""

    buffers: list[tuple[nn.Module, str, Tensor]]
    autocast: tuple[str, torch.dtype, bool]
    of_python: Any
    of_torch: Tensor
    of_devices: dict[int, Tensor]

    @classmethod
    def now(cls, network: nn.Module) -> "CallState":
        """That of a call that would come now."""
        buffers = [(module, name, buffer.clone()) for module, name, buffer in _buffers(network)]
        devices = sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})
        kind = next(network.parameters()).device.type
        return cls(
            buffers,
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)),
            random.getstate(),
            torch.get_rng_state(),
            {device: torch.cuda.get_rng_state(device) for device in devices},
        )


@contextmanager
def replayed(network: nn.Module, state: CallState) -> Iterator[None]:
    """Calls of the network find this state, and no gradients; afterwards everything is as it was before."""
    reshard(network)
    kind, dtype, enabled = state.autocast
    # The buffers themselves stay what they are, so a backward pass that is still to come finds what it saved.
    kept = _buffers(network)
    of_python = random.getstate()
    try:
        for module, name, buffer in state.buffers:
            module._buffers[name] = buffer.clone()
        # Without autocast's cache: it may hold half-precision copies of other weights.
        autocast = torch.autocast(kind, dtype, enabled, cache_enabled=False)
        with torch.no_grad(), autocast, torch.random.fork_rng(devices=list(state.of_devices)):
            random.setstate(state.of_python)
            torch.set_rng_state(state.of_torch)
            for device, of_device in state.of_devices.items():
                torch.cuda.set_rng_state(of_device, device)
            yield
    finally:
        random.setstate(of_python)
        for module, name, buffer in kept:
            module._buffers[name] = buffer
        reshard(network)


@contextmanager
def weights(values: Mapping[nn.Parameter, Tensor], of: Iterable[nn.Parameter]) -> Iterator[None]:
    """Those of the parameters that are among the values have them; afterwards they are what they were."""
    changed = {parameter: values[parameter] for parameter in of if parameter in values}
    now = {parameter: parameter.detach().clone() for parameter in changed}
    try:
        for parameter, value in changed.items():
            parameter.data.copy_(value)  # past autograd's version counter: a backward pass may still come
        yield
    finally:
        for parameter, value in now.items():
            parameter.data.copy_(value)


def _buffers(network: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, buffer)
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
