"""Floating-point operations of training, counted as the networks run."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.maskable import TRANSPOSED_LAYERS, MaskableWeight, channel_dim
from lightning_ddst.sparsity.masked import MaskedNetwork
from lightning_ddst.utils.compilation import run_eagerly, uncompiled
from lightning_ddst.utils.modules import remove_hooks


class OpCounter:
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
        handles = [
            layer.register_forward_hook(partial(self._forward, weight), with_kwargs=True)
            for weight in self._weights
            for layer in weight.layers.values()
        ]
        with remove_hooks(handles):
            yield

    @uncompiled
    def _forward(
        self, weight: MaskableWeight, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        images: Tensor = args[0] if args else kwargs["input"]
        # A weight is used once per output position; in a transposed convolution, per input position.
        maps = images if isinstance(layer, TRANSPOSED_LAYERS) else output
        # Channels as there are: inactive ones may have been left out (`StructuredForward`).
        positions = maps.numel() // maps.shape[channel_dim(layer)]
        self.uses[weight.name] += positions
        if output.requires_grad and torch.is_grad_enabled():
            trains, input_trains = weight.parameter.requires_grad, images.requires_grad
            output.register_hook(lambda _: self._backward(weight.name, positions, trains, input_trains))

    @uncompiled
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

    def subtract(self, part: "OpCounter") -> None:
        """Takes away what was counted here but belongs to something else."""
        for name, number in part.uses.items():
            self.uses[name] -= number


@dataclass(frozen=True)
class LayerFlops:
    """Floating-point operations of one weight in training, or of several together.

    Attributes:
        steps: Of its active entries, in forward and backward passes.
        dense_gradients: Of the gradients of inactive entries, where growth needed them.
        probes: Of measuring the balance ratio.
        dense: Of the same training, dense and without probes.
    """

    steps: int = 0
    dense_gradients: int = 0
    probes: int = 0
    dense: int = 0

    @property
    def sparse(self) -> int:
        """All but `dense`."""
        return self.steps + self.dense_gradients + self.probes

    @property
    def ratio(self) -> float:
        """The sparse operations relative to dense training; NaN for a layer that does nothing."""
        return self.sparse / self.dense if self.dense else float("nan")

    @classmethod
    def total(cls, layers: Iterable["LayerFlops"]) -> "LayerFlops":
        """The sum over layers."""
        return cls(*(sum(parts) for parts in zip(*(astuple(layer) for layer in (cls(), *layers)), strict=True)))


class TrainingFlops:
    """Adds up the operations of training networks together, and of the same training when dense.

    The work of one step is measured once, between the end of two generator updates, and taken for
    every step; so is that of one measurement of the balance ratio. Networks that are compiled run
    uncompiled in that update, since compiled calls pass by the hooks of layers.

    Args:
        networks: The networks.
    """

    def __init__(self, networks: Iterable[MaskedNetwork]) -> None:
        self._tallies = [_Tally(network) for network in networks]
        self._updates = 0
        self._measured = self._probe_measured = self._paused = False
        self._measuring: ExitStack | None = None

    @property
    def layers(self) -> list[dict[str, LayerFlops]]:
        """For each network, the operations of every weight so far; empty before the second update."""
        return [tally.layers(self._updates) if self._measured else {} for tally in self._tallies]

    @property
    def total(self) -> LayerFlops:
        """The operations of all weights so far; 0 before the second update."""
        return LayerFlops.total(layer for layers in self.layers for layer in layers.values())

    @property
    def mean_densities(self) -> list[dict[str, float]]:
        """For each network, the density of every weight, averaged over generator updates; NaN before the first."""
        return [tally.mean_densities(self._updates) for tally in self._tallies]

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Around whatever belongs to a measurement of the balance ratio."""
        with ExitStack() as stack:
            if not self._probe_measured:
                for tally in self._tallies:
                    stack.enter_context(tally.probe.counted())
            yield

    def updated(self, *, probed: bool, dense_gradients: Iterable[bool]) -> None:
        """Adds one generator update at the present masks; call it before they change.

        Args:
            probed: Whether the balance ratio was measured.
            dense_gradients: For each network, whether growth needed the gradients of inactive weights.
        """
        self._updates += 1
        self._probe_measured |= probed
        for tally, needed in zip(self._tallies, dense_gradients, strict=True):
            tally.add(probed, needed)
        if self._measuring is not None:
            self.stop()
            self._measured = True
            if probed:  # its calls were counted with the step's
                for tally in self._tallies:
                    tally.step.subtract(tally.probe)
        elif not self._measured:
            self._count()

    def _count(self) -> None:
        self._measuring = ExitStack()
        for tally in self._tallies:
            self._measuring.enter_context(run_eagerly(tally.masked.network))
            self._measuring.enter_context(tally.step.counted())

    def pause(self) -> None:
        """Stops counting for something that is no training."""
        self._paused = self._measuring is not None
        self.stop()

    def resume(self) -> None:
        """Goes on counting after a pause."""
        if self._paused:
            self._paused = False
            self._count()

    def stop(self) -> None:
        """Leaves no hook behind."""
        if self._measuring is not None:
            self._measuring.close()
            self._measuring = None

    def state_dict(self) -> dict[str, Any]:
        """Sums and workloads; loads with ``weights_only=True``."""
        return {
            "updates": self._updates,
            "measured": [self._measured, self._probe_measured],
            "tallies": [tally.state_dict(self._measured) for tally in self._tallies],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._updates = state["updates"]
        self._measured, self._probe_measured = state["measured"]
        for tally, saved in zip(self._tallies, state["tallies"], strict=True):
            tally.load_state_dict(saved)


class _Tally:
    """One network's sums over updates, in weights: how many were used in steps, in probes and in dense gradients."""

    def __init__(self, network: MaskedNetwork) -> None:
        self.step = OpCounter(network.weights.values())
        self.probe = OpCounter(network.weights.values())
        self.masked = network
        self._sums = {kind: dict.fromkeys(network.weights, 0) for kind in ("step", "probe", "gradient")}

    def add(self, probed: bool, dense_gradients: bool) -> None:
        for name, active in self.masked.layer_counts.items():
            self._sums["step"][name] += active
            self._sums["probe"][name] += active * probed
            self._sums["gradient"][name] += (self.masked.masks[name].numel() - active) * dense_gradients

    def layers(self, updates: int) -> dict[str, LayerFlops]:
        steps, probes = self.step.uses, self.probe.uses
        return {
            name: LayerFlops(
                steps=2 * steps.get(name, 0) * self._sums["step"][name],
                dense_gradients=2 * self.step.gradient_uses.get(name, 0) * self._sums["gradient"][name],
                probes=2 * probes.get(name, 0) * self._sums["probe"][name],
                dense=2 * steps.get(name, 0) * mask.numel() * updates,
            )
            for name, mask in self.masked.masks.items()
        }

    def mean_densities(self, updates: int) -> dict[str, float]:
        sizes = {name: mask.numel() for name, mask in self.masked.masks.items()}
        return {name: total / sizes[name] / (updates or float("nan")) for name, total in self._sums["step"].items()}

    def state_dict(self, measured: bool) -> dict[str, Any]:
        step = self.step.state_dict() if measured else None
        sums = {kind: dict(values) for kind, values in self._sums.items()}
        return {"step": step, "probe": self.probe.state_dict(), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["step"] is not None:
            self.step.load_state_dict(state["step"])
        self.probe.load_state_dict(state["probe"])
        self._sums = {kind: dict(values) for kind, values in state["sums"].items()}
