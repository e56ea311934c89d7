import pytest
import torch
from architectures import FeatureDiscriminator, GroupNormGenerator, ModulatedGenerator, StyleGenerator
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from lightning_ddst import models
from lightning_ddst.sparsity import trace_channels


def axes(network, *inputs, **options):
    """The channels of every axis as lists, and the groups' sizes."""
    channels = trace_channels(network, *inputs, **options)
    return channels.sizes, {name: {d: c.tolist() for d, c in dims.items()} for name, dims in channels.axes.items()}


def test_a_chain_has_the_channels_between_its_layers():
    network = nn.Sequential(
        nn.Linear(2, 6),  # three channels of a map of 2 pixels
        nn.Unflatten(1, (3, 1, 2)),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 2, 2),
        nn.LeakyReLU(),
        nn.Conv2d(2, 1, 1),
    )
    sizes, found = axes(network, torch.zeros(2, 2))
    assert sizes == (3, 2)
    assert found == {
        "0.weight": {0: [0, 0, 1, 1, 2, 2]},
        "0.bias": {0: [0, 0, 1, 1, 2, 2]},
        "2.weight": {0: [0, 1, 2]},
        "2.bias": {0: [0, 1, 2]},
        "2.running_mean": {0: [0, 1, 2]},
        "2.running_var": {0: [0, 1, 2]},
        "4.weight": {0: [0, 1, 2], 1: [3, 4]},  # transposed: inputs first
        "4.bias": {0: [3, 4]},
        "6.weight": {1: [3, 4]},
    }


def test_spectral_norms_vectors_have_the_channels_of_their_weight():
    network = nn.Sequential(spectral_norm(nn.Conv2d(1, 2, 1)), nn.ReLU(), spectral_norm(nn.Conv2d(2, 1, (1, 3))))
    sizes, found = axes(network, torch.zeros(2, 1, 3, 3))
    assert sizes == (2,)
    last = "2.parametrizations.weight"
    assert found == {
        "0.parametrizations.weight.original": {0: [0, 1]},
        "0.bias": {0: [0, 1]},
        "0.parametrizations.weight.0._u": {0: [0, 1]},
        f"{last}.original": {1: [0, 1]},
        f"{last}.0._v": {0: [0, 0, 0, 1, 1, 1]},
    }


class Residual(nn.Module):
    """A sum of three, a concatenation in another order, and an output of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.back = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4)
        self.side, self.head = nn.Linear(3, 2), nn.Linear(6, 1)

    def forward(self, x):
        stem = self.stem(x)
        maps = stem + self.back(self.inner(stem).relu())
        return self.head(torch.cat([self.side(x), maps.tanh()], 1))


def test_channels_that_meet_in_a_sum_are_one():
    sizes, found = axes(Residual(), torch.zeros(2, 3))
    assert sizes == (4, 5, 2)  # of the sum, within the branch, at its side
    assert found["stem.weight"] == {0: [0, 1, 2, 3]}
    assert found["inner.weight"] == {0: [4, 5, 6, 7, 8], 1: [0, 1, 2, 3]}
    assert found["back.weight"] == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7, 8]}
    assert found["head.weight"] == {1: [9, 10, 0, 1, 2, 3]}


def test_named_weights_stay_whole():
    sizes, found = axes(Residual(), torch.zeros(2, 3), whole=["back.weight"])
    assert sizes == (2,)
    assert found.keys() == {"side.weight", "side.bias", "head.weight"}


class Mixing(nn.Module):
    """The channels of `stay` are mixed by something, those of `go` are not."""

    def __init__(self, mixes):
        super().__init__()
        self.mixes = mixes
        self.stay, self.go, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 1, 1)

    def forward(self, x):
        return self.head(self.go(self.mixes(self.stay(x))).relu())


@pytest.mark.parametrize(
    "mixes",
    [
        nn.GroupNorm(1, 4),
        nn.Conv2d(4, 4, 1, groups=2),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.softmax(1),
        lambda x: x.view(-1, 4, *x.shape[2:]),  # of fixed size: half the channels would be twice the batch
        lambda x: x * torch.ones(4, 1, 1),
        nn.Sequential(nn.Flatten(2), nn.Linear(9, 9, bias=False), nn.Unflatten(2, (3, 3))),
    ],
    ids=["GroupNorm", "groups", "mean", "softmax", "view", "constant", "positions"],
)
def test_channels_that_are_mixed_or_of_fixed_number_stay(mixes):
    sizes, found = axes(Mixing(mixes), torch.zeros(2, 1, 3, 3))
    assert sizes == (6,)
    assert found == {
        "go.weight": {0: list(range(6))},
        "go.bias": {0: list(range(6))},
        "head.weight": {1: list(range(6))},
    }


@pytest.mark.parametrize("groups", [2, 8])
def test_a_grouped_convolution_keeps_its_own_channels_and_those_that_it_reads_only(groups):
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=groups), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 3, 1)]
    channels = trace_channels(nn.Sequential(*layers), torch.zeros(2, 3, 2, 2))
    assert channels.sizes == (12,)
    assert channels.whole == {"0": "grouped convolution '1' reads them", "1": "a grouped convolution"}
    last = nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 3, 1, groups=3))
    with pytest.raises(ValueError, match=r"'0' \(grouped convolution '1' reads them\), '1' \(a grouped convolution\)"):
        trace_channels(last, torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize(
    ("mixes", "reason"),
    [
        (nn.GroupNorm(1, 4), "GroupNorm 'mixes' normalizes them together"),
        (nn.LayerNorm([4, 3, 3]), "LayerNorm 'mixes' mixes channels"),
        (nn.Conv2d(4, 4, 1, groups=2), "grouped convolution 'mixes' reads them"),
        (lambda x: x.softmax(1), "the code of Mixing mixes channels"),
        (
            nn.Sequential(nn.Flatten(), nn.Unflatten(1, (12, 3)), nn.Softmax(1), nn.Flatten()),
            "Softmax 'mixes.2' mixes channels",
        ),
        (
            lambda x: x.view(-1, 4, *x.shape[2:]),
            "without some of them Conv2d 'go' fails: Given groups=1",
        ),
    ],
    ids=["GroupNorm", "LayerNorm", "groups", "code", "inner", "view"],
)
def test_the_layer_that_keeps_channels_is_named(mixes, reason):
    network = Mixing(mixes)
    if isinstance(mixes, nn.Sequential):
        network.mixes = nn.Sequential(*mixes, nn.Unflatten(1, (4, 3, 3)))
    assert trace_channels(network, torch.zeros(2, 1, 3, 3)).whole["stay"].startswith(reason)


def test_groups_of_group_norm_are_one_channel():
    sizes, found = axes(GroupNormGenerator(), torch.zeros(2, 4))
    assert sizes == (4, 4)
    assert found["norm.weight"] == found["norm.bias"] == {0: [i // 4 for i in range(16)]}
    assert found["linear.weight"] == {0: [i // 16 for i in range(64)]}  # 4 channels of 4 pixels each
    assert found["up.weight"] == {0: [i // 4 for i in range(16)], 1: [4, 4, 5, 5, 6, 6, 7, 7]}
    assert found["image.weight"] == {1: [4, 4, 5, 5, 6, 6, 7, 7]}


def test_learned_constants_styles_and_biases_follow_their_channels():
    sizes, found = axes(StyleGenerator(), torch.zeros(2, 4))
    assert sizes == (8, 6, 10)
    constant, last = list(range(8, 14)), list(range(14, 24))
    assert found["const"] == {1: constant}
    assert found["style.weight"] == {0: constant * 2, 1: list(range(8))}  # scales, then shifts
    assert found["last_style.weight"] == {0: last * 2, 1: list(range(8))}
    assert found["bias"] == found["norm.weight"] == found["act.weight"] == {0: last}
    assert "strength" not in found


def test_maps_of_positions_belong_to_no_channel():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Parameter(torch.ones(1, 1, 3, 3))
            self.first, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.last(self.first(x) * self.map)

    assert axes(Positions(), torch.zeros(2, 1, 3, 3)) == (
        (4,),
        {"first.weight": {0: [0, 1, 2, 3]}, "first.bias": {0: [0, 1, 2, 3]}, "last.weight": {1: [0, 1, 2, 3]}},
    )


def test_a_modulated_convolution_keeps_what_it_reads_and_is_named():
    channels = trace_channels(ModulatedGenerator(), torch.zeros(2, 4))
    assert channels.sizes == (7,)  # of the plain convolution
    assert channels.whole == {
        "mapping": "the network returns them",
        "conv.affine": "Modulated 'conv' mixes channels",
    }


def test_returned_features_are_narrowed_only_where_that_is_allowed():
    network, x = FeatureDiscriminator(), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"no channels .*'first' \(the network returns them\), 'second' \("):
        trace_channels(network, x)
    channels = trace_channels(network, x, narrow_features=True)
    assert channels.sizes == (8, 12)
    assert {n: {d: c.tolist() for d, c in dims.items()} for n, dims in channels.returned.items()} == {
        1: {1: list(range(8))},
        2: {1: list(range(8, 20))},
    }
    assert not channels.whole


def test_a_network_that_returns_no_tensor_is_rejected():
    class Nothing(nn.Linear):
        def forward(self, x):
            return object()

    with pytest.raises(ValueError, match=r"Nothing .*returns no tensor"):
        trace_channels(Nothing(2, 1), torch.zeros(2, 2))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.first(x) + torch.randn(len(x), 1))


def test_the_networks_own_noise_does_not_matter_and_the_network_does_not_change():
    network = Noisy()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    assert trace_channels(network, torch.zeros(2, 2)).sizes == (4,)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in network.modules())


def conditional(*shape):
    return torch.zeros(2, *shape), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("network", "inputs", "sizes"),
    [
        (lambda: models.SmallGenerator(16, 1, 2), (torch.zeros(2, 64),), (8, 8, 4, 2)),
        (lambda: models.SmallDiscriminator(16, 1, 2), (torch.zeros(2, 1, 16, 16),), (2, 4, 8, 8)),
        # The last channels are multiplied with the class's embedding and summed up.
        (lambda: models.SmallDiscriminator(16, 1, 2, num_classes=3), conditional(1, 16, 16), (2, 4, 8)),
        (lambda: models.DCGANGenerator(width=2), (torch.zeros(2, 128),), (16, 8, 4, 2)),
        (lambda: models.DCGANDiscriminator(width=2), (torch.zeros(2, 3, 32, 32),), (2, 2, 4, 4, 8, 8, 16)),
        (lambda: models.SNGANGenerator(width=4), (torch.zeros(2, 128),), (4,) * 7),
        (lambda: models.SNGANGenerator(48, width=2), (torch.zeros(2, 128),), (16, 8, 8, 4, 4, 2, 2)),
        (lambda: models.SNGANDiscriminator(width=4), (torch.zeros(2, 3, 32, 32),), (4,) * 6),
        (lambda: models.BigGANGenerator(width=2), conditional(128), (8,) * 7),
        (lambda: models.BigGANDiscriminator(width=2), conditional(3, 32, 32), (8,) * 5),
        (lambda: models.BigGANGenerator(64, width=8), conditional(100), (128, 64, 64, 32, 32, 16, 16, 8, 8, 8)),
    ],
)
def test_the_papers_networks(network, inputs, sizes):
    assert trace_channels(network(), *inputs).sizes == sizes


def test_a_network_that_fails_on_the_example_input_is_rejected():
    with pytest.raises(ValueError, match=r"Linear cannot be traced: .*a tensor \(2, 3\)"):
        trace_channels(nn.Linear(2, 1), torch.zeros(2, 3))


def test_a_network_without_such_channels_is_rejected():
    with pytest.raises(ValueError, match=r"Sequential has no channels .*x\.unflatten"):
        trace_channels(nn.Sequential(nn.Linear(2, 1), nn.ReLU()), torch.zeros(2, 2))


def test_a_layer_that_is_called_by_function_alone_has_none():
    class ByFunction(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.last(F.linear(x, self.first.weight))

    with pytest.raises(ValueError, match="no channels"):
        trace_channels(ByFunction(), torch.zeros(2, 2))
