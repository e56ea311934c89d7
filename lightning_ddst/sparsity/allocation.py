"""Distributes active weights over layers with exact integer counts: uniform, ER and ERK."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

from lightning_ddst.utils.registry import Registry
from lightning_ddst.utils.validation import check_density

Shape = Sequence[int]


DISTRIBUTIONS: Registry[Callable[[Shape], float]] = Registry("distribution")
"""Functions from a weight's shape to its layer's density up to a common factor. Register others to use them by name."""


@DISTRIBUTIONS.register("uniform")
def uniform(shape: Shape) -> float:
    """Returns the same density for every layer."""
    return 1.0


@DISTRIBUTIONS.register("er")
def er(shape: Shape) -> float:
    """Returns the Erdos-Renyi density (Mocanu et al. 2018), ``(n_out + n_in) / (n_out * n_in)``."""
    return (shape[0] + shape[1]) / (shape[0] * shape[1])


@DISTRIBUTIONS.register("erk")
def erk(shape: Shape) -> float:
    """Returns the Erdos-Renyi-Kernel density (RigL), ``(n_out + n_in + k_1 + ...) / (n_out * n_in * k_1 * ...)``."""
    return sum(shape) / math.prod(shape)


def allocate(
    shapes: Sequence[Shape],
    density: float,
    distribution: str = "erk",
    floor: int | Sequence[int] = 1,
    given: Mapping[int, int] | None = None,
) -> list[int]:
    """Distributes a network's active weights over its layers.

    Layers whose share would exceed their size are dense; the others share the difference.

    Args:
        shapes: Shape of each layer's weight: outputs, inputs, and the sizes of the kernel.
        density: Active weights over all weights, in (0, 1].
        distribution: A key of `DISTRIBUTIONS`.
        floor: Smallest count of a layer, or of each, at least 1; a smaller layer is dense.
        given: Fixed counts by the layer's index; the other layers share the rest.

    Returns:
        Active weights of each layer; their sum is exactly ``round(density * number of weights)``.

    Raises:
        ValueError: If the density is outside (0, 1] or too low for the floor, or the distribution unknown or not
            positive.
    """
    check_density("density", density)
    relative_density = DISTRIBUTIONS.find("distribution", distribution)
    sizes = [math.prod(shape) for shape in shapes]
    given = given or {}
    floors = [floor] * len(sizes) if isinstance(floor, int) else floor
    lower = [given.get(i, min(floors[i], size)) for i, size in enumerate(sizes)]
    upper = [given.get(i, size) for i, size in enumerate(sizes)]
    total = round(density * sum(sizes))
    if total < sum(lower):
        raise ValueError(
            f"density={density} leaves {total} active weights for {len(sizes)} layers, less than {_needed(floors)}"
            f"{f' and the {sum(given.values())} of given densities' if given else ''}; "
            f"it must be at least {_rounded_up(sum(lower) / sum(sizes)):.3g} here."
        )
    if total > sum(upper):
        raise ValueError(
            f"density={density} needs {total} active weights, more than layers with given densities allow; "
            f"it must be at most {_rounded_down(sum(upper) / sum(sizes)):.3g} here."
        )
    relative = [relative_density(shape) for shape in shapes]
    for shape, value in zip(shapes, relative, strict=True):
        if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
            raise ValueError(
                f"distribution={distribution!r} returned {value!r} for a weight of shape {tuple(shape)}; it must be a "
                "positive number."
            )
    shares = [value * size for value, size in zip(relative, sizes, strict=True)]
    return apportion(shares, total, lower, upper)


def _needed(floors: Sequence[int]) -> str:
    if len(set(floors)) == 1:
        return f"{floors[0]} per layer"
    return f"the {sum(floors)} that they need (one for every norm of a layer with weight norm)"


def _rounded_up(value: float) -> float:
    """Rounds up to three significant digits, so that the printed number is large enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit) * unit


def _rounded_down(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / unit) * unit


def apportion(shares: Sequence[float], total: int, lower: Sequence[int], upper: Sequence[int]) -> list[int]:
    """Splits an integer in proportion to shares, within bounds, by largest remainders.

    Args:
        shares: Positive weights of the parts.
        total: The integer to split, between the sums of the bounds.
        lower: Smallest value of each part.
        upper: Largest value of each part.

    Returns:
        Integers within the bounds that sum to `total`; among equal remainders the first is rounded up.

    Raises:
        ValueError: If the bounds allow no solution.
    """
    if not sum(lower) <= total <= sum(upper):
        raise ValueError(f"total={total} must be between {sum(lower)} and {sum(upper)}.")
    parts: list[float] = [0.0] * len(shares)
    free = set(range(len(shares)))
    left = total
    while free:
        scale = left / sum(shares[i] for i in free)
        for i in free:
            parts[i] = min(max(scale * shares[i], lower[i]), upper[i])
        # Clipping raised or lowered the sum: parts clipped in that direction stay clipped in the solution.
        excess = sum(parts[i] for i in free) - left
        clipped = {
            i
            for i in free
            if (excess >= 0 and parts[i] > scale * shares[i]) or (excess <= 0 and parts[i] < scale * shares[i])
        }
        if not clipped:
            break
        left -= sum(int(parts[i]) for i in clipped)
        free -= clipped
    counts = [math.floor(part + 1e-9) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: round(counts[i] - parts[i], 9))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
