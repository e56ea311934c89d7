"""Floating-point operations of training, counted as the networks run."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.maskable import MaskableWeight
from lightning_ddst.sparsity.network import SparseNetwork

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Uses = Mapping[str, int]


class Workload:
    """How often each maskable weight of a network is multiplied in a piece of training.

    Multiplied by the number of active weights and by 2 (a multiplication and an addition) this
    gives floating-point operations, for any density. Biases, norms and activations are not
    counted. What is counted is what ran: forward passes as they happen, and the gradients of
    inputs and weights as backward passes reach a layer. (The second backward pass of a gradient
    penalty is not.)

    Args:
        weights: The weights whose layers are watched.

    Attributes:
        uses: Multiplications per weight by name, forward and backward.
        gradient_uses: The part of them in which the weight's gradient was computed.
    """

    def __init__(self, weights: Iterable[MaskableWeight]) -> None:
        self.uses: dict[str, int] = defaultdict(int)
        self.gradient_uses: dict[str, int] = defaultdict(int)
        self._weights = list(weights)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Adds what the layers do inside the context."""
        handles = [weight.layer.register_forward_hook(partial(self._forward, weight)) for weight in self._weights]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, weight: MaskableWeight, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # A weight is used once per output position; in a transposed convolution, per input position.
        if isinstance(layer, _TRANSPOSED):
            positions = args[0].numel() // layer.in_channels
        elif isinstance(layer, nn.Linear):
            positions = output.numel() // layer.out_features
        else:
            positions = output.numel() // cast(int, layer.out_channels)
        self.uses[weight.name] += positions
        if output.requires_grad and torch.is_grad_enabled():
            trains, input_trains = weight.parameter.requires_grad, args[0].requires_grad
            output.register_hook(lambda _: self._backward(weight.name, positions, trains, input_trains))

    def _backward(self, name: str, positions: int, trains: bool, input_trains: bool) -> None:
        self.uses[name] += positions * (trains + input_trains)
        self.gradient_uses[name] += positions * trains

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The counts; loads with ``weights_only=True``."""
        return {"uses": dict(self.uses), "gradient_uses": dict(self.gradient_uses)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Takes over what `state_dict` gave."""
        self.uses.update(state["uses"])
        self.gradient_uses.update(state["gradient_uses"])

    def subtract(self, part: "Workload") -> None:
        """Takes away what was counted here but belongs to something else."""
        for name, number in part.uses.items():
            self.uses[name] -= number


def flops(uses: Uses, counts: Mapping[str, int]) -> int:
    """Floating-point operations if each weight has that many active entries."""
    return sum(2 * counts[name] * number for name, number in uses.items())


class TrainingFlops:
    """Adds up the operations of training networks together, and of the same training when dense.

    The work of one step is measured once, between the end of two generator updates, and taken for
    every step; so is that of one measurement of the balance ratio.

    Args:
        networks: The networks.

    Attributes:
        total: Operations so far: of active weights, and of dense gradients and probes where there were any.
        dense: Operations of the same training, dense and without probes.
    """

    def __init__(self, networks: Iterable[SparseNetwork]) -> None:
        self.total = 0
        self.dense = 0
        self._networks = list(networks)
        self._steps = [Workload(network.weights.values()) for network in self._networks]
        self._probes = [Workload(network.weights.values()) for network in self._networks]
        self._measured = self._probe_measured = False
        # Updates that were not added yet, those of them with a probe, and with dense gradients, by network.
        self._waiting = self._probes_waiting = 0
        self._gradients_waiting = [0 for _ in self._networks]
        self._measuring: ExitStack | None = None

    @property
    def ratio(self) -> float | None:
        """Operations relative to dense training; None before the second update."""
        return self.total / self.dense if self.dense else None

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Around whatever belongs to a measurement of the balance ratio."""
        with ExitStack() as stack:
            if not self._probe_measured:
                for workload in self._probes:
                    stack.enter_context(workload.counted())
            yield

    def updated(self, *, probed: bool, dense_gradients: Iterable[bool]) -> None:
        """Adds one generator update at the present masks; call it before they change.

        Args:
            probed: Whether the balance ratio was measured.
            dense_gradients: For each network, whether growth needed the gradients of inactive weights.
        """
        self._probe_measured |= probed
        self._waiting += 1
        self._probes_waiting += probed
        self._gradients_waiting = [
            n + needed for n, needed in zip(self._gradients_waiting, dense_gradients, strict=True)
        ]
        if not self._measured:
            if self._measuring is None:
                self._measuring = ExitStack()
                for workload in self._steps:
                    self._measuring.enter_context(workload.counted())
                return
            self.stop()
            if probed:  # its calls were counted with the step's
                for step, probe in zip(self._steps, self._probes, strict=True):
                    step.subtract(probe)
            self._measured = True
        self._add_waiting()

    def stop(self) -> None:
        """Leaves no hook behind."""
        if self._measuring is not None:
            self._measuring.close()
            self._measuring = None

    def state_dict(self) -> dict[str, Any]:
        """Sums and workloads; loads with ``weights_only=True``."""
        sums = {name: getattr(self, name) for name in self._SUMS}
        return {**sums, "workloads": [workload.state_dict() for workload in self._steps + self._probes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        for name in self._SUMS:
            setattr(self, name, state[name])
        if self._measured:
            for workload, saved in zip(self._steps + self._probes, state["workloads"], strict=True):
                workload.load_state_dict(saved)

    _SUMS = ("total", "dense", "_measured", "_probe_measured", "_waiting", "_probes_waiting", "_gradients_waiting")

    def _add_waiting(self) -> None:
        for network, step, probe, gradients in zip(
            self._networks, self._steps, self._probes, self._gradients_waiting, strict=True
        ):
            active = network.layer_counts
            every = {name: mask.numel() for name, mask in network.masks.items()}
            inactive = {name: every[name] - active[name] for name in every}
            self.dense += self._waiting * flops(step.uses, every)
            self.total += self._waiting * flops(step.uses, active)
            self.total += self._probes_waiting * flops(probe.uses, active)
            self.total += gradients * flops(step.gradient_uses, inactive)
        self._waiting = self._probes_waiting = 0
        self._gradients_waiting = [0 for _ in self._networks]
