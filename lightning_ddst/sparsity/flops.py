"""Floating-point operations of training, counted while the networks run."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.sparsity.call_log import SIGNATURE, CallLog, Signature, called_networks, get_kind, get_size
from lightning_ddst.sparsity.masked import MaskedNetwork
from lightning_ddst.sparsity.op_counter import OpCounter
from lightning_ddst.sparsity.workloads import ActiveCounts, ActiveSum, Uses, Workload
from lightning_ddst.utils.compilation import is_called_by_compiled, run_eagerly, uncompiled
from lightning_ddst.utils.states import COUNT, FLAG, Form, each, maybe

_MOST_WORKLOADS = 32


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


class TrainingFlops:
    """A sum of the operations of sparse training, and of the same training when dense.

    Training is split into workloads: the work between two steps of optimizers. Cheap hooks recognise equal workloads by
    the networks' calls, so changing numbers of steps, warm-up phases, penalties at every 16th step and other batch
    sizes are counted as they come. The operations of each workload are measured once, when it occurs for the second
    time, and are assumed for every time it occurs. A workload that is not measured yet counts like a measured one
    that differs in sizes only; if there is none, it counts once it is measured. Likewise, one measurement of the
    balance ratio is counted once. Compiled networks run uncompiled while operations are counted. In a compiled training
    step nothing is counted.

    Args:
        networks: The networks.
        optimizers: Optimizers whose steps end a workload; every generator update does, too.
    """

    state_form: ClassVar[Form] = {
        "steps": COUNT,
        "measured": FLAG,
        "updates": ActiveSum.state_form,
        "probes": ActiveSum.state_form,
        "probe": maybe(Uses.state_form),
        "workloads": each(Workload.state_form),
        "since_update": each(COUNT),
        "calls": SIGNATURE,
        "counter": maybe(Uses.state_form),
        "in_compiled": FLAG,
    }
    """The form of `state_dict`."""

    def __init__(self, networks: Iterable[MaskedNetwork], optimizers: Iterable[Optimizer] = ()) -> None:
        self._networks = list(networks)
        self._names = [list(network.masks) for network in self._networks]
        self._log = CallLog()
        for network in self._networks:
            self._log.attach(network.network, network.parameters.values())
        self._handles: list[RemovableHandle] = [each.register_step_post_hook(self._on_step) for each in optimizers]
        self._workloads: dict[Signature, Workload] = {}
        self._since_update: list[Workload] = []
        self._steps = 0
        self._updates, self._probes = ActiveSum(self._names), ActiveSum(self._names)
        self._counts: ActiveCounts = []  # active weights at the last update
        self._measured = False  # whether a whole update was measured
        self._probe: Uses | None = None
        self._probe_counter: OpCounter | None = None
        self._counter: OpCounter | None = None
        self._counting: ExitStack | None = None
        self._overflowed = False
        self._in_compiled = False  # whether optimizers step inside of compiled code

    # ---- results -----------------------------------------------------------------------------------

    @property
    def layers(self) -> list[dict[str, LayerFlops]]:
        """Operations of every weight so far, for each network; empty until an update was measured."""
        if not self._measured:
            return [{} for _ in self._networks]
        self._settle()
        measured = self._find_measured()
        return [
            {name: self._count_layer(number, name, mask, measured) for name, mask in network.masks.items()}
            for number, network in enumerate(self._networks)
        ]

    def _count_layer(
        self, number: int, name: str, mask: Tensor, measured: Iterable[tuple[Workload, Uses]]
    ) -> LayerFlops:
        steps = dense_gradients = dense = probes = Fraction()
        for workload, found in measured:
            uses, size = 2 * found.all[number].get(name, Fraction()), mask.numel()
            steps += uses * workload.steps.active[number][name]
            dense += uses * size * workload.steps.times
            needed = workload.dense_gradients[number]
            inactive = size * needed.times - needed.active[number][name]
            dense_gradients += 2 * found.gradient[number].get(name, Fraction()) * inactive
        if self._probe is not None:
            probes += 2 * self._probe.all[number].get(name, 0) * self._probes.active[number][name]
        return LayerFlops(*map(round, (steps, dense_gradients, probes, dense)))

    @property
    def total(self) -> LayerFlops:
        """Operations of all weights so far; 0 until an update was measured."""
        return LayerFlops.total(layer for layers in self.layers for layer in layers.values())

    @property
    def mean_densities(self) -> list[dict[str, float]]:
        """Mean density of every weight over generator updates, for each network; NaN before the first update."""
        self._settle()
        updates = self._updates.times or float("nan")
        return [
            {name: active[name] / mask.numel() / updates for name, mask in network.masks.items()}
            for network, active in zip(self._networks, self._updates.active, strict=True)
        ]

    @property
    def stage(self) -> tuple[bool, int, int]:
        """Whether an update was measured, and the numbers of workloads and of measured ones, as in `find_uncounted`."""
        measured = [workload.uses is not None for workload in self._workloads.values()]
        return self._measured, len(measured), sum(measured)

    def find_uncounted(self) -> list[list[str]]:
        """Returns the names of weights without operations, for each network; empty while something is not measured.

        A network that was not called yet has none.
        """
        measured = self._find_measured()
        if not self._measured or len(measured) < len(self._workloads):
            return [[] for _ in self._networks]
        called = {number for workload, _ in measured for number in called_networks(workload.signature)}
        return [
            [name for name in names if number in called and not any(uses.all[number].get(name) for _, uses in measured)]
            for number, names in enumerate(self._names)
        ]

    def _settle(self) -> None:
        for sums in [self._updates, self._probes, *(held for w in self._workloads.values() for held in w.sums)]:
            sums.settle(self._counts)

    # ---- training ----------------------------------------------------------------------------------

    @contextmanager
    def probing(self) -> Iterator[bool]:
        """Counts operations inside the context as those of a measurement of the balance ratio, once.

        Yields:
            Whether they are counted this time.
        """
        with ExitStack() as stack:
            stack.enter_context(self._log.paused())
            if self._counter is not None:
                stack.enter_context(self._counter.paused())
            if self._probe is None:
                self._probe_counter = self._probe_counter or self._make_counter()
                stack.enter_context(self._probe_counter.counted())
            yield self._probe is None

    def updated(self, *, probed: bool, dense_gradients: Iterable[bool]) -> None:
        """Adds one generator update with the current masks; call it before they change.

        Args:
            probed: Whether the balance ratio was measured.
            dense_gradients: For each network, whether growth needed the gradients of inactive weights.
        """
        if not self._log.empty or not self._since_update:
            self._end_workload()
        counts = [network.layer_counts for network in self._networks]
        if counts != self._counts:
            self._settle()
            self._counts = counts
        needed = list(dense_gradients)
        for workload in self._since_update:
            workload.steps.add()
            for number, sums in enumerate(workload.dense_gradients):
                sums.add(needed[number])
        self._measured |= all(workload.uses is not None for workload in self._since_update)
        self._since_update.clear()
        self._updates.add()
        self._probes.add(probed)
        if probed and self._probe_counter is not None:
            self._probe, self._probe_counter = self._read(self._probe_counter), None

    @uncompiled
    def _on_step(self, *_: Any) -> None:
        self._in_compiled = self._in_compiled or is_called_by_compiled()
        if not self._log.empty:
            self._end_workload()

    def _end_workload(self) -> None:
        """Ends the current workload, and counts the next one if a new one is expected."""
        signature = self._log.signature
        self._log.clear()
        counter = self._counter
        self._stop_counting()
        again = signature in self._workloads
        workload = self._find_workload(signature)
        workload.occurred(self._steps, again=again)
        if counter is not None and workload.uses is None and workload.signature == signature:
            workload.uses = self._read(counter)
        self._since_update.append(workload)
        self._steps += 1
        self._expect()

    def _expect(self) -> None:
        if self._in_compiled:
            return
        if any(workload.is_expected(self._steps) for workload in self._workloads.values()):
            self._counter = self._make_counter()
            self._start_counting()

    def _find_workload(self, signature: Signature) -> Workload:
        if signature in self._workloads:
            return self._workloads[signature]
        if len(self._workloads) < _MOST_WORKLOADS:
            return self._workloads.setdefault(signature, Workload(signature, self._names))
        if not self._overflowed:
            self._overflowed = True
            warnings.warn(
                f"training operations are estimated: the networks were called in more than {_MOST_WORKLOADS} ways "
                "(sizes of batches, modes, numbers of calls). Others count like the most similar one.",
                stacklevel=2,
            )
        alike = self._sort_similar(signature, self._workloads.values())
        return alike[0] if alike else max(self._workloads.values(), key=lambda each: each.steps.times)

    @staticmethod
    def _sort_similar(signature: Signature, workloads: Iterable[Workload]) -> list[Workload]:
        """Returns the workloads that differ in sizes only, the nearest size first."""
        kind, size = get_kind(signature), get_size(signature)
        alike = [workload for workload in workloads if get_kind(workload.signature) == kind]
        return sorted(alike, key=lambda each: abs(get_size(each.signature) - size))

    def _find_measured(self) -> list[tuple[Workload, Uses]]:
        """Returns the workloads with their operations, or with those of the most similar workload."""
        measured = [each for each in self._workloads.values() if each.uses is not None]
        found = []
        for workload in self._workloads.values():
            similar = [workload] if workload.uses is not None else self._sort_similar(workload.signature, measured)
            if similar and (uses := similar[0].uses) is not None:
                found.append((workload, uses))
        return found

    # ---- counting ----------------------------------------------------------------------------------

    def _make_counter(self) -> OpCounter:
        networks = {str(number): network for number, network in enumerate(self._networks)}

        def is_kept(name: str) -> bool:
            number, _, name = name.partition(".")
            return name in networks[number].kept

        def find_current() -> dict[str, Tensor]:
            return {
                f"{number}.{name}": network.network.get_parameter(name)
                for number, network in networks.items()
                for name in network.masks
            }

        parameters = {f"{n}.{name}": p for n, network in networks.items() for name, p in network.parameters.items()}
        return OpCounter(parameters, is_kept, find_current)

    def _read(self, counter: OpCounter) -> Uses:
        parts = [
            [
                {name: counts[f"{number}.{name}"] for name in names if f"{number}.{name}" in counts}
                for number, names in enumerate(self._names)
            ]
            for counts in (counter.uses, counter.gradient_uses)
        ]
        return Uses(*parts)

    @staticmethod
    def _write(counter: OpCounter, uses: Uses) -> None:
        """Gives a counter the counts that `_read` returned."""
        for counts, networks in ((counter.uses, uses.all), (counter.gradient_uses, uses.gradient)):
            counts.update({f"{n}.{name}": number for n, each in enumerate(networks) for name, number in each.items()})

    def _start_counting(self) -> None:
        assert self._counter is not None
        self._counting = ExitStack()
        for network in self._networks:
            self._counting.enter_context(run_eagerly(network.network))
        self._counting.enter_context(self._counter.counted())

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.close()
        self._counting = self._counter = None

    def pause(self) -> None:
        """Pauses counting, for calls that are not training."""
        self._log.enabled = False
        if self._counting is not None:
            self._counting.close()
            self._counting = None

    def resume(self) -> None:
        """Resumes counting after a pause."""
        self._log.enabled = True
        if self._counter is not None and self._counting is None:
            self._start_counting()

    def stop(self) -> None:
        """Stops counting and removes every hook."""
        self._stop_counting()
        self._probe_counter = None
        self._log.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- saving ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns sums and counts; loads with ``weights_only=True``."""
        self._settle()
        workloads = list(self._workloads.values())
        return {
            "steps": self._steps,
            "measured": self._measured,
            "updates": self._updates.state_dict(),
            "probes": self._probes.state_dict(),
            "probe": None if self._probe is None else self._probe.state_dict(),
            "workloads": [workload.state_dict() for workload in workloads],
            "since_update": [workloads.index(workload) for workload in self._since_update],
            "calls": self._log.signature,
            "counter": None if self._counter is None else self._read(self._counter).state_dict(),
            "in_compiled": self._in_compiled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: If it is of other networks.
        """
        self._stop_counting()
        self._steps, self._measured = state["steps"], state["measured"]
        self._updates.load_state_dict(state["updates"])
        self._probes.load_state_dict(state["probes"])
        self._probe = None if state["probe"] is None else Uses.from_state(state["probe"], self._names)
        workloads = [Workload.from_state(saved, self._names) for saved in state["workloads"]]
        self._workloads = {workload.signature: workload for workload in workloads}
        self._since_update = [workloads[index] for index in state["since_update"]]
        self._log.signature, self._in_compiled = state["calls"], state["in_compiled"]
        if state["counter"] is not None:
            self._counter = self._make_counter()
            self._write(self._counter, Uses.from_state(state["counter"], self._names))
            self._start_counting()
