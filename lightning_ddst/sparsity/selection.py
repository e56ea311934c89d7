"""Exact choice of the k best weights: always k of them, ties by position."""

from collections.abc import Sequence

import torch
from torch import Tensor

_NARROW_ABOVE = 2**18
_SAMPLE = 2**16


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
    return _largest([scores], k)[0]


def _largest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """The same over several tensors together; ties go to the first tensor."""
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k={k} must be between 0 and the number of scores, {total}.")
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    flats = [score.flatten() for score in scores]
    threshold = _kth_largest(flats, k)
    chosen = [flat >= threshold for flat in flats]
    surplus = sum(count_true(marks) for marks in chosen) - k
    for marks, flat in zip(reversed(chosen), reversed(flats), strict=True):
        if surplus:
            ties = (flat == threshold).nonzero().squeeze(1)
            dropped = ties[max(0, len(ties) - surplus) :]
            marks[dropped] = False
            surplus -= len(dropped)
    return [marks.view(score.shape) for marks, score in zip(chosen, scores, strict=True)]


def _kth_largest(flats: list[Tensor], k: int) -> Tensor:
    """The k-th largest value; of many, only those that a sample shows to be near it are looked through."""
    total = sum(flat.numel() for flat in flats)
    if total > _NARROW_ABOVE:
        stride = total // _SAMPLE
        sample = torch.cat([flat[::stride] for flat in flats])
        rank = int(1.05 * k / stride) + 64
        if rank <= sample.numel():
            bound = sample.topk(rank).values[-1]
            near = [flat[(flat >= bound).nonzero().squeeze(1)] for flat in flats]
            if sum(flat.numel() for flat in near) >= k:
                flats = near
    return torch.cat(flats).topk(k, sorted=False).values.min()


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
    candidates = [torch.where(allowed, score, float("-inf")) for score, allowed in zip(scores, eligible, strict=True)]
    full: dict[int, Tensor] = {}
    while True:
        # A layer over its limit gives what the limit allows; the others are chosen from again.
        open_layers = [i for i in range(len(candidates)) if i not in full]
        left = k - sum(limits[i] for i in full)
        chosen = full | dict(zip(open_layers, _largest([candidates[i] for i in open_layers], left), strict=True))
        over = [i for i in open_layers if count_true(chosen[i]) > limits[i]]
        if not over:
            return [chosen[i] for i in range(len(candidates))]
        full |= {i: largest(candidates[i], limits[i]) for i in over}


def count_true(marks: Tensor) -> int:
    """Number of true entries (much faster than a bool tensor's sum)."""
    return int(marks.count_nonzero())
