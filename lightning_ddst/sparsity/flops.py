"""Floating-point operations of training, counted while the networks run."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.maskable import TRANSPOSED_LAYERS, MaskableWeight, channel_dim
from lightning_ddst.sparsity.masked import MaskedNetwork
from lightning_ddst.utils.compilation import run_eagerly, uncompiled
from lightning_ddst.utils.modules import remove_hooks
from lightning_ddst.utils.states import COUNT, FLAG, Form, maybe, named

_SUMS = ("step", "probe", "gradient")
"""The kinds of operations that are summed over updates."""


class OpCounter:
    """A counter of how often training uses each maskable weight of a network.

    This number times the number of active weights times 2 (a multiplication and an addition) is the number of
    floating-point operations, for any density. The counter observes what runs: forward passes, and the gradients of
    inputs and weights when a backward pass reaches a layer. It does not count biases, norms, activations, and the
    second backward pass of a gradient penalty.

    Args:
        weights: The weights whose layers are observed.

    Attributes:
        uses: Multiplications per weight by name, forward and backward.
        gradient_uses: The part of `uses` that computed the weight's gradient.
    """

    state_form: ClassVar[Form] = {"uses": named(COUNT), "gradient_uses": named(COUNT)}
    """The form of `state_dict`."""

    def __init__(self, weights: Iterable[MaskableWeight]) -> None:
        self.uses: dict[str, int] = defaultdict(int)
        self.gradient_uses: dict[str, int] = defaultdict(int)
        self._weights = list(weights)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the layers' operations inside the context."""
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
        # The actual number of channels: `StructuredForward` leaves out inactive ones.
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
        """Returns the counts; loads with ``weights_only=True``."""
        return {"uses": dict(self.uses), "gradient_uses": dict(self.gradient_uses)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Restores the state returned by `state_dict`."""
        self.uses.update(state["uses"])
        self.gradient_uses.update(state["gradient_uses"])

    def subtract(self, part: "OpCounter") -> None:
        """Subtracts another counter's uses, which were also counted here."""
        for name, number in part.uses.items():
            self.uses[name] -= number


@dataclass(frozen=True)
class LayerFlops:
    """Floating-point operations of one weight in training, or of several weights together.

    Attributes:
        steps: Operations of active entries, in forward and backward passes.
        dense_gradients: Operations of the gradients of inactive entries, when growth needed them.
        probes: Operations of measuring the balance ratio.
        dense: Operations of the same training, dense and without measuring.
    """

    steps: int = 0
    dense_gradients: int = 0
    probes: int = 0
    dense: int = 0

    @property
    def sparse(self) -> int:
        """All operations of sparse training."""
        return self.steps + self.dense_gradients + self.probes

    @property
    def ratio(self) -> float:
        """The operations of sparse training relative to dense training; NaN for a layer without operations."""
        return self.sparse / self.dense if self.dense else float("nan")

    @classmethod
    def total(cls, layers: Iterable["LayerFlops"]) -> "LayerFlops":
        """Returns the sum over layers."""
        return cls(*(sum(parts) for parts in zip(*(astuple(layer) for layer in (cls(), *layers)), strict=True)))


class _Tally:
    """Sums over updates of one network's weights that were used in steps, in probes and in dense gradients."""

    state_form: ClassVar[Form] = {
        "step": maybe(OpCounter.state_form),
        "probe": OpCounter.state_form,
        "sums": dict.fromkeys(_SUMS, named(COUNT)),
    }

    def __init__(self, network: MaskedNetwork) -> None:
        self.step = OpCounter(network.weights.values())
        self.probe = OpCounter(network.weights.values())
        self.masked = network
        self._sums = {kind: dict.fromkeys(network.weights, 0) for kind in _SUMS}

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
        if any(sums.keys() != self.masked.weights.keys() for sums in state["sums"].values()):
            raise ValueError(
                f"the saved operations are another network's: this one has {', '.join(self.masked.weights)}."
            )
        if state["step"] is not None:
            self.step.load_state_dict(state["step"])
        self.probe.load_state_dict(state["probe"])
        self._sums = {kind: dict(values) for kind, values in state["sums"].items()}


class TrainingFlops:
    """A sum of the operations of sparse training, and of the same training when dense.

    The work of one step is counted once, between the ends of two generator updates, and assumed for every step.
    Likewise, one measurement of the balance ratio is counted once. Compiled networks run uncompiled during that
    update, because compiled calls bypass the hooks of layers.

    Args:
        networks: The networks.
    """

    state_form: ClassVar[Form] = {
        "updates": COUNT,
        "measured": (FLAG, FLAG),
        "tallies": (_Tally.state_form, _Tally.state_form),
    }
    """The form of `state_dict`."""

    def __init__(self, networks: Iterable[MaskedNetwork]) -> None:
        self._tallies = [_Tally(network) for network in networks]
        self._updates = 0
        self._measured = self._probe_measured = self._paused = False
        self._measuring: ExitStack | None = None

    @property
    def layers(self) -> list[dict[str, LayerFlops]]:
        """Operations of every weight so far, for each network; empty before the second update."""
        return [tally.layers(self._updates) if self._measured else {} for tally in self._tallies]

    @property
    def total(self) -> LayerFlops:
        """Operations of all weights so far; 0 before the second update."""
        return LayerFlops.total(layer for layers in self.layers for layer in layers.values())

    @property
    def mean_densities(self) -> list[dict[str, float]]:
        """Mean density of every weight over generator updates, for each network; NaN before the first update."""
        return [tally.mean_densities(self._updates) for tally in self._tallies]

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Counts operations inside the context as those of a measurement of the balance ratio."""
        with ExitStack() as stack:
            if not self._probe_measured:
                for tally in self._tallies:
                    stack.enter_context(tally.probe.counted())
            yield

    def updated(self, *, probed: bool, dense_gradients: Iterable[bool]) -> None:
        """Adds one generator update with the current masks; call it before they change.

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
            if probed:  # the step's count includes the probe's calls
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
        """Pauses counting, for calls that are not training."""
        self._paused = self._measuring is not None
        self.stop()

    def resume(self) -> None:
        """Resumes counting after a pause."""
        if self._paused:
            self._paused = False
            self._count()

    def stop(self) -> None:
        """Stops counting and removes every hook."""
        if self._measuring is not None:
            self._measuring.close()
            self._measuring = None

    def state_dict(self) -> dict[str, Any]:
        """Returns sums and counts; loads with ``weights_only=True``."""
        return {
            "updates": self._updates,
            "measured": [self._measured, self._probe_measured],
            "tallies": [tally.state_dict(self._measured) for tally in self._tallies],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: If it is of other networks, or its parts do not fit together.
        """
        if any((tally["step"] is not None) != state["measured"][0] for tally in state["tallies"]):
            raise ValueError(f"flops.measured={list(state['measured'])} must be whether tallies.step is there.")
        self._updates = state["updates"]
        self._measured, self._probe_measured = state["measured"]
        for tally, saved in zip(self._tallies, state["tallies"], strict=True):
            tally.load_state_dict(saved)
