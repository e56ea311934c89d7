"""Periods of observation that overlap each other and other modes."""

from contextlib import ExitStack

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_ddst.sparsity.observed_ops import observed

A = torch.ones(2, 3)


class Products:
    """Counts products."""

    def __init__(self):
        self.number = 0

    def observe(self, func, args, kwargs, result):
        self.number += func is torch.ops.aten.mm.default


def product():
    A @ A.T


def test_periods_that_overlap_see_their_own_operations():
    first, second = Products(), Products()
    with ExitStack() as later:
        with observed(first.observe):
            product()
            later.enter_context(observed(second.observe))
            product()
        product()
        product()
    product()
    assert (first.number, second.number) == (2, 3)


def test_modes_of_other_code_stay_where_a_period_begins_or_ends_inside():
    counter, period = Products(), ExitStack()
    with FlopCounterMode(display=False) as before:
        product()
        period.enter_context(observed(counter.observe))
        product()
    product()
    with FlopCounterMode(display=False) as after:
        product()
        period.close()
        product()
    product()
    assert counter.number == 3
    each = 2 * 2 * 3 * 2
    assert (before.get_total_flops(), after.get_total_flops()) == (2 * each, 2 * each)


def test_backward_passes_are_in_the_thread_until_the_last_period_ends():
    first, second = ExitStack(), ExitStack()
    allowed = torch._C._is_multithreading_enabled()
    first.enter_context(observed(Products().observe))
    second.enter_context(observed(Products().observe))
    first.close()
    assert not torch._C._is_multithreading_enabled()
    second.close()
    assert torch._C._is_multithreading_enabled() == allowed


def test_operations_of_backward_passes_are_seen():
    counter, x = Products(), torch.ones(2, 2, requires_grad=True)
    with observed(counter.observe):
        (x @ x).sum().backward()
    assert counter.number == 3
