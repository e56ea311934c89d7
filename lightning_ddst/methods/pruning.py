"""Pruning dense networks by magnitude, once or in rounds: the baselines of sparse training."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ddst.balance import Decision
from lightning_ddst.methods.base import MaskUpdate, Method, Role, training_method
from lightning_ddst.methods.intervals import Plan
from lightning_ddst.methods.training import SparseTraining
from lightning_ddst.sparsity.sharding import copy_like, full_tensor
from lightning_ddst.utils.states import COUNT, TENSOR, check_state, check_tensors, maybe, named

_POST_HOC_AT = 2 / 3
"""Share of the run after which weights are pruned: fine-tuning takes half as long as training (DDST)."""
_ROUND_KEEPS = 0.8
"""Share of the active weights that a round of iterative pruning keeps (Frankle and Carbin 2019; Chen et al. 2021)."""


@dataclass(frozen=True)
class MagnitudePruning:
    """The times and densities of pruning dense networks by magnitude.

    Args:
        rounds: Number of rounds of pruning, spread over the run.
        first: Share of the run at which the first round is due; the others follow at equal intervals.
        keeps: Share of the active weights that a round keeps, until a network reaches its density.
        rewinds: Whether every round restores the initial weights.
    """

    rounds: int
    first: float
    keeps: float
    rewinds: bool

    @classmethod
    def post_hoc(cls) -> "MagnitudePruning":
        """Makes a plan of one pruning to the final density after two thirds of the run; the rest is fine-tuning."""
        return cls(1, _POST_HOC_AT, 0.0, rewinds=False)

    @classmethod
    def iterative(cls, density: float) -> "MagnitudePruning":
        """Makes a plan of rounds that prune a fifth of the weights and restore the initial weights (lottery tickets).

        The run is divided evenly: one part for every round, and one for training the final ticket.

        Args:
            density: The lowest target density, in (0, 1].
        """
        rounds = math.ceil(math.log(density) / math.log(_ROUND_KEEPS) - 1e-9)
        return cls(rounds, 1 / (rounds + 1), _ROUND_KEEPS, rewinds=True)

    def rounds_until(self, update: int, length: int) -> int:
        """Returns the number of rounds up to a generator update in a run of this length."""
        return sum(self.time_of(number, length) <= update for number in range(1, self.rounds + 1))

    def time_of(self, number: int, length: int) -> int:
        """Returns the generator update at which a round is due, from round 1, in a run of this length."""
        return round(length * self.first * number)

    def density(self, number: int, target: float) -> float:
        """Returns a network's density after a round, on the way to its target."""
        return max(target, self.keeps**number)


class InitialWeights:
    """Copies of networks' values, from which training can restart.

    Args:
        networks: The networks.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._networks = list(networks)
        self._values = [{name: value.clone() for name, value in _values(network).items()} for network in self._networks]

    @torch.no_grad()
    def restore(self, optimizers: Iterable[Optimizer]) -> None:
        """Restores the networks' values, and resets the optimizer state of their parameters."""
        optimizers = list(optimizers)
        for network, values in zip(self._networks, self._values, strict=True):
            for name, value in _values(network).items():
                value.copy_(values[name])
            for parameter in network.parameters():
                for optimizer in optimizers:
                    optimizer.state.pop(parameter, None)

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Returns the values; loads with ``weights_only=True``."""
        return [{name: full_tensor(value).clone() for name, value in values.items()} for values in self._values]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: If it has values of other networks.
        """
        for values, saved in zip(self._values, state, strict=True):
            check_tensors("the saved initial weights", saved, values)
        for values, saved in zip(self._values, state, strict=True):
            for name, value in saved.items():
                values[name] = copy_like(value, values[name])


def _values(network: nn.Module) -> dict[str, Tensor]:
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: value.data for name, value in named}


class PruneByMagnitude(MaskUpdate):
    """A mask update that prunes both networks by magnitude, on the way to their final densities.

    Args:
        pruning: The times and densities of pruning.
        targets: The final densities.
    """

    grows: ClassVar[bool] = False

    def __init__(self, pruning: MagnitudePruning, targets: Mapping[Role, float]) -> None:
        self._pruning = pruning
        self._targets = dict(targets)
        self._initial: InitialWeights | None = None
        self._done = 0

    def begin(self, training: SparseTraining) -> None:
        """Copies the initial weights if the method restores them."""
        if self._pruning.rewinds:
            self._initial = InitialWeights(training.network(role).network for role in self.roles)

    def due(self, update: int, plan: Plan) -> bool:
        """Returns whether a round of pruning is due."""
        return plan.updates is not None and self._pruning.rounds_until(update, plan.updates) > self._done

    def describe_plan(self, plan: Plan) -> str:
        """Returns the number of rounds and their times."""
        if plan.updates is None or not self._pruning.rounds:
            return ""
        first, last = (self._pruning.time_of(number, plan.updates) for number in (1, self._pruning.rounds))
        if first == last:
            return f"pruning by magnitude at update {first:,}"
        return f"{self._pruning.rounds} rounds of pruning by magnitude, at updates {first:,} to {last:,}"

    def apply(self, training: SparseTraining) -> bool:
        """Prunes, and restores the initial weights if the method does."""
        assert training.plan.updates is not None
        self._done = number = self._pruning.rounds_until(training.updates, training.plan.updates)
        for role, target in self._targets.items():
            training.network(role).resize(self._pruning.density(number, target))
        generator, discriminator = (training.network(role) for role in self.roles)
        reason = f"round {number} of {self._pruning.rounds}: pruned by magnitude, the generator to "
        reason += f"{generator.density:.4g}, the discriminator to {discriminator.density:.4g}"
        if self._initial is not None:
            self._initial.restore(training.optimizers)
            for role in self.roles:
                training.network(role).apply_masks()
            training.rewinds += 1
            reason += ", and back to the initial weights"
        training.decisions.append((training.updates, Decision("prune", discriminator.target, reason)))
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of rounds so far, and the initial weights if the method restores them."""
        return {"done": self._done, "initial": None if self._initial is None else self._initial.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: For another form of state.
        """
        values = (named(TENSOR), named(TENSOR))
        initial = values if self._pruning.rewinds else maybe(values)
        check_state(type(self).__name__, state, {"done": COUNT, "initial": initial})
        self._done = state["done"]
        if self._initial is not None:
            self._initial.load_state_dict(state["initial"])


@training_method("posthoc")
@dataclass(frozen=True, kw_only=True)
class PostHoc(Method):
    """Dense training for two thirds of the run, one pruning by magnitude, and fine-tuning (the baseline of DDST).

    Args:
        discriminator_density: The discriminator's final density; by default it stays dense.
    """

    starts_dense: ClassVar[bool] = True
    needs_run_length: ClassVar[bool] = True

    @property
    def final_densities(self) -> dict[Role, float]:
        """The final densities; the discriminator's is 1 by default."""
        discriminator = self.discriminator_density
        return {
            "generator": self.generator_density,
            "discriminator": 1.0 if discriminator is None else discriminator,
        }

    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns the pruning."""
        return (PruneByMagnitude(MagnitudePruning.post_hoc(), self.final_densities),)


@training_method("imp")
@dataclass(frozen=True, kw_only=True)
class IMP(Method):
    """Iterative magnitude pruning: rounds that prune a fifth of the active weights and restore the initial weights.

    Lottery tickets: Frankle and Carbin 2019; in GANs, Chen et al. 2021.
    """

    starts_dense: ClassVar[bool] = True
    needs_run_length: ClassVar[bool] = True

    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns the rounds of pruning."""
        targets = self.final_densities
        return (PruneByMagnitude(MagnitudePruning.iterative(min(targets.values())), targets),)
