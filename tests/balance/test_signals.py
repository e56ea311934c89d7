import math

import pytest
import torch
from toys import trained

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.balance import (
    SIGNALS,
    Balance,
    BalanceWindow,
    DensityController,
    RelativeController,
    control_signal,
)

BALANCE = Balance(0.25, 4.0, 1.0, 3.0, -1.0, 8, "", real_sign=0.5)


def test_what_the_built_in_signals_read():
    assert SIGNALS["balance_ratio"].read(BALANCE) == 0.25
    assert SIGNALS["real_sign"].read(BALANCE) == 0.5


def test_the_sign_is_the_mean_over_a_window_by_hand():
    window = BalanceWindow(4)
    for real_sign in (1.0, 0.5, -0.5):  # of 4 real images each: all, 3, and 1 of them with a positive score
        window.add(torch.tensor([1.0, 0.0, 0.5, real_sign]))
    assert window.read().real_sign == pytest.approx(1 / 3)


def test_the_sign_of_an_empty_window_is_not_known():
    assert math.isnan(BalanceWindow(4).read().real_sign)


def test_a_signal_of_ones_own_controls_a_run():
    @control_signal("score_gap", bounds=(-2.0, -1.0), high_means="strong")
    def by_score_gap(balance):
        return balance.alpha

    try:
        sparsity = DynamicSparsityCallback(0.25, 0.5, signal="score_gap", interval=2, explore_interval=5)
        trained(sparsity)
        # The gap of a discriminator that learns is never below -1: always too strong.
        assert [decision.action for _, decision in sparsity.decisions] == ["prune"] * 5
        assert sparsity.decisions[0][1].reason.startswith("score_gap ")
        assert sparsity.discriminator_density == 136 / 544
    finally:
        del SIGNALS["score_gap"]


def test_a_signal_is_high_for_the_weak_or_the_strong():
    with pytest.raises(ValueError, match=r"high_means='high'.*weak.*strong"):
        control_signal("new", bounds=(0, 1), high_means="high")
    assert "new" not in SIGNALS


def test_unknown_signals_are_rejected_with_those_that_exist():
    with pytest.raises(ValueError, match=r"signal='brr'.*balance_ratio.*real_sign"):
        DensityController(signal="brr")
    with pytest.raises(ValueError, match="signal='brr'"):
        DynamicSparsityCallback(0.1, signal="brr")


def test_other_signals_have_bounds_of_their_own_by_default():
    sparsity = DynamicSparsityCallback(0.25, signal="real_sign", interval=10, probe_interval=1)
    trained(sparsity)
    assert controller_of(sparsity) == DensityController((0.5, 0.7), 0.05, 0.25, 1.0, "real_sign")


def test_bounds_follow_the_balance_ratio_by_default():
    by_default, auto = (controller_of(DynamicSparsityCallback(0.25, **given)) for given in ({}, {"bounds": "auto"}))
    assert isinstance(by_default, RelativeController)
    assert vars(by_default) == vars(auto)
    assert by_default.decide(BALANCE, 0.25, share=0.1).density == 0.325  # 0.25 to 1 in ten steps


def controller_of(sparsity):
    return sparsity.settings.mask_updates()[0].controller
