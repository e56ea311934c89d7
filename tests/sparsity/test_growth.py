import pytest
import torch
from torch import nn

from lightning_ddst.sparsity import GROWTH_RULES, Layer, MaskedNetwork, growth_rule


def layer(gradient=(), seed=0, shape=(2, 3)):
    return Layer(
        weight=torch.full(shape, 100.0),
        mask=torch.ones(shape, dtype=torch.bool),
        gradient=torch.tensor(gradient),
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize(("rule", "gradient"), [("random", "none"), ("gradient", "latest"), ("momentum", "average")])
def test_rules_and_the_gradients_they_need(rule, gradient):
    assert GROWTH_RULES[rule].gradient == gradient


@pytest.mark.parametrize("rule", ["gradient", "momentum"])
def test_scores_by_gradient_count_by_magnitude_whatever_the_weight(rule):
    scores = GROWTH_RULES[rule].score(layer([[1.0, -3.0, 0.0], [-0.5, 2.0, -0.0]]))
    assert scores.tolist() == [[1.0, -3.0, 0.0], [-0.5, 2.0, 0.0]]
    assert GROWTH_RULES[rule].magnitude
    assert not GROWTH_RULES["random"].magnitude


def test_random_scores_are_drawn_from_the_layers_generator_only():
    state = torch.get_rng_state()
    one = layer(seed=3, shape=(20, 50))
    first, second = GROWTH_RULES["random"].score(one), GROWTH_RULES["random"].score(one)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(GROWTH_RULES["random"].score(layer(seed=3, shape=(20, 50))), first)
    assert not torch.equal(second, first)
    assert not torch.equal(GROWTH_RULES["random"].score(layer(seed=4, shape=(20, 50))), first)
    assert first.shape == (20, 50)
    assert first.min() >= 0
    assert first.max() <= 1
    assert first.mean() == pytest.approx(0.5, abs=0.03)  # 3 standard errors: 0.289 / sqrt(1000) = 0.009


def test_a_function_is_registered_under_its_name_and_stays_what_it_is(registered):
    def by_place(layer):
        return torch.arange(6.0).view(2, 3)

    assert growth_rule("place", gradient="average")(by_place) is by_place
    assert registered["place"].score is by_place
    assert registered["place"].gradient == "average"


@pytest.mark.parametrize("scores", [3.0, None, torch.ones(2, 2, dtype=torch.bool)])
def test_scores_that_are_no_numbers_are_rejected(registered, scores):
    growth_rule("place")(lambda layer: scores)
    network = MaskedNetwork(nn.Linear(4, 3), 0.5, growth="place")
    with pytest.raises(TypeError, match=r"scores of 'weight' must be a floating-point tensor"):
        network.explore(0.5)


def test_scores_of_another_shape_are_rejected_with_both_shapes(registered):
    growth_rule("place")(lambda layer: layer.gradient)  # empty, as the rule asks for none
    network = MaskedNetwork(nn.Linear(4, 3), 0.5, growth="place")
    with pytest.raises(ValueError, match=r"scores of 'weight' have shape \(0,\); they must have .* \(3, 4\)"):
        network.explore(0.5)


def test_a_rule_needs_no_gradient_unless_it_asks_for_it(registered):
    growth_rule("place")(lambda layer: layer.weight)
    assert registered["place"].gradient == "none"
