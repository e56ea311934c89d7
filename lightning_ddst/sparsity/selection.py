"""Exact choice of the k best weights: always k of them, ties by position."""

from collections.abc import Sequence

import torch
from torch import Tensor

_NARROW_ABOVE = 2**18
_SAMPLE = 2**16
_DEVIATIONS = 5
"""Standard deviations of a sample's quantile within which the threshold is looked for."""


def largest(scores: Tensor, k: int) -> Tensor:
    """Marks the k largest scores.

    Args:
        scores: Any shape, without NaN.
        k: How many, 0 to ``scores.numel()``.

    Returns:
        A bool tensor of the scores' shape with exactly k true entries; of equal scores at the
        threshold, those with the lowest flat index.

    Raises:
        ValueError: If k is negative or larger than the number of scores.
    """
    if not 0 <= k <= scores.numel():
        raise ValueError(f"k={k} must be between 0 and the number of scores, {scores.numel()}.")
    return _largest([scores], [torch.ones_like(scores, dtype=torch.bool)], k)[0]


def select(scores: Sequence[Tensor], eligible: Sequence[Tensor], k: int, limits: Sequence[int]) -> list[Tensor]:
    """Marks the k best eligible weights over all layers together.

    Args:
        scores: A tensor a layer, finite; the largest are chosen.
        eligible: A bool tensor a layer, of the scores' shape.
        k: How many to choose.
        limits: The most that may be chosen in each layer, at most its number of eligible weights.

    Returns:
        A bool tensor a layer, k true entries in all; ties go to the first layer, then the lowest flat index.

    Raises:
        ValueError: If k is negative or more than the limits allow.
    """
    if not 0 <= k <= sum(limits):
        raise ValueError(f"cannot choose k={k} weights: between 0 and {sum(limits)} are available.")
    full: set[int] = set(range(len(scores))) if k == sum(limits) else set()
    chosen: dict[int, Tensor] = {}
    while True:
        # A layer over its limit gives what the limit allows; the others are chosen from again.
        for i in full - chosen.keys():
            (chosen[i],) = _largest([scores[i]], [eligible[i]], limits[i])
        open_layers = [i for i in range(len(scores)) if i not in full]
        left = k - sum(limits[i] for i in full)
        marks = _largest([scores[i] for i in open_layers], [eligible[i] for i in open_layers], left)
        # Counting is not free: where every layer has room for all, none can be over its limit.
        over = {
            i for i, layer in zip(open_layers, marks, strict=True) if limits[i] < left and count_true(layer) > limits[i]
        }
        if not over:
            chosen |= zip(open_layers, marks, strict=True)
            return [chosen[i] for i in range(len(scores))]
        full |= over


def count_true(marks: Tensor) -> int:
    """Number of true entries (much faster than a bool tensor's sum)."""
    return int(marks.count_nonzero())


def _largest(scores: Sequence[Tensor], eligible: Sequence[Tensor], k: int) -> list[Tensor]:
    """Marks the k largest eligible scores of several tensors together; ties go to the first tensor."""
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    flats = [score.flatten() for score in scores]
    allowed = [mask.flatten() for mask in eligible]
    # Scores above `high` are among the largest for sure, those below `low` are not; between them it is sorted out.
    low, high = _bounds(flats, allowed, k)
    reaching = [(f >= low).logical_and_(a) for f, a in zip(flats, allowed, strict=True)]
    chosen = [(f > high).logical_and_(r) for f, r in zip(flats, reaching, strict=True)]
    missing = k - sum(count_true(marks) for marks in chosen)
    places = [r.logical_xor_(marks).nonzero().squeeze(1) for r, marks in zip(reaching, chosen, strict=True)]
    near = torch.cat([flat[place] for flat, place in zip(flats, places, strict=True)])
    if not 0 <= missing <= near.numel():  # the sample misled
        chosen = [torch.zeros_like(mask) for mask in allowed]
        missing, places = k, [mask.nonzero().squeeze(1) for mask in allowed]
        near = torch.cat([flat[place] for flat, place in zip(flats, places, strict=True)])
    if missing:
        threshold = near.topk(missing, sorted=False).values.min()
        taken = near >= threshold
        if surplus := count_true(taken) - missing:
            taken[(near == threshold).nonzero().squeeze(1)[-surplus:]] = False
        for marks, place, take in zip(chosen, places, taken.split([len(p) for p in places]), strict=True):
            marks[place[take]] = True
    return [marks.view(score.shape) for marks, score in zip(chosen, scores, strict=True)]


def _bounds(flats: list[Tensor], allowed: list[Tensor], k: int) -> tuple[Tensor | float, Tensor | float]:
    """Where the k-th largest allowed value very likely lies, by a sample of many; anywhere, of few."""
    total = sum(flat.numel() for flat in flats)
    if total > _NARROW_ABOVE:
        stride = total // _SAMPLE
        sample = torch.cat([f[::stride][a[::stride]] for f, a in zip(flats, allowed, strict=True)])
        rank = k / stride
        slack = _DEVIATIONS * (rank**0.5 + 1)
        if slack < rank < sample.numel() - slack:
            ranked = sample.sort(descending=True).values
            return ranked[int(rank + slack)], ranked[int(rank - slack)]
    return float("-inf"), float("inf")
