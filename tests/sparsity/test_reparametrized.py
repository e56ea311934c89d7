import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from lightning_ddst.sparsity.reparametrized import copy_network, fold_all, fold_weight_norm, has_weight_norm

FORMS = {"new": weight_norm, "old": hooked_weight_norm}


@pytest.fixture(params=FORMS)
def form(request, recwarn):
    return FORMS[request.param]


def direction(layer):
    """The parameter v."""
    (v,) = (parameter for name, parameter in layer.named_parameters() if name.endswith(("_v", "original1")))
    return v


def test_the_weight_is_worked_out_by_hand_and_zeros_are_exact(form):
    layer = form(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        direction(layer).copy_(torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
        g = next(parameter for parameter in layer.parameters() if parameter.shape == (3, 1))
        g.copy_(torch.tensor([[10.0], [-1.0], [5.0]]))
    fold_weight_norm(layer)
    assert type(layer) is nn.Linear
    assert layer.state_dict().keys() == {"weight"}
    expected = torch.tensor([[6.0, 0.0, 8.0], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0]])  # the last norm is 0
    assert torch.equal(layer.weight, expected)
    assert not layer.weight.signbit()[expected == 0].any()


@pytest.mark.parametrize(
    ("layer", "dim", "shape"),
    [
        (nn.Conv1d(2, 4, 3), 0, (1, 2, 5)),
        (nn.ConvTranspose1d(2, 4, 3), 0, (1, 2, 5)),
        (nn.Conv2d(2, 4, 3), 1, (1, 2, 5, 5)),
        (nn.Linear(2, 4), None, (1, 2)),
    ],
    ids=["conv", "transposed", "dim 1", "one norm"],
)
def test_a_copy_computes_the_same_without_weight_norm(form, layer, dim, shape):
    network, x = nn.Sequential(form(copy_network(layer), dim=dim)), torch.randn(shape)
    with torch.no_grad():
        direction(network)[..., 0, 0] = 0
    expected = network(x)  # a weight with a gradient is part of the module after this
    copy = copy_network(network)
    fold_weight_norm(copy)
    torch.testing.assert_close(copy(x), expected)
    assert torch.equal(copy[0].weight == 0, direction(network) == 0)
    assert has_weight_norm(network)
    assert not has_weight_norm(copy)
    assert torch.equal(network(x), expected)


def test_recurrent_layers_use_the_plain_weight(form):
    network, x = form(nn.LSTM(3, 4), "weight_hh_l0"), torch.randn(5, 2, 3)
    expected, _ = network(x)
    fold_weight_norm(network)
    torch.testing.assert_close(network(x)[0], expected)
    with torch.no_grad():
        network.weight_hh_l0.zero_()
    assert not torch.allclose(network(x)[0], expected)


def test_other_parametrizations_stay():
    layer = weight_norm(nn.Linear(3, 3))
    parametrize.register_parametrization(layer, "bias", nn.Softplus())
    other = copy_network(layer)
    x = torch.randn(2, 3)
    expected = layer(x)
    fold_weight_norm(layer)
    assert list(layer.parametrizations) == ["bias"]
    torch.testing.assert_close(layer(x), expected)
    assert list(other.parametrizations) == ["weight", "bias"]
    assert torch.equal(other(x), expected)


def test_everything_is_folded():
    network = nn.Sequential(
        spectral_norm(nn.Linear(3, 3)),
        hooked_spectral_norm(nn.Linear(3, 3)),
        orthogonal(nn.Linear(3, 3)),
        weight_norm(nn.Linear(3, 3)),
    ).eval()
    x = torch.randn(2, 3)
    expected = network(x)
    copy = copy_network(network)
    fold_all(copy)
    assert [type(layer) for layer in copy] == [nn.Linear] * 4
    assert set(copy.state_dict()) == {f"{i}.{name}" for i in range(4) for name in ("weight", "bias")}
    torch.testing.assert_close(copy(x), expected)
    assert torch.equal(network(x), expected)
