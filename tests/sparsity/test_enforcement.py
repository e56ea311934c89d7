import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer, find_optimizers
from lightning_ddst.sparsity.enforcement import DenseGradients

FIRST, LAST = "0.weight", "3.weight"


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


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed, of=None):
    """A scalar that depends on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
    return (of(inputs) - targets).pow(2).mean()


def update(net, optimizer, seed):
    optimizer.zero_grad()
    batch(seed, net).backward()
    optimizer.step()


def with_gradients(sparse, **values):
    """Sends gradients by hand (scalars, or tensors, by layer) to the weights: the loss is linear in them."""
    loss = 0.0
    for place, value in values.items():
        parameter = sparse.network[int(place[1:])].weight
        loss = loss + (parameter * torch.as_tensor(value).expand_as(parameter)).nansum()
    loss.backward()


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


# ---- what optimizers leave behind ------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_after_every_step_nothing_is_left_where_inactive(make):
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


def test_state_of_other_shapes_and_kinds_is_left_alone():
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
        hold.gradients.armed = True
        update(sparse.network, optimizer, 0)
        assert_nothing_where_inactive(sparse, optimizer)
        assert hold.gradients.take() is not None
        sparse.network.requires_grad_(False)


# ---- taking hold and letting go ------------------------------------------------------------------------------


def test_a_weight_in_no_optimizer_is_refused_by_name():
    sparse = MaskedNetwork(network(), 0.4)
    optimizers = [torch.optim.SGD([*sparse.network[0].parameters(), sparse.network[3].bias], lr=0.1)]
    message = r"no optimizer updates '3\.weight' \(1 of 2 weights are in none\)"
    with pytest.raises(ValueError, match=message):
        MaskEnforcer(sparse, optimizers)
    with pytest.raises(ValueError, match=message):
        find_optimizers(sparse.parameters, optimizers)
    assert not sparse.network[0].weight._backward_hooks


def test_without_optimizers_the_first_weight_is_named():
    with pytest.raises(ValueError, match=r"no optimizer updates '0\.weight' \(2 of 2"):
        find_optimizers(MaskedNetwork(network(), 0.4).parameters, [])


def test_only_the_optimizers_of_a_networks_maskable_weights_are_found():
    sparse = MaskedNetwork(network(), 0.4)
    first, second = (torch.optim.SGD(sparse.network[i].parameters(), lr=0.1) for i in (0, 3))
    norms = torch.optim.SGD(sparse.network[1].parameters(), lr=0.1)
    foreign = torch.optim.SGD(network().parameters(), lr=0.1)
    assert find_optimizers(sparse.parameters, [foreign, second, norms, first]) == [second, first]
    assert find_optimizers({"gain": sparse.network[1].weight}, [foreign, second, norms, first]) == [norms]


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


# ---- dense gradients -------------------------------------------------------------------------------------------


@pytest.fixture
def setting():
    """A sparse network under enforcement, armed; an unmasked twin; and the optimizers of both, which leave weights."""

    def make(growth="gradient"):
        sparse = MaskedNetwork(network(), 0.4, growth=growth, seed=1)
        twin = copy.deepcopy(sparse.network)
        optimizer = torch.optim.SGD(sparse.network.parameters(), lr=0.0)
        hold = MaskEnforcer(sparse, [optimizer])
        hold.gradients.armed = True
        return sparse, twin, optimizer, hold.gradients

    return make


def gradients_of(net):
    return {name: net.get_parameter(name).grad.clone() for name in (FIRST, LAST)}


def assert_same(taken, expected):
    assert taken is not None
    assert taken.keys() == expected.keys()
    for name in expected:
        assert torch.equal(taken[name], expected[name]), name


def test_dense_gradients_are_those_of_an_unmasked_twin(setting):
    sparse, twin, optimizer, gradients = setting()
    update(sparse.network, optimizer, 0)
    batch(0, twin).backward()
    taken = gradients.take()
    assert_same(taken, gradients_of(twin))
    assert all(taken[name][~mask].all() for name, mask in sparse.masks.items())


def test_dense_gradients_of_several_backward_passes_add_up(setting):
    sparse, twin, optimizer, gradients = setting()
    for seed in range(3):
        batch(seed, sparse.network).backward()
        batch(seed, twin).backward()
    optimizer.step()
    assert_same(gradients.take(), gradients_of(twin))


def _cleared_by_hand(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)


CLEARING = {
    "none": lambda optimizer: optimizer.zero_grad(set_to_none=True),
    "zero": lambda optimizer: optimizer.zero_grad(set_to_none=False),
    "by hand": _cleared_by_hand,
}


@pytest.mark.parametrize("clear", CLEARING.values(), ids=CLEARING)
@pytest.mark.parametrize("passes", [1, 2])
def test_dense_gradients_start_over_where_gradients_are_cleared(setting, clear, passes):
    sparse, twin, optimizer, gradients = setting()
    for seed in range(passes):
        batch(100 + seed, sparse.network).backward()  # does not count
    clear(optimizer)
    for seed in range(passes):
        batch(seed, sparse.network).backward()
        batch(seed, twin).backward()
    optimizer.step()
    assert_same(gradients.take(), gradients_of(twin))


@pytest.mark.parametrize("clear", CLEARING.values(), ids=CLEARING)
def test_what_another_network_sends_through_does_not_count(setting, clear):
    # As in a GAN: the generator's backward pass reaches the discriminator's weights, too.
    sparse, twin, optimizer, gradients = setting()
    generator = nn.Linear(4, 6)
    generator_optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)

    def update_generator():
        generator_optimizer.zero_grad()
        sparse.network(generator(torch.randn(8, 4))).sum().backward()
        generator_optimizer.step()

    for seed in range(2):
        update_generator()
        clear(optimizer)
        batch(seed, sparse.network).backward()
        optimizer.step()
        update_generator()
        twin.zero_grad()
        batch(seed, twin).backward()
        assert_same(gradients.take(), gradients_of(twin))


def test_dense_gradients_add_up_over_a_change_of_the_masks(setting):
    # As where the discriminator's gradients of several batches are accumulated over updates of the generator.
    sparse, twin, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    batch(0, twin).backward()
    sparse.resize(0.2)
    twin.load_state_dict(sparse.network.state_dict())
    batch(1, sparse.network).backward()
    batch(1, twin).backward()
    optimizer.step()
    assert_same(gradients.take(), gradients_of(twin))


def test_a_gradient_that_is_only_looked_at_does_not_count(setting):
    sparse, twin, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    torch.autograd.grad(batch(1, sparse.network), [sparse.network[0].weight])
    batch(2, sparse.network).backward()
    optimizer.step()
    batch(0, twin).backward()
    batch(2, twin).backward()
    assert_same(gradients.take(), gradients_of(twin))


class FromBuffer(torch.autograd.Function):
    """Hands out one and the same tensor as gradient, as code does that uses its memory again."""

    @staticmethod
    def forward(ctx, weight, buffer):
        ctx.buffer = buffer
        return weight.sum()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.buffer, None


def test_dense_gradients_are_copies(setting):
    sparse, _, optimizer, gradients = setting()
    buffers = {name: torch.ones_like(weight.parameter) for name, weight in sparse.weights.items()}
    sum(FromBuffer.apply(weight.parameter, buffers[name]) for name, weight in sparse.weights.items()).backward()
    for buffer in buffers.values():
        buffer.fill_(7.0)
    optimizer.step()
    assert all((gradient == 1).all() for gradient in gradients.take().values())


def test_of_several_updates_the_last_ones_gradients_are_kept(setting):
    sparse, twin, optimizer, gradients = setting()
    update(sparse.network, optimizer, 0)
    update(sparse.network, optimizer, 1)
    batch(1, twin).backward()
    assert_same(gradients.take(), gradients_of(twin))


def test_gradients_of_one_update_are_given_up_once(setting):
    sparse, _, optimizer, gradients = setting()
    update(sparse.network, optimizer, 0)
    assert gradients.take() is not None
    assert gradients.take() is None


def test_gradients_are_not_there_before_the_optimizer_stepped(setting):
    sparse, _, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    assert gradients.take() is None
    optimizer.step()
    assert gradients.take() is not None


def test_nothing_is_kept_when_not_armed(setting):
    sparse, _, optimizer, gradients = setting()
    gradients.armed = False
    assert not gradients.wanted
    update(sparse.network, optimizer, 0)
    assert gradients.state_dict()["kept"] == {}
    assert gradients.take() is None
    gradients.armed = True
    assert gradients.wanted
    assert gradients.take() is None
    update(sparse.network, optimizer, 0)
    assert gradients.take() is not None


def test_a_rule_that_needs_no_gradient_gets_none_and_keeps_none(setting):
    sparse, _, optimizer, gradients = setting("random")
    assert not gradients.wanted
    update(sparse.network, optimizer, 0)
    assert gradients.state_dict()["kept"] == {}
    assert gradients.take() == {}


def test_the_average_moves_a_tenth_of_the_way_at_every_update_armed_or_not(setting):
    sparse, _, optimizer, gradients = setting("momentum")
    gradients.armed = False
    assert gradients.wanted
    for value in (1.0, 2.0, -3.0):
        optimizer.zero_grad()
        with_gradients(sparse, _0=value, _3=10 * value)
        optimizer.step()
    # 1, then 0.9 * 1 + 0.1 * 2 = 1.1, then 0.9 * 1.1 - 0.1 * 3 = 0.69
    for _ in range(2):  # it stays
        taken = gradients.take()
        torch.testing.assert_close(taken[FIRST], torch.full((8, 6), 0.69))
        torch.testing.assert_close(taken[LAST], torch.full((3, 8), 6.9))


def test_a_gradient_that_is_missing_for_one_weight_gives_none(setting):
    sparse, _, optimizer, gradients = setting()
    with_gradients(sparse, _0=1.0)
    optimizer.step()
    assert gradients.take() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_gives_none_and_the_next_one_counts_again(setting, bad):
    sparse, _, optimizer, gradients = setting()
    with_gradients(sparse, _0=torch.where(sparse.masks[FIRST], 1.0, bad), _3=1.0)
    optimizer.step()
    assert gradients.take() is None
    update(sparse.network, optimizer, 0)
    assert gradients.take() is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_count_in_the_average(setting, bad):
    sparse, _, optimizer, gradients = setting("momentum")
    mask = sparse.masks[FIRST]
    for values in (2.0, torch.where(mask, 3.0, bad), 4.0):
        optimizer.zero_grad()
        with_gradients(sparse, _0=values, _3=1.0)
        optimizer.step()
    # 2, then 0.9 * 2 + 0.1 * 3 = 2.1 or still 2, then 0.9 * 2.1 + 0.1 * 4 = 2.29 or 0.9 * 2 + 0.1 * 4 = 2.2
    torch.testing.assert_close(gradients.take()[FIRST], torch.where(mask, 2.29, 2.2))


def test_dense_gradients_grow_what_they_point_to(setting):
    sparse, _, optimizer, gradients = setting()
    aim = torch.zeros(8, 6)
    places = (~sparse.masks[FIRST]).nonzero()[:4]
    aim[places[:, 0], places[:, 1]] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    with_gradients(sparse, _0=aim, _3=0.0)
    optimizer.step()
    before = sparse.masks[FIRST].clone()
    sparse.resize((sparse.active + 4) / sparse.total, gradients.take())
    assert torch.equal(sparse.masks[FIRST] & ~before, aim != 0)


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_kept_gradients_are_saved_and_restored(setting, growth):
    sparse, _, optimizer, gradients = setting(growth)
    update(sparse.network, optimizer, 0)
    file = io.BytesIO()
    torch.save(gradients.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    restored = DenseGradients(sparse)
    restored.load_state_dict(state)
    assert restored.armed
    assert_same(restored.take(), gradients.take())
    assert state["kept"].keys() == {FIRST, LAST}  # not given up with the gradients


def test_saved_gradients_are_copies(setting):
    sparse, _, optimizer, gradients = setting("momentum")
    update(sparse.network, optimizer, 0)
    before = {name: gradient.clone() for name, gradient in gradients.take().items()}
    state = gradients.state_dict()
    for _ in range(2):  # neither what is saved nor what is restored follows further updates
        restored = DenseGradients(sparse)
        restored.load_state_dict(state)
        update(sparse.network, optimizer, 1)
        assert_same(restored.take(), before)
        for gradient in restored.take().values():
            gradient.fill_(7.0)


def test_what_was_thrown_away_before_a_step_that_needs_nothing_is_not_kept(setting):
    sparse, _, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    optimizer.zero_grad()
    gradients.armed = False
    batch(1, sparse.network).backward()
    optimizer.step()
    assert gradients.take() is None


def test_what_was_thrown_away_and_not_stepped_with_is_not_kept(setting):
    sparse, _, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert gradients.take() is None
