import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import (
    FIRST,
    FIRST_WEIGHT,
    SECOND,
    assert_consistent,
    copies,
    equal,
    masks_of,
    three_layers,
    two_layers,
    with_masks,
)
from torch import nn

from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer


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


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_outside_its_range_is_rejected(rate):
    sparse = MaskedNetwork(two_layers(), 0.5, growth="random")
    with pytest.raises(ValueError, match=rf"rate={rate} must be in \[0, 1\]"):
        sparse.explore(rate)


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


def test_weights_stored_channels_last_get_the_same_masks():
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


def test_a_saved_network_resumes_with_the_same_masks_and_the_same_random_growth():
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


def test_the_state_of_other_shapes_is_rejected_by_the_weights_name():
    state = MaskedNetwork(deep(), 0.3).state_dict()
    with pytest.raises(ValueError, match=r"'2\.weight'"):
        MaskedNetwork(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 9)), 0.3, state=state)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (nn.Sequential(nn.Linear(12, 10)), r"2\.weight"),  # one more was saved
        (nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.Linear(8, 8)), r"3\.weight"),  # one less
    ],
)
def test_the_state_of_other_weights_is_rejected_by_the_weights_name(network, name):
    state = MaskedNetwork(deep(), 0.3).state_dict()
    with pytest.raises(ValueError, match=rf"'{name}'"):
        MaskedNetwork(network, 0.3, state=state)


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


def test_first_masks_of_an_unknown_kind_are_rejected():
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
