import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_ddst.sparsity import DISTRIBUTIONS, MaskedNetwork, MaskEnforcer, allocate, growth_rule

FIRST, SECOND = "0.weight", "1.weight"
FIRST_WEIGHT = [[1.0, -2.0, 3.0, -4.0], [0.5, 6.0, -7.0, 8.0]]
SECOND_WEIGHT = [[0.1, -9.0], [10.0, 0.2], [-0.3, 11.0]]


def two_layers():
    """8 and 6 weights, so that ERK splits active weights 6 (4+2) to 5 (2+3), as long as neither is full."""
    network = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(FIRST_WEIGHT))
        network[1].weight.copy_(torch.tensor(SECOND_WEIGHT))
    return network


def with_masks(network, *masks, seed=0, **options):
    """A sparse network with masks by hand."""
    names = [name for name, parameter in network.named_parameters() if parameter.dim() > 1]
    state = {
        "target": 0.5,
        "masks": {name: torch.tensor(mask, dtype=torch.bool) for name, mask in zip(names, masks, strict=True)},
        "rng": torch.Generator().manual_seed(seed).get_state(),
    }
    return MaskedNetwork(network, 0.5, state=state, **options)


def masks_of(sparse):
    return [mask.int().tolist() for mask in sparse.masks.values()]


def copies(sparse):
    return {name: mask.clone() for name, mask in sparse.masks.items()}


def gradients(first, second):
    return {FIRST: torch.tensor(first), SECOND: torch.tensor(second)}


def parameters(sparse):
    return [parameter.detach().clone() for parameter in sparse.network.parameters()]


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def assert_consistent(sparse):
    """What must hold at any time."""
    assert all(sparse.parameters[name] is weight.parameter for name, weight in sparse.weights.items())
    assert sparse.parameters.keys() == sparse.weights.keys() == sparse.masks.keys()
    assert sparse.layer_counts == {name: int(mask.sum()) for name, mask in sparse.masks.items()}
    assert sparse.active == sum(sparse.layer_counts.values())
    assert sparse.total == sum(mask.numel() for mask in sparse.masks.values())
    assert sparse.density == sparse.active / sparse.total
    for name, weight in sparse.weights.items():
        assert sparse.masks[name].dtype == torch.bool
        assert sparse.layer_counts[name] >= 1
        assert sparse.layer_densities[name] == sparse.layer_counts[name] / weight.parameter.numel()
        assert not weight.parameter[~sparse.masks[name]].any()


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


def test_drawing_masks_only_zeroes_inactive_weights():
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    sparse = MaskedNetwork(network, 0.4)
    for name, parameter in network.named_parameters():
        expected = before[name] * sparse.masks[name] if name in sparse.masks else before[name]
        assert torch.equal(parameter, expected), name


def test_density_one_changes_nothing():
    network = two_layers()
    sparse = MaskedNetwork(network, 1.0)
    assert all(mask.all() for mask in sparse.masks.values())
    assert network[0].weight.tolist() == FIRST_WEIGHT
    assert sparse.density == 1.0


def test_the_same_seed_draws_the_same_masks_and_another_seed_others():
    one, same, other = (MaskedNetwork(nn.Linear(30, 30), 0.5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.masks["weight"], same.masks["weight"])
    # Two independent masks of density 0.5 agree in half of 900 places; 3 standard deviations are 45.
    assert (one.masks["weight"] == other.masks["weight"]).sum().item() == pytest.approx(450, abs=45)


def test_every_layer_draws_its_own_mask():
    sparse = MaskedNetwork(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30)), 0.5)
    assert not torch.equal(sparse.masks[FIRST], sparse.masks[SECOND])


@pytest.mark.parametrize("bias", [True, False])
def test_masks_do_not_follow_weights_that_were_drawn_from_the_same_seed(bias):
    torch.manual_seed(7)
    network = nn.Sequential(*(nn.Linear(50, 50, bias=bias) for _ in range(3)))
    sparse = MaskedNetwork(network, 0.2, seed=7)
    for name, weight in sparse.weights.items():
        active = weight.parameter[sparse.masks[name]]
        # Of about 500 weights drawn from a symmetric distribution half are positive; 4 standard deviations are 0.09.
        assert (active > 0).float().mean().item() == pytest.approx(0.5, abs=0.09), name


def test_nothing_touches_the_global_random_state():
    network = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    state = torch.get_rng_state()
    sparse = MaskedNetwork(network, 0.3, growth="random")
    sparse.explore(0.5)
    sparse.resize(0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density=0\.0 must be in \(0, 1\]"),
        ({"density": 1.2}, r"density=1\.2 must be in \(0, 1\]"),
        ({"layer_floor": 0.0}, r"layer_floor=0\.0 must be in \(0, 1\]"),
        ({"distribution": "even"}, "distribution='even' is unknown; allowed are uniform, er, erk"),
        ({"scope": "row"}, "scope='row' is unknown; allowed are global, layer"),
        ({"growth": "luck"}, "growth='luck' is unknown; allowed are random, gradient, momentum"),
        # 14 weights: 0.1 of them is 1, and 2 / 14 = 0.1429.
        ({"density": 0.1}, r"density=0\.1 leaves 1 active weights for 2 layers.*at least 0\.14"),
    ],
)
def test_arguments_outside_what_is_allowed_are_refused(options, message):
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
def test_scores_that_cannot_be_compared_are_refused_and_nothing_changes(registered, score):
    growth_rule("broken")(lambda layer: torch.full_like(layer.weight, score))
    sparse = with_masks(two_layers(), FIRST_MASK, SECOND_MASK, growth="broken")
    with pytest.raises(ValueError, match=FIRST):
        sparse.resize(0.5)
    assert masks_of(sparse) == [FIRST_MASK, SECOND_MASK]
    assert sparse.active == 3


@pytest.mark.parametrize("given", [None, {}, {FIRST: torch.ones(2, 4)}])
def test_growth_without_the_gradients_it_needs_is_refused_and_nothing_changes(given):
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
def test_exploring_without_the_gradients_it_needs_is_refused_and_nothing_changes(given):
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


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_outside_its_range_is_refused(rate):
    sparse = MaskedNetwork(two_layers(), 0.5, growth="random")
    with pytest.raises(ValueError, match=rf"rate={rate} must be in \[0, 1\]"):
        sparse.explore(rate)


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
        (0.1, r"density=0\.1 leaves 1 active weights for 2 layers.*at least 0\.14"),
    ],
)
def test_an_impossible_density_is_refused_and_nothing_changes(scope, density, message):
    sparse = MaskedNetwork(two_layers(), 0.5, scope=scope, growth="random")
    before = masks_of(sparse)
    with pytest.raises(ValueError, match=message):
        sparse.resize(density)
    assert masks_of(sparse) == before
    assert sparse.target == 0.5


def test_the_target_is_the_density_last_asked_for_and_the_density_what_there_is():
    sparse = MaskedNetwork(two_layers(), 0.4, growth="random")
    assert (sparse.target, sparse.density) == (0.4, 6 / 14)  # of 5.6 weights
    sparse.resize(0.6)
    assert (sparse.target, sparse.density) == (0.6, 8 / 14)  # of 8.4
    sparse.resize(0.57)
    assert (sparse.target, sparse.density) == (0.57, 8 / 14)  # of 7.98
    sparse.explore(0.5)
    assert (sparse.target, sparse.density) == (0.57, 8 / 14)
    restored = MaskedNetwork(two_layers(), 0.4, state=sparse.state_dict())
    assert (restored.target, restored.density) == (0.57, 8 / 14)


# ---- what others rely on ---------------------------------------------------------------------------------------


def test_masks_change_in_place_and_listeners_hear_of_pruning_once_the_weights_are_zero():
    sparse = MaskedNetwork(two_layers(), 0.5, growth="random")
    held = dict(sparse.masks)
    heard = []

    def listener(*_):
        assert_consistent(sparse)
        heard.append(sparse.active)

    sparse.listeners.append(listener)
    sparse.resize(1.0)
    sparse.resize(4 / 14)
    sparse.explore(0.5)  # 2 of 4 are pruned, then others grow
    sparse.resize(0.9)
    assert heard == [4, 2]
    assert all(sparse.masks[name] is mask for name, mask in held.items())


@pytest.mark.parametrize(
    "norm", [None, nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm], ids=["plain", "old", "new"]
)
def test_a_loss_from_before_a_change_can_still_be_differentiated(norm):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]
    sparse = MaskedNetwork(nn.Sequential(*(layers if norm is None else map(norm, layers))), 1.0, growth="random")
    loss = sparse.network(torch.randn(3, 6)).pow(2).sum()
    sparse.resize(0.5)
    sparse.explore(0.5)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sparse.network.parameters())


def test_neither_modules_nor_parameter_names_change():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.utils.spectral_norm(nn.Linear(4, 4)))
    modules = dict(network.named_modules())
    ids = {name: id(parameter) for name, parameter in network.named_parameters()}
    keys = list(network.state_dict())
    sparse = MaskedNetwork(network, 0.5, growth="random")
    sparse.explore(0.5)
    assert dict(network.named_modules()) == modules
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == ids
    assert list(network.state_dict()) == keys


def test_weights_stored_channels_last_are_masked_alike():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3)).to(memory_format=layout)
        with torch.no_grad():
            for layer in network:
                layer.weight.copy_(layer.weight.sign())  # ties everywhere
        sparse = MaskedNetwork(network, 1.0)
        gradient = {name: weight.parameter.detach().roll(7) for name, weight in sparse.weights.items()}
        sparse.resize(0.4)
        sparse.explore(0.5, gradient)
        sparse.resize(0.6, gradient)
        assert sparse.active == round(0.6 * 432)
        assert_consistent(sparse)
        results.append([mask.contiguous() for mask in sparse.masks.values()])
    assert equal(*results)


def test_double_precision_weights_are_masked_too():
    sparse = MaskedNetwork(nn.Linear(10, 10, dtype=torch.float64), 0.3, growth="random")
    sparse.explore(0.5)
    assert sparse.active == 30
    assert sparse.network.weight.dtype == torch.float64
    assert_consistent(sparse)


# ---- saving ------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def deep(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))


def test_a_saved_network_goes_on_with_the_same_masks_and_the_same_random_growth():
    sparse = MaskedNetwork(deep(), 0.3, growth="random", seed=1)
    sparse.explore(0.5)
    state = through_a_file(sparse.state_dict())
    network = deep()
    network.load_state_dict(sparse.network.state_dict())
    restored = MaskedNetwork(network, 0.9, growth="random", seed=2, state=state)
    assert restored.layer_counts == sparse.layer_counts
    for _ in range(3):
        for one in (sparse, restored):
            one.explore(0.3)
            one.resize(one.density + 0.1)
        assert masks_of(restored) == masks_of(sparse)
    assert restored.density == pytest.approx(0.6, abs=0.01)


def test_restoring_masks_zeroes_the_weights_of_a_fresh_network():
    state = MaskedNetwork(deep(), 0.3).state_dict()
    restored = MaskedNetwork(deep(seed=1), 0.3, state=state)
    assert_consistent(restored)


def test_a_saved_state_is_a_copy():
    sparse = MaskedNetwork(deep(), 0.3, growth="random")
    state = sparse.state_dict()
    before = copies(sparse)
    restored = MaskedNetwork(deep(), 0.3, growth="random", state=state)
    sparse.resize(0.9)
    restored.resize(0.6)
    assert equal(state["masks"].values(), before.values())
    assert sparse.active == round(0.9 * 200)


def test_the_state_of_other_shapes_is_refused_by_the_weights_name():
    state = MaskedNetwork(deep(), 0.3).state_dict()
    with pytest.raises(ValueError, match=r"'2\.weight' is missing or differs in shape"):
        MaskedNetwork(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 9)), 0.3, state=state)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (nn.Sequential(nn.Linear(12, 10)), r"2\.weight"),  # one more was saved
        (nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.Linear(8, 8)), r"3\.weight"),  # one less
    ],
)
def test_the_state_of_other_weights_is_refused_by_the_weights_name(network, name):
    state = MaskedNetwork(deep(), 0.3).state_dict()
    with pytest.raises(ValueError, match=rf"'{name}' is missing or differs in shape"):
        MaskedNetwork(network, 0.3, state=state)


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


# ---- layers left dense, layers of given density, first masks by magnitude --------------------------------------


def three_layers():
    """8, 6 and 12 weights, of magnitudes that rise from layer to layer and within them."""
    network = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3), nn.Conv1d(3, 2, 2))
    value = 0.0
    with torch.no_grad():
        for layer in network:
            for i in range(layer.weight.numel()):
                value += 1
                layer.weight.view(-1)[i] = value * (-1) ** i
    return network


@pytest.mark.parametrize("pattern", ["painter.1", "*.1", "painter.[1]"])
def test_a_dense_layer_is_left_alone_and_in_no_density(pattern):
    network = three_layers()
    before = network[1].weight.detach().clone()
    sparse = MaskedNetwork(network, 0.5, dense_layers=[pattern], name="painter")
    assert list(sparse.masks) == ["0.weight", "2.weight"]
    assert (sparse.total, sparse.active) == (20, 10)
    sparse.resize(0.25)
    sparse.resize(1.0, {name: torch.ones_like(p) for name, p in sparse.parameters.items()})
    assert sparse.density == 1
    assert torch.equal(network[1].weight, before)


def test_layers_are_left_dense_by_their_class():
    assert list(MaskedNetwork(three_layers(), 0.5, dense_layers=["Linear"]).masks) == ["2.weight"]
    with pytest.raises(ValueError, match=r"dense_layers=\['Linear', 'Conv1d'\] leaves nothing to mask"):
        MaskedNetwork(three_layers(), 0.5, dense_layers=["Linear", "Conv1d"])


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
        ({"*": 0.5}, 0.7, "needs 18 active weights, more than layers of given densities allow"),
        ({"Conv1d": 1.0}, 0.5, "leaves 13 active weights for 3 layers, less than 1 a layer beside the 12"),
    ],
)
def test_densities_that_cannot_be_are_refused(densities, density, message):
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


def test_first_masks_of_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="initial='largest' is unknown; allowed are random, magnitude"):
        MaskedNetwork(three_layers(), 0.5, initial="largest")


# ---- coverage and overlap ----------------------------------------------------------------------------


def test_coverage_and_overlap_at_the_start():
    network = MaskedNetwork(nn.Linear(4, 2, bias=False), 0.5)
    assert (network.coverage, network.overlap) == (0.5, 1.0)
    network = MaskedNetwork(nn.Linear(4, 2, bias=False), 0.5, initial="magnitude")
    assert (network.coverage, network.overlap) == (0.5, 1.0)


def test_an_exploration_covers_what_it_grows():
    network = MaskedNetwork(nn.Linear(4, 2, bias=False), 0.5)
    with torch.no_grad():
        network.network.weight[network.masks["weight"]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # The smallest active weight goes, and the inactive one of largest gradient comes.
    gradient = torch.zeros(2, 4)
    gradient[~network.masks["weight"]] = torch.tensor([9.0, 1.0, 1.0, 1.0])
    assert network.explore(0.25, {"weight": gradient}) == 1
    assert network.coverage == 5 / 8
    assert network.overlap == 3 / 5  # 3 stay, 1 went, 1 came
    # What was pruned and grown again in one exploration has not changed.
    gradient = torch.zeros(2, 4)
    smallest = network.network.weight.abs().masked_fill(~network.masks["weight"], 9).argmin()
    gradient.view(-1)[smallest] = 1.0
    assert network.explore(0.25, {"weight": gradient}) == 1
    assert (network.coverage, network.overlap) == (5 / 8, 1.0)


def test_resizing_moves_the_overlap_and_only_growing_the_coverage():
    network = MaskedNetwork(nn.Linear(4, 2, bias=False), 0.5, growth="random")
    network.resize(0.75)
    assert (network.coverage, network.overlap) == (0.75, 4 / 6)
    network.resize(0.25)
    assert (network.coverage, network.overlap) == (0.75, 2 / 6)
    network.resize(0.25)
    assert network.overlap == 2 / 6  # nothing changed, so the last change is still the one before


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_coverage_is_the_share_of_weights_that_were_ever_active(density):
    torch.manual_seed(0)
    network = MaskedNetwork(nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5)), density, growth="random")
    ever = {name: mask.clone() for name, mask in network.masks.items()}
    for _ in range(5):
        before = torch.cat([mask.flatten().clone() for mask in network.masks.values()])
        with torch.no_grad():
            for name, parameter in network.parameters.items():
                parameter.copy_(torch.randn_like(parameter) * network.masks[name])
        network.explore(0.4)
        after = torch.cat([mask.flatten() for mask in network.masks.values()])
        for name, mask in network.masks.items():
            ever[name] |= mask
        assert network.coverage == sum(int(mask.sum()) for mask in ever.values()) / network.total
        assert network.overlap == int((before & after).sum()) / int((before | after).sum())
    again = MaskedNetwork(nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5)), density, state=network.state_dict())
    assert (again.coverage, again.overlap) == (network.coverage, network.overlap)


# ---- weights that are pruned and grown again -----------------------------------------------------------

ROW = [[1.0, -2.0, 3.0, -4.0, 5.0, 6.0]]


def one_row(mask, regrown):
    network = nn.Sequential(nn.Linear(6, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(ROW))
    return with_masks(network, [mask], regrown=regrown)


@pytest.mark.parametrize(("regrown", "again"), [("keep", 1.0), ("reset", 0.0)])
def test_a_weight_that_is_pruned_and_grown_again_is_kept_or_reset(regrown, again):
    sparse = one_row([1, 1, 1, 1, 0, 0], regrown)
    # 1 and -2 are pruned; of what is inactive then, the first and the fifth have the largest gradients.
    assert sparse.explore(0.5, {FIRST: torch.tensor([[9.0, 0.0, 7.0, 7.0, 8.0, 1.0]])}) == 2
    assert masks_of(sparse) == [[[1, 0, 1, 1, 1, 0]]]
    assert sparse.network[0].weight.tolist() == [[again, 0.0, 3.0, -4.0, 0.0, 0.0]]
    assert sparse.overlap == 3 / 5
    assert_consistent(sparse)


@pytest.mark.parametrize(("regrown", "number"), [("keep", 2), ("reset", 1)])
def test_above_one_over_one_plus_rate_only_kept_weights_let_the_rate_hold(regrown, number):
    sparse = one_row([1, 1, 1, 1, 1, 0], regrown)  # half of five are two, and one is inactive
    assert sparse.explore(0.5, {FIRST: torch.tensor([[0.0, 3.0, 0.0, 0.0, 0.0, 4.0]])}) == number
    assert sparse.network[0].weight.tolist() == [[0.0, -2.0, 3.0, -4.0, 5.0, 0.0]]
    assert masks_of(sparse) == [[[0, 1, 1, 1, 1, 1]]]
    assert_consistent(sparse)


@pytest.mark.parametrize(("regrown", "number"), [("keep", 3), ("reset", 0)])
def test_exploring_a_full_layer_changes_nothing(regrown, number):
    sparse = one_row([1] * 6, regrown)
    # Only what was pruned can grow, so all of it does, as in RigL's reference code.
    assert sparse.explore(0.5, {FIRST: torch.zeros(1, 6)}) == number
    assert sparse.network[0].weight.tolist() == ROW
    assert masks_of(sparse) == [[[1] * 6]]
    assert sparse.overlap == 1.0


def test_the_optimizer_state_of_a_weight_that_grows_again_is_kept():
    sparse = one_row([1, 1, 1, 1, 0, 0], "keep")
    optimizer = torch.optim.Adam(sparse.network.parameters(), lr=1e-3)
    enforcement = MaskEnforcer(sparse, [optimizer])
    sparse.network(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    weight = sparse.network[0].weight
    before, moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    sparse.explore(0.5, {FIRST: torch.tensor([[9.0, 0.0, 7.0, 7.0, 8.0, 1.0]])})
    survives = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]])
    assert torch.equal(weight, before * survives)
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment * survives)
    assert moment[0, 0] != 0
    enforcement.remove()


@given(
    mask=st.lists(st.booleans(), min_size=12, max_size=12).filter(any),
    rate=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_what_survives_an_exploration_that_keeps_is_untouched(mask, rate, seed):
    torch.manual_seed(seed)
    sparse = with_masks(nn.Sequential(nn.Linear(4, 3)), torch.tensor(mask).view(3, 4).tolist(), regrown="keep")
    before, active = copies(sparse)[FIRST], sparse.active
    weight = sparse.network[0].weight.detach().clone()
    sparse.explore(rate, {FIRST: torch.randn(3, 4)})
    after = sparse.masks[FIRST]
    assert sparse.active == active
    assert torch.equal(sparse.network[0].weight, weight * (before & after))
    assert_consistent(sparse)
