import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.sparsity import SCHEDULES, exploration_rate


@pytest.mark.parametrize(
    ("schedule", "progress", "rate"),
    [
        ("cosine", 0.0, 0.8),
        ("cosine", 1 / 3, 0.6),  # 0.5 * (1 + cos 60 degrees) = 0.75
        ("cosine", 0.5, 0.4),
        ("cosine", 2 / 3, 0.2),
        ("linear", 0.0, 0.8),
        ("linear", 0.25, 0.6),
        ("constant", 0.0, 0.8),
        ("constant", 0.7, 0.8),
        ("constant", 1.0, 0.8),
    ],
)
def test_rates_by_hand(schedule, progress, rate):
    assert exploration_rate(0.8, schedule, progress) == pytest.approx(rate, abs=1e-12)


def test_a_schedule_of_the_users_own_is_known_by_its_name(request):
    request.addfinalizer(lambda: SCHEDULES.pop("mine", None))
    SCHEDULES.register("mine")(lambda progress: (1 - progress) ** 2)
    assert exploration_rate(0.8, "mine", 0.5) == pytest.approx(0.2)
    DynamicSparsityCallback(0.1, schedule="mine")


def test_an_unknown_schedule_is_rejected():
    with pytest.raises(ValueError, match=r"schedule='cosin' is unknown; .* Did you mean 'cosine'\?"):
        exploration_rate(0.8, "cosin", 0.5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_falling_rate_ends_at_exactly_zero(schedule):
    assert exploration_rate(0.5, schedule, 1.0) == 0.0


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_progress_outside_the_run_counts_as_its_start_or_end(schedule):
    assert exploration_rate(0.5, schedule, -0.3) == exploration_rate(0.5, schedule, 0.0)
    assert exploration_rate(0.5, schedule, 1.7) == exploration_rate(0.5, schedule, 1.0)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.floats(0, 1),
    st.floats(-0.5, 1.5),
    st.floats(-0.5, 1.5),
)
def test_a_rate_never_rises_and_stays_between_zero_and_the_initial_one(schedule, initial, one, other):
    early, late = sorted((one, other))
    before, after = (exploration_rate(initial, schedule, progress) for progress in (early, late))
    assert 0 <= after <= before + 1e-15  # rounding of neighbouring cosines
    assert before <= initial


@pytest.mark.parametrize("factor", [1.5, -0.1, float("nan"), None])
def test_a_factor_outside_its_range_is_rejected(request, factor):
    name = "outside"
    request.addfinalizer(lambda: SCHEDULES.pop(name))
    SCHEDULES.register(name)(lambda progress: factor)
    with pytest.raises(ValueError, match=rf"schedule='outside' returned {factor} at progress 0.5"):
        exploration_rate(0.3, name, 0.5)
