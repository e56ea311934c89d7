"""Kernels launched and waits for the device by kind of update, which must not grow."""

import launches
import pytest
import torch
from kinds import AFTER, EXPLORATION, GROWS, MEASUREMENT, ORDINARY, PRUNES, mean_of_run
from launches import AVERAGE, MOMENTUM, Count, Counting, count_kinds

LIMITS = {
    "weight": {
        ORDINARY: (4, 0),
        MEASUREMENT: (124, 0),
        EXPLORATION: (100, 4),
        AFTER + EXPLORATION: (5, 0),
        GROWS: (320, 6),
        AFTER + GROWS: (4, 0),
        PRUNES: (320, 6),
        AFTER + PRUNES: (5, 0),
        AVERAGE: (12, 0),
        MOMENTUM: (20, 0),
    },
    "channel": {
        ORDINARY: (553, 0),
        MEASUREMENT: (879, 0),
        EXPLORATION: (2700, 340),
        AFTER + EXPLORATION: (554, 0),
        GROWS: (3300, 440),
        AFTER + GROWS: (553, 0),
        PRUNES: (3300, 440),
        AFTER + PRUNES: (554, 0),
        AVERAGE: (12, 0),
    },
}
"""Launches and waits that an update may add to a dense one of the SNGAN pair. Lower them when they fall."""


@pytest.mark.parametrize("granularity", LIMITS)
def test_launches_and_waits_do_not_grow(granularity, monkeypatch):
    monkeypatch.setattr(launches, "WIDTH", 32)
    dense, kinds = count_kinds(granularity)
    assert dense.waits == 0
    assert kinds.keys() == LIMITS[granularity].keys()
    over = {
        kind: str(count)
        for kind, count in kinds.items()
        if count.launches > LIMITS[granularity][kind][0] or count.waits > LIMITS[granularity][kind][1]
    }
    assert not over


def counted(function):
    with Counting() as counting:
        function()
    return counting.count.launches, counting.count.waits


def test_an_operation_is_a_kernel_and_a_view_is_none():
    x = torch.ones(2, 3)
    assert counted(lambda: x.view(6).add(1)) == (1, 0)
    assert counted(lambda: torch.empty_like(x).t().expand(3, 2)) == (0, 0)


def test_backward_passes_and_their_hooks_count():
    x = torch.ones(3, requires_grad=True)
    y = x.exp().sum()
    assert counted(y.backward) == (2, 0)  # the gradient 1, and a product; expanding it is a view
    x.grad = None
    x.register_hook(lambda gradient: gradient * 2)
    z = x.exp().sum()
    assert counted(z.backward) == (3, 0)


def test_many_tensors_together_are_one_kernel_if_their_dtypes_are_equal():
    tensors = [torch.ones(2) for _ in range(5)]
    assert counted(lambda: torch._foreach_mul_(tensors, tensors)) == (1, 0)
    masks = [tensor.bool() for tensor in tensors]
    assert counted(lambda: torch._foreach_mul_(tensors, masks)) == (5, 0)
    many = [torch.ones(1) for _ in range(65)]
    assert counted(lambda: torch._foreach_mul_(many, many)) == (2, 0)  # 64 pairs fit in one


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([True, False])],
        lambda x: x.masked_select(torch.tensor([True, False])),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.linalg.eigh(x.outer(x)),
    ],
)
def test_what_needs_the_values_waits(wait):
    assert counted(lambda: wait(torch.ones(2)))[1] == 1


def test_what_needs_no_values_does_not_wait():
    x, mask = torch.ones(2), torch.tensor([True, False])

    def work():
        x[mask] = 0.0
        x.to(x.device).index_select(0, torch.arange(1)).masked_fill_(mask[:1], 0).sum()

    assert counted(work)[1] == 0


def test_the_mean_of_a_run_follows_from_its_default_intervals():
    kinds = {
        ORDINARY: Count(10, 0),
        MEASUREMENT: Count(30, 0),
        EXPLORATION: Count(510, 5),
        AFTER + EXPLORATION: Count(10, 0),
        GROWS: Count(2010, 20),
        AFTER + GROWS: Count(10, 0),
        PRUNES: Count(10, 0),
        AFTER + PRUNES: Count(10, 10),
    }
    # BR every 10th update, an exploration every 500th, a decision every 1,000th.
    assert mean_of_run(kinds, 100_000) == Count(10 + 2 + 1 + 1, pytest.approx(0.01 + 0.01 + 0.005))
    # Every 2nd, 50th and 100th.
    assert mean_of_run(kinds, 3_000) == Count(10 + 10 + 10 + 10, pytest.approx(0.1 + 0.1 + 0.05))
