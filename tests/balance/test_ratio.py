"""The balance ratio over a window. A sample is (real, old fake, new fake), so alpha = real - old, beta = new - old."""

import io
import math
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ddst.balance import Balance, BalanceWindow
from lightning_ddst.balance.ratio import ESTIMATORS

ALPHA_2_BETA_1 = (2.0, 0.0, 1.0)
ALPHA_4_BETA_1 = (3.0, -1.0, 0.0)


def measurement(scores):
    """Returns the scores of a probe with a single real image."""
    scores = torch.as_tensor(scores)
    return torch.cat([scores, scores[:1].sign()])


def filled(size, samples, estimator="ratio_of_means"):
    window = BalanceWindow(size, estimator)
    for sample in samples:
        window.add(measurement(sample))
    return window


def with_alphas(*alphas, beta=0.5):
    """A window that just fits samples with these alphas; the old fake always scores 1."""
    return filled(len(alphas), [(1 + alpha, 1.0, 1 + beta) for alpha in alphas])


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the estimators ------------------------------------------------------------------------------


def test_ratio_of_means_by_hand():
    balance = filled(5, [ALPHA_2_BETA_1, ALPHA_4_BETA_1]).read()
    assert balance.ratio == 1 / 3  # mean beta 1, mean alpha 3


def test_mean_of_ratios_by_hand():
    balance = filled(5, [ALPHA_2_BETA_1, ALPHA_4_BETA_1], "mean_of_ratios").read()
    assert balance.ratio == 0.375  # (1 / 2 + 1 / 4) / 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_parts_are_means_over_the_samples(estimator):
    balance = filled(5, [ALPHA_2_BETA_1, ALPHA_4_BETA_1], estimator).read()
    assert (balance.alpha, balance.beta) == (3.0, 1.0)
    assert (balance.real, balance.fake) == (2.5, -0.5)
    assert (balance.samples, balance.reason) == (2, "")


def test_ratio_of_means_is_the_default():
    window = BalanceWindow(2)
    window.add(measurement(torch.tensor(ALPHA_2_BETA_1)))
    window.add(measurement(torch.tensor(ALPHA_4_BETA_1)))
    assert window.read().ratio == 1 / 3


def test_a_single_measurement_with_positive_alpha_is_decided():
    assert filled(3, [ALPHA_4_BETA_1]).read() == Balance(0.25, 4.0, 1.0, 3.0, -1.0, 1, "", real_sign=1.0)


def test_a_generator_that_got_worse_gives_a_negative_ratio():
    assert filled(3, [(2.0, 0.0, -1.0)]).read().ratio == -0.5


def test_a_small_difference_of_large_scores_is_kept():
    # A critic's scores have no fixed origin. 4096 + 1/512 still has 22 significant bits, so float32 holds it.
    balance = filled(1, [(4097.0, 4096.0, 4096.0 + 2**-9)]).read()
    assert balance.ratio == 2**-9


def test_scores_in_double_precision_stay_so():
    window = BalanceWindow(2)
    window.add(measurement(torch.tensor([2.0, 1.0, 1.0 + 2**-40], dtype=torch.float64)))
    assert window.read().beta == 2**-40
    window.resize(3)
    window.add(measurement(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)))
    assert window.read().beta == 2**-41


def test_measurements_do_not_keep_a_graph():
    window = BalanceWindow(2)
    window.add(measurement(torch.tensor(ALPHA_2_BETA_1, requires_grad=True) * 1))
    assert not window.state_dict()["samples"].requires_grad
    assert window.read().ratio == 0.5


def test_reading_changes_nothing():
    window = filled(2, [ALPHA_2_BETA_1, ALPHA_4_BETA_1])
    assert window.read() == window.read()


# ---- the window slides ----------------------------------------------------------------------------


def test_only_the_last_measurements_count():
    window = filled(2, [(90.0, 0.0, 9.0), (-50.0, 7.0, 1.0), ALPHA_2_BETA_1, ALPHA_4_BETA_1])
    balance = window.read()
    assert (balance.ratio, balance.alpha, balance.beta, balance.samples) == (1 / 3, 3.0, 1.0, 2)


def test_a_window_that_is_not_full_counts_what_is_there():
    balance = filled(100, [ALPHA_2_BETA_1, ALPHA_4_BETA_1]).read()
    assert (balance.samples, balance.alpha) == (2, 3.0)


eighths = st.integers(-40, 40).map(lambda number: number / 8)  # exact in float32


@given(st.integers(1, 6), st.lists(st.tuples(eighths, eighths, eighths), min_size=1, max_size=15))
@settings(deadline=None, max_examples=150)
def test_any_measurements_agree_with_the_definition(size, samples):
    balance = filled(size, samples).read()
    last = samples[-size:]
    alphas, betas = [real - old for real, old, _ in last], [new - old for _, old, new in last]
    error = stdev(alphas) / len(last) ** 0.5 if len(last) > 1 else 0.0
    assert balance.samples == len(last)
    assert (balance.alpha, balance.beta) == pytest.approx((mean(alphas), mean(betas)), abs=1e-12)
    if not math.isclose(mean(alphas), 2 * error, abs_tol=1e-9) or error == 0:
        assert (balance.ratio is not None) == (mean(alphas) > 2 * error)
    if balance.ratio is not None:
        assert balance.ratio == pytest.approx(sum(betas) / sum(alphas), rel=1e-12)
    assert (balance.ratio is None) == bool(balance.reason)


# ---- undecided --------------------------------------------------------------------------------------


def test_an_empty_window_is_undecided():
    balance = BalanceWindow(4).read()
    assert balance.ratio is None
    assert balance.samples == 0
    assert balance.reason == "nothing was measured yet"
    assert all(math.isnan(part) for part in (balance.alpha, balance.beta, balance.real, balance.fake))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("alpha", [0.0, -0.25])
def test_alpha_that_is_not_positive_is_undecided(alpha, estimator):
    balance = filled(3, [(1 + alpha, 1.0, 1.5)], estimator).read()
    assert balance.ratio is None
    assert (balance.alpha, balance.beta) == (alpha, 0.5)
    assert "does not clearly tell real from fake" in balance.reason
    assert f"alpha = {alpha:g}" in balance.reason


def test_real_scores_clearly_below_those_of_fakes_are_named():
    balance = filled(4, [(0.0, 1.0, 0.8), (0.1, 1.0, 0.8), (0.0, 1.1, 0.8)]).read()
    assert balance.ratio is None
    assert "scores real images lower than generated ones: alpha = -1 " in balance.reason
    assert "balance_scores" in balance.reason


def test_a_negative_alpha_with_a_negative_beta_is_not_a_positive_ratio():
    assert with_alphas(-1.0, -1.0, beta=-0.5).read().ratio is None


def test_alpha_within_two_standard_errors_of_zero_is_undecided():
    balance = with_alphas(0.0, 2.0).read()  # mean 1, standard deviation sqrt(2), standard error 1
    assert balance.ratio is None
    assert (balance.alpha, balance.beta) == (1.0, 0.5)
    assert "alpha = 1 +- 1" in balance.reason


def test_two_standard_errors_exactly_are_not_clearly_positive():
    # Mean 2, variance (1 + 1) / 1 = 2, standard error sqrt(2 / 2) = 1.
    assert with_alphas(1.0, 3.0).read().ratio is None


def test_more_than_two_standard_errors_are_decided():
    # Mean 2.25, standard error 1.
    balance = with_alphas(1.25, 3.25).read()
    assert balance.ratio == 0.5 / 2.25
    assert balance.reason == ""


def test_more_measurements_make_a_noisy_alpha_clear():
    # The standard error of 8 samples of 0 and 2 is sqrt(8 / 7 / 8) = 0.38: mean 1 is clear.
    assert with_alphas(*[0.0, 2.0] * 4).read().ratio == 0.5


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_undecided_while_it_is_in_the_window(value, place):
    bad = list(ALPHA_2_BETA_1)
    bad[place] = value
    window = filled(2, [ALPHA_4_BETA_1, bad])
    assert window.read().ratio is None
    assert window.read().reason == "a score is not finite"
    window.add(measurement(torch.tensor(ALPHA_2_BETA_1)))
    assert window.read().ratio is None
    window.add(measurement(torch.tensor(ALPHA_4_BETA_1)))
    assert window.read().ratio == 1 / 3


@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_mean_of_ratios_is_undecided_where_one_alpha_is_zero(beta):
    # Alphas 0, 4, 4, 4: mean 3, standard error sqrt(12 / 3 / 4) = 1, so alpha itself is clear.
    samples = [(1 + alpha, 1.0, 1 + beta) for alpha in (0.0, 4.0, 4.0, 4.0)]
    balance = filled(4, samples, "mean_of_ratios").read()
    assert balance.ratio is None
    assert balance.reason == "a single measurement has alpha = 0"
    assert filled(4, samples).read().ratio == beta / 3


# ---- resizing ---------------------------------------------------------------------------------------


def numbered(size, numbers):
    """A window of samples that are recognised by their real score, a power of 2."""
    return filled(size, [(2.0**number, 0.0, 0.0) for number in numbers])


def contents(window):
    """The numbers of the samples in a `numbered` window: the bits of the sum of their real scores."""
    balance = window.read()
    total = round(balance.real * balance.samples)
    return {number for number in range(total.bit_length()) if total >> number & 1}


@pytest.mark.parametrize("added", [2, 4, 5, 6, 7, 8, 11])
@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_resizing_keeps_the_last_measurements_in_the_order_they_came(added, size):
    window = numbered(4, range(added))
    window.resize(size)
    expected = list(range(added))[-4:][-size:]
    assert contents(window) == set(expected)
    # What is added then pushes out the oldest first.
    for number in range(20, 20 + size + 1):
        window.add(measurement(torch.tensor([2.0**number, 0.0, 0.0])))
        expected = [*expected, number][-size:]
        assert contents(window) == set(expected)


@given(
    st.integers(1, 5),
    st.lists(st.one_of(st.just("add"), st.integers(1, 6)), max_size=16),
)
@settings(deadline=None, max_examples=150)
def test_any_mixture_of_adding_and_resizing_keeps_the_last_ones(size, actions):
    window = BalanceWindow(size)
    kept = []
    for number, action in enumerate(actions):
        if action == "add":
            window.add(measurement(torch.tensor([2.0**number, 0.0, 0.0])))
            kept = [*kept, number][-size:]
        else:
            size = action
            window.resize(size)
            kept = kept[-size:]
        assert window.read().samples == len(kept)
        assert not kept or contents(window) == set(kept)


# ---- saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("added", [0, 2, 3, 5])
def test_a_saved_window_resumes_identically(added, estimator):
    samples = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)) + torch.tensor([5.0, 0.0, 1.0])
    window = filled(3, samples[:added].tolist(), estimator)
    resumed = BalanceWindow(7, estimator)
    resumed.load_state_dict(saved_and_loaded(window.state_dict()))
    assert repr(resumed.read()) == repr(window.read())  # nan is not equal to itself, but looks the same
    for sample in samples[added:]:
        window.add(measurement(sample))
        resumed.add(measurement(sample))
        assert resumed.read() == window.read()
    assert window.read().ratio is not None


def test_what_was_saved_does_not_change_with_the_window():
    window = filled(2, [ALPHA_2_BETA_1, ALPHA_4_BETA_1])
    state = window.state_dict()
    window.add(measurement(torch.tensor([50.0, 0.0, 0.0])))
    resumed = BalanceWindow(2)
    resumed.load_state_dict(state)
    assert resumed.read().ratio == 1 / 3
    resumed.add(measurement(torch.tensor([50.0, 0.0, 0.0])))
    again = BalanceWindow(2)
    again.load_state_dict(state)
    assert again.read().ratio == 1 / 3


def test_missing_measurements_let_older_ones_leave():
    window = BalanceWindow(3)
    window.add_missing()
    assert window.read().reason == "nothing was measured yet"
    window.add(torch.tensor([4.0, 2.0, 3.0, 1.0]))
    window.add_missing()
    window.add(torch.tensor([4.0, 0.0, 1.0, -1.0]))
    balance = window.read()
    assert (balance.samples, balance.real, balance.fake, balance.ratio, balance.real_sign) == (2, 4, 1, 1 / 3, 0)
    again = BalanceWindow(3)
    again.load_state_dict(window.state_dict())
    again.add_missing()
    assert (again.read().samples, again.read().fake, again.read().ratio) == (1, 0, 0.25)
    for _ in range(2):
        again.add_missing()
    balance = again.read()
    assert (balance.samples, balance.ratio, balance.reason) == (0, None, "nothing was measured")
    assert not balance.scores_are_constant
    assert not balance.at_chance
