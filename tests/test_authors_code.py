"""Differences between the authors' code and the paper: their code in a few lines, next to this package.

`theirs_...` restates a rule of github.com/YiteWang/ADAPT in its effect; every test shows both results.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import Adam

from lightning_ddst.balance import BalanceWindow, DensityController
from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer, maskable_weights, published_flops
from lightning_ddst.sparsity.averaging import WeightAverage
from lightning_ddst.sparsity.op_counter import OpCounter


def layer(inputs=10, outputs=10):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=False)


# ---- growing and pruning -----------------------------------------------------------------------------


def theirs_grown(gradient, mask, number):
    """Every weight whose score reaches the number-th largest grows."""
    score = gradient.abs() * ~mask
    threshold = score.flatten().sort(descending=True).values[number - 1]
    return mask | (score >= threshold)


def test_growth_where_gradients_are_zero_is_exact():
    network = MaskedNetwork(layer(), 0.2)
    gradient = torch.zeros(10, 10)
    gradient[~network.masks["weight"]] = torch.cat([torch.ones(5), torch.zeros(75)])  # dead units: only 5 are not 0
    assert theirs_grown(gradient, network.masks["weight"], 15).float().mean() == 1.0  # asked for 0.35
    network.resize(0.35, {"weight": gradient})
    assert network.active == 35
    assert network.masks["weight"][gradient != 0].all()


def test_growing_nothing_does_nothing():
    network = MaskedNetwork(layer(), 0.2)
    with pytest.raises(IndexError):
        theirs_grown(torch.ones(1), torch.zeros(1, dtype=torch.bool), 3)  # an index that is not there
    before = network.masks["weight"].clone()
    network.resize(0.2)
    assert network.explore(0.0, {"weight": torch.ones(10, 10)}) == 0
    assert torch.equal(network.masks["weight"], before)


def test_the_first_masks_have_exactly_the_count_asked_for():
    torch.manual_seed(1)
    theirs = [int((torch.rand(10, 10) < 0.2).sum()) for _ in range(20)]  # weight by weight
    assert len(set(theirs)) > 1
    assert {MaskedNetwork(layer(), 0.2, seed=seed).active for seed in range(20)} == {20}


def test_a_layer_of_small_weights_is_not_emptied():
    network = nn.Sequential(layer(), layer())
    with torch.no_grad():
        network[1].weight *= 1e-3  # under spectral norm the same function
    weights = torch.cat([module.weight.detach().abs().flatten() for module in network])
    theirs = network[1].weight.abs() >= weights.sort(descending=True).values[99]
    assert theirs.sum() == 0
    sparse = MaskedNetwork(network, 0.5, initial="magnitude")
    assert sparse.active == 100
    # A quarter of what ERK gives two layers alike, half of each: 12 of 50.
    assert sparse.layer_counts == {"0.weight": 88, "1.weight": 12}


# ---- what a mask holds -------------------------------------------------------------------------------


def test_adam_has_no_state_where_weights_are_inactive():
    def trained(enforced):
        network = layer()
        optimizer = Adam(network.parameters(), betas=(0.5, 0.9))
        sparse = MaskedNetwork(network, 0.2)
        if enforced:
            MaskEnforcer(sparse, [optimizer])
        for _ in range(20):
            optimizer.zero_grad()
            (network(torch.randn(8, 10)) - 1).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                network.weight *= sparse.masks["weight"]
        state = optimizer.state[network.weight]
        return [state[name][~sparse.masks["weight"]] for name in ("exp_avg", "exp_avg_sq")]

    assert all(value.all() for value in trained(enforced=False))  # theirs masks SGD's momentum alone
    assert not any(value.any() for value in trained(enforced=True))


def test_spectral_norm_is_right_after_a_mask_changed():
    def norm_of(network):
        return torch.linalg.matrix_norm(network.eval().weight, 2).item()

    theirs, ours = spectral_norm(layer(64, 64)), spectral_norm(layer(64, 64))
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1
    with torch.no_grad():
        theirs.parametrizations.weight.original *= mask
    assert abs(norm_of(theirs) - 1) > 0.03  # by singular vectors of the dense weight
    MaskedNetwork(ours, 0.1)
    assert norm_of(ours) == pytest.approx(1, abs=1e-4)


def test_norms_are_not_masked():
    network = nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Embedding(4, 8))
    theirs = [name for name, p in network.named_parameters() if "bias" not in name and not name.startswith("3")]
    assert theirs == ["0.weight", "1.weight", "2.weight", "4.weight"]  # all but biases and BatchNorm
    assert [weight.name for weight in maskable_weights(network)] == ["0.weight"]


def test_an_average_has_buffers_and_does_not_drag_grown_weights_down():
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = WeightAverage(network, 0.999)
    theirs = 0.0
    with torch.no_grad():
        for update in range(1_500):
            grown = update >= 1_000
            network[0].weight.fill_(1.0 if grown else 0.0)
            network[1].running_mean.fill_(2.0)
            average.update()
            theirs = 0.999 * theirs + 0.001 * grown
    assert theirs == pytest.approx(0.39, abs=0.005)  # of a weight that has been 1 for 500 updates
    assert average.values()["0.weight"].item() == pytest.approx(1.0)
    assert average.values()["1.running_mean"].item() == pytest.approx(2.0, abs=0.01)


# ---- the balance ratio -------------------------------------------------------------------------------


def measured(alphas, beta):
    window = BalanceWindow(len(alphas))
    for alpha in alphas:
        window.add(torch.tensor([alpha, 0.0, beta, 1.0]))
    return window.read()


def test_a_single_alpha_near_zero_does_not_decide():
    alphas = [0.3] * 99 + [1e-4]
    theirs = sum(0.15 / alpha for alpha in alphas) / 100
    assert theirs > 15  # "too weak", though the ratio is 0.5
    balance = measured(alphas, 0.15)
    assert balance.ratio == pytest.approx(0.505, abs=1e-3)
    assert DensityController().decide(balance, 0.3).action == "hold"


def test_a_discriminator_that_fails_is_not_pruned_further():
    alphas = [-0.3, 0.2] * 50
    theirs = sum(-0.02 / alpha for alpha in alphas) / 100
    assert theirs < 0.45  # read as "too strong"
    decision = DensityController().decide(measured(alphas, -0.02), 0.3)
    assert (decision.action, decision.density) == ("undecided", 0.3)


def test_a_ratio_that_is_no_number_gives_the_reason():
    assert not (math.nan >= 0.55)
    assert not (math.nan <= 0.45)  # theirs: neither, without a word
    decision = DensityController().decide(measured([math.nan] * 4, 0.1), 0.3)
    assert (decision.action, decision.reason) == ("undecided", "a score is not finite")


def test_limits_are_arguments():
    """Theirs are 0.05 and, where the setting is strict, 0.5."""
    controller = DensityController(min_density=0.2, max_density=0.8)
    assert controller.decide(measured([1.0], 0.9), 0.79).density == 0.8
    assert controller.decide(measured([1.0], 0.1), 0.21).density == 0.2


# ---- operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "image", "theirs", "operations"),
    [
        (nn.ConvTranspose2d(3, 4, 2, stride=2, bias=False), (1, 3, 5, 5), 0, 2 * 48 * 25),
        (nn.Conv2d(4, 8, 1, groups=2, bias=False), (1, 4, 3, 3), 32 * 9, 2 * 16 * 9),
    ],
)
def test_operations_of_transposed_and_grouped_convolutions(module, image, theirs, operations):
    assert published_flops(module, torch.zeros(image)) == theirs
    workload = OpCounter({weight.name: weight.parameter for weight in maskable_weights(module)})
    with workload.counted(), torch.no_grad():
        module(torch.zeros(image))
    assert 2 * workload.uses["weight"] * module.weight.numel() == operations
