"""Growth rules: which inactive weights to activate.

A rule is a function that scores every weight of a layer; the largest scores among the inactive
ones grow. To add one, decorate a function:

    @growth_rule("gradient_per_fan_in", gradient="latest")
    def by_scaled_gradient(layer: Layer) -> Tensor:
        return layer.gradient.abs() / layer.weight[0].numel()

and name it wherever a growth rule is asked for, in Python or in YAML.
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
    """What a growth rule sees of one layer.

    Attributes:
        weight: The masked weight, before any normalisation.
        mask: Bool, of the weight's shape; true where active.
        gradient: The dense gradient, of the weight's shape: of the network's last update or, for
            rules that ask for the average, its exponential moving average over updates. Empty for
            rules that need none.
        generator: CPU random generator for rules that draw.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class GrowthRule:
    """A scoring function, the gradient it needs, and whether its scores count by magnitude."""

    score: Callable[[Layer], Tensor]
    gradient: GradientKind
    magnitude: bool

    @property
    def __wrapped__(self) -> Callable[[Layer], Tensor]:
        """The function that was registered."""
        return self.score


GROWTH_RULES: Registry[GrowthRule] = Registry("growth rule")
"""Every registered growth rule by name."""


def growth_rule(
    name: str, gradient: GradientKind = "none", *, magnitude: bool = False
) -> Callable[[Callable[[Layer], Tensor]], Callable[[Layer], Tensor]]:
    """Registers a function as a growth rule.

    Args:
        name: What the rule is called in Python, YAML and on the command line.
        gradient: "none", "latest" (the dense gradient of the last update) or "average" (its
            exponential moving average, which costs a clone of the weights and their gradient a step).
        magnitude: Whether the scores of largest magnitude grow, rather than the largest; spares a
            copy of the gradient.

    Returns:
        A decorator for a function from a `Layer` to finite scores of the weight's shape.

    Raises:
        ValueError: If `gradient` is none of these.
    """
    check_choice("gradient", gradient, get_args(GradientKind))

    def register(score: Callable[[Layer], Tensor]) -> Callable[[Layer], Tensor]:
        GROWTH_RULES.register(name)(GrowthRule(score, gradient, magnitude))
        return score

    return register


@growth_rule("random")
def by_chance(layer: Layer) -> Tensor:
    """Uniformly at random (SET, Mocanu et al. 2018)."""
    return torch.rand(layer.weight.shape, generator=layer.generator).to(layer.weight.device)


@growth_rule("gradient", gradient="latest", magnitude=True)
def by_gradient(layer: Layer) -> Tensor:
    """Largest dense gradient (RigL, Evci et al. 2020)."""
    return layer.gradient


@growth_rule("momentum", gradient="average", magnitude=True)
def by_momentum(layer: Layer) -> Tensor:
    """Largest averaged dense gradient (sparse momentum, Dettmers and Zettlemoyer 2019)."""
    return layer.gradient
