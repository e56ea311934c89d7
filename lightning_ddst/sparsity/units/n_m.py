"""Masks with N active weights in every M consecutive ones, such as 2:4."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_ddst.sparsity.growth import GROWTH_RULES
from lightning_ddst.sparsity.maskable import TRANSPOSED_LAYERS, MaskableWeight
from lightning_ddst.sparsity.units.base import ByTensor, Initial, Options, Units

_TOLERANCE = 1e-3
"""Tolerance of a density: 0.333 is accepted for 1:3."""


class NMUnits(Units):
    """Single weights with exactly N active ones in every group of M consecutive inputs.

    A group holds the weights by which one output (at one position of a kernel) reads M consecutive inputs. This is the
    layout of NVIDIA's sparse tensor cores for 2:4 (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"),
    and of SR-STE (Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch").
    Layers whose number of inputs is not divisible by M, or whose weight norm has a norm for every input, stay dense and
    do not count in the density, which is N / M.

    In an exploration each layer prunes its share of active weights of smallest magnitude, in any groups. Then each
    group grows as many weights as it lost, those with the highest scores among its inactive ones. So the number of
    replaced weights is exact, as for single weights, and every group has N active weights after every change.

    `n_m` returns the class of a pattern.
    """

    n: ClassVar[int]
    m: ClassVar[int]
    options: ClassVar[Options] = {"growth": GROWTH_RULES.find}

    @classmethod
    def check_density(cls, argument: str, value: float) -> None:
        """Checks that a density is N / M, rounded to at least three decimals."""
        if abs(value - cls.n / cls.m) > _TOLERANCE:
            raise ValueError(
                f'{argument}={value} must be {cls.n / cls.m:.4g}, the density of granularity="{cls.n}:{cls.m}".'
            )

    @classmethod
    def accepts(cls, weight: MaskableWeight) -> bool:
        """Returns whether the inputs of every output are divisible by M, and no norm is of a single input."""
        layer = next(iter(weight.layers.values()))
        groups = layer.groups if isinstance(layer, TRANSPOSED_LAYERS) else 1  # others hold one group's inputs
        of_inputs = weight.norm is not None and weight.norm.dim == weight.in_dim  # all of whose weights may be pruned
        return weight.parameter.shape[weight.in_dim] // groups % cls.m == 0 and not of_inputs

    def begin(self, density: float, initial: Initial) -> None:
        """Draws N weights of every group, or keeps the N of largest magnitude."""
        self.check_density("density", density)
        magnitudes = None if initial == "random" else self.magnitudes()
        for name, weight in self.weights.items():
            if magnitudes is None:
                scores = self._random_scores(name).to(weight.parameter.device)
            else:
                scores = magnitudes[name].abs()
            self.masks[name] = self._mark(name, self._grouped(name, scores), self.n)
        self.counts |= self.allocation(density)

    def numbers(self, density: float) -> list[int]:
        """Returns the current numbers, since there is only one density."""
        self.check_density("density", density)
        return self.now

    def allocation(self, density: float) -> dict[str, int]:
        """Returns N of M weights in every layer."""
        self.check_density("density", density)
        return {name: weight.parameter.numel() // self.m * self.n for name, weight in self.weights.items()}

    def reachable(self, density: float) -> float:
        """Returns N / M."""
        return self.n / self.m

    def grow(self, numbers: Sequence[int], scores: ByTensor) -> ByTensor:
        """Activates the missing weights in every group, those of highest score; `numbers` is not used."""
        changes = []
        for name, mask in self.active.items():
            active = self._grouped(name, mask)
            missing = self.n - active.sum(-1, keepdim=True)
            score = self._growth_key(self._grouped(name, scores[name])).masked_fill(active, float("-inf"))
            number = mask.numel() // self.m * self.n - self.counts[name]
            changes.append(([name], [self._mark(name, score, missing)], [number]))
        return self._flip_all(changes)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the masks.

        Raises:
            ValueError: If a group has another number of active weights than N.
        """
        for name in self.weights:
            if not bool((self._grouped(name, state["masks"][name]).sum(-1) == self.n).all()):
                raise ValueError(f"the saved masks are not {self.n}:{self.m}: {name!r} has groups with other numbers.")
        super().load_state_dict(state)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the pattern instead of its class, which no module holds."""
        return _make_empty, (self.n, self.m), self.__dict__

    def _grouped(self, name: str, values: Tensor) -> Tensor:
        """Returns a view of a weight-shaped tensor with the groups' M inputs as last dimension."""
        grouped: Tensor = values.movedim(self.weights[name].in_dim, -1).unflatten(-1, (-1, self.m))
        return grouped

    def _mark(self, name: str, scores: Tensor, numbers: Tensor | int) -> Tensor:
        """Returns marks of each group's largest scores in the weight's shape; ties are broken by position."""
        order = scores.argsort(dim=-1, descending=True, stable=True)
        best = (torch.arange(self.m, device=scores.device) < numbers).expand_as(order)
        marks = torch.zeros_like(best).scatter(-1, order, best)
        return marks.flatten(-2).movedim(-1, self.weights[name].in_dim).contiguous()


def _make_empty(n: int, m: int) -> NMUnits:
    kind = n_m(n, m)
    return kind.__new__(kind)


@cache
def n_m(n: int, m: int) -> type[NMUnits]:
    """Returns the class of units of a pattern.

    Args:
        n: Active weights per group, less than `m`.
        m: Weights per group.

    Raises:
        ValueError: If these numbers make no pattern.
    """
    if not 0 < n < m:
        raise ValueError(f'granularity="{n}:{m}" must be N:M with 0 < N < M.')
    return type(f"Units{n}Of{m}", (NMUnits,), {"__doc__": NMUnits.__doc__, "n": n, "m": m, "fixed_density": n / m})
