from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ddst.balance.normalized import NormalizedWeights


class Products(TorchDispatchMode):
    """Counts the products of a matrix and a vector, of which spectral norm takes three for each weight in training."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


class Repeated(nn.Module):
    """Applies one layer as often as its argument says; each time spectral norm goes on by one iteration."""

    def __init__(self):
        super().__init__()
        self.layer = spectral_norm(nn.Linear(3, 3, bias=False))

    def forward(self, x, times=1):
        for _ in range(times):
            x = self.layer(x)
        return x

    @property
    def norm(self):
        return self.layer.parametrizations.weight[0]


def made():
    torch.manual_seed(0)
    network = Repeated()
    nn.init.normal_(network.layer.parametrizations.weight.original)  # far from what the vectors fit
    return network, {name: value.clone() for name, value in network.state_dict().items()}


def from_state(network, state, *arguments):
    """Returns the result of a call from a state, the number of its products, and the state afterwards."""
    network.load_state_dict(state)
    with Products() as products, torch.no_grad():
        returned = network(*arguments)
    return returned, products.counts["mv"], [buffer.clone() for buffer in network.buffers()]


def recorded(network, *arguments):
    normalized = NormalizedWeights(network)
    normalized.record()
    network(*arguments)
    normalized.stop()
    return normalized


def test_calls_from_the_same_state_take_the_recorded_weights():
    network, state = made()
    normalized, other = recorded(network, torch.ones(1, 3)), torch.randn(4, 3)
    with normalized.reused():
        returned, products, buffers = from_state(network, state, other)
    expected, needed, _ = from_state(network, state, other)
    assert torch.equal(returned, expected)
    assert not returned.requires_grad
    assert (products, needed) == (0, 3)
    assert all(
        torch.equal(value, state[name]) for value, name in zip(buffers, dict(network.named_buffers()), strict=True)
    )


def test_without_a_record_the_first_call_makes_it():
    network, state = made()
    normalized, x = NormalizedWeights(network), torch.randn(4, 3)
    counts = []
    for _ in range(3):
        with normalized.reused():
            counts.append(from_state(network, state, x)[1])
    assert counts == [3, 0, 0]


@pytest.mark.parametrize(("before", "again"), [(3, 3), (3, 1), (1, 3), (2, 4)])
def test_a_weight_that_is_computed_several_times_is_another_each_time(before, again):
    network, state = made()
    normalized, x = recorded(network, torch.ones(1, 3), before), torch.randn(2, 3)
    with normalized.reused():
        returned, *_ = from_state(network, state, x, again)
    expected, *_, buffers = from_state(network, state, x, again)
    assert torch.equal(returned, expected)
    if again > before:
        with normalized.reused():
            assert all(map(torch.equal, from_state(network, state, x, again)[2], buffers))


def test_in_another_mode_weights_are_computed():
    network, state = made()
    normalized, x = recorded(network, torch.ones(1, 3)), torch.randn(2, 3)
    network.eval()
    with normalized.reused():
        returned, products, _ = from_state(network, state, x)
    assert torch.equal(returned, from_state(network, state, x)[0])
    assert products == 1


def test_nothing_stays_in_the_network_after_a_call_or_an_error():
    network, _ = made()
    normalized = NormalizedWeights(network)
    for _ in range(2):  # while it records, and while it gives
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), normalized.reused():
            network(torch.ones(1, 4))
        assert not network.norm._forward_hooks
        assert "forward" not in vars(network.norm)
    assert network(torch.ones(1, 3)).requires_grad


def test_other_networks_are_called_as_they_are():
    network = nn.utils.spectral_norm(nn.Linear(3, 3))
    with recorded(network, torch.ones(1, 3)).reused(), Products() as products:
        network(torch.ones(1, 3))
    assert products.counts["mv"] > 0
