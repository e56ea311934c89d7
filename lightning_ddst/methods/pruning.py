"""Pruning dense networks by magnitude, once or in rounds: the baselines of sparse training."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ddst.sparsity.sharding import copy_like, full_tensor

_POST_HOC_AT = 2 / 3
"""Share of the run after which weights are pruned: fine-tuning takes half as long as training (DDST)."""
_ROUND_KEEPS = 0.8
"""Share of the active weights that a round of iterative pruning keeps (Frankle and Carbin 2019; Chen et al. 2021)."""


@dataclass(frozen=True)
class MagnitudePruning:
    """When networks that are dense at first are pruned by magnitude, and to what.

    Args:
        rounds: Number of prunings, spread over the run.
        first: Share of the run at which the first one is due; the others follow at the same distance.
        keeps: Share of the weights that a round keeps, until a network is at its density.
        rewinds: Whether training goes back to the initial weights after every round.
    """

    rounds: int
    first: float
    keeps: float
    rewinds: bool

    @classmethod
    def post_hoc(cls) -> "MagnitudePruning":
        """Once, to the density itself, after two thirds of the run; the rest of it is fine-tuning."""
        return cls(1, _POST_HOC_AT, 0.0, rewinds=False)

    @classmethod
    def iterative(cls, density: float) -> "MagnitudePruning":
        """Lottery tickets: a fifth of what is left in every round, and back to the initial weights.

        The run is divided evenly: one part for every round, and one for the ticket.

        Args:
            density: The lowest density aimed at, in (0, 1].
        """
        rounds = math.ceil(math.log(density) / math.log(_ROUND_KEEPS) - 1e-9)
        return cls(rounds, 1 / (rounds + 1), _ROUND_KEEPS, rewinds=True)

    def round_at(self, update: int, length: int) -> int | None:
        """The round that is due at a generator update of a run of that length, from 1; None where none is."""
        due = [number for number in range(1, self.rounds + 1) if round(length * self.first * number) == update]
        return due[-1] if due else None

    def density(self, number: int, target: float) -> float:
        """A network's density after a round, on the way to its target."""
        return max(target, self.keeps**number)


class InitialWeights:
    """The values that networks had when this was made, for training to begin again from them.

    Args:
        networks: The networks.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._networks = list(networks)
        self._values = [{name: value.clone() for name, value in _values(network).items()} for network in self._networks]

    @torch.no_grad()
    def restore(self, optimizers: Iterable[Optimizer]) -> None:
        """Gives the networks these values, and optimizers of their parameters fresh state."""
        optimizers = list(optimizers)
        for network, values in zip(self._networks, self._values, strict=True):
            for name, value in _values(network).items():
                value.copy_(values[name])
            for parameter in network.parameters():
                for optimizer in optimizers:
                    optimizer.state.pop(parameter, None)

    def state_dict(self) -> list[dict[str, Tensor]]:
        """The values; loads with ``weights_only=True``."""
        return [{name: full_tensor(value).clone() for name, value in values.items()} for values in self._values]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Takes over what `state_dict` gave."""
        for values, saved in zip(self._values, state, strict=True):
            for name, value in saved.items():
                values[name] = copy_like(value, values[name])


def _values(network: nn.Module) -> dict[str, Tensor]:
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: value.data for name, value in named}
