import pytest
import torch
from torch import nn
from torch.optim import Adam

from lightning_ddst.methods import InitialWeights, MagnitudePruning
from lightning_ddst.sparsity import MaskedNetwork


def test_post_hoc_pruning_is_once_after_two_thirds():
    pruning = MagnitudePruning.post_hoc()
    assert [pruning.rounds_until(update, 300) for update in (1, 199, 200, 300)] == [0, 0, 1, 1]
    assert pruning.density(1, 0.1) == 0.1
    assert not pruning.rewinds


def test_rounds_of_iterative_pruning_by_hand():
    pruning = MagnitudePruning.iterative(0.5)
    # 0.8, 0.64, 0.512, and then 0.5: four rounds, five parts of the run.
    assert (pruning.rounds, pruning.rewinds) == (4, True)
    rounds = [pruning.rounds_until(update, 100) for update in range(1, 101)]
    assert rounds == [0] * 19 + [1] * 20 + [2] * 20 + [3] * 20 + [4] * 21
    assert [pruning.density(number, 0.5) for number in range(1, 5)] == pytest.approx([0.8, 0.64, 0.512, 0.5])
    assert [pruning.density(number, 1.0) for number in range(1, 5)] == [1.0] * 4


def test_of_rounds_that_fall_together_the_last_counts():
    pruning = MagnitudePruning.iterative(0.5)  # in a run of 2 updates at 0.4, 0.8, 1.2 and 1.6
    assert [pruning.rounds_until(update, 2) for update in (1, 2)] == [3, 4]


@pytest.mark.parametrize(("density", "rounds"), [(1.0, 0), (0.8, 1), (0.79, 2), (0.64, 2), (0.1, 11)])
def test_number_of_rounds(density, rounds):
    pruning = MagnitudePruning.iterative(density)
    assert pruning.rounds == rounds
    assert rounds == 0 or pruning.density(rounds, density) == pytest.approx(density)


def test_restoring_gives_back_weights_and_buffers_and_takes_optimizer_state_away():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other = nn.Linear(2, 2)
    initial = InitialWeights([network])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = Adam([*network.parameters(), *other.parameters()])
    for _ in range(3):
        optimizer.zero_grad()
        (network(torch.randn(8, 4)).square().mean() + other(torch.randn(8, 2)).square().mean()).backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in network.state_dict().items())
    initial.restore([optimizer])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert optimizer.state.keys() == set(other.parameters())


def test_what_was_saved_restores_another_time():
    torch.manual_seed(0)
    network = nn.Linear(4, 4)
    saved = InitialWeights([network]).state_dict()
    with torch.no_grad():
        network.weight.zero_()
    later = InitialWeights([network])
    later.load_state_dict(saved)
    later.restore([])
    assert torch.equal(network.weight, saved[0]["weight"])
    assert network.weight.any()


def test_masks_hold_for_weights_that_came_back():
    torch.manual_seed(0)
    network = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    initial = InitialWeights([network])
    sparse = MaskedNetwork(network, 1.0)
    sparse.resize(0.25)
    initial.restore([])
    assert network.parametrizations.weight.original.count_nonzero() == 64
    sparse.apply_masks()
    (mask,) = sparse.masks.values()
    original = network.parametrizations.weight.original
    assert mask.sum() == 16
    assert torch.equal(original != 0, mask)
    network.eval()
    assert torch.linalg.matrix_norm(network.weight, 2).item() == pytest.approx(1, abs=1e-5)
