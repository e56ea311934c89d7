"""Selects exactly the k best weights; ties are broken by position."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_ddst.sparsity.bitpack import choose_chunk
from lightning_ddst.sparsity.launches import join, unjoin
from lightning_ddst.utils.devices import is_launch_bound

Key = Callable[[Tensor], Tensor]
Read = Callable[[Tensor], list[int]]

_NARROW_ABOVE = 2**18
_SAMPLE = 2**15
_DEVIATIONS = 3
"""Half the width of the searched threshold range, in standard deviations of a rank in the sample."""
_PIECE = 2**18
_WORD = 8
"""Bool entries read at once where few are true."""
_LANES = 255 * _WORD


def largest(scores: Tensor, k: int) -> Tensor:
    """Marks the k largest scores.

    Args:
        scores: Any shape, without NaN.
        k: Number of scores to mark, 0 to ``scores.numel()``.

    Returns:
        A bool tensor of the scores' shape with exactly k true entries; among equal scores at the threshold, those with
        the lowest flat index are marked.

    Raises:
        ValueError: If k is negative or larger than the number of scores.
    """
    if not 0 <= k <= scores.numel():
        raise ValueError(f"k={k} must be between 0 and the number of scores, {scores.numel()}.")
    return _largest([scores], [torch.ones_like(scores, dtype=torch.bool)], k, torch.detach, Tensor.tolist)[0][0]


def select(
    scores: Sequence[Tensor],
    eligible: Sequence[Tensor],
    k: int,
    limits: Sequence[int],
    key: Key = torch.detach,
    read: Read = Tensor.tolist,
) -> tuple[list[Tensor], list[int]]:
    """Marks the k best eligible weights over all layers together.

    On devices bound by launches it waits once, for the numbers of several layers, and once more whenever layers exceed
    their limits.

    Args:
        scores: One tensor per layer, finite; the largest are chosen.
        eligible: One bool tensor per layer, of the scores' shape.
        k: Number of weights to choose.
        limits: Largest number of weights to choose in each layer, at most its number of eligible weights.
        key: Elementwise function; its values are compared instead of the scores, which saves a copy of all scores.
        read: Function that reads numbers from a device; it may read others in the same transfer.

    Returns:
        One bool tensor per layer, with k true entries in total, and the number of true entries per layer. Ties go to
        the first layer, then to the lowest flat index.

    Raises:
        ValueError: If k is negative or larger than the limits allow.
    """
    if not 0 <= k <= sum(limits):
        raise ValueError(f"cannot choose k={k} weights: between 0 and {sum(limits)} are available.")
    chosen: dict[int, Tensor] = {}
    counts = dict.fromkeys(range(len(scores)), 0)
    full: set[int] = set(range(len(scores))) if k == sum(limits) else set()
    while True:
        # A layer over its limit contributes its limit; the rest is chosen again from the other layers.
        for i in full - chosen.keys():
            (chosen[i],), (counts[i],) = _largest([scores[i]], [eligible[i]], limits[i], key, read)
        rest = [i for i in range(len(scores)) if i not in full]
        left = k - sum(limits[i] for i in full)
        marks, numbers = _largest([scores[i] for i in rest], [eligible[i] for i in rest], left, key, read)
        over = {i for i, number in zip(rest, numbers, strict=True) if number > limits[i]}
        if not over:
            chosen |= zip(rest, marks, strict=True)
            counts |= zip(rest, numbers, strict=True)
            return [chosen[i] for i in range(len(scores))], list(counts.values())
        full |= over


def count_true(marks: Tensor) -> int:
    """Returns the number of true entries (much faster than a bool tensor's sum)."""
    flat = marks.flatten()
    whole = flat.numel() // _LANES * _LANES
    # One addition adds eight counts: a byte can hold the sum of 255 bools.
    sums = flat[:whole].view(torch.int64).view(-1, _LANES // _WORD).sum(1).view(torch.uint8)
    return int(sums.sum()) + int(flat[whole:].sum())


def _largest(
    scores: Sequence[Tensor], eligible: Sequence[Tensor], k: int, key: Key, read: Read
) -> tuple[list[Tensor], list[int]]:
    """Marks the k largest eligible scores of several tensors, ties to the first; also returns counts per tensor."""
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores], [0] * len(scores)
    if not is_launch_bound(scores[0].device):
        return _largest_by_sample(scores, eligible, k, key)
    marks, ends = _largest_by_threshold(join(scores), join(eligible), k, [score.numel() for score in scores], key)
    totals = [k] if len(scores) == 1 else read(ends)
    return unjoin(marks, scores), [end - start for start, end in zip([0, *totals], totals, strict=False)]


def _largest_by_threshold(
    scores: Tensor, eligible: Tensor, k: int, sizes: Sequence[int], key: Key
) -> tuple[Tensor, Tensor]:
    """Marks the k largest of joined scores, without waiting for the device.

    Returns:
        The marks, and the number of marks up to the end of each part of these sizes.
    """
    scores = key(scores)
    scores = torch.where(eligible, scores, float("-inf"))
    from_below = len(scores) - k + 1
    if k <= from_below:
        threshold = scores.topk(k, sorted=False).values.min()
    else:
        threshold = scores.topk(from_below, largest=False, sorted=False).values.max()
    marks = scores > threshold
    ties = (scores == threshold).logical_and_(eligible)
    del scores, eligible
    ranks = ties.to(torch.int32).cumsum_(0)  # a float cumsum would not be deterministic
    marks.logical_or_(ties.logical_and_(ranks <= k - marks.sum()))
    ranks.copy_(marks).cumsum_(0)
    return marks, torch.stack([ranks[end - 1] for end in accumulate(sizes)])


def _largest_by_sample(
    scores: Sequence[Tensor], eligible: Sequence[Tensor], k: int, key: Key
) -> tuple[list[Tensor], list[int]]:
    """Does the same where reading a number costs nothing: a sample spares sorting most scores."""
    flats = [score.flatten() for score in scores]
    allowed = [mask.flatten() for mask in eligible]
    # Scores above `high` are certainly among the largest, those below `low` are not; those between are sorted.
    low, high = _bounds(flats, allowed, k, key)
    chosen, counts, places = [], [], []
    for flat, mask in zip(flats, allowed, strict=True):
        above, between = _compare(flat, mask, low, high, key)
        chosen.append(above)
        counts.append(count_true(above))
        places.append(_positions(between))
    if not 0 <= k - sum(counts) <= sum(map(len, places)):  # the sample was not representative
        chosen = [torch.zeros_like(mask) for mask in allowed]
        counts = [0] * len(chosen)
        places = [_positions(mask.clone()) for mask in allowed]  # a view may not be aligned to words
    if missing := k - sum(counts):
        near = key(torch.cat([flat.index_select(0, place) for flat, place in zip(flats, places, strict=True)]))
        threshold = near.topk(missing, sorted=False).values.min()
        taken = near >= threshold
        if surplus := count_true(taken) - missing:
            taken[_positions(near == threshold)[-surplus:]] = False
        for i, take in enumerate(taken.split([len(place) for place in places])):
            added = places[i].masked_select(take)
            chosen[i].index_fill_(0, added, True)
            counts[i] += len(added)
    return [marks.view(score.shape) for marks, score in zip(chosen, scores, strict=True)], counts


def _compare(flat: Tensor, mask: Tensor, low: Tensor | float, high: Tensor | float, key: Key) -> tuple[Tensor, Tensor]:
    """Marks the allowed scores above `high`, and those from `low` to `high`."""
    above, between = torch.empty_like(mask), torch.empty_like(mask)
    parts = (part.split(choose_chunk(flat, _PIECE)) for part in (flat, mask, above, between))
    for values, allowed, more, some in zip(*parts, strict=True):
        score = key(values)
        # Comparing into floats and converting them is twice as fast as comparing into bools.
        compared = torch.empty_like(score)
        some.copy_(torch.ge(score, low, out=compared)).logical_and_(allowed)
        more.copy_(torch.gt(score, high, out=compared)).logical_and_(some)
        some.logical_xor_(more)
    return above, between


def _bounds(flats: list[Tensor], allowed: list[Tensor], k: int, key: Key) -> tuple[Tensor | float, Tensor | float]:
    """Returns bounds that very likely contain the k-th largest allowed value; infinite bounds for few values."""
    total = sum(flat.numel() for flat in flats)
    if total > _NARROW_ABOVE:
        stride = -(-total // _SAMPLE)
        sample = key(torch.cat([f[::stride][a[::stride]] for f, a in zip(flats, allowed, strict=True)]))
        rank = k / stride
        slack = _DEVIATIONS * (rank * (1 - k / total)) ** 0.5 + _DEVIATIONS
        if slack < rank < sample.numel() - slack:
            low, high = (sample.kthvalue(sample.numel() - int(place)).values for place in (rank + slack, rank - slack))
            return low, high
    return float("-inf"), float("inf")


def _positions(marks: Tensor) -> Tensor:
    """Returns the indices of the true entries of a flat tensor; fast if they are few."""
    whole = marks.numel() // _WORD * _WORD
    words = marks[:whole].view(torch.int64).nonzero()
    found = marks[:whole].view(-1, _WORD)[words.squeeze(1)].nonzero()
    positions = words[found[:, 0], 0] * _WORD + found[:, 1]
    return torch.cat([positions, marks[whole:].nonzero().squeeze(1) + whole])
