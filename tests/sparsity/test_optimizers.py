import pytest
import torch
from sparse_toys import network
from torch import nn

from lightning_ddst.sparsity import MaskedNetwork, find_optimizers, get_parameters, has_updated
from lightning_ddst.sparsity.optimizers import UpdateHooks


def test_the_error_names_a_weight_in_no_optimizer():
    sparse = MaskedNetwork(network(), 0.4)
    optimizers = [torch.optim.SGD([*sparse.network[0].parameters(), sparse.network[3].bias], lr=0.1)]
    with pytest.raises(ValueError, match=r"no optimizer updates '3\.weight' \(1 of 2 "):
        find_optimizers(sparse.parameters, optimizers)


def test_without_optimizers_the_error_names_the_first_weight():
    with pytest.raises(ValueError, match=r"no optimizer updates '0\.weight' \(2 of 2"):
        find_optimizers(MaskedNetwork(network(), 0.4).parameters, [])


def test_only_the_optimizers_of_a_networks_maskable_weights_are_found():
    sparse = MaskedNetwork(network(), 0.4)
    first, second = (torch.optim.SGD(sparse.network[i].parameters(), lr=0.1) for i in (0, 3))
    norms = torch.optim.SGD(sparse.network[1].parameters(), lr=0.1)
    foreign = torch.optim.SGD(network().parameters(), lr=0.1)
    assert find_optimizers(sparse.parameters, [foreign, second, norms, first]) == [second, first]
    assert find_optimizers({"gain": sparse.network[1].weight}, [foreign, second, norms, first]) == [norms]


def test_parameters_come_in_the_order_of_the_groups():
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [c]}, {"params": [a, b]}], lr=0.1)
    assert [id(parameter) for parameter in get_parameters(optimizer)] == [id(c), id(a), id(b)]


def test_a_step_updates_parameters_that_have_gradients():
    own, other = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([own, other], lr=0.1)
    other.grad = torch.ones(1)
    assert not has_updated({"own": own}, optimizer)
    own.grad = torch.zeros(1)
    assert has_updated({"own": own}, optimizer)
    assert not has_updated({"foreign": nn.Parameter(torch.zeros(1))}, optimizer)


@pytest.mark.parametrize("overflow", [True, False])
def test_a_fused_optimizer_that_skips_its_step_updates_nothing(overflow):
    own = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([own], lr=0.1)
    own.grad = torch.ones(1)
    optimizer.found_inf = torch.tensor(float(overflow))  # as torch's GradScaler sets it
    assert has_updated({"own": own}, optimizer) != overflow


@pytest.fixture
def halves():
    """Two layers with an optimizer each, and the updates that were counted."""
    layers = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    first, last = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers)
    layers(torch.ones(1, 1)).sum().backward()
    counted = []
    return layers, first, last, counted


def test_one_step_of_each_optimizer_is_an_update(halves):
    layers, first, last, counted = halves
    foreign = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    hooks = UpdateHooks(layers, [foreign, first, last], lambda: counted.append(1))
    for optimizer, updates in ((first, 0), (first, 0), (foreign, 0), (last, 1), (last, 1), (first, 2)):
        optimizer.step()
        assert len(counted) == updates
    hooks.end_batch()
    assert len(counted) == 2
    first.step()
    hooks.end_batch()  # without the last one
    hooks.end_batch()
    assert len(counted) == 3
    hooks.remove()
    first.step()
    last.step()
    assert len(counted) == 3


def test_updates_of_a_network_that_was_frozen_when_it_was_hooked_count(halves):
    layers, first, last, counted = halves
    layers.requires_grad_(False)
    UpdateHooks(layers, [first, last], lambda: counted.append(1))
    layers.requires_grad_(True)
    first.step()
    last.step()
    assert len(counted) == 1
