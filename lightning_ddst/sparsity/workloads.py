"""Workloads of training: kinds of work that recur, and how often and with how many active weights they did."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from lightning_ddst.sparsity.call_log import SIGNATURE, Signature
from lightning_ddst.utils.states import COUNT, POSITIVE, Form, each, maybe, named

PATIENCE = 64
"""Steps after a new workload in which it is expected again."""

ActiveCounts = Sequence[Mapping[str, int]]
"""Active weights by name, for each network."""


class ActiveSum:
    """A sum of active weights over occurrences.

    Occurrences are added up first and multiplied when the masks change, so that most updates add one number.

    Args:
        names: The names of weights, for each network.

    Attributes:
        times: The number of occurrences.
        active: The sum of active weights by name, for each network, of occurrences before `settle`.
    """

    state_form: ClassVar[Form] = {"times": COUNT, "active": each(named(COUNT))}
    """The form of `state_dict`."""

    def __init__(self, names: Iterable[Iterable[str]]) -> None:
        self.times = 0
        self.active = [dict.fromkeys(weights, 0) for weights in names]
        self._pending = 0

    def add(self, times: int = 1) -> None:
        """Adds occurrences."""
        self.times += times
        self._pending += times

    def settle(self, counts: ActiveCounts) -> None:
        """Sums up the occurrences since the last call, which had these numbers of active weights."""
        if self._pending:
            for sums, active in zip(self.active, counts, strict=True):
                for name, number in active.items():
                    sums[name] += number * self._pending
            self._pending = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums after `settle`; loads with ``weights_only=True``."""
        return {"times": self.times, "active": [dict(sums) for sums in self.active]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: If it has sums of other weights.
        """
        if [sums.keys() for sums in state["active"]] != [sums.keys() for sums in self.active]:
            raise ValueError("the saved sums of operations are of other weights.")
        self.times, self._pending = state["times"], 0
        self.active = [dict(sums) for sums in state["active"]]


@dataclass(frozen=True)
class Uses:
    """Measured multiplications per weight.

    Attributes:
        all: Forward and backward, by name and for each network.
        gradient: The part that computed the weight's gradient.
    """

    all: Sequence[Mapping[str, Fraction]]
    gradient: Sequence[Mapping[str, Fraction]]

    state_form: ClassVar[Form] = dict.fromkeys(("all", "gradient"), each(named((COUNT, POSITIVE))))
    """The form of `state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the numbers as pairs of int; loads with ``weights_only=True``."""
        return {
            part: [{name: list(number.as_integer_ratio()) for name, number in uses.items()} for uses in networks]
            for part, networks in (("all", self.all), ("gradient", self.gradient))
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], names: Sequence[Iterable[str]]) -> "Uses":
        """Returns the numbers that `state_dict` returned.

        Args:
            state: The state.
            names: The names of weights, for each network.

        Raises:
            ValueError: If the state has numbers of other weights.
        """
        parts = []
        for part in ("all", "gradient"):
            if len(state[part]) != len(names) or any(set(u) - set(n) for u, n in zip(state[part], names, strict=True)):
                raise ValueError("the saved numbers of operations are of other weights.")
            parts.append([{name: Fraction(*number) for name, number in uses.items()} for uses in state[part]])
        return cls(*parts)


class Workload:
    """Work between two steps of optimizers that has a certain signature.

    Args:
        signature: The calls of the networks.
        names: The names of weights, for each network.

    Attributes:
        signature: The calls of the networks.
        steps: Active weights over all occurrences.
        dense_gradients: The same over occurrences in updates whose dense gradients were needed, for each network.
        uses: The measured operations; None if they were not measured yet.
    """

    state_form: ClassVar[Form] = {
        "signature": SIGNATURE,
        "sums": each(ActiveSum.state_form),
        "uses": maybe(Uses.state_form),
        "last": COUNT,
        "gap": maybe(COUNT),
    }
    """The form of `state_dict`."""

    def __init__(self, signature: Signature, names: Sequence[Iterable[str]]) -> None:
        self.signature = signature
        self.steps = ActiveSum(names)
        self.dense_gradients = [ActiveSum(names) for _ in names]
        self.uses: Uses | None = None
        self._last = 0  # step of the last occurrence
        self._gap: int | None = None  # steps between the last two

    def occurred(self, step: int, *, again: bool) -> None:
        """Notes an occurrence at a step; `again` if it is not the first one."""
        self._gap = step - self._last if again else None
        self._last = step

    def is_expected(self, step: int) -> bool:
        """Returns whether the workload is to be measured, and may occur at a step."""
        if self.uses is not None:
            return False
        return step <= self._last + PATIENCE if self._gap is None else step == self._last + self._gap

    @property
    def sums(self) -> list[ActiveSum]:
        """All sums."""
        return [self.steps, *self.dense_gradients]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state after all sums were settled; loads with ``weights_only=True``."""
        return {
            "signature": self.signature,
            "sums": [sums.state_dict() for sums in self.sums],
            "uses": None if self.uses is None else self.uses.state_dict(),
            "last": self._last,
            "gap": self._gap,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], names: Sequence[Iterable[str]]) -> "Workload":
        """Returns the workload whose state `state_dict` returned."""
        workload = cls(state["signature"], names)
        for sums, saved in zip(workload.sums, state["sums"], strict=True):
            sums.load_state_dict(saved)
        workload.uses = None if state["uses"] is None else Uses.from_state(state["uses"], names)
        workload._last, workload._gap = state["last"], state["gap"]
        return workload
