import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.sparsity import DISTRIBUTIONS, allocate
from lightning_ddst.sparsity.allocation import apportion

CONV = (8, 4, 3, 3)  # 288 weights
LINEAR = (10, 32)  # 320 weights


@pytest.mark.parametrize(
    ("distribution", "counts"),
    [
        # 608 weights, so 61 active at density 0.1, in proportion to:
        ("erk", [18, 43]),  # 8+4+3+3 = 18 and 10+32 = 42: 18.3 and 42.7
        ("er", [44, 17]),  # (8+4)*9 = 108 and 42: 43.92 and 17.08
        ("uniform", [29, 32]),  # 288 and 320: 28.89 and 32.11
    ],
)
def test_counts_by_hand(distribution, counts):
    assert allocate([CONV, LINEAR], 0.1, distribution) == counts


def test_a_distribution_of_the_users_own_is_known_by_its_name(request):
    request.addfinalizer(lambda: DISTRIBUTIONS.pop("mine", None))
    DISTRIBUTIONS.register("mine")(lambda shape: 1.0 if len(shape) == 4 else 2.0)
    assert allocate([CONV, LINEAR], 0.1, "mine") == [19, 42]  # 288 to 640: 18.9 and 42.1
    DynamicSparsityCallback(0.1, distribution="mine")


def test_erk_is_the_default():
    assert allocate([CONV, LINEAR], 0.1) == [18, 43]


@pytest.mark.parametrize(("total", "counts"), [(7, [3, 2, 2]), (8, [3, 3, 2]), (9, [3, 3, 3])])
def test_of_equal_remainders_the_first_are_rounded_up(total, counts):
    # 7/3 = 2.33 and 8/3 = 2.67 for each of three alike layers.
    assert allocate([(2, 2)] * 3, total / 12, "uniform") == counts


def test_a_layer_whose_share_exceeds_its_size_is_dense_and_the_others_take_the_rest():
    # 404 weights, 202 active; in proportion 4 to 40 the first of the layers would get 18.4 of its 4.
    assert allocate([(2, 2), (20, 20)], 0.5) == [4, 198]
    assert allocate([(20, 20), (2, 2)], 0.5) == [198, 4]


def test_a_layer_that_exceeds_its_size_only_through_the_others_rest_is_dense_too():
    # 4 + 64 + 900 weights, 312 active in proportion 4 : 16 : 60. At first only the first layer exceeds its size
    # (15.6 of 4; 62.4 of 64; 234). The other 308 in proportion 16 : 60 give the second 64.8 of 64.
    assert allocate([(2, 2), (8, 8), (30, 30)], 312 / 968) == [4, 64, 244]


def test_a_floor_lifts_small_shares_at_the_others_expense():
    # 2504 weights, 25 active: 0.04, 8.99 and 15.97 in proportion; the first has only 4 weights.
    assert allocate([(2, 2), (30, 30), (40, 40)], 0.01, "uniform", floor=10) == [4, 10, 11]


def test_every_layer_gets_one_weight_by_default():
    # 10002 weights, 10 active: 0.002 for the first in proportion.
    assert allocate([(1, 2), (100, 100)], 0.001, "uniform") == [1, 9]


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_density_one_is_every_weight(distribution):
    assert allocate([CONV, LINEAR, (1, 1)], 1.0, distribution) == [288, 320, 1]


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_counts_are_exact_in_networks_of_hundreds_of_millions_of_weights(distribution):
    shapes = [(10_007, 10_009), (5_003, 20_011), (512, 512, 3, 3), (3, 7)]
    counts = allocate(shapes, 0.123456789, distribution)
    assert sum(counts) == round(0.123456789 * sum(map(math.prod, shapes)))


def test_a_density_too_low_for_one_weight_a_layer_is_rejected_with_what_is_needed():
    # 12 weights, 1 active, 3 layers: 3/12 is needed.
    with pytest.raises(ValueError, match=r"density=0\.1 leaves 1 .* 3 layers.*at least 0\.25"):
        allocate([(2, 2)] * 3, 0.1)


def test_the_lowest_density_is_allowed():
    assert allocate([(2, 2)] * 3, 0.25) == [1, 1, 1]


def test_the_density_that_the_refusal_names_is_enough():
    # 2700 weights, 303 needed: a share of 0.11222.
    shapes = [(30, 30)] * 3
    with pytest.raises(ValueError, match="at least") as refusal:
        allocate(shapes, 0.05, floor=101)
    needed = float(str(refusal.value).split("at least ")[1].split(" ")[0])
    assert needed == pytest.approx(303 / 2700, rel=0.01)
    assert sum(allocate(shapes, needed, floor=101)) >= 303


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, math.nan])
def test_a_density_outside_its_range_is_rejected(density):
    with pytest.raises(ValueError, match=rf"density={density} must be in \(0, 1\]"):
        allocate([CONV], density)


def test_an_unknown_distribution_is_rejected_with_the_known_ones():
    with pytest.raises(ValueError, match=r"distribution='ERK' is unknown; allowed are uniform, er, erk"):
        allocate([CONV], 0.5, "ERK")


SHAPES = st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=7)


@settings(deadline=None)
@given(SHAPES, st.floats(1e-4, 1), st.sampled_from(sorted(DISTRIBUTIONS)), st.integers(1, 5))
def test_counts_are_exact_bounded_and_in_proportion(shapes, density, distribution, floor):
    sizes = [math.prod(shape) for shape in shapes]
    floors = [min(floor, size) for size in sizes]
    total = round(density * sum(sizes))
    if total < sum(floors):
        with pytest.raises(ValueError, match=rf"density={density} leaves {total} active weights"):
            allocate(shapes, density, distribution, floor)
        return
    counts = allocate(shapes, density, distribution, floor)
    assert sum(counts) == total
    assert all(type(count) is int for count in counts)
    assert all(low <= count <= size for low, count, size in zip(floors, counts, sizes, strict=True))
    # One factor fits all: rounded up it gives no less than any count above its floor, and rounded down no more than
    # any count below its size.
    shares = [DISTRIBUTIONS[distribution](shape) * size for shape, size in zip(shapes, sizes, strict=True)]
    layers = range(len(shapes))
    at_least = max(((counts[i] - 1) / shares[i] for i in layers if counts[i] > floors[i]), default=0)
    at_most = min(((counts[i] + 1) / shares[i] for i in layers if counts[i] < sizes[i]), default=math.inf)
    assert at_least <= at_most * (1 + 1e-9)


@settings(deadline=None)
@given(st.data())
def test_splitting_keeps_any_bounds_and_the_sum(data):
    parts = data.draw(st.integers(1, 8))
    shares = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=parts, max_size=parts))
    lower = data.draw(st.lists(st.integers(0, 50), min_size=parts, max_size=parts))
    upper = [low + data.draw(st.integers(0, 50)) for low in lower]
    total = data.draw(st.integers(sum(lower), sum(upper)))
    counts = apportion(shares, total, lower, upper)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(lower, counts, upper, strict=True))


@pytest.mark.parametrize("total", [2, 10])
def test_splitting_into_bounds_that_cannot_hold_it_is_rejected(total):
    with pytest.raises(ValueError, match=rf"total={total} must be between 3 and 9"):
        apportion([1.0, 2.0], total, [1, 2], [4, 5])


# ---- counts that are decided already -----------------------------------------------------------------------


def test_layers_without_a_given_count_share_what_is_left():
    # 12 weights, 6 active: 4 are given to the first, and 2 are left for two alike layers.
    assert allocate([(2, 2)] * 3, 0.5, given={0: 4}) == [4, 1, 1]
    assert allocate([(2, 2)] * 3, 0.5, given={1: 1}) == [3, 1, 2]
    assert allocate([(2, 2)] * 3, 0.5, given={0: 1, 1: 2, 2: 3}) == [1, 2, 3]


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (5 / 12, r"leaves 5 .* 3 layers, less than 1 .* 4 .*at least 0\.5 here"),
        (1.0, r"density=1\.0 needs 12 active weights.*given densities.*at most 0\.83"),
    ],
)
def test_given_counts_that_leave_too_little_or_too_much_are_rejected(density, message):
    with pytest.raises(ValueError, match=message):
        allocate([(2, 2)] * 3, density, given={0: 4} if density < 1 else {0: 2})


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), None, "dense"])
def test_a_distribution_that_gives_no_positive_number_is_rejected(request, value):
    request.addfinalizer(lambda: DISTRIBUTIONS.pop("odd"))
    DISTRIBUTIONS.register("odd")(lambda shape: value)
    with pytest.raises(ValueError, match=rf"distribution='odd' returned {value!r} for a weight of shape \(2, 3\)"):
        allocate([(2, 3)], 0.5, "odd")
