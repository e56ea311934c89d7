"""Repeats a network's call from its recorded state, without side effects."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.sharding import reshard
from lightning_ddst.utils.nested import tensors_in
from lightning_ddst.utils.together import clone_together, copy_together

_Buffer = tuple[nn.Module, str, Tensor]
"""A buffer with its module and name."""


@dataclass(frozen=True)
class CallState:
    """The state that a call depends on, apart from its arguments and weights.

    Attributes:
        buffers: Copies of the network's buffers, with their modules and names.
        autocast: Device type, dtype and whether autocast is enabled.
        python_rng: Python's random state.
        numpy_rng: NumPy's global random state.
        torch_rng: Torch's random state on the CPU.
        device_rng: Torch's random state by GPU.
    """

    buffers: Sequence[_Buffer]
    autocast: tuple[str, torch.dtype, bool]
    python_rng: Any
    numpy_rng: Any
    torch_rng: Tensor
    device_rng: dict[int, Tensor]

    @classmethod
    def capture(cls, network: nn.Module, *arguments: Any) -> "CallState":
        """Snapshots the current buffers, autocast and random states.

        Args:
            network: The network.
            *arguments: The call's arguments, which show the device of a network without parameters.
        """
        buffers = _copy_buffers(_list_buffers(network))
        places = [p.device for p in network.parameters()] or [value.device for _, value in tensors_in(arguments)]
        devices = sorted({place.index for place in places if place.type == "cuda"})
        kind = places[0].type if places else "cpu"
        return cls(
            buffers,
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)),
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002  # networks of users draw from it
            torch.get_rng_state(),
            {device: torch.cuda.get_rng_state(device) for device in devices},
        )


@contextmanager
def replay(network: nn.Module, state: CallState) -> Iterator[None]:
    """Runs the network's calls inside the context from a state, without gradients; restores everything afterwards."""
    reshard(network)
    kind, dtype, enabled = state.autocast
    # The buffer objects are kept, because a pending backward pass may have saved them.
    buffers = _list_buffers(network)
    python_rng, numpy_rng = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        for module, name, buffer in _copy_buffers(state.buffers):
            module._buffers[name] = buffer
        # Without autocast's cache: it may hold half-precision copies of other weights.
        autocast = torch.autocast(kind, dtype, enabled, cache_enabled=False)
        with torch.no_grad(), autocast, torch.random.fork_rng(devices=list(state.device_rng)):
            random.setstate(state.python_rng)
            np.random.set_state(state.numpy_rng)  # noqa: NPY002
            torch.set_rng_state(state.torch_rng)
            for device, rng in state.device_rng.items():
                torch.cuda.set_rng_state(rng, device)
            yield
    finally:
        random.setstate(python_rng)
        np.random.set_state(numpy_rng)  # noqa: NPY002
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        reshard(network)


@contextmanager
def swap_weights(values: Mapping[nn.Parameter, Tensor], only: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
    """Gives parameters other values inside the context.

    Args:
        values: The values by parameter.
        only: The parameters to change; by default all parameters in `values`.
    """
    changed = dict.fromkeys(parameter for parameter in (values if only is None else only) if parameter in values)
    kept = clone_together(changed)
    try:
        # `data` bypasses autograd's version counter: a backward pass may follow.
        copy_together((parameter.data for parameter in changed), (values[parameter] for parameter in changed))
        yield
    finally:
        copy_together((parameter.data for parameter in changed), kept)


def _copy_buffers(buffers: Sequence[_Buffer]) -> list[_Buffer]:
    copies = clone_together(buffer for _, _, buffer in buffers)
    return [(module, name, copy) for (module, name, _), copy in zip(buffers, copies, strict=True)]


def _list_buffers(network: nn.Module) -> list[_Buffer]:
    return [
        (module, name, buffer)
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
