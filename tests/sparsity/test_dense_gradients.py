import copy
import io

import pytest
import torch
from sparse_toys import FIRST, LAST, batch, network, update, with_gradients
from torch import nn

from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer
from lightning_ddst.sparsity.dense_gradients import DenseGradients

pytestmark = pytest.mark.usefixtures("every_device")


@pytest.fixture
def setting():
    """A sparse network that is enforced and recorded, an unmasked twin, and the optimizers of both at rate 0."""

    def make(growth="gradient"):
        sparse = MaskedNetwork(network(), 0.4, growth=growth, seed=1)
        twin = copy.deepcopy(sparse.network)
        optimizer = torch.optim.SGD(sparse.network.parameters(), lr=0.0)
        hold = MaskEnforcer(sparse, [optimizer])
        hold.gradients.recording = True
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
    taken = gradients.pop()
    assert_same(taken, gradients_of(twin))
    assert all(taken[name][~mask].all() for name, mask in sparse.masks.items())


def test_dense_gradients_of_several_backward_passes_add_up(setting):
    sparse, twin, optimizer, gradients = setting()
    for seed in range(3):
        batch(seed, sparse.network).backward()
        batch(seed, twin).backward()
    optimizer.step()
    assert_same(gradients.pop(), gradients_of(twin))


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
    assert_same(gradients.pop(), gradients_of(twin))


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
        assert_same(gradients.pop(), gradients_of(twin))


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
    assert_same(gradients.pop(), gradients_of(twin))


def test_a_gradient_that_is_only_looked_at_does_not_count(setting):
    sparse, twin, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    torch.autograd.grad(batch(1, sparse.network), [sparse.network[0].weight])
    batch(2, sparse.network).backward()
    optimizer.step()
    batch(0, twin).backward()
    batch(2, twin).backward()
    assert_same(gradients.pop(), gradients_of(twin))


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
    assert all((gradient == 1).all() for gradient in gradients.pop().values())


def test_of_several_updates_the_last_ones_gradients_are_kept(setting):
    sparse, twin, optimizer, gradients = setting()
    update(sparse.network, optimizer, 0)
    update(sparse.network, optimizer, 1)
    batch(1, twin).backward()
    assert_same(gradients.pop(), gradients_of(twin))


def test_gradients_of_one_update_are_given_up_once(setting):
    sparse, _, optimizer, gradients = setting()
    update(sparse.network, optimizer, 0)
    assert gradients.pop() is not None
    assert gradients.pop() is None


def test_gradients_are_not_there_before_the_optimizer_stepped(setting):
    sparse, _, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    assert gradients.pop() is None
    optimizer.step()
    assert gradients.pop() is not None


def test_nothing_is_kept_when_not_recording(setting):
    sparse, _, optimizer, gradients = setting()
    gradients.recording = False
    assert not gradients.needed
    update(sparse.network, optimizer, 0)
    assert gradients.state_dict()["kept"] == {}
    assert gradients.pop() is None
    gradients.recording = True
    assert gradients.needed
    assert gradients.pop() is None
    update(sparse.network, optimizer, 0)
    assert gradients.pop() is not None


def test_a_rule_that_needs_no_gradient_gets_none_and_keeps_none(setting):
    sparse, _, optimizer, gradients = setting("random")
    assert not gradients.needed
    update(sparse.network, optimizer, 0)
    assert gradients.state_dict()["kept"] == {}
    assert gradients.pop() == {}


def test_the_average_moves_a_tenth_of_the_way_at_every_update_recording_or_not(setting):
    sparse, _, optimizer, gradients = setting("momentum")
    gradients.recording = False
    assert gradients.needed
    for value in (1.0, 2.0, -3.0):
        optimizer.zero_grad()
        with_gradients(sparse, _0=value, _3=10 * value)
        optimizer.step()
    # 1, then 0.9 * 1 + 0.1 * 2 = 1.1, then 0.9 * 1.1 - 0.1 * 3 = 0.69
    for _ in range(2):  # it stays
        taken = gradients.pop()
        torch.testing.assert_close(taken[FIRST], torch.full((8, 6), 0.69))
        torch.testing.assert_close(taken[LAST], torch.full((3, 8), 6.9))


def test_a_gradient_that_is_missing_for_one_weight_gives_none(setting):
    sparse, _, optimizer, gradients = setting()
    with_gradients(sparse, _0=1.0)
    optimizer.step()
    assert gradients.pop() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_gives_none_and_the_next_one_counts_again(setting, bad):
    sparse, _, optimizer, gradients = setting()
    with_gradients(sparse, _0=torch.where(sparse.masks[FIRST], 1.0, bad), _3=1.0)
    optimizer.step()
    assert gradients.pop() is None
    update(sparse.network, optimizer, 0)
    assert gradients.pop() is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_count_in_the_average(setting, bad):
    sparse, _, optimizer, gradients = setting("momentum")
    mask = sparse.masks[FIRST]
    for values in (2.0, torch.where(mask, 3.0, bad), 4.0):
        optimizer.zero_grad()
        with_gradients(sparse, _0=values, _3=1.0)
        optimizer.step()
    # 2, then 0.9 * 2 + 0.1 * 3 = 2.1 or still 2, then 0.9 * 2.1 + 0.1 * 4 = 2.29 or 0.9 * 2 + 0.1 * 4 = 2.2
    torch.testing.assert_close(gradients.pop()[FIRST], torch.where(mask, 2.29, 2.2))


def test_dense_gradients_grow_what_they_point_to(setting):
    sparse, _, optimizer, gradients = setting()
    aim = torch.zeros(8, 6)
    places = (~sparse.masks[FIRST]).nonzero()[:4]
    aim[places[:, 0], places[:, 1]] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    with_gradients(sparse, _0=aim, _3=0.0)
    optimizer.step()
    before = sparse.masks[FIRST].clone()
    sparse.resize((sparse.active + 4) / sparse.total, gradients.pop())
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
    assert restored.recording
    assert_same(restored.pop(), gradients.pop())
    assert state["kept"].keys() == {FIRST, LAST}  # not given up with the gradients


def test_a_saved_average_that_is_not_finite_is_rejected(setting):
    sparse, _, optimizer, gradients = setting("momentum")
    update(sparse.network, optimizer, 0)
    state = gradients.state_dict()
    state["kept"][FIRST][0, 0] = float("nan")
    restored = DenseGradients(sparse)
    with pytest.raises(ValueError, match=FIRST):
        restored.load_state_dict(state)
    assert not restored.recording


def test_saved_gradients_are_copies(setting):
    sparse, _, optimizer, gradients = setting("momentum")
    update(sparse.network, optimizer, 0)
    before = {name: gradient.clone() for name, gradient in gradients.pop().items()}
    state = gradients.state_dict()
    for _ in range(2):  # neither what is saved nor what is restored follows further updates
        restored = DenseGradients(sparse)
        restored.load_state_dict(state)
        update(sparse.network, optimizer, 1)
        assert_same(restored.pop(), before)
        for gradient in restored.pop().values():
            gradient.fill_(7.0)


def test_what_was_thrown_away_before_a_step_that_needs_nothing_is_not_kept(setting):
    sparse, _, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    optimizer.zero_grad()
    gradients.recording = False
    batch(1, sparse.network).backward()
    optimizer.step()
    assert gradients.pop() is None


def test_what_was_thrown_away_and_not_stepped_with_is_not_kept(setting):
    sparse, _, optimizer, gradients = setting()
    batch(0, sparse.network).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert gradients.pop() is None
