import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer, select
from lightning_ddst.sparsity.launches import (
    all_finite,
    flip,
    invert,
    join,
    join_views,
    read,
    unjoin,
    zero_where_inactive,
)
from lightning_ddst.utils.devices import simulate_launch_bound

INF = float("inf")

# ---- single operations -----------------------------------------------------------------------------


def test_joined_tensors_come_apart_in_their_shapes_also_if_they_were_stored_by_columns():
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t(), torch.tensor([5.0])]
    joined = join(tensors)
    assert joined.tolist() == [1, 3, 2, 4, 5]
    assert all(torch.equal(*pair) for pair in zip(unjoin(joined, tensors), tensors, strict=True))


@pytest.mark.usefixtures("every_device")
@pytest.mark.parametrize(
    ("order", "shares"),
    [([0, 1, 2], True), ([1, 2], True), ([0, 2], False), ([1, 0, 2], False)],
)
def test_parts_that_lie_side_by_side_are_joined_without_a_copy(order, shares):
    joined = torch.arange(9.0)
    parts = unjoin(joined, [torch.empty(2, 2), torch.empty(3), torch.empty(1, 2)])
    chosen = [parts[number] for number in order]
    again = join_views(chosen)
    assert again.tolist() == join(chosen).tolist()
    assert (again.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()) is shares


def test_parts_of_other_tensors_or_transposed_ones_are_copied():
    first, second, square = torch.ones(2), torch.zeros(2), torch.arange(4.0).view(2, 2).t()
    assert join_views([first, second]).tolist() == [1, 1, 0, 0]
    assert join_views([square]).tolist() == [0, 2, 1, 3]


def test_tensors_with_a_value_that_is_not_finite_are_found():
    values = [[1.0, -3e38], [0.0, float("nan")], [INF, 1.0], [-INF, 0.0], [-0.0, 2.0]]
    assert all_finite([torch.tensor(value) for value in values]).tolist() == [True, False, False, False, True]
    assert all_finite([torch.tensor([1.0, 60000.0], dtype=torch.float16), torch.ones(3)]).all()
    assert all_finite([torch.empty(0), torch.tensor([INF]), torch.empty(0)]).tolist() == [True, False, True]
    assert all_finite([torch.empty(0)]).tolist() == [True]


@pytest.mark.usefixtures("every_device")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
def test_inactive_entries_become_zero_without_a_sign_whatever_they_were(dtype):
    first = torch.tensor([[float("nan"), -2.0], [-INF, 4.0]])
    second = torch.tensor([-1.0, 5.0])
    masks = [torch.tensor([[0, 1], [0, 1]], dtype=dtype), torch.tensor([0, 1], dtype=dtype)]
    zero_where_inactive([first, second], masks)
    assert first.tolist() == [[0, -2], [0, 4]]
    assert second.tolist() == [0, 5]
    assert not first[:, 0].signbit().any()
    assert not second.signbit().any()


@pytest.mark.usefixtures("every_device")
def test_masks_are_flipped_in_place_where_marked_and_inverted():
    masks = [torch.tensor([True, False, True, False]), torch.tensor([[True]])]
    flip(masks, [torch.tensor([True, True, False, False]), torch.tensor([[True]])])
    assert [mask.tolist() for mask in masks] == [[False, True, True, False], [[False]]]
    assert [mask.tolist() for mask in invert(masks)] == [[True, False, False, True], [[True]]]


def test_numbers_and_bools_are_read_together():
    assert read([torch.tensor([3, 2**40]), torch.tensor([], dtype=torch.int32), torch.tensor([True, False])]) == [
        [3, 2**40],
        [],
        [1, 0],
    ]


# ---- masks do not depend on the device ---------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_choice_is_the_same(data):
    values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0])
    layers = data.draw(
        st.lists(st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5)
    )
    limits = [data.draw(st.integers(0, sum(allowed for _, allowed in layer))) for layer in layers]
    k = data.draw(st.integers(0, sum(limits)))
    key = data.draw(st.sampled_from([torch.detach, torch.abs, torch.neg]))
    scores = [torch.tensor([score for score, _ in layer]) for layer in layers]
    eligible = [torch.tensor([allowed for _, allowed in layer]) for layer in layers]
    marks, counts = select(scores, eligible, k, limits, key)
    with simulate_launch_bound():
        others, numbers = select(scores, eligible, k, limits, key)
    assert counts == numbers
    assert all(torch.equal(*pair) for pair in zip(marks, others, strict=True))


def test_choice_among_many_is_the_same_with_and_without_limits():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, generator=generator).mul(20).round() for n in (1000, 250_000, 90_000)]  # with many ties
    eligible = [torch.rand(len(score), generator=generator) < 0.6 for score in scores]
    most = [int(allowed.sum()) for allowed in eligible]
    for k, limits in ((5, most), (100_000, most), (200_000, most), (sum(most), most), (50_000, [100, 20_000, most[2]])):
        expected = select(scores, eligible, k, limits, torch.abs)
        with simulate_launch_bound():
            found = select(scores, eligible, k, limits, torch.abs)
        assert found[1] == expected[1]
        assert all(torch.equal(*pair) for pair in zip(found[0], expected[0], strict=True))


class WithNorms(nn.Sequential):
    def __init__(self):
        super().__init__(weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def plain():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


NETWORKS = {
    "global": (plain, {}),
    "gradients of chance": (plain, {"growth": "random"}),
    "averaged gradients": (plain, {"growth": "momentum"}),
    "by layer": (plain, {"scope": "layer"}),
    "high floors": (plain, {"layer_floor": 1.0}),
    "a density of its own": (plain, {"layer_densities": {"2": 0.5}}),
    "kept": (plain, {"regrown": "keep"}),
    "weight norm": (WithNorms, {}),
    "2:4": (plain, {"granularity": "2:4"}),
    "channels": (plain, {"granularity": "channel", "inputs": (torch.zeros(2, 8),)}),
}
OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1),
}


def train(name, optimizer, frozen):
    """Trains through every kind of mask update; returns all that it leaves behind after each."""
    torch.manual_seed(0)
    make, options = NETWORKS[name]
    sparse = MaskedNetwork(make(), 0.5, seed=3, **options)
    network = sparse.network
    made = OPTIMIZERS[optimizer](network.parameters())
    enforcer = MaskEnforcer(sparse, [made])
    if frozen:
        network[2].weight.requires_grad_(False)
    seen = []
    changes = [sparse.explore, sparse.explore]
    if not name.startswith("2"):
        changes += [lambda _, g: sparse.resize(0.4, g), lambda _, g: sparse.resize(0.7, g), sparse.explore]
    for change in changes:
        enforcer.gradients.recording = True
        for _ in range(3):
            made.zero_grad()
            for _ in range(2):  # gradients accumulate
                network(torch.randn(16, network[0].in_features)).square().mean().backward()
            made.step()
        enforcer.gradients.recording = False
        change(0.3, enforcer.gradients.pop())
        state = [value for held in made.state.values() for value in held.values()]
        values = [*network.parameters(), *(p.grad for p in network.parameters() if p.grad is not None), *state]
        numbers = [sparse.coverage, sparse.overlap, sparse.checksum, sparse.layer_counts]
        seen.append(
            (copy.deepcopy(sparse.masks), [torch.as_tensor(value).detach().clone() for value in values], numbers)
        )
    return seen


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_bit_identical(name, optimizer, frozen):
    expected = train(name, optimizer, frozen)
    with simulate_launch_bound():
        found = train(name, optimizer, frozen)
    assert len({numbers[2] for _, _, numbers in found}) > 1  # masks changed
    for (masks, values, numbers), (others, other_values, other_numbers) in zip(expected, found, strict=True):
        assert all(torch.equal(mask, others[key]) for key, mask in masks.items())
        assert all(torch.equal(*pair) for pair in zip(values, other_values, strict=True))
        assert numbers == other_numbers
