import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import (
    FIRST,
    SECOND,
    assert_consistent,
    copies,
    equal,
    gradients,
    masks_of,
    parameters,
    three_layers,
    two_layers,
    with_masks,
)
from torch import nn

from lightning_ddst.sparsity import DISTRIBUTIONS, MaskedNetwork, allocate, growth_rule

# ---- masks at the start --------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("density", [0.05, 0.1, 0.37, 0.5, 0.999, 1.0])
def test_masks_are_drawn_with_the_distributions_exact_counts(distribution, density):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 4), nn.Linear(20, 10))
    sparse = MaskedNetwork(network, density, distribution=distribution)
    shapes = [(8, 3, 3, 3), (8, 4, 4, 4), (10, 20)]
    assert list(sparse.layer_counts.values()) == allocate(shapes, density, distribution)
    assert list(sparse.layer_counts) == ["0.weight", "2.weight", "3.weight"]
    assert sparse.active == round(density * (216 + 512 + 200))
    assert_consistent(sparse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density=0\.0 must be in \(0, 1\]"),
        ({"density": 1.2}, r"density=1\.2 must be in \(0, 1\]"),
        ({"layer_floor": 0.0}, r"layer_floor=0\.0 must be in \(0, 1\]"),
        ({"distribution": "even"}, "distribution='even' is unknown; allowed are uniform, er, erk"),
        ({"scope": "row"}, "scope='row' is unknown; allowed are global, layer"),
        ({"growth": "luck"}, "growth='luck' .*random, gradient, momentum"),
        # 14 weights: 0.1 of them is 1, and 2 / 14 = 0.1429.
        ({"density": 0.1}, r"density=0\.1 leaves 1 .* 2 layers.*at least 0\.14"),
    ],
)
def test_arguments_outside_what_is_allowed_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedNetwork(two_layers(), **{"density": 0.5, **options})


# ---- pruning by magnitude --------------------------------------------------------------------------------


def test_global_pruning_takes_the_smallest_of_all_layers():
    sparse = MaskedNetwork(two_layers(), 1.0)
    sparse.resize(8 / 14)
    # The six smallest magnitudes are 0.1, 0.2, 0.3, 0.5, 1 and 2.
    assert masks_of(sparse) == [[[0, 0, 1, 1], [0, 1, 1, 1]], [[0, 1], [1, 0], [0, 1]]]
    assert sparse.network[0].weight.tolist() == [[0.0, 0.0, 3.0, -4.0], [0.0, 6.0, -7.0, 8.0]]
    assert sparse.network[1].weight.tolist() == [[0.0, -9.0], [10.0, 0.0], [0.0, 11.0]]


def test_pruning_by_layer_keeps_to_the_distribution():
    sparse = MaskedNetwork(two_layers(), 1.0, scope="layer")
    sparse.resize(8 / 14)
    # 8 in proportion 6 : 5 are 4.36 and 3.64, so 4 and 4: without 0.5, 1, 2, 3 and without 0.1, 0.2.
    assert sparse.layer_counts == {FIRST: 4, SECOND: 4}
    assert masks_of(sparse) == [[[0, 0, 0, 1], [0, 1, 1, 1]], [[0, 1], [1, 0], [1, 1]]]


def test_of_equal_magnitudes_the_lowest_index_of_the_first_layer_is_pruned():
    network = two_layers()
    with torch.no_grad():
        network[0].weight.fill_(-1.0)
        network[1].weight.fill_(1.0)
    sparse = MaskedNetwork(network, 1.0)
    sparse.resize(11 / 14)
    assert masks_of(sparse) == [[[0, 0, 0, 1], [1, 1, 1, 1]], [[1, 1], [1, 1], [1, 1]]]


def test_inactive_weights_are_not_pruned_again():
    sparse = with_masks(two_layers(), [[0, 1, 0, 1], [0, 1, 0, 1]], [[0, 1], [1, 0], [0, 1]])
    sparse.resize(5 / 14)
    # Active are 2, 4, 6, 8 and 9, 10, 11: without 2 and 4.
    assert masks_of(sparse) == [[[0, 0, 0, 0], [0, 1, 0, 1]], [[0, 1], [1, 0], [0, 1]]]


@pytest.mark.parametrize(("layer_floor", "left"), [(0.25, 25), (0.5, 51), (1.0, 103), (0.001, 1)])
def test_global_pruning_leaves_a_layer_of_small_weights_its_floor(layer_floor, left):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        network[0].weight.mul_(1e-3)
    sparse = MaskedNetwork(network, 1.0, layer_floor=layer_floor)
    sparse.resize(0.1)
    # 2048 weights, 205 active, of which the distribution gives the layers 103 and 102.
    assert sparse.layer_counts == {FIRST: left, SECOND: 205 - left}


def test_exploring_again_and_again_leaves_a_layer_of_small_weights_its_floor():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        network[0].weight.mul_(1e-3)
    sparse = MaskedNetwork(network, 0.1)
    least = int(0.25 * sparse.layer_counts[FIRST])
    for _ in range(10):
        # All growth goes to the second layer.
        sparse.explore(0.5, {FIRST: torch.zeros(32, 32), SECOND: torch.ones(32, 32)})
        assert sparse.layer_counts[FIRST] >= least
    assert sparse.layer_counts[FIRST] == least


# ---- growing ---------------------------------------------------------------------------------------------

FIRST_MASK = [[1, 0, 0, 0], [0, 0, 0, 1]]
SECOND_MASK = [[1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_global_growth_takes_the_largest_gradients_of_all_layers(growth):
    sparse = with_masks(two_layers(), FIRST_MASK, SECOND_MASK, growth=growth)
    # The large gradients of active weights (90, 80, 70) do not count, signs neither.
    sparse.resize(
        6 / 14, gradients([[90.0, 1.0, -5.0, 0.2], [0.3, 2.0, 0.1, 80.0]], [[70.0, 0.0], [-6.0, 4.0], [3, 0]])
    )
    assert masks_of(sparse) == [[[1, 0, 1, 0], [0, 0, 0, 1]], [[1, 0], [1, 1], [0, 0]]]
    assert_consistent(sparse)


def test_growth_by_layer_keeps_to_the_distribution():
    sparse = with_masks(two_layers(), FIRST_MASK, SECOND_MASK, scope="layer")
    # 8 in proportion 6 : 5 are 4 and 4: two more and three more, although the first layer's gradients are larger.
    sparse.resize(8 / 14, gradients([[0.0, 50.0, 60.0, 70.0], [0.0, 80.0, 90.0, 0.0]], [[0.0, 1.0], [2.0, 3], [4, 5]]))
    assert masks_of(sparse) == [[[1, 0, 0, 0], [0, 1, 1, 1]], [[1, 0], [0, 1], [1, 1]]]


def test_random_growth_takes_the_largest_draws_of_the_networks_generator():
    sparse = with_masks(two_layers(), FIRST_MASK, SECOND_MASK, growth="random", seed=5)
    sparse.resize(7 / 14)
    generator = torch.Generator().manual_seed(5)
    draws = torch.cat(
        [torch.rand(2, 4, generator=generator).flatten(), torch.rand(3, 2, generator=generator).flatten()]
    )
    active = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    for place in draws.masked_fill(active.bool(), -1).argsort(descending=True)[:4]:
        active[place] = 1
    assert torch.cat([mask.flatten() for mask in sparse.masks.values()]).int().tolist() == active.tolist()


def test_random_growth_reaches_every_inactive_weight_about_equally_often():
    grown = torch.zeros(2, 4)
    for seed in range(400):
        sparse = with_masks(nn.Linear(4, 2), [[1, 0, 0, 0], [0, 0, 0, 1]], growth="random", seed=seed)
        sparse.resize(0.5)
        grown += sparse.masks["weight"]
    # 2 of 6 are grown: 133 of 400 times each; 4 standard deviations are 38.
    assert grown[0, 0] == grown[1, 3] == 400
    assert ((grown.flatten()[1:7] - 400 / 3).abs() < 38).all()


@pytest.mark.parametrize("number", [1, 2, 5, 10])
def test_where_all_gradients_are_zero_exactly_as_many_grow_as_asked_the_first_ones(number):
    sparse = with_masks(two_layers(), FIRST_MASK, [[0, 1], [0, 0], [0, 0]])
    sparse.resize((3 + number) / 14, gradients([[0.0] * 4] * 2, [[0.0] * 2] * 3))
    inactive = [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13]  # flat places, 0 to 7 in the first layer
    grown = set(inactive[:number]) | {0, 7, 9}
    flat = torch.cat([mask.flatten() for mask in sparse.masks.values()])
    assert set(flat.nonzero().flatten().tolist()) == grown
    assert sparse.active == 3 + number


def test_grown_weights_are_zero_whatever_was_pruned_there():
    torch.manual_seed(0)
    sparse = MaskedNetwork(nn.Linear(20, 20), 1.0, growth="random")
    sparse.resize(0.3)
    kept = sparse.masks["weight"].clone()
    values = sparse.network.weight.detach().clone()
    sparse.resize(0.8)
    assert sparse.active == 320
    assert torch.equal(sparse.network.weight, values)
    assert sparse.network.weight[kept].all()


def test_a_grown_weight_starts_from_zero_even_where_something_wrote_meanwhile():
    sparse = with_masks(nn.Linear(4, 2), FIRST_MASK, growth="random")
    with torch.no_grad():
        sparse.network.weight.fill_(5.0)  # as an optimizer does that nobody holds back
    grown = ~sparse.masks["weight"]
    sparse.resize(1.0)
    assert not sparse.network.weight[grown].any()
    assert (sparse.network.weight[~grown] == 5).all()


def test_a_rule_of_ones_own_is_named_like_the_others(registered):
    @growth_rule("last")
    def last_first(layer):
        return torch.arange(float(layer.weight.numel())).view_as(layer.weight)

    sparse = with_masks(two_layers(), FIRST_MASK, SECOND_MASK, growth="last")
    sparse.resize(5 / 14)
    # The inactive places are 1 to 6 in the first layer and 1 to 5 in the second: the highest two are 6, and 5 or 5.
    assert sparse.active == 5
    assert masks_of(sparse) == [[[1, 0, 0, 0], [0, 1, 1, 1]], [[1, 0], [0, 0], [0, 0]]]


def test_a_rule_sees_masked_weights_also_while_exploring(registered):
    seen = []

    @growth_rule("watching")
    def watching(layer):
        seen.append((layer.weight.clone(), layer.mask.clone(), layer.gradient))
        return torch.zeros_like(layer.weight)

    sparse = with_masks(nn.Linear(4, 2), FIRST_MASK, growth="watching")
    sparse.resize(0.5)
    with torch.no_grad():
        sparse.network.weight.copy_(sparse.masks["weight"])
    sparse.explore(0.25)
    assert [int(mask.sum()) for _, mask, _ in seen] == [2, 4]  # it is asked before 1 of the 4 is pruned
    for weight, mask, gradient in seen:
        assert not weight[~mask].any()
        assert gradient.numel() == 0


@pytest.mark.parametrize("score", [math.nan, -math.inf])
def test_scores_that_cannot_be_compared_are_rejected_and_nothing_changes(registered, score):
    growth_rule("broken")(lambda layer: torch.full_like(layer.weight, score))
    sparse = with_masks(two_layers(), FIRST_MASK, SECOND_MASK, growth="broken")
    with pytest.raises(ValueError, match=FIRST):
        sparse.resize(0.5)
    assert masks_of(sparse) == [FIRST_MASK, SECOND_MASK]
    assert sparse.active == 3


@pytest.mark.parametrize("given", [None, {}, {FIRST: torch.ones(2, 4)}])
def test_growth_without_the_gradients_it_needs_is_rejected_and_nothing_changes(given):
    sparse = with_masks(two_layers(), FIRST_MASK, SECOND_MASK)
    before = parameters(sparse)
    missing = SECOND if given else FIRST
    with pytest.raises(ValueError, match=rf"dense gradient of '{missing}'"):
        sparse.resize(0.6, given)
    assert sparse.target == 0.5
    assert masks_of(sparse) == [FIRST_MASK, SECOND_MASK]
    assert sparse.active == 3
    assert equal(parameters(sparse), before)


@pytest.mark.parametrize(
    "given",
    [None, {FIRST: torch.ones(2, 4)}, gradients([[0.0] * 4, [0.0, math.nan, 0.0, 0.0]], [[0.0] * 2] * 3)],
    ids=["none", "one missing", "not finite"],
)
def test_exploring_without_the_gradients_it_needs_is_rejected_and_nothing_changes(given):
    sparse = with_masks(two_layers(), [[1, 1, 1, 1], [0, 0, 0, 1]], SECOND_MASK)
    before, weights = masks_of(sparse), parameters(sparse)
    with pytest.raises(ValueError, match=FIRST if given is None or SECOND in given else SECOND):
        sparse.explore(0.5, given)
    assert masks_of(sparse) == before
    assert equal(parameters(sparse), weights)
    assert sparse.active == 6


# ---- exploring ---------------------------------------------------------------------------------------------


def test_exploring_prunes_the_smallest_and_grows_as_many_by_gradient():
    sparse = with_masks(two_layers(), [[1, 1, 1, 1], [0, 0, 0, 0]], [[1, 1], [0, 0], [0, 0]])
    number = sparse.explore(0.5, gradients([[0.0] * 4, [0.0, 7.0, 0.0, -9.0]], [[0.0, 0.0], [0.0, 8.0], [0.0, 6.0]]))
    # Active are 1, 2, 3, 4 and 0.1, 9: without the half 0.1, 1 and 2; then the largest of 7, 9, 8, 6 grow.
    assert number == 3
    assert masks_of(sparse) == [[[0, 0, 1, 1], [0, 1, 0, 1]], [[0, 1], [0, 1], [0, 0]]]
    assert sparse.network[0].weight.tolist() == [[0.0, 0.0, 3.0, -4.0], [0.0] * 4]
    assert sparse.network[1].weight.tolist() == [[0.0, -9.0], [0.0, 0.0], [0.0, 0.0]]


def test_exploring_by_layer_keeps_every_layers_count():
    sparse = with_masks(two_layers(), [[1, 1, 1, 1], [0, 0, 0, 0]], [[1, 1], [0, 1], [0, 0]], scope="layer")
    number = sparse.explore(0.5, gradients([[0.0] * 4, [1.0, 2.0, 3.0, 0.0]], [[0.0, 0.0], [50.0, 0.0], [60.0, 40.0]]))
    # Two of four (1 and 2), and one of three (0.1).
    assert number == 3
    assert masks_of(sparse) == [[[0, 0, 1, 1], [0, 1, 1, 0]], [[0, 1], [0, 1], [1, 0]]]


def test_a_weight_pruned_just_now_may_grow_again_and_then_starts_from_zero():
    sparse = with_masks(nn.Linear(4, 2), [[1, 1, 1, 1], [0, 0, 0, 0]])
    with torch.no_grad():
        sparse.network.weight[0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert sparse.explore(0.5, {"weight": torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]])}) == 2
    assert masks_of(sparse) == [[[1, 0, 1, 1], [0, 1, 0, 0]]]
    assert sparse.network.weight.tolist() == [[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_no_more_is_explored_than_there_is_inactive(scope):
    torch.manual_seed(0)
    sparse = MaskedNetwork(nn.Linear(10, 10), 0.9, scope=scope, growth="random")
    assert sparse.explore(0.5) == 10
    assert sparse.active == 90
    assert_consistent(sparse)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_exploring_a_dense_network_does_nothing(scope, growth):
    sparse = MaskedNetwork(two_layers(), 1.0, scope=scope, growth=growth)
    changes = []
    sparse.listeners.append(lambda *_: changes.append(1))
    before = parameters(sparse)
    assert sparse.explore(0.5) == 0
    assert equal(parameters(sparse), before)
    assert sparse.density == 1.0
    assert not changes


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_exploring_less_than_one_weight_does_nothing(rate):
    sparse = with_masks(two_layers(), [[1, 1, 1, 1], [0, 0, 0, 0]], [[1, 1], [0, 0], [0, 0]])
    before = masks_of(sparse)
    assert sparse.explore(rate) == 0  # of 6 active weights
    assert masks_of(sparse) == before


# ---- resizing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_resizing_to_the_same_density_does_nothing(scope, density):
    sparse = MaskedNetwork(two_layers(), density, scope=scope, growth="random")
    changes = []
    sparse.listeners.append(lambda *_: changes.append(1))
    before, weights, state = masks_of(sparse), parameters(sparse), sparse.state_dict()
    sparse.resize(density)
    assert masks_of(sparse) == before
    assert equal(parameters(sparse), weights)
    assert torch.equal(sparse.state_dict()["rng"], state["rng"])
    assert not changes


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_resizing_only_grows_or_only_prunes(scope):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 30), nn.Linear(30, 5))
    sparse = MaskedNetwork(network, 0.3, scope=scope, growth="random")
    for density in (0.35, 0.8, 1.0, 0.6, 0.31, 0.05):
        before, active = copies(sparse), sparse.active
        sparse.resize(density)
        assert sparse.active == round(density * 650)
        for name, mask in sparse.masks.items():
            gone, new = before[name] & ~mask, mask & ~before[name]
            assert not (gone if sparse.active > active else new).any()
        assert_consistent(sparse)


def test_resizing_by_layer_follows_the_distribution():
    sparse = MaskedNetwork(
        nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 30), nn.Linear(30, 5)), 0.2, scope="layer", growth="random"
    )
    for density in (0.3, 0.5, 0.25, 0.1):
        sparse.resize(density)
        assert list(sparse.layer_counts.values()) == allocate([(10, 20), (30, 10), (5, 30)], density)
        assert sparse.layer_counts == sparse.allocation(density)


def test_resizing_by_layer_never_takes_back_what_a_layer_has_beyond_its_share():
    sparse = with_masks(two_layers(), [[1, 1, 1, 1], [1, 1, 1, 0]], SECOND_MASK, scope="layer", growth="random")
    # 10 in proportion 6 : 5 are 5 and 5; the first layer has 7 already, so the second gets 3.
    sparse.resize(10 / 14)
    assert sparse.layer_counts == {FIRST: 7, SECOND: 3}
    sparse = with_masks(two_layers(), [[1, 1, 1, 1], [1, 1, 1, 0]], SECOND_MASK, scope="layer", growth="random")
    # 4 are 2 and 2; the second has only 1, so the first keeps 3.
    sparse.resize(4 / 14)
    assert sparse.layer_counts == {FIRST: 3, SECOND: 1}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    ("density", "message"),
    [
        (0.0, r"density=0\.0 must be in \(0, 1\]"),
        (1.5, r"density=1\.5 must be in \(0, 1\]"),
        (0.1, r"density=0\.1 leaves 1 .* 2 layers.*at least 0\.14"),
    ],
)
def test_an_impossible_density_is_rejected_and_nothing_changes(scope, density, message):
    sparse = MaskedNetwork(two_layers(), 0.5, scope=scope, growth="random")
    before = masks_of(sparse)
    with pytest.raises(ValueError, match=message):
        sparse.resize(density)
    assert masks_of(sparse) == before
    assert sparse.target == 0.5


# ---- any sequence of changes ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    scope=st.sampled_from(["global", "layer"]),
    growth=st.sampled_from(["random", "gradient"]),
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    layer_floor=st.floats(0.01, 1),
    start=st.floats(0.06, 1),
    changes=st.lists(
        st.one_of(
            st.tuples(st.just("resize"), st.floats(0.06, 1)),
            st.tuples(st.just("explore"), st.floats(0, 1)),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 1000),
)
def test_any_sequence_of_changes_keeps_counts_exact(scope, growth, distribution, layer_floor, start, changes, seed):
    # 6*8 + 4*6*2*2/2 + 5*3*3 + 3 = 48 + 48 + 45 + 3 = 144 weights; 0.06 of them is 9.
    network = nn.ModuleList(
        [nn.Linear(8, 6), nn.Conv2d(6, 8, 2, groups=2), nn.ConvTranspose1d(5, 3, 3), nn.Linear(3, 1, bias=False)]
    )
    draw = torch.Generator().manual_seed(seed)
    sparse = MaskedNetwork(
        network, start, scope=scope, growth=growth, distribution=distribution, layer_floor=layer_floor, seed=seed
    )
    total = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    target = start
    assert sparse.active == round(target * total)
    for kind, value in changes:
        # Training moves active weights, layers by very different amounts, and some of them to zero.
        arriving = {}
        with torch.no_grad():
            for place, (name, weight) in enumerate(sparse.weights.items()):
                new = torch.randn(weight.parameter.shape, generator=draw).mul(10.0**-place).round(decimals=2)
                weight.parameter.copy_(new * sparse.masks[name])
                arriving[name] = torch.randn(new.shape, generator=draw).relu()
        before = sparse.layer_counts
        if kind == "resize":
            sparse.resize(value, arriving)
            target = value
        else:
            sparse.explore(value, arriving)
            if scope == "layer":
                assert sparse.layer_counts == before
        assert sparse.active == round(target * total)
        assert_consistent(sparse)


def test_a_layer_of_given_density_keeps_it_and_the_others_share_what_is_left():
    sparse = MaskedNetwork(three_layers(), 0.5, layer_densities={"1": 1.0, "Linear": 0.25}, growth="random")
    # 13 of 26 active: 6 of 6 in "1", which comes first; 2 of 8 in the other Linear; 5 are left for the Conv1d.
    assert list(sparse.layer_counts.values()) == [2, 6, 5]
    for density, last in ((0.7, 10), (0.05, 1), (0.4, 2), (1.0, 12), (0.35, 1), (0.5, 5)):
        sparse.resize(density)
        assert list(sparse.layer_counts.values()) == [2, 6, last]
        assert sparse.target == {0.05: 9 / 26, 1.0: 20 / 26}.get(density, density)  # what can be reached
        assert_consistent(sparse)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_layer_of_given_density_explores_by_itself(scope):
    sparse = MaskedNetwork(three_layers(), 0.5, layer_densities={"1": 0.5}, growth="random", scope=scope)
    counts = sparse.layer_counts
    assert counts["1.weight"] == 3
    first = copies(sparse)["1.weight"]
    seen = set()
    for _ in range(20):
        sparse.explore(0.4)  # int(0.4 * 3) = 1 of its three
        assert sparse.layer_counts["1.weight"] == 3
        seen.add(tuple(sparse.masks["1.weight"].flatten().tolist()))
    assert len(seen) > 1
    assert sparse.active == sum(counts.values())
    assert not torch.equal(first, torch.ones_like(first))


def test_a_small_layer_of_given_density_does_not_lose_to_larger_weights():
    # Without it the smallest magnitudes, all in layer 0, would be pruned first.
    sparse = MaskedNetwork(three_layers(), 20 / 26, initial="magnitude", layer_densities={"0": 0.75})
    assert list(sparse.layer_counts.values()) == [6, 2, 12]  # 4 of the 6 from the layer with the next smallest
    free = MaskedNetwork(three_layers(), 20 / 26, initial="magnitude")
    assert list(free.layer_counts.values()) == [2, 6, 12]


@pytest.mark.parametrize(
    ("densities", "density", "message"),
    [
        ({"0": 1.5}, 0.5, r"layer_densities\['0'\]=1\.5 must be in \(0, 1\]"),
        ({"0": 0.0}, 0.5, r"layer_densities\['0'\]=0\.0 must be in \(0, 1\]"),
        ({"*": 0.5}, 0.7, "density=0.7 needs 18 active weights.*given densities"),
        ({"Conv1d": 1.0}, 0.5, "density=0.5 leaves 13 .* 3 layers, less than 1 .* 12 "),
    ],
)
def test_impossible_densities_are_rejected(densities, density, message):
    with pytest.raises(ValueError, match=message):
        MaskedNetwork(three_layers(), density, layer_densities=densities)


def test_first_masks_by_magnitude_keep_the_largest_weights_of_all_layers():
    # 8 + 6 + 12 weights of magnitudes 1 to 26; 13 stay. Floors of a quarter of ERK's counts (at most 6, 5 and 7,
    # of 13 in proportion 6 to 5 to 7) leave layer 0 its largest one and layer 1 its largest one.
    sparse = MaskedNetwork(three_layers(), 0.5, initial="magnitude")
    assert masks_of(sparse)[0] == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert masks_of(sparse)[1] == [[0, 0], [0, 0], [0, 1]]
    assert sparse.layer_counts["2.weight"] == 11
    assert not sparse.masks["2.weight"].flatten()[0]
    assert torch.equal(sparse.network[0].weight[1, 3].detach(), torch.tensor(-8.0))
    assert_consistent(sparse)


def test_first_masks_by_magnitude_layer_by_layer_have_the_distributions_counts():
    random = MaskedNetwork(three_layers(), 0.5, scope="layer", distribution="uniform")
    sparse = MaskedNetwork(three_layers(), 0.5, scope="layer", distribution="uniform", initial="magnitude")
    assert sparse.layer_counts == random.layer_counts == {"0.weight": 4, "1.weight": 3, "2.weight": 6}
    for mask in sparse.masks.values():
        size = mask.numel()
        assert mask.flatten().tolist() == [False] * (size // 2) + [True] * (size // 2)


def test_erk_counts_outputs_inputs_and_the_kernel_of_a_modulated_convolution_once():
    modulated = nn.Module()
    modulated.weight = nn.Parameter(torch.randn(1, 4, 2, 3, 3))
    sparse = MaskedNetwork(nn.Sequential(modulated, nn.Linear(4, 6)), 22 / 96)
    assert sparse.layer_counts == {"0.weight": 12, "1.weight": 10}  # 4 + 2 + 3 + 3 and 6 + 4
