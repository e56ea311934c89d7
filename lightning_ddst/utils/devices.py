"""Devices on which the number of launched operations matters more than what each computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_simulated = False


def is_launch_bound(device: torch.device) -> bool:
    """Returns whether launching operations costs more than small ones compute: on every device but the CPU.

    There, one operation works on all tensors together, and results are read seldom: reading waits for the device. On
    the CPU, tensors are processed one by one, so that intermediate results stay in its cache. Results are the same.
    """
    return _simulated or device.type != "cpu"


@contextmanager
def simulate_launch_bound() -> Iterator[None]:
    """Treats the CPU as a device bound by launches inside the context, to count and test what runs on a GPU."""
    global _simulated
    before, _simulated = _simulated, True
    try:
        yield
    finally:
        _simulated = before
