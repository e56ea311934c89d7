import math

import pytest

from lightning_ddst.utils.validation import check_choice, check_count, check_density, check_rate


@pytest.mark.parametrize("value", [1e-9, 0.5, 1, 1.0])
def test_a_density_above_zero_and_up_to_one_passes(value):
    check_density("density", value)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, 10, math.nan, math.inf, -math.inf])
def test_any_other_density_is_rejected_with_its_name_and_value(value):
    with pytest.raises(ValueError, match=rf"^generator_density={value} must be in \(0, 1\]\.$"):
        check_density("generator_density", value)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1, 1.0])
def test_a_rate_from_zero_to_one_passes(value):
    check_rate("rate", value)


@pytest.mark.parametrize("value", [-0.001, 1.001, math.nan, math.inf])
def test_any_other_rate_is_rejected_with_its_name_and_value(value):
    with pytest.raises(ValueError, match=rf"^exploration_rate={value} must be in \[0, 1\]\.$"):
        check_rate("exploration_rate", value)


@pytest.mark.parametrize("value", [1, 2, 10**9])
def test_a_positive_integer_passes_as_a_count(value):
    check_count("interval", value)


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "3", None, math.nan])
def test_other_values_are_rejected_as_a_count(value):
    with pytest.raises(ValueError, match=rf"^interval={value!r} must be an integer, at least 1\.$"):
        check_count("interval", value)


def test_a_choice_that_is_allowed_passes():
    check_choice("scope", "layer", ("global", "layer"))
    check_choice("scope", "layer", {"global": 1, "layer": 2})


@pytest.mark.parametrize("value", ["Layer", "", "all"])
def test_an_unknown_choice_is_rejected_with_every_allowed_one(value):
    with pytest.raises(
        ValueError, match=rf"^scope='{value}' is unknown; allowed are global, layer\.( Did you mean 'layer'\?)?$"
    ):
        check_choice("scope", value, ("global", "layer"))


def test_choices_may_be_numbers():
    check_choice("image_size", 48, {32: 1, 48: 2})
    with pytest.raises(ValueError, match=r"^image_size=33 is unknown; allowed are 32, 48\.$"):
        check_choice("image_size", 33, {32: 1, 48: 2})
