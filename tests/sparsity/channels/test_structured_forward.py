from copy import deepcopy

import pytest
import torch
from architectures import FeatureDiscriminator, GroupNormGenerator, StyleGenerator
from torch import nn

from lightning_ddst import models
from lightning_ddst.sparsity import MaskedNetwork, StructuredForward
from lightning_ddst.sparsity.channels.structured_forward import can_run_structured

NETWORKS = {
    "SmallGenerator": (lambda: models.SmallGenerator(8, 1, 8), lambda: (torch.randn(6, 64),)),
    "SmallDiscriminator": (lambda: models.SmallDiscriminator(8, 1, 8), lambda: (torch.randn(6, 1, 8, 8),)),
    "SNGANDiscriminator": (lambda: models.SNGANDiscriminator(width=8), lambda: (torch.randn(6, 3, 32, 32),)),
    "GroupNormGenerator": (GroupNormGenerator, lambda: (torch.randn(6, 4),)),
    "StyleGenerator": (StyleGenerator, lambda: (torch.randn(6, 4),)),
    "BigGANGenerator": (lambda: models.BigGANGenerator(width=2), lambda: (torch.randn(6, 128), torch.arange(6))),
}


@pytest.fixture(params=NETWORKS)
def pair(request):
    """A network with masks of channels, the same one without inactive ones, and what they are called with.

    In 64 bits, where sums in another order differ by little also after a normalization divided by a small variance.
    """
    torch.manual_seed(0)
    make, make_inputs = NETWORKS[request.param]
    whole = make().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in make_inputs())
    sparse = MaskedNetwork(whole, 0.35, granularity="channel", inputs=inputs)
    narrow = deepcopy(whole)
    return whole, narrow, sparse, inputs


def test_training_equals_the_whole_network_with_zeros(pair):
    whole, narrow, sparse, inputs = pair
    narrowing = StructuredForward(narrow, sparse.kept)
    for _ in range(2):
        outputs = []
        for network in (whole, narrow):
            outputs.append(network(*inputs))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-10)
    for name, mask in sparse.masks.items():
        own, other = whole.get_parameter(name).grad * mask, narrow.get_parameter(name).grad
        assert not other[~mask].any()
        torch.testing.assert_close(other, own, rtol=1e-6, atol=1e-8 * float(own.abs().max()))
    for name, buffer in narrow.named_buffers():
        expected = whole.get_buffer(name)
        stays = sparse.kept.get(name, {}).get(0, ...)
        torch.testing.assert_close(buffer[stays], expected[stays], rtol=1e-8, atol=1e-10)
    narrowing.remove()
    assert "forward" not in narrow.__dict__


def test_evaluation_equals_the_whole_network_bit_for_bit(pair):
    whole, narrow, sparse, inputs = pair
    StructuredForward(narrow, sparse.kept)
    with torch.no_grad():
        assert torch.equal(narrow.eval()(*inputs), whole.eval()(*inputs))


def test_layers_compute_fewer_channels(pair):
    _, narrow, sparse, inputs = pair
    widths = {}
    for name, layer in narrow.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, args, output, name=name: widths.update({name: args[0].shape[1]}))
    StructuredForward(narrow, sparse.kept)
    narrow(*inputs)
    layers = dict(narrow.named_modules())
    narrower = 0
    for name, weight in sparse.weights.items():
        (layer,) = weight.layers
        if layer not in widths:
            continue
        active = int(sparse.masks[name].any(0).flatten(1).any(1).sum())
        assert widths[layer] == active
        narrower += active < layers[layer].in_channels
    assert narrower


def test_norms_are_whole_again_after_a_call():
    torch.manual_seed(0)
    network, z = GroupNormGenerator(), torch.randn(2, 4)
    sparse = MaskedNetwork(network, 0.35, granularity="channel", inputs=(z,))
    widths = []
    network.norm.register_forward_hook(lambda norm, args, output: widths.append((norm.num_groups, norm.num_channels)))
    StructuredForward(network, sparse.kept)
    network(z)
    assert widths == [(sparse.units.now[0], 4 * sparse.units.now[0])] != [(4, 16)]
    assert (network.norm.num_groups, network.norm.num_channels) == (4, 16)


def test_returned_features_have_the_active_channels():
    torch.manual_seed(0)
    network, x = FeatureDiscriminator(), torch.randn(2, 3, 8, 8)
    sparse = MaskedNetwork(network, 0.4, granularity="channel", inputs=(x,), narrow_features=True)
    full_score, full = network(x)
    StructuredForward(network, sparse.kept)
    score, features = network(x)
    torch.testing.assert_close(score, full_score)
    for name, narrow, whole in zip(("first", "second"), features, full, strict=True):
        kept = sparse.kept[f"{name}.weight"][0]
        assert narrow.shape[1] == len(kept) < whole.shape[1]
        torch.testing.assert_close(narrow, whole[:, kept])


def test_a_copy_computes_with_its_own_weights():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(4, 3)
    sparse = MaskedNetwork(network, 0.5, granularity="channel", inputs=(x,))
    StructuredForward(network, sparse.kept)
    copy = deepcopy(network)
    with torch.no_grad():
        copy[2].bias.add_(1)
    torch.testing.assert_close(copy(x), network(x) + 1)


def test_a_compiled_network_computes_with_all_channels():
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert can_run_structured(network)
    network.compile()
    assert not can_run_structured(network)


def test_a_forward_that_was_replaced_in_a_network_is_the_one_that_runs():
    network, inputs = models.SmallGenerator(8, 1, 8), torch.randn(6, 64)
    own = network.forward
    replaced = lambda z: own(z) + 1  # noqa: E731
    network.forward = replaced
    sparse = MaskedNetwork(network, 0.35, granularity="channel", inputs=(inputs,))
    sparse.to_weights()
    torch.manual_seed(0)
    expected = network(inputs)
    structured = StructuredForward(network, sparse.kept)
    torch.testing.assert_close(network(inputs), expected)
    structured.remove()
    assert network.forward is replaced
