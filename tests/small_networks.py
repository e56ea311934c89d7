"""Networks with a few weights, and what must hold of their masks."""

import torch
from torch import nn

from lightning_ddst.sparsity import MaskedNetwork

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
    """Checks what must always hold."""
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
