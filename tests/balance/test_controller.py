"""Decisions on the discriminator's density, along paths of BR worked out by hand."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ddst.balance import Balance, Decision, DensityController, DensityRamp, RelativeController

UNDECIDED = Balance(None, -0.1, 0.2, 0.0, 0.1, 8, "alpha = -0.1 +- 0.3")


def balanced_at(ratio):
    """Returns the balance of a window; a ratio of None is undecided."""
    return UNDECIDED if ratio is None else Balance(ratio, 1.0, ratio, 1.0, 0.0, 100, "")


def path(controller, density, ratios):
    """(action, density) of one decision after the other, each from the density of the one before."""
    steps = []
    for ratio in ratios:
        decision = controller.decide(balanced_at(ratio), density)
        density = decision.density
        steps.append((decision.action, density))
    return steps


# ---- paths ------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_relaxed_setting():
    controller = DensityController()
    assert controller.bounds == (0.45, 0.55)
    assert (controller.delta, controller.min_density, controller.max_density) == (0.05, 0.05, 1.0)


def test_a_decision_of_an_unknown_action_is_rejected():
    with pytest.raises(ValueError, match="action='growing' is unknown; allowed are grow, prune, explore, hold, undec"):
        Decision("growing", 0.5, "")


@pytest.mark.parametrize(("density", "reason"), [(1.5, ""), (float("nan"), ""), (0.5, None), (0.5, 3.0)])
def test_a_decision_without_a_density_or_a_text_is_rejected(density, reason):
    with pytest.raises(ValueError, match=f"density={density}" if reason == "" else f"reason={reason} must be text"):
        Decision("grow", density, reason)


def test_a_decision_of_numpys_types_has_pythons():
    decision = Decision("hold", np.float64(0.25), np.str_("same"), at_floor=np.bool_(True))
    assert [type(value) for value in (decision.density, decision.reason, decision.at_floor)] == [float, str, bool]
    assert decision == Decision("hold", 0.25, "same", at_floor=True)


def test_up_down_hold_and_undecided():
    ratios = [0.8, 0.56, 0.5, 0.2, None, 0.44, 0.449, 0.551, -0.3]
    assert path(DensityController(), 0.3, ratios) == [
        ("grow", 0.35),
        ("grow", 0.4),
        ("hold", 0.4),
        ("prune", 0.35),
        ("undecided", 0.35),
        ("prune", 0.3),
        ("prune", 0.25),
        ("grow", 0.3),
        ("prune", 0.25),  # a generator that got worse: beta < 0
    ]


def test_a_ratio_at_a_bound_is_held():
    assert path(DensityController(), 0.3, [0.45, 0.55]) == [("hold", 0.3)] * 2


def test_the_smallest_excess_over_a_bound_counts():
    just_above, just_below = math.nextafter(0.55, 1), math.nextafter(0.45, 0)
    assert path(DensityController(), 0.3, [just_above, just_below]) == [("grow", 0.35), ("prune", 0.3)]


def test_a_lower_bound_of_zero_prunes_only_where_the_generator_got_worse():
    controller = DensityController(bounds=(0, 0.5))
    assert path(controller, 0.3, [0.0, -0.01]) == [("hold", 0.3), ("prune", 0.25)]


def test_the_last_step_to_a_limit_is_shorter_than_delta():
    controller = DensityController(delta=0.25, min_density=0.1, max_density=0.9)
    up = path(controller, 0.3, [0.9] * 3)
    assert up == [("grow", 0.55), ("grow", 0.8), ("grow", 0.9)]
    down = path(controller, 0.8, [0.1] * 3)
    assert down == [("prune", 0.55), ("prune", 0.3), ("prune", 0.1)]


def test_relaxed_holds_when_dense():
    assert path(DensityController(delta=0.3), 0.5, [0.9] * 4) == [
        ("grow", 0.8),
        ("grow", 1.0),
        ("hold", 1.0),
        ("hold", 1.0),
    ]
    reason = DensityController().decide(balanced_at(0.9), 1.0).reason
    assert "BR 0.900 > 0.55" in reason
    assert "dense" in reason


def test_strict_explores_at_its_largest_density():
    controller = DensityController(max_density=0.5)
    ratios = [0.9, 0.9, 0.9, 0.5, 0.9, None, 0.4, 0.6, 0.6]
    assert path(controller, 0.42, ratios) == [
        ("grow", 0.47),
        ("grow", 0.5),
        ("explore", 0.5),
        ("hold", 0.5),
        ("explore", 0.5),
        ("undecided", 0.5),
        ("prune", 0.45),
        ("grow", 0.5),
        ("explore", 0.5),
    ]
    reason = controller.decide(balanced_at(0.9), 0.5).reason
    assert "BR 0.900 > 0.55" in reason
    assert "0.5" in reason.split("0.55", 1)[1]  # the density, after the bound


def test_the_smallest_density_is_held():
    controller = DensityController(min_density=0.2)
    assert path(controller, 0.27, [0.1] * 4) == [("prune", 0.22), ("prune", 0.2), ("hold", 0.2), ("hold", 0.2)]
    reason = controller.decide(balanced_at(0.1), 0.2).reason
    assert "BR 0.100 < 0.45" in reason
    assert "smallest density 0.2" in reason
    assert controller.decide(balanced_at(0.1), 0.2).at_floor
    assert not any(controller.decide(balanced_at(ratio), 0.2).at_floor for ratio in (0.5, 0.9, None))
    assert not controller.decide(balanced_at(0.1), 0.3).at_floor


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_only_too_weak_a_discriminator_explores(ratio):
    controller = DensityController(min_density=0.5, max_density=0.5)
    assert path(controller, 0.5, [ratio]) == [("hold", 0.5)]


def test_densities_do_not_drift_on_the_way_up_and_down():
    up = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
    controller = DensityController()
    assert path(controller, 0.05, [0.9] * 20) == [("grow", density) for density in up] + [("hold", 1.0)]
    down = [*up[-2::-1], 0.05]
    assert path(controller, 1.0, [0.1] * 20) == [("prune", density) for density in down] + [("hold", 0.05)]


def test_limits_with_many_digits_are_reached_exactly():
    # 2/3 rounds up and 1/3 rounds down, so rounding them would leave the limits.
    controller = DensityController(delta=0.25, min_density=1 / 3, max_density=2 / 3)
    assert path(controller, 0.5, [0.9, 0.9]) == [("grow", 2 / 3), ("explore", 2 / 3)]
    assert path(controller, 0.5, [0.1, 0.1]) == [("prune", 1 / 3), ("hold", 1 / 3)]


# ---- reasons ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "density", "action", "numbers"),
    [
        (0.613, 0.3, "grow", ["0.613", "0.55"]),
        (0.613, 0.8, "explore", ["0.613", "0.55", "0.8"]),
        (0.321, 0.3, "prune", ["0.321", "0.45"]),
        (0.321, 0.1, "hold", ["0.321", "0.45", "0.1"]),
        (0.512, 0.3, "hold", ["0.512", "0.45", "0.55"]),
        (None, 0.3, "undecided", ["-0.1", "0.3"]),
    ],
)
def test_every_reason_holds_the_numbers_compared(ratio, density, action, numbers):
    decision = DensityController(min_density=0.1, max_density=0.8).decide(balanced_at(ratio), density)
    assert decision.action == action
    found = re.findall(r"-?\d+(?:\.\d+)?", decision.reason)
    assert set(numbers) <= set(found)


def test_undecided_passes_on_the_windows_reason():
    assert DensityController().decide(UNDECIDED, 0.3) == Decision("undecided", 0.3, UNDECIDED.reason)


# ---- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (math.nan, 0.5), (0.5,), (0.1, 0.2, 0.3)])
def test_bounds_that_are_no_range_are_rejected(bounds):
    with pytest.raises(ValueError, match=r"bounds=.*lower < upper") as error:
        DensityController(bounds=bounds)
    assert str(bounds) in str(error.value)


@pytest.mark.parametrize("delta", [0, -0.05, 1.01, math.nan])
def test_delta_outside_its_range_is_rejected(delta):
    with pytest.raises(ValueError, match=rf"delta={delta} .*\(0, 1\]"):
        DensityController(delta=delta)


@pytest.mark.parametrize("density", [0, -0.5, 1.01, math.nan])
def test_a_largest_density_outside_its_range_is_rejected(density):
    with pytest.raises(ValueError, match=rf"max_(discriminator_)?density={density} .*\(0, 1\]"):
        DensityController(max_density=density)


@pytest.mark.parametrize("density", [0, -0.1, 0.31, 1.5, math.nan])
def test_a_smallest_density_outside_its_range_is_rejected(density):
    with pytest.raises(ValueError, match=rf"min_(discriminator_)?density={density} .*\(0, .*0\.3\]"):
        DensityController(min_density=density, max_density=0.3)


@pytest.mark.parametrize(
    "allowed",
    [
        {"bounds": (0, 1e-9)},
        {"bounds": (2, 3)},
        {"delta": 1},
        {"max_density": 0.05},
        {"min_density": 1.0, "max_density": 1.0},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(allowed):
    assert DensityController(**allowed)


# ---- what holds for every path ------------------------------------------------------------------------

thousandths = st.integers(1, 1000).map(lambda number: number / 1000)


@st.composite
def runs(draw):
    low, start, high = sorted(draw(st.lists(thousandths, min_size=3, max_size=3)))
    lower, upper = sorted(draw(st.lists(st.integers(0, 100), min_size=2, max_size=2, unique=True)))
    controller = DensityController((lower / 100, upper / 100), draw(thousandths), low, high)
    ratio = st.none() | st.floats(-2, 3) | st.sampled_from(controller.bounds)
    return controller, start, draw(st.lists(ratio, max_size=30))


@given(runs())
def test_every_path_keeps_to_the_limits_and_to_delta(run):
    controller, before, ratios = run
    for ratio in ratios:
        decision = controller.decide(balanced_at(ratio), before)
        after = decision.density
        assert controller.min_density <= after <= controller.max_density
        assert abs(after - before) <= controller.delta + 1e-12
        lower, upper = controller.bounds
        if ratio is None:
            assert decision.action == "undecided"
        elif lower <= ratio <= upper:
            assert decision.action == "hold"
        assert {"grow": after > before, "prune": after < before}.get(decision.action, after == before)
        if decision.action == "grow":
            assert ratio > upper
        if decision.action == "prune":
            assert ratio < lower
        if decision.action == "explore":
            assert ratio > upper
            assert after == controller.max_density < 1
        assert decision.reason
        before = after


# ---- other signals -----------------------------------------------------------------------------------


def signed(real_sign):
    return Balance(0.5, 1.0, 0.5, 1.0, 0.0, 100, "", real_sign=real_sign)


def test_a_signal_that_is_high_for_a_strong_discriminator():
    controller = DensityController((0.5, 0.7), signal="real_sign")
    density, steps = 0.3, []
    for value in [0.4, 0.5, 0.7, 0.71, 1.0, -1.0]:
        decision = controller.decide(signed(value), density)
        density = decision.density
        steps.append((decision.action, density))
    assert steps == [
        ("grow", 0.35),
        ("hold", 0.35),
        ("hold", 0.35),
        ("prune", 0.3),
        ("prune", 0.25),
        ("grow", 0.3),
    ]


def test_reasons_name_the_signal():
    controller = DensityController((0.5, 0.7), signal="real_sign")
    assert controller.decide(signed(0.9), 0.3).reason == "E[sign D(x)] 0.900 > 0.7: the discriminator is too strong"
    assert controller.decide(signed(0.2), 0.3).reason == "E[sign D(x)] 0.200 < 0.5: the discriminator is too weak"


def test_a_signal_that_is_not_known_is_undecided():
    decision = DensityController((0.5, 0.7), signal="real_sign").decide(signed(math.nan), 0.3)
    assert (decision.action, decision.density) == ("undecided", 0.3)
    assert decision.reason == "E[sign D(x)] is undecided"


def test_only_the_balance_ratio_has_no_negative_bounds():
    assert DensityController((-0.5, 0.5), signal="real_sign").bounds == (-0.5, 0.5)
    with pytest.raises(ValueError, match="neither negative"):
        DensityController((-0.5, 0.5))


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)])
def test_a_ramp_does_not_fall(start, end):
    with pytest.raises(ValueError, match=r"start=|end="):
        DensityRamp(start, end)


# ---- without feedback --------------------------------------------------------------------------------


def test_the_ramp_is_a_straight_line_whatever_the_balance():
    ramp = DensityRamp(0.1, 0.6)
    density, steps = 0.1, []
    for progress, ratio in [(0.0, 0.0), (0.1, None), (0.5, 0.1), (0.5, 9.0), (1.0, 0.5), (1.5, 0.5)]:
        decision = ramp.decide(balanced_at(ratio), density, progress)
        density = decision.density
        steps.append((decision.action, density))
    assert steps == [
        ("hold", 0.1),
        ("grow", 0.15),
        ("grow", 0.35),
        ("hold", 0.35),
        ("grow", 0.6),
        ("hold", 0.6),
    ]


# ---- by the highest balance ratio --------------------------------------------------------------------


def followed(controller, density, ratios, share=0.1):
    """(action, density) of decisions that are a share of the run apart."""
    steps = []
    for ratio in ratios:
        balance = balanced_at(ratio)
        controller.observe(balance)
        decision = controller.decide(balance, density, share=share)
        density = decision.density
        steps.append((decision.action, density))
    return steps


def test_steps_follow_how_near_the_ratio_is_to_the_highest():
    # A straight line from 0.1 to 0.9 rises by 0.08 at a time. That at 95 % of the highest and above, nothing at 65 %,
    # as much down at 35 % and below.
    ratios = [0.4, 0.4, 0.4, 0.38, 0.32, 0.26, 0.2, 0.14, 0.04, None, 0.4]
    assert followed(RelativeController((0.1, 0.9)), 0.1, ratios, 0.1) == [
        ("grow", 0.18),
        ("grow", 0.26),
        ("grow", 0.34),
        ("grow", 0.42),
        ("grow", 0.46),
        ("hold", 0.46),
        ("prune", 0.42),
        ("prune", 0.34),
        ("prune", 0.26),
        ("grow", 0.34),
        ("grow", 0.42),
    ]


def test_with_the_ratio_at_its_highest_it_is_a_ramp():
    controller, ramp = RelativeController((0.2, 1.0)), DensityRamp(0.2, 1.0)
    density, other = 0.2, 0.2
    for number in range(1, 51):
        controller.observe(balanced_at(0.3))
        density = controller.decide(balanced_at(0.3), density, number / 50, 1 / 50).density
        other = ramp.decide(balanced_at(0.3), other, number / 50).density
        assert density == pytest.approx(other, abs=1e-6)


def test_the_highest_is_of_medians_of_three_windows():
    controller = RelativeController((0.1, 1.0))
    highest = []
    for ratio in [0.1, 0.3, 0.9, 0.5, None, 0.4, 0.6, 0.6, 0.2]:
        controller.observe(balanced_at(ratio))
        highest.append(controller.readings(balanced_at(0.5)).get("control/lower", 0.0) / 0.65)
    # Medians: none yet, none yet, 0.3, 0.5, as before, 0.5, 0.5, 0.6, 0.6.
    assert highest == pytest.approx([0, 0, 0.3, 0.5, 0.5, 0.5, 0.5, 0.6, 0.6])


def test_a_first_window_that_is_high_by_chance_does_not_count():
    steps = followed(RelativeController((0.1, 1.0)), 0.1, [3.0, 0.5, 0.5, 0.5])
    assert [action for action, _ in steps] == ["grow"] * 4
    assert steps[-1] == ("grow", 0.46)


@pytest.mark.parametrize("delta", [None, 0.1])
def test_the_limits_of_the_density_are_kept_to(delta):
    up = followed(RelativeController((0.2, 1.0), delta), 0.95, [0.4] * 3, 0.5)
    assert up == [("grow", 1.0), ("hold", 1.0), ("hold", 1.0)]
    down = followed(RelativeController((0.2, 0.5), delta), 0.5, [0.4, 0.4, 0.4, *[0.01] * 5], 0.5)
    assert {action for action, _ in down[3:]} == {"prune", "hold"}
    assert down[-1] == ("hold", 0.2)


def test_at_a_largest_density_below_1_it_explores_instead_of_growing():
    steps = followed(RelativeController((0.1, 0.5)), 0.5, [0.4, 0.4, 0.4, 0.3, 0.26, 0.4])
    assert [action for action, _ in steps] == ["explore", "explore", "explore", "explore", "hold", "explore"]


def test_delta_is_the_largest_step():
    assert followed(RelativeController((0.1, 1.0), 0.04), 0.1, [0.4, 0.4, 0.4, 0.32]) == [
        ("grow", 0.14),
        ("grow", 0.18),
        ("grow", 0.22),
        ("grow", 0.24),
    ]


def test_the_density_is_steady_at_another_share_of_the_highest():
    steps = followed(RelativeController((0.1, 0.9), steady=0.5), 0.1, [0.4, 0.4, 0.4, 0.2, 0.14], 0.1)
    assert steps[2:] == [("grow", 0.34), ("hold", 0.34), ("prune", 0.3)]


@pytest.mark.parametrize("steady", [0.0, 1.0])
def test_a_steady_share_is_between_0_and_1(steady):
    with pytest.raises(ValueError, match=rf"steady={steady} must be in \(0, 1\)"):
        RelativeController((0.1, 1.0), steady=steady)


def test_without_a_length_steps_are_the_papers():
    assert followed(RelativeController((0.1, 1.0)), 0.1, [0.4] * 4, 0.0)[-1] == ("grow", 0.3)


def test_a_ratio_that_has_not_been_positive_moves_nothing():
    assert followed(RelativeController((0.1, 1.0)), 0.1, [-0.2, 0.0, -0.1]) == [("undecided", 0.1)] * 3


def test_a_discriminator_at_chance_grows():
    controller = RelativeController((0.1, 0.9))
    assert followed(controller, 0.1, [None] * 3, 0.05) == [("grow", 0.14), ("grow", 0.18), ("grow", 0.22)]
    assert controller.decide(UNDECIDED, 0.1).reason == UNDECIDED.reason


def test_without_finite_measurements_nothing_moves():
    controller = RelativeController((0.1, 1.0))
    none = Balance(None, math.nan, math.nan, math.nan, math.nan, 0, "nothing was measured yet")
    assert controller.decide(none, 0.3) == Decision("undecided", 0.3, none.reason)
    infinite = Balance(None, 1.0, math.inf, 1.0, 0.0, 8, "a score is not finite")
    assert controller.decide(infinite, 0.3) == Decision("undecided", 0.3, infinite.reason)


def test_a_generator_that_gets_worse_prunes():
    assert followed(RelativeController((0.1, 1.0), 0.05), 0.5, [0.4, 0.4, 0.4, -0.1])[-1] == ("prune", 0.6)


def test_reasons_give_the_highest_ratio():
    controller = RelativeController((0.1, 1.0))
    reason = "BR is 0.200, and there is no earlier level yet to compare it with"
    assert controller.decide(balanced_at(0.2), 0.3).reason == reason
    followed(controller, 0.1, [0.5, 0.5, 0.5])
    level = "its highest level so far, 0.500"
    for ratio, words in [
        (-0.1, "BR -0.100 is below 0, and its highest level so far is 0.500"),
        (0.2, f"BR 0.200 is 40% of {level} (below 65%)"),
        (0.4, f"BR 0.400 is 80% of {level} (at least 65%)"),
        (0.5, f"BR 0.500 is 100% of {level} (at least 65%)"),
        (1.015, f"BR 1.015 is above {level}"),
    ]:
        assert controller.decide(balanced_at(ratio), 0.3).reason == words
    assert controller.decide(UNDECIDED, 0.3).reason == UNDECIDED.reason


def test_deciding_twice_gives_the_same_decision():
    controller = RelativeController((0.1, 1.0))
    followed(controller, 0.1, [0.4, 0.6])
    assert controller.decide(balanced_at(0.7), 0.2) == controller.decide(balanced_at(0.7), 0.2)


@given(st.lists(st.floats(0.05, 2.0), max_size=20), st.integers(-6, 6).map(lambda power: 2.0**power))
def test_decisions_do_not_depend_on_the_scale_of_the_ratio(ratios, scale):
    one, other = RelativeController((0.1, 1.0)), RelativeController((0.1, 1.0))
    assert followed(one, 0.3, ratios) == followed(other, 0.3, [scale * ratio for ratio in ratios])


@given(st.lists(st.none() | st.floats(-2, 3), max_size=30), st.lists(thousandths, min_size=3, max_size=3))
def test_every_relative_path_keeps_to_the_limits_and_to_the_ramps_pace(ratios, densities):
    low, before, high = sorted(densities)
    for action, after in followed(RelativeController((low, high)), before, ratios, 0.02):
        assert low <= after <= high
        assert abs(after - before) <= (high - low) * 0.02 + 1e-8
        assert {"grow": after > before, "prune": after < before}.get(action, after == before)
        before = after


@pytest.mark.parametrize("saved_after", [1, 2, 3, 4])
def test_what_was_seen_is_saved(saved_after):
    ratios = [0.2, 0.5, 0.5, 0.8, 0.4]
    first, second = RelativeController((0.1, 1.0)), RelativeController((0.1, 1.0))
    expected = followed(RelativeController((0.1, 1.0)), 0.3, ratios)
    begun = followed(first, 0.3, ratios[:saved_after])
    second.load_state_dict(first.state_dict())
    assert begun + followed(second, begun[-1][1], ratios[saved_after:]) == expected


@pytest.mark.parametrize(
    ("limits", "delta", "named"),
    [
        ((0.0, 0.5), None, "min_discriminator_density=0"),
        ((0.5, 1.5), None, "max_discriminator_density=1.5"),
        ((0.6, 0.5), None, "min_discriminator_density=0.6"),
        ((0.1, 1.0), 0.0, "delta=0.0"),
    ],
)
def test_arguments_outside_what_is_allowed_are_rejected(limits, delta, named):
    with pytest.raises(ValueError, match=named):
        RelativeController(limits, delta)


def test_what_is_logged_of_control():
    controller = RelativeController((0.1, 1.0))
    # TensorBoard's chart needs all three at the same updates, or none.
    assert controller.readings(balanced_at(0.4)) == {}
    followed(controller, 0.1, [0.5, 0.5, 0.5])
    bounds = {"control/lower": 0.325, "control/upper": 0.475}
    assert controller.readings(balanced_at(0.4)) == pytest.approx({"control/signal": 0.4} | bounds)
    assert controller.readings(UNDECIDED) == {}
    assert DensityController().readings(UNDECIDED) == {}
    bounds = {"control/lower": 0.45, "control/upper": 0.55}
    assert DensityController().readings(balanced_at(0.4)) == {"control/signal": 0.4} | bounds
    assert DensityRamp(0.1).readings(balanced_at(0.4)) == {}
