import pytest
import torch

from lightning_ddst.data import digits
from lightning_ddst.models import DigitsCNN, trained_digits_cnn


@pytest.fixture(scope="module")
def network() -> DigitsCNN:
    return trained_digits_cnn()


def test_it_classifies_the_digits(network: DigitsCNN) -> None:
    images, labels = digits().tensors
    predicted = network.classify(images)
    assert predicted.dtype == torch.int64
    assert predicted.shape == (1797,)
    assert (predicted == labels).double().mean() >= 0.95


def test_its_forward_pass_gives_features(network: DigitsCNN) -> None:
    images, _ = digits().tensors
    features = network(images[:7])
    assert features.shape == (7, 64)
    assert network.num_features == 64
    assert torch.equal(network.classify(images[:7]), network.classifier(features).argmax(1))
    assert len(network(images[:500]).std(0).nonzero()) > 32  # most features say something


def test_it_comes_frozen_and_in_evaluation_mode(network: DigitsCNN) -> None:
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network(digits().tensors[0][:2]).requires_grad


def test_its_weights_follow_the_seed_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = trained_digits_cnn(epochs=1, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    with torch.no_grad():  # it trains where gradients are switched off, too
        again, other = (trained_digits_cnn(epochs=1, seed=seed).state_dict() for seed in (4, 5))
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    assert not any(torch.equal(value, first[name]) for name, value in other.items())
