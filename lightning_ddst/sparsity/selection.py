"""Exact choice of the k best weights: always k of them, ties by position."""

from collections.abc import Sequence

import torch
from torch import Tensor

_NARROW_ABOVE = 2**18
_SAMPLE = 2**16


def largest(scores: Tensor, k: int) -> Tensor:
    """Marks the k largest scores.

    Args:
        scores: Any shape, without NaN; ``-inf`` is never chosen while others are left.
        k: How many, 0 to ``scores.numel()``.

    Returns:
        A bool tensor of the scores' shape with exactly k true entries; of equal scores at the
        threshold, those with the lowest flat index.

    Raises:
        ValueError: If k is negative or larger than the number of scores.
    """
    flat = scores.reshape(-1)
    if not 0 <= k <= flat.numel():
        raise ValueError(f"k={k} must be between 0 and the number of scores, {flat.numel()}.")
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_largest(flat, k)
    chosen = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.view(scores.shape)


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest value; in a large tensor only those that a sample shows to be near it are sorted."""
    if flat.numel() > _NARROW_ABOVE:
        stride = flat.numel() // _SAMPLE
        sample = flat[::stride]
        rank = int(1.1 * k / stride) + 64
        if rank <= sample.numel():
            near = flat[flat >= sample.topk(rank).values[-1]]
            if near.numel() >= k:
                flat = near
    return flat.topk(k, sorted=False).values.min()


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
    candidates = [
        torch.where(allowed, score, float("-inf")).flatten() for score, allowed in zip(scores, eligible, strict=True)
    ]
    full: dict[int, Tensor] = {}
    while True:
        # A layer over its limit gives what the limit allows; the others are chosen from again.
        open_layers = [i for i in range(len(candidates)) if i not in full]
        left = k - sum(limits[i] for i in full)
        chosen = dict(full)
        if open_layers:
            marks = largest(torch.cat([candidates[i] for i in open_layers]), left)
            chosen |= zip(open_layers, marks.split([candidates[i].numel() for i in open_layers]), strict=True)
        over = [i for i in open_layers if int(chosen[i].sum()) > limits[i]]
        if not over:
            return [chosen[i].view(score.shape) for i, score in enumerate(scores)]
        full |= {i: largest(candidates[i], limits[i]) for i in over}
