import io

import pytest
import torch
from crashes import assert_resumed_alike
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from torch import nn
from toys import ToyGAN, toy_data, trained

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.sparsity import MaskedNetwork, find_units

ROW = [1.0, -2.0, 3.0, -4.0, 6.0, 5.0, -5.0, 0.1]
BY_MAGNITUDE = [0, 0, 1, 1, 1, 1, 0, 0]  # of 5 and -5 the first


def layer(values, **options):
    network = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([values]))
    return MaskedNetwork(network, 0.5, granularity="2:4", initial="magnitude", **options)


def mask_of(sparse):
    return sparse.masks["weight"].int().flatten().tolist()


def weights_of(sparse):
    return sparse.network.weight.detach().flatten().tolist()


def assert_n_of_m(sparse, n, m):
    """Checks every group of every weight, one by one."""
    for name, weight in sparse.weights.items():
        transposed = any(isinstance(own, nn.ConvTranspose2d) for own in weight.layers.values())
        mask = sparse.masks[name].transpose(0, 1) if transposed else sparse.masks[name]
        for group in mask.split(m, dim=1):
            assert (group.sum(1) == n).all()
        assert sparse.layer_counts[name] == int(mask.sum()) == mask.numel() * n // m
        assert not weight.parameter[~sparse.masks[name]].any()


# ---- first masks -------------------------------------------------------------------------------------------


def test_of_every_group_the_largest_stay():
    sparse = layer(ROW)
    assert mask_of(sparse) == BY_MAGNITUDE
    assert weights_of(sparse) == [0, 0, 3, -4, 6, 5, 0, 0]
    assert (sparse.active, sparse.total, sparse.density) == (4, 8, 0.5)
    assert sparse.describe() == "4 of 8 weights active"
    assert not sparse.kept


@pytest.mark.parametrize(
    ("network", "dim"),
    [
        (nn.Linear(8, 3), 1),
        (nn.Conv2d(8, 3, (2, 3)), 1),
        (nn.Conv2d(16, 6, 3, groups=2), 1),  # 8 inputs each
        (nn.ConvTranspose2d(8, 3, (2, 3)), 0),
    ],
    ids=["linear", "conv", "groups", "transposed"],
)
def test_groups_are_of_consecutive_inputs_of_one_output(network, dim):
    with torch.no_grad():  # along the inputs the second and third of every four are the largest
        network.weight.copy_(torch.randn_like(network.weight).clamp(-0.9, 0.9))
        for start in (1, 2, 5, 6):
            network.weight.select(dim, start).copy_(network.weight.select(dim, start).sign() * (1 + start))
    sparse = MaskedNetwork(network, 0.5, granularity="2:4", initial="magnitude")
    for i in range(8):
        assert (sparse.masks["weight"].select(dim, i) == (i in (1, 2, 5, 6))).all()


def test_random_masks_are_drawn_from_the_seed():
    one, same, other = (MaskedNetwork(nn.Linear(40, 30), 0.5, granularity="2:4", seed=seed) for seed in (3, 3, 4))
    assert_n_of_m(one, 2, 4)
    assert mask_of(one) == mask_of(same) != mask_of(other)
    # Each of the six ways to choose 2 of 4 in a sixth of 300 groups: 50; 4 standard deviations are 26.
    ways = one.masks["weight"].view(-1, 4).unique(dim=0, return_counts=True)[1]
    assert len(ways) == 6
    assert ((ways - 50).abs() < 26).all()


# ---- exploring ---------------------------------------------------------------------------------------------

GRADIENT = [9.0, 0.0, 0.0, 7.0, 50.0, 60.0, 70.0, 80.0]


@pytest.mark.parametrize(("regrown", "again"), [("keep", -4.0), ("reset", 0.0)])
def test_the_smallest_weights_go_and_their_groups_grow_as_many(regrown, again):
    sparse = layer(ROW, regrown=regrown)
    # The two smallest active ones are 3 and -4, both of the first group. So that one grows two of its four, the first
    # and the fourth, though the second group's gradients are larger.
    assert sparse.explore(0.5, {"weight": torch.tensor([GRADIENT])}) == 2
    assert mask_of(sparse) == [1, 0, 0, 1, 1, 1, 0, 0]
    assert weights_of(sparse) == [0, 0, 0, again, 6, 5, 0, 0]
    assert sparse.overlap == 3 / 5
    assert sparse.coverage == 5 / 8


def test_every_group_grows_as_many_as_it_lost():
    sparse = layer([1.0, -2.0, 3.0, -4.0, 6.0, 2.5, -2.0, 0.1])
    # 3 of the first group and 2.5 of the second go.
    assert sparse.explore(0.5, {"weight": torch.tensor([GRADIENT])}) == 2
    assert mask_of(sparse) == [1, 0, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(("rate", "number"), [(0.0, 0), (0.2, 0), (0.25, 1), (0.74, 2), (1.0, 4)])
def test_the_share_is_exact(rate, number):
    sparse = layer(ROW)
    assert sparse.explore(rate, {"weight": torch.ones(1, 8)}) == number
    assert_n_of_m(sparse, 2, 4)


@pytest.mark.parametrize(("regrown", "number"), [("keep", 3), ("reset", 2)])
def test_of_three_of_four_no_more_are_reset_than_are_inactive(regrown, number):
    network = nn.Linear(8, 1, bias=False)
    sparse = MaskedNetwork(network, 0.75, granularity="3:4", growth="random", regrown=regrown)
    assert sparse.explore(0.5) == number
    assert_n_of_m(sparse, 3, 4)


def test_layers_explore_by_themselves():
    network = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    sparse = MaskedNetwork(network, 0.5, granularity="2:4", growth="random")
    with torch.no_grad():
        network[0].weight.mul_(1e-3)
    old = sparse.masks["1.weight"].clone()
    assert sparse.explore(0.5) == 8 + 8
    assert not torch.equal(sparse.masks["1.weight"], old)


@pytest.mark.parametrize("given", [None, {}, {"weight": torch.full((1, 8), torch.nan)}], ids=["none", "empty", "nan"])
def test_exploring_without_the_gradients_it_needs_changes_nothing(given):
    sparse = layer(ROW)
    with pytest.raises(ValueError, match="'weight'"):
        sparse.explore(0.5, given)
    assert mask_of(sparse) == BY_MAGNITUDE
    assert weights_of(sparse) == [0, 0, 3, -4, 6, 5, 0, 0]


@settings(deadline=None, max_examples=40)
@given(
    pattern=st.tuples(st.integers(1, 5), st.integers(2, 6)).filter(lambda pattern: pattern[0] < pattern[1]),
    initial=st.sampled_from(["random", "magnitude"]),
    regrown=st.sampled_from(["keep", "reset"]),
    growth=st.sampled_from(["random", "gradient"]),
    rates=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
def test_every_group_always_has_exactly_n(pattern, initial, regrown, growth, rates, seed):
    n, m = pattern
    network = nn.ModuleList(
        [nn.Linear(2 * m, 3), nn.Conv2d(2 * m, 4, 2, groups=2), nn.ConvTranspose2d(2 * m, 4, (1, 2), groups=2)]
    )
    sparse = MaskedNetwork(
        network, n / m, granularity=f"{n}:{m}", initial=initial, regrown=regrown, growth=growth, seed=seed
    )
    assert len(sparse.weights) == 3
    draw = torch.Generator().manual_seed(seed)
    for rate in rates:
        arriving = {}
        with torch.no_grad():
            for name, weight in sparse.weights.items():
                new = torch.randn(weight.parameter.shape, generator=draw).round(decimals=1)  # with ties, and zeros
                weight.parameter.copy_(new * sparse.masks[name])
                arriving[name] = torch.randn(new.shape, generator=draw).relu()
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        moved = sparse.explore(rate, arriving)
        counts = sparse.layer_counts
        share = [
            min(int(rate * count + 1e-9), count if regrown == "keep" else sparse.masks[name].numel() - count)
            for name, count in counts.items()
        ]
        assert moved == sum(share)
        assert_n_of_m(sparse, n, m)
        if not moved:
            continue
        both = sum(int((before[name] & mask).sum()) for name, mask in sparse.masks.items())
        assert sparse.overlap == both / (2 * sparse.active - both)


# ---- densities and layers ------------------------------------------------------------------------------------


def test_the_density_is_n_of_m():
    sparse = layer(ROW)
    before, rng = mask_of(sparse), sparse.state_dict()["rng"]
    sparse.resize(0.5)
    assert mask_of(sparse) == before
    assert torch.equal(sparse.state_dict()["rng"], rng)
    assert sparse.reachable(0.1) == sparse.reachable(1.0) == 0.5
    for density in (0.4, 1.0, 0.0):
        message = rf'density={density} must be 0.5, the density of granularity="2:4"'
        for change in (
            sparse.resize,
            sparse.allocation,
            lambda d: MaskedNetwork(nn.Linear(4, 4), d, granularity="2:4"),
        ):
            with pytest.raises(ValueError, match=message):
                change(density)
    assert mask_of(sparse) == before
    assert sparse.target == 0.5
    third = MaskedNetwork(nn.Linear(6, 4), 0.333, granularity="1:3")
    assert third.active == 8


def test_layers_whose_inputs_do_not_divide_stay_dense_and_outside_the_density():
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.ConvTranspose2d(8, 4, 1, groups=4))  # 2 inputs each
    before = network[0].weight.detach().clone()
    sparse = MaskedNetwork(network, 0.5, granularity="2:4")
    assert list(sparse.masks) == ["1.weight"]
    assert (sparse.active, sparse.total) == (20, 40)
    assert torch.equal(network[0].weight, before)
    with pytest.raises(ValueError, match="granularity='2:4' fits the shape of no layer"):
        MaskedNetwork(nn.Linear(6, 8), 0.5, granularity="2:4")


@pytest.mark.parametrize("granularity", ["4:4", "0:4", "5:4", "2-4", "2:4:8", "rows"])
def test_granularities_that_are_no_pattern_are_rejected(granularity):
    with pytest.raises(ValueError, match=f"granularity=.{granularity}. "):
        find_units(granularity)


@pytest.mark.parametrize("given", [{"scope": "layer"}, {"layer_floor": 0.5}, {"distribution": "er"}])
def test_options_of_single_weights_are_rejected(given):
    (name,) = given
    with pytest.raises(ValueError, match=rf'{name}=.* is no option of masks with granularity="2:4"'):
        MaskedNetwork(nn.Linear(8, 8), 0.5, granularity="2:4", **given)


# ---- saving --------------------------------------------------------------------------------------------------


def test_a_saved_network_explores_the_same_way():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))

    one = MaskedNetwork(network(), 0.25, granularity="1:4", growth="random", seed=1)
    one.explore(0.5)
    file = io.BytesIO()
    torch.save({"masks": one.state_dict(), "network": one.network.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    restored = network()
    restored.load_state_dict(saved["network"])
    other = MaskedNetwork(restored, 0.25, granularity="1:4", growth="random", seed=2, state=saved["masks"])
    for sparse in (one, other):
        sparse.explore(0.4)
    assert one.checksum == other.checksum
    assert (one.coverage, one.overlap) == (other.coverage, other.overlap)


def test_other_masks_are_rejected():
    state = MaskedNetwork(nn.Linear(8, 8), 0.5).state_dict()
    with pytest.raises(ValueError, match="saved masks are not 2:4: 'weight'"):
        MaskedNetwork(nn.Linear(8, 8), 0.5, granularity="2:4", state=state)


# ---- in training ---------------------------------------------------------------------------------------------

SETTINGS = {"generator_density": 0.5, "method": "sdst", "granularity": "2:4", "explore_interval": 3, "seed": 1}


class EveryStep(Callback):
    """Checks groups and zeros after every batch."""

    def __init__(self):
        self.checksums = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        (sparsity,) = (c for c in trainer.callbacks if isinstance(c, DynamicSparsityCallback))
        for network in sparsity.networks().values():
            assert_n_of_m(network, 2, 4)
        self.checksums.append(sparsity.networks()["generator"].checksum)


def test_a_run_keeps_two_of_four_after_every_step():
    sparsity, every = DynamicSparsityCallback(**SETTINGS, probe_interval=None), EveryStep()
    trained(sparsity, every, epochs=2)
    assert len(every.checksums) == 20
    # Explorations at 3, 6, ... 18 of 20 updates; the last replaces too little to be seen in every layer, but some.
    assert len(set(every.checksums)) == 7
    assert sparsity.generator_density == sparsity.discriminator_density == 0.5


def test_a_static_run_takes_half_of_the_operations():
    sparsity = DynamicSparsityCallback(0.5, method="static", granularity="2:4", probe_interval=None)
    trained(sparsity)
    assert sparsity.flops_ratio == 0.5
    assert set(sparsity.mean_layer_densities.values()) == {0.5}


def test_a_killed_run_resumes_exactly(tmp_path):
    def data():
        return toy_data(7)

    callback = assert_resumed_alike(ToyGAN, data, tmp_path, every=None, kill=16, **SETTINGS)
    assert callback.networks()["generator"].coverage > 0.5


def test_densities_that_the_pattern_does_not_have_are_rejected():
    with pytest.raises(ValueError, match=r'generator_density=0.3 must be 0.5, .*granularity="2:4"'):
        DynamicSparsityCallback(0.3, method="sdst", granularity="2:4")
    with pytest.raises(ValueError, match=r"discriminator_density=1.0 must be 0.5"):
        DynamicSparsityCallback(0.5, 1.0, method="sdst", granularity="2:4")
    with pytest.raises(ValueError, match=r'granularity="2:4" has only the density 0.5, and method="ddst"'):
        DynamicSparsityCallback(0.5, method="ddst", granularity="2:4")


def test_the_density_of_the_pattern_need_not_be_given():
    sparsity = DynamicSparsityCallback(method="sdst", granularity="1:4")
    assert (sparsity.generator_density, sparsity.discriminator_density) == (0.25, 0.25)


def test_groups_lie_along_the_declared_inputs():
    layer = nn.Module()
    layer.kernel = nn.Parameter(torch.randn(3, 8, 5))
    sparse = MaskedNetwork(layer, 0.5, granularity="2:4", masked_parameters={"kernel": (2, 1)})
    (mask,) = sparse.masks.values()
    assert (mask.movedim(1, -1).reshape(3, 5, 2, 4).sum(-1) == 2).all()
