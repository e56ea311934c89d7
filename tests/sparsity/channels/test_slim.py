import pytest
import torch
from architectures import FeatureDiscriminator, GroupNormGenerator, StyleGenerator
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_ddst import models
from lightning_ddst.sparsity import MaskedNetwork, compact
from lightning_ddst.utils.modules import eval_mode


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: models.SmallGenerator(8, 1, 8), (torch.randn(4, 64),)),
        (lambda: models.SNGANGenerator(width=8), (torch.randn(4, 128),)),
        (lambda: models.DCGANDiscriminator(width=4), (torch.randn(4, 3, 32, 32),)),
        (lambda: models.BigGANGenerator(width=2), (torch.randn(4, 128), torch.arange(4))),
    ],
)
def test_masks_of_channels_leave_exactly_the_active_ones(make, inputs):
    torch.manual_seed(0)
    network = make()
    sparse = MaskedNetwork(network, 0.3, granularity="channel", inputs=inputs)
    sizes = {name: parameter.shape for name, parameter in network.named_parameters()}
    small, left, channels = compact(network, *inputs)
    assert (left, channels) == (sum(sparse.units.now), sum(sparse.units.sizes))
    weights = [m.weight for m in small.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    assert sum(weight.numel() for weight in weights) == sparse.active
    with torch.no_grad(), eval_mode(network):
        torch.testing.assert_close(small(*inputs), network(*inputs), rtol=1e-3, atol=1e-5)
    assert network.training
    assert {name: parameter.shape for name, parameter in network.named_parameters()} == sizes


@pytest.mark.parametrize("make", [GroupNormGenerator, StyleGenerator])
def test_norms_and_constants_lose_the_inactive_channels(make):
    torch.manual_seed(0)
    network, z = make().double(), torch.randn(5, 4).double()
    sparse = MaskedNetwork(network, 0.5, granularity="channel", inputs=(z,))
    small, left, channels = compact(network, z)
    assert (left, channels) == (sum(sparse.units.now), sum(sparse.units.sizes))
    assert left < channels
    with torch.no_grad(), eval_mode(network):
        torch.testing.assert_close(small(z), network(z), rtol=1e-9, atol=1e-12)
    weights = [m.weight for m in small.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    assert sum(weight.numel() for weight in weights) == sparse.active
    if make is GroupNormGenerator:  # groups as large as before
        assert (small.norm.num_channels, small.norm.num_groups) == (4 * sparse.units.now[0], sparse.units.now[0])
        assert small.last_norm.num_channels == 2 * small.last_norm.num_groups == small.image.in_channels
    else:
        assert small.const.shape == (1, small.conv.in_channels, 4, 4)
        assert small.norm.num_features == small.act.num_parameters == len(small.bias) == small.conv.out_channels


def test_a_discriminators_features_are_narrower():
    torch.manual_seed(0)
    network, x = FeatureDiscriminator(), torch.randn(2, 3, 8, 8)
    MaskedNetwork(network, 0.4, granularity="channel", inputs=(x,), narrow_features=True)
    small, *_ = compact(network, x, narrow_features=True)
    with torch.no_grad():
        (score, features), (full_score, full_features) = small(x), network(x)
    torch.testing.assert_close(score, full_score)
    for layer, reader, narrow, full in zip(
        ("first", "second"), ("second", "score"), features, full_features, strict=True
    ):
        kept = network.get_submodule(reader).weight.detach().flatten(2).any(2).any(0)
        assert narrow.shape[1] == small.get_submodule(layer).out_channels == int(kept.sum()) < len(kept)
        torch.testing.assert_close(narrow, full[:, kept])


def test_weight_norm_becomes_plain_and_unread_channels_go():
    torch.manual_seed(0)
    network = nn.Sequential(weight_norm(nn.Linear(2, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 1)))
    with torch.no_grad():
        network[2].parametrizations.weight.original1[:, :4] = 0
    x = torch.randn(5, 2)
    small, left, channels = compact(network, x)
    assert (left, channels) == (2, 6)
    torch.testing.assert_close(small(x), network(x))
    assert [type(layer) for layer in small] == [nn.Linear, nn.Tanh, nn.Linear]


def test_a_generator_that_draws_noise_is_compared_with_the_same_noise():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            return {"image": self.last(self.first(x) + torch.randn(len(x), 1)), "number": 3}

    network, x = Noisy(), torch.randn(3, 2)
    sparse = MaskedNetwork(network, 0.5, granularity="channel", inputs=(x,))
    small, left, _ = compact(network, x)
    assert left == sum(sparse.units.now) == 2
    outputs = []
    for each in (small, network):
        torch.manual_seed(1)
        outputs.append(each(x)["image"])
    torch.testing.assert_close(*outputs)


def test_layers_report_their_sizes():
    network = nn.Sequential(
        nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 3, 1), nn.Conv2d(3, 1, 1)
    )
    with torch.no_grad():
        network[3].weight[1] = 0  # what reads the second channel
        network[4].weight[:, [0, 2]] = 0
    small, left, channels = compact(network, torch.zeros(2, 2))
    assert (left, channels) == (2, 5)
    linear, _, norm, transposed, conv = small
    assert (linear.out_features, norm.num_features) == (4, 1)
    assert (transposed.in_channels, transposed.out_channels, conv.in_channels, conv.out_channels) == (1, 1, 1, 1)
    assert torch.equal(conv.weight, network[4].weight[:, 1:2])


def test_what_only_unread_channels_read_goes_too():
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    with torch.no_grad():
        network[4].weight[0, 1] = 0
        network[2].weight[0, 2] = 0  # the third is read by the second's row alone
    small, left, channels = compact(network, torch.zeros(2, 2))
    assert (left, channels) == (3, 5)
    assert small[0].weight.shape == (2, 2)


def test_of_every_group_a_channel_stays():
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        network[2].weight.zero_()
    small, left, _ = compact(network, torch.randn(2, 2))
    assert left == 1
    torch.testing.assert_close(small(torch.randn(5, 2)), network[2].bias.expand(5, 1))


@pytest.mark.parametrize("norm", [spectral_norm, hooked_spectral_norm])
def test_weights_are_those_that_spectral_norm_made_and_the_network_keeps_it(norm):
    torch.manual_seed(0)
    network = nn.Sequential(norm(nn.Linear(2, 6)), nn.Tanh(), norm(nn.Linear(6, 1))).eval()
    sparse = MaskedNetwork(network, 0.6)
    last = next(name for name in sparse.weights if name.startswith("2."))
    with torch.no_grad():
        sparse.parameters[last][:, :4] = 0  # the rows of these stay, and are part of the first layer's norm
    x = torch.randn(5, 2)
    before = network(x)
    small, left, _ = compact(network, x)
    assert left <= 2
    torch.testing.assert_close(small(x), before)
    assert not any(parametrize.is_parametrized(module) or module._forward_pre_hooks for module in small)
    assert torch.equal(network(x), before)
    assert all(parametrize.is_parametrized(network[i]) or network[i]._forward_pre_hooks for i in (0, 2))


def test_a_network_whose_channels_are_all_read_keeps_its_size():
    network = models.SmallGenerator(8, 1, 4)
    _, left, channels = compact(network, torch.randn(2, 64))
    assert left == channels == 16 + 8 + 4
