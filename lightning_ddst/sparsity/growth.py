"""Growth rules, which choose the inactive weights to activate.

A rule is a function that scores every weight of a layer; the inactive weights with the largest scores grow. To add one,
decorate a function:

    @growth_rule("gradient_per_fan_in", gradient="latest")
    def by_scaled_gradient(layer: Layer) -> Tensor:
        return layer.gradient.abs() / layer.weight[0].numel()

and pass its name as ``growth``, in Python or in YAML.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ddst.utils.registry import Registry
from lightning_ddst.utils.validation import check_choice

GradientKind = Literal["none", "latest", "average"]


@dataclass(frozen=True)
class Layer:
    """The input of a growth rule: one layer.

    Attributes:
        weight: The masked weight: the effective one under weight norm, the one before normalization under spectral
            norm.
        mask: Bool, of the weight's shape; true where active.
        gradient: The dense gradient of that weight, of its shape: the last update's or, for rules with ``"average"``,
            the exponential moving average over updates. Empty for rules that need no gradient.
        generator: CPU random generator for rules that draw random numbers.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class GrowthRule:
    """A scoring function, the gradient that it needs, and whether its scores are compared by magnitude."""

    score: Callable[[Layer], Tensor]
    gradient: GradientKind
    magnitude: bool

    @property
    def __wrapped__(self) -> Callable[[Layer], Tensor]:
        """The registered function."""
        return self.score


GROWTH_RULES: Registry[GrowthRule] = Registry("growth rule")
"""Every registered growth rule by name."""


def growth_rule(
    name: str, gradient: GradientKind = "none", *, magnitude: bool = False
) -> Callable[[Callable[[Layer], Tensor]], Callable[[Layer], Tensor]]:
    """Registers a function as a growth rule.

    Args:
        name: Name of the rule in Python, YAML and on the command line.
        gradient: "none", "latest" (the dense gradient of the last update) or "average" (its exponential moving
            average, which costs a copy of the weights and of their gradients per step).
        magnitude: Whether weights grow by the magnitude of their scores instead of the scores; saves a copy of the
            gradient.

    Returns:
        A decorator for a function from a `Layer` to finite scores of the weight's shape.

    Raises:
        ValueError: If `gradient` is unknown.
    """
    check_choice("gradient", gradient, get_args(GradientKind))

    def register(score: Callable[[Layer], Tensor]) -> Callable[[Layer], Tensor]:
        GROWTH_RULES.register(name)(GrowthRule(score, gradient, magnitude))
        return score

    return register


@growth_rule("random")
def by_chance(layer: Layer) -> Tensor:
    """Scores weights uniformly at random (SET, Mocanu et al. 2018)."""
    return torch.rand(layer.weight.shape, generator=layer.generator).to(layer.weight.device)


@growth_rule("gradient", gradient="latest", magnitude=True)
def by_gradient(layer: Layer) -> Tensor:
    """Scores weights by their dense gradient (RigL, Evci et al. 2020)."""
    return layer.gradient


@growth_rule("momentum", gradient="average", magnitude=True)
def by_momentum(layer: Layer) -> Tensor:
    """Scores weights by their averaged dense gradient (sparse momentum, Dettmers and Zettlemoyer 2019)."""
    return layer.gradient
