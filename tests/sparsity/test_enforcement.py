import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from sparse_toys import FIRST, batch, network, update, with_gradients
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer
from lightning_ddst.sparsity.enforcement import StateMasker, mask_gradients, mask_weights

pytestmark = pytest.mark.usefixtures("every_device")


class Noisy(torch.optim.Optimizer):
    """Moves every weight at random and writes noise into all of its state, masked or not."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "noise": torch.randn_like(parameter),
                    "half": torch.randn_like(parameter).to(torch.bfloat16),
                    "per_row": torch.ones(len(parameter)),
                    "step": 1,
                    "name": "noise",
                }
                parameter.add_(torch.randn_like(parameter))


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, betas=(0.0, 0.9)),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True, foreach=True),
    "fused adam": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1),
    "noisy": Noisy,
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def weight_shaped_state(optimizer, parameter):
    return [
        value
        for value in optimizer.state[parameter].values()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    ]


def assert_nothing_where_inactive(sparse, optimizer, *, gradients=True):
    for name, weight in sparse.weights.items():
        inactive = ~sparse.masks[name]
        assert inactive.any()
        assert not weight.parameter[inactive].any()
        assert weight_shaped_state(optimizer, weight.parameter)
        for value in weight_shaped_state(optimizer, weight.parameter):
            assert not value[inactive].any()
        if gradients:
            assert not weight.parameter.grad[inactive].any()


# ---- the parts, with a few tensors ------------------------------------------------------------------------


@pytest.fixture
def masked():
    """A weight whose first and third entry are inactive, and its mask."""
    return nn.Parameter(torch.tensor([1.0, 2.0, -3.0, 4.0])), torch.tensor([False, True, False, True])


def test_weights_are_masked(masked):
    weight, mask = masked
    weight.data[0] = float("nan")
    mask_weights({weight: mask})
    assert weight.tolist() == [0, 2, 0, 4]
    assert not weight.signbit().any()


def test_gradients_are_masked_where_there_are_some(masked):
    weight, mask = masked
    other = nn.Parameter(torch.ones(4))
    weight.grad = torch.tensor([5.0, 6.0, -float("inf"), 8.0])
    version = weight.grad._version
    mask_gradients({weight: mask, other: mask})
    assert weight.grad.tolist() == [0, 6, 0, 8]
    assert weight.grad._version == version
    assert other.grad is None


def test_state_is_masked_at_every_step_if_the_optimizer_fills_it(masked):
    weight, mask = masked
    optimizer = Noisy([weight])
    masker = StateMasker(optimizer)
    for _ in range(3):
        optimizer.step()
        masker.on_step({weight: mask})
        assert ((optimizer.state[weight]["noise"] != 0) == mask).all()


def test_state_is_masked_again_only_after_a_change_if_the_optimizer_leaves_it_zero(masked):
    weight, mask = masked
    optimizer = Noisy([weight])
    masker = StateMasker(optimizer)
    optimizer.state[weight] = {"momentum": mask.float()}
    for _ in range(2):
        masker.on_step({weight: mask})
    optimizer.state[weight]["momentum"] += 1
    masker.on_step({weight: mask})
    assert optimizer.state[weight]["momentum"].tolist() == [1, 2, 1, 2]
    masker.on_change({weight: mask})
    assert optimizer.state[weight]["momentum"].tolist() == [0, 2, 0, 2]
    optimizer.state[weight]["momentum"] += 1
    masker.on_step({weight: mask})
    assert optimizer.state[weight]["momentum"].tolist() == [0, 3, 0, 3]


def test_an_optimizer_that_writes_nothing_at_first_is_not_trusted_yet_and_named_once(masked):
    weight, mask = masked
    optimizer = Noisy([weight])
    masker = StateMasker(optimizer)
    optimizer.state[weight] = {"momentum": torch.zeros(4)}
    for _ in range(2):
        masker.on_step({weight: mask})
    for number in range(2):
        optimizer.state[weight]["momentum"] += 1  # also of inactive weights
        with pytest.warns(UserWarning, match="Noisy writes state of inactive weights") if not number else nullcontext():
            masker.on_step({weight: mask})
        assert not optimizer.state[weight]["momentum"][mask == 0].any()
        masker.on_change({weight: mask})


def test_state_from_before_the_masks_is_set_to_zero_without_a_warning(masked):
    weight, mask = masked
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(4):
        weight.grad = torch.ones(4)
        optimizer.step()
    masker = StateMasker(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            weight.grad = mask.float()
            optimizer.step()
            masker.on_step({weight: mask})
            assert not optimizer.state[weight]["exp_avg"][mask == 0].any()


def test_state_of_an_optimizer_inside_a_wrapper_is_masked(masked):
    class Wrapper(torch.optim.SGD):
        def __init__(self, inner):
            super().__init__([weight], lr=0.1)
            self.inner = inner

    weight, mask = masked
    inner = torch.optim.SGD([weight], lr=0.1)
    inner.state[weight] = {"momentum": torch.ones(4)}
    StateMasker(Wrapper(inner)).on_change({weight: mask})
    assert inner.state[weight]["momentum"].tolist() == [0, 1, 0, 1]


def test_state_of_optimizers_without_any_is_no_mistake(masked):
    weight, mask = masked
    masker = StateMasker(torch.optim.SGD([weight], lr=0.1))
    masker.on_step({weight: mask})
    masker.on_change({weight: mask})


# ---- what optimizers leave behind ------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_after_every_step_everything_inactive_is_zero(make):
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    optimizer = make(sparse.network.parameters())
    MaskEnforcer(sparse, [optimizer])
    for seed in range(6):
        before = {name: weight.parameter.detach().clone() for name, weight in sparse.weights.items()}
        update(sparse.network, optimizer, seed)
        assert_nothing_where_inactive(sparse, optimizer)
        for name, weight in sparse.weights.items():
            mask = sparse.masks[name]
            assert (weight.parameter != before[name])[mask].float().mean() > 0.9  # some move by less than a rounding
            assert weight.parameter.grad[mask].all()
            assert any(value[mask].any() for value in weight_shaped_state(optimizer, weight.parameter))


@EVERY_OPTIMIZER
def test_a_pruned_weight_loses_its_state_at_once_and_a_grown_one_starts_with_none(make):
    sparse = MaskedNetwork(network(), 1.0, growth="random", seed=1)
    optimizer = make(sparse.network.parameters())
    MaskEnforcer(sparse, [optimizer])
    for seed in range(3):
        update(sparse.network, optimizer, seed)
    for change in (
        lambda: sparse.resize(0.5),
        lambda: sparse.explore(0.5),
        lambda: sparse.resize(0.3),
        lambda: sparse.resize(0.7),
    ):
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        change()
        assert_nothing_where_inactive(sparse, optimizer, gradients=False)
        for name, weight in sparse.weights.items():
            grown = sparse.masks[name] & ~before[name]
            assert not weight.parameter[grown].any()
            for value in weight_shaped_state(optimizer, weight.parameter):
                assert not value[grown].any()
        update(sparse.network, optimizer, 3)
        assert_nothing_where_inactive(sparse, optimizer)
    assert grown.any()
    assert weight.parameter[grown].all()  # trained by now


def test_a_weight_that_is_pruned_and_grown_at_once_starts_like_any_other():
    sparse = MaskedNetwork(network(), 0.5, seed=1)
    optimizer = torch.optim.Adam(sparse.network.parameters(), lr=0.01)
    MaskEnforcer(sparse, [optimizer])
    for seed in range(3):
        update(sparse.network, optimizer, seed)
    before = {
        name: (mask.clone(), sparse.weights[name].parameter.detach().clone()) for name, mask in sparse.masks.items()
    }
    # What is active has the largest gradients, so all that is pruned grows again.
    number = sparse.explore(0.5, {name: mask.float() for name, mask in sparse.masks.items()})
    assert number == 18  # half of half of 72
    assert all(torch.equal(sparse.masks[name], mask) for name, (mask, _) in before.items())
    again = {name: mask & (sparse.weights[name].parameter == 0) for name, (mask, _) in before.items()}
    assert sum(int(marks.sum()) for marks in again.values()) == 18
    for name, weight in sparse.weights.items():
        assert torch.equal(weight.parameter[~again[name]], before[name][1][~again[name]])
        for value in weight_shaped_state(optimizer, weight.parameter):
            assert not value[again[name]].any()
            assert value[sparse.masks[name] & ~again[name]].all()


def test_a_pruned_weight_loses_its_gradient_at_once():
    sparse = MaskedNetwork(network(), 1.0, seed=1)
    optimizer = torch.optim.SGD(sparse.network.parameters(), lr=0.1)
    MaskEnforcer(sparse, [optimizer])
    batch(0, sparse.network).backward()  # a part of an update that is still to come
    sparse.resize(0.5)
    for name, weight in sparse.weights.items():
        assert not weight.parameter.grad[~sparse.masks[name]].any()
        assert weight.parameter.grad[sparse.masks[name]].all()


def test_state_of_other_shapes_and_kinds_does_not_change():
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    optimizer = Noisy(sparse.network.parameters())
    MaskEnforcer(sparse, [optimizer])
    update(sparse.network, optimizer, 0)
    for weight in sparse.weights.values():
        state = optimizer.state[weight.parameter]
        assert state["per_row"].all()
        assert (state["step"], state["name"]) == (1, "noise")


@EVERY_OPTIMIZER
def test_biases_and_norms_train_as_in_an_unmasked_network(make):
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    twin = copy.deepcopy(sparse.network)
    optimizer, plain = make(sparse.network.parameters()), make(twin.parameters())
    MaskEnforcer(sparse, [optimizer])
    for net, one in ((sparse.network, optimizer), (twin, plain)):
        torch.manual_seed(5)  # of the noise
        update(net, one, 0)
    others = [name for name, _ in twin.named_parameters() if name not in sparse.masks]
    assert others == ["0.bias", "1.weight", "1.bias", "3.bias"]
    for name in others:
        mine, plains = sparse.network.get_parameter(name), twin.get_parameter(name)
        assert torch.equal(mine, plains)
        assert torch.equal(mine.grad, plains.grad)
        for value, expected in zip(
            weight_shaped_state(optimizer, mine), weight_shaped_state(plain, plains), strict=True
        ):
            assert torch.equal(value, expected)
            assert value.any()


def test_two_optimizers_of_one_network_mask_their_own_weights():
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    first = torch.optim.Adam(sparse.network[0].parameters(), lr=0.01)
    second = torch.optim.SGD([*sparse.network[3].parameters(), *sparse.network[1].parameters()], lr=0.1, momentum=0.9)
    MaskEnforcer(sparse, [first, second])
    for seed in range(3):
        batch(seed, sparse.network).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in sparse.weights.items():
        inactive = ~sparse.masks[name]
        assert not weight.parameter[inactive].any()
        for value in weight_shaped_state(first if name == FIRST else second, weight.parameter):
            assert not value[inactive].any()


def test_an_optimizer_of_another_network_among_them_changes_nothing():
    sparse, other = MaskedNetwork(network(), 0.4, seed=1), network()
    own, foreign = (torch.optim.Adam(net.parameters(), lr=0.01) for net in (sparse.network, other))
    MaskEnforcer(sparse, [foreign, own])
    twin = network()
    alone = torch.optim.Adam(twin.parameters(), lr=0.01)
    for seed in range(3):
        for net, optimizer in ((sparse.network, own), (other, foreign), (twin, alone)):
            update(net, optimizer, seed)
    assert_nothing_where_inactive(sparse, own)
    assert all(torch.equal(mine, its) for mine, its in zip(other.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_under_spectral_norm_are_masked_before_it(spectral_norm):
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 3)))
    sparse = MaskedNetwork(net, 0.4, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    MaskEnforcer(sparse, [optimizer])
    for seed in range(4):
        update(net, optimizer, seed)
        assert_nothing_where_inactive(sparse, optimizer)
    net.eval()(torch.zeros(1, 6))
    for (name, weight), layer in zip(sparse.weights.items(), (net[0], net[2]), strict=True):
        assert name == weight.name
        assert torch.equal(layer.weight != 0, sparse.masks[name])


# ---- gradients ---------------------------------------------------------------------------------------------


def test_clipping_sees_the_norm_of_active_gradients_only():
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    twin = copy.deepcopy(sparse.network)
    MaskEnforcer(sparse, [torch.optim.SGD(sparse.network.parameters(), lr=0.1)])
    batch(0, sparse.network).backward()
    batch(0, twin).backward()
    squares = sum(
        (parameter.grad * sparse.masks[name] if name in sparse.masks else parameter.grad).pow(2).sum()
        for name, parameter in twin.named_parameters()
    )
    dense = sum(parameter.grad.pow(2).sum() for parameter in twin.parameters())
    norm = clip_grad_norm_(sparse.network.parameters(), 1e-3)
    assert norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-5)
    assert norm < 0.95 * dense.sqrt()
    assert not any(weight.parameter.grad[~sparse.masks[name]].any() for name, weight in sparse.weights.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adagrad"])
def test_a_gradient_that_is_not_finite_does_not_get_through_where_inactive(bad, name):
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    optimizer = OPTIMIZERS[name](sparse.network.parameters())
    MaskEnforcer(sparse, [optimizer])
    mask = sparse.masks[FIRST]
    with_gradients(sparse, _0=torch.where(mask, 2.0, bad), _3=1.0)
    assert torch.equal(sparse.network[0].weight.grad, 2.0 * mask)
    optimizer.step()
    assert_nothing_where_inactive(sparse, optimizer)
    assert all(parameter.isfinite().all() for parameter in sparse.network.parameters())


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "amsgrad", "rmsprop"])
def test_masking_gradients_equals_masking_weights_bit_for_bit(name):
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    weights_only, gradients_only = copy.deepcopy(sparse.network), copy.deepcopy(sparse.network)
    make = OPTIMIZERS[name]
    enforced = make(sparse.network.parameters())
    MaskEnforcer(sparse, [enforced])
    first, second = make(weights_only.parameters()), make(gradients_only.parameters())
    for seed in range(20):
        update(sparse.network, enforced, seed)
        update(weights_only, first, seed)
        with torch.no_grad():
            for key, mask in sparse.masks.items():
                weights_only.get_parameter(key).mul_(mask)
        second.zero_grad()
        batch(seed, gradients_only).backward()
        for key, mask in sparse.masks.items():
            gradients_only.get_parameter(key).grad.mul_(mask)
        second.step()
    for key, parameter in sparse.network.named_parameters():
        assert torch.equal(parameter, weights_only.get_parameter(key)), key
        assert torch.equal(parameter, gradients_only.get_parameter(key)), key
    # The state differs where inactive, or this would show nothing.
    inactive = ~sparse.masks[FIRST]
    assert any(value[inactive].any() for value in weight_shaped_state(first, weights_only[0].weight))


def test_masks_are_enforced_once_weights_that_were_frozen_train():
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    sparse.network.requires_grad_(False)
    optimizer = torch.optim.Adam(sparse.network.parameters(), lr=0.01)
    hold = MaskEnforcer(sparse, [optimizer])
    assert not any(parameter.requires_grad for parameter in sparse.network.parameters())
    for _ in range(2):  # a GAN freezes and unfreezes in turns
        sparse.network.requires_grad_(True)
        hold.gradients.recording = True
        update(sparse.network, optimizer, 0)
        assert_nothing_where_inactive(sparse, optimizer)
        assert hold.gradients.pop() is not None
        sparse.network.requires_grad_(False)


# ---- optimizer state that is kept ----------------------------------------------------------------------------


@EVERY_OPTIMIZER
@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_inactive_weights_are_zero_without_a_sign(make, optimizer_state):
    sparse = MaskedNetwork(network(), 1.0, growth="random", seed=1)
    optimizer = make(sparse.network.parameters())
    MaskEnforcer(sparse, [optimizer], optimizer_state=optimizer_state)
    for seed, density in enumerate((1.0, 0.5, 0.5, 0.3, 0.7)):
        sparse.resize(density)
        update(sparse.network, optimizer, seed)
        for name, weight in sparse.weights.items():
            for value in (weight.parameter[~sparse.masks[name]], weight.parameter.grad[~sparse.masks[name]]):
                assert not value.any()
                assert not value.signbit().any()


def kept_adam(optimizer_state):
    """Adam with betas 1/2 and 3/4 on the weights 4, -3, 2, -1, after a step with gradients of 8."""
    net = nn.Linear(4, 1, bias=False)
    net.weight.data.copy_(torch.tensor([[4.0, -3.0, 2.0, -1.0]]))
    sparse = MaskedNetwork(net, 1.0, growth="random")
    optimizer = torch.optim.Adam(net.parameters(), lr=2**-10, betas=(0.5, 0.75))
    MaskEnforcer(sparse, [optimizer], optimizer_state=optimizer_state)

    def step():
        optimizer.zero_grad()
        (8 * net.weight.sum()).backward()
        optimizer.step()

    step()
    return sparse, net.weight, optimizer.state[net.weight], step


def test_kept_moments_decay_as_for_gradients_of_zero():
    sparse, weight, state, step = kept_adam("keep")
    sparse.resize(0.5)
    assert sparse.masks["weight"].tolist() == [[True, True, False, False]]
    assert state["exp_avg"].tolist() == [[4, 4, 4, 4]]  # 8 / 2
    assert state["exp_avg_sq"].tolist() == [[16, 16, 16, 16]]  # 64 / 4
    # Active weights: 4 / 2 + 8 / 2 = 6 and 6 / 2 + 8 / 2 = 7; 16 * 3/4 + 64/4 = 28 and 28 * 3/4 + 64/4 = 37.
    for m, v in (([6, 6, 2, 2], [28, 28, 12, 12]), ([7, 7, 1, 1], [37, 37, 9, 9])):
        step()
        assert state["exp_avg"].tolist() == [m]
        assert state["exp_avg_sq"].tolist() == [v]
        assert weight[0, 2:].tolist() == [0, 0]
        assert weight.grad.tolist() == [[8, 8, 0, 0]]


@pytest.mark.parametrize(
    ("optimizer_state", "m", "v"),
    [("keep", 1 / 2 + 8 / 2, 9 * 3 / 4 + 64 / 4), ("reset", 8 / 2, 64 / 4)],
)
def test_a_regrown_weight_continues_from_kept_moments_or_starts_with_none(optimizer_state, m, v):
    sparse, weight, state, step = kept_adam(optimizer_state)
    sparse.resize(0.5)
    step()
    step()
    sparse.resize(1.0)
    assert weight[0, 2:].tolist() == [0, 0]
    step()
    assert state["exp_avg"][0, 2:].tolist() == [m, m]
    assert state["exp_avg_sq"][0, 2:].tolist() == [v, v]
    moved = -(2**-10) * (m / (1 - 0.5**4)) / (v / (1 - 0.75**4)) ** 0.5  # in Adam's fourth step
    assert weight[0, 2:].tolist() == pytest.approx([moved, moved], rel=1e-6)


def test_an_unknown_treatment_of_state_is_rejected():
    sparse = MaskedNetwork(network(), 0.4)
    optimizer = torch.optim.SGD(sparse.network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer_state='decay' is unknown; allowed are reset, keep"):
        MaskEnforcer(sparse, [optimizer], optimizer_state="decay")
    assert not optimizer._optimizer_step_post_hooks


# ---- taking hold and letting go ------------------------------------------------------------------------------


def test_a_weight_in_no_optimizer_is_rejected_by_name():
    sparse = MaskedNetwork(network(), 0.4)
    optimizers = [torch.optim.SGD([*sparse.network[0].parameters(), sparse.network[3].bias], lr=0.1)]
    with pytest.raises(ValueError, match=r"no optimizer updates '3\.weight'"):
        MaskEnforcer(sparse, optimizers)
    assert not sparse.network[0].weight._backward_hooks


def test_removed_it_leaves_no_hook_and_masks_nothing_any_more():
    sparse = MaskedNetwork(network(), 0.4, seed=1)
    twin = copy.deepcopy(sparse.network)
    optimizer = torch.optim.Adam(sparse.network.parameters(), lr=0.01)
    plain = torch.optim.Adam(twin.parameters(), lr=0.01)
    MaskEnforcer(sparse, [optimizer]).remove()
    for weight in sparse.weights.values():
        assert not weight.parameter._backward_hooks
        assert not weight.parameter._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks
    update(sparse.network, optimizer, 0)
    update(twin, plain, 0)
    assert sparse.network[0].weight.all()
    assert all(torch.equal(*pair) for pair in zip(sparse.network.parameters(), twin.parameters(), strict=True))


def test_removed_it_leaves_optimizer_state_alone_when_masks_change():
    sparse = MaskedNetwork(network(), 1.0)
    optimizer = torch.optim.Adam(sparse.network.parameters(), lr=0.01)
    hold = MaskEnforcer(sparse, [optimizer])
    update(sparse.network, optimizer, 0)
    hold.remove()
    sparse.resize(0.5)
    assert optimizer.state[sparse.network[0].weight]["exp_avg"].all()


def test_removing_twice_does_no_harm():
    sparse = MaskedNetwork(network(), 0.4)
    hold = MaskEnforcer(sparse, [torch.optim.SGD(sparse.network.parameters(), lr=0.1)])
    hold.remove()
    hold.remove()
