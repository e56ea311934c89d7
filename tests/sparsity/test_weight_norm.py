"""Weight norm, w = g v / |v|: v is masked, and w is what counts."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer, maskable_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
FORMS = {"old": old_weight_norm, "new": parametrizations.weight_norm}
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
NAMES = {
    "old": ("0.weight_g", "0.weight_v"),
    "new": ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
}
V = [[3.0, 4.0, 12.0], [1.0, 2.0, 2.0]]  # rows of length 13 and 3


def normed(form, v, g, dim=0):
    """A network of one layer with these v and g."""
    v = torch.tensor(v)
    network = nn.Sequential(FORMS[form](nn.Linear(v.shape[1], v.shape[0], bias=False), dim=dim))
    values = dict(network.named_parameters())
    with torch.no_grad():
        values[NAMES[form][0]].copy_(torch.tensor(g).view_as(values[NAMES[form][0]]))
        values[NAMES[form][1]].copy_(v)
    return network


def effective(network):
    """The weight that the layer computes with."""
    with torch.no_grad():
        network(torch.zeros(1, network[0].in_features))
        return network[0].weight.detach().clone()


def g_of(network, form):
    return dict(network.named_parameters())[NAMES[form][0]].flatten().tolist()


# ---- finding -----------------------------------------------------------------------------------------


@BOTH_FORMS
@pytest.mark.parametrize(("dim", "found", "groups"), [(0, 0, 2), (1, 1, 3), (-2, 0, 2), (-1, None, 1), (None, None, 1)])
def test_v_is_found_with_its_norms(form, dim, found, groups):
    network = nn.Sequential(FORMS[form](nn.Linear(3, 2), dim=dim))
    (weight,) = maskable_weights(network)
    g, v = (network.get_parameter(name) for name in NAMES[form])
    assert (weight.name, weight.tensor, weight.out_dim, weight.in_dim) == (NAMES[form][1], "weight", 0, 1)
    assert weight.parameter is weight.norm.v is v
    assert weight.norm.g is g
    assert (weight.norm.dim, weight.norm.groups) == (found, groups)
    assert torch.allclose(weight.effective(), network[0].weight)


def test_a_transposed_convolution_has_a_norm_for_every_input_by_default():
    (weight,) = maskable_weights(nn.Sequential(parametrizations.weight_norm(nn.ConvTranspose1d(6, 4, 3))))
    assert (weight.out_dim, weight.in_dim, weight.norm.dim, weight.norm.groups) == (1, 0, 0, 6)


@BOTH_FORMS
def test_a_layer_in_two_places_is_masked_once_and_weights_under_two_norms_are_rejected(form):
    layer = FORMS[form](nn.Linear(3, 3))
    (weight,) = maskable_weights(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert weight.norm.groups == 3
    other = FORMS[form](nn.Linear(3, 3))
    if form == "old":
        other.weight_v = layer.weight_v
    else:
        other.parametrizations.weight.original1 = layer.parametrizations.weight.original1
    network = nn.ModuleDict({"a": layer, "b": other, "c": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"'b'.*'a'.*weight norm"):
        maskable_weights(network)
    assert [w.name for w in maskable_weights(network, dense_layers=["a", "b"])] == ["c.weight"]


# ---- pruning, by hand --------------------------------------------------------------------------------


@BOTH_FORMS
def test_magnitudes_are_those_of_the_effective_weight_and_survivors_keep_it(form):
    # g v / |v| is 0.1 * row 0 = (0.3, 0.4, 1.2) and 10 * row 1 = (10, 20, 20); v alone would prune in row 1.
    network = normed(form, V, [1.3, 30.0])
    sparse = MaskedNetwork(network, 4 / 6, initial="magnitude")
    (mask,) = sparse.masks.values()
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    assert g_of(network, form) == pytest.approx([1.2, 30.0])  # 1.3 * 12 / 13
    expected = torch.tensor([[0.0, 0.0, 1.2], [10.0, 20.0, 20.0]])
    assert torch.allclose(effective(network), expected)
    assert not effective(network)[~mask].any()


@BOTH_FORMS
def test_the_largest_entry_of_every_row_stays(form):
    network = normed(form, V, [1.3, 30.0])
    sparse = MaskedNetwork(network, 2 / 6, initial="magnitude")
    (mask,) = sparse.masks.values()
    assert mask.tolist() == [[False, False, True], [False, True, False]]
    assert g_of(network, form) == pytest.approx([1.2, 20.0])  # 30 * 2 / 3


@BOTH_FORMS
def test_the_norms_of_columns(form):
    # Columns of length 5, 13 and 10; the effective ones are (3, 4), (0.5, 1.2), (80, 60).
    network = normed(form, [[3.0, 5.0, 8.0], [4.0, 12.0, 6.0]], [5.0, 1.3, 100.0], dim=1)
    sparse = MaskedNetwork(network, 1.0)
    sparse.resize(3 / 6)
    (mask,) = sparse.masks.values()
    assert mask.tolist() == [[False, False, True], [True, True, False]]
    assert g_of(network, form) == pytest.approx([4.0, 1.2, 80.0])


@BOTH_FORMS
@pytest.mark.parametrize("dim", [None, -1])
def test_one_norm_of_all_entries(form, dim):
    network = normed(form, [[1.0, 3.0, 5.0], [-8.0, 1.0, 0.0]], [20.0], dim=dim)  # of length 10
    sparse = MaskedNetwork(network, 1.0)
    sparse.resize(2 / 6)
    assert g_of(network, form) == pytest.approx([2 * math.sqrt(89)])
    assert torch.allclose(effective(network), torch.tensor([[0.0, 0.0, 10.0], [-16.0, 0.0, 0.0]]))


@BOTH_FORMS
def test_a_norm_of_zero_is_no_reason_to_prune_the_last_entry_that_is_not(form):
    network = normed(form, [[0.0, 0.0, 7.0], [0.0, 5.0, 0.0]], [0.0, 1.0])  # all of row 0 is 0 now
    sparse = MaskedNetwork(network, 2 / 6, initial="magnitude")
    assert [mask.tolist() for mask in sparse.masks.values()] == [[[False, False, True], [False, True, False]]]
    assert effective(network).isfinite().all()


@BOTH_FORMS
@pytest.mark.parametrize("initial", ["random", "magnitude"])
def test_a_density_that_cannot_leave_one_entry_to_every_norm_is_rejected(form, initial):
    with pytest.raises(ValueError, match=r"density=0.2 .* 1 .* 2 per layer.* at least 0.334"):
        MaskedNetwork(normed(form, V, [1.0, 1.0]), 0.2, initial=initial)
    network = nn.Sequential(normed(form, V, [1.0, 1.0]), nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"density=0.2 .* 2 .* the 3 .*weight norm.* at least 0.25"):
        MaskedNetwork(network, 0.2, initial=initial)
    with pytest.raises(ValueError, match=r"layer_densities\['0.0'\]=0.2 .* 1 .* needs 2"):
        MaskedNetwork(network, 0.5, initial=initial, layer_densities={"0.0": 0.2})


# ---- growing, by hand --------------------------------------------------------------------------------


def masked_by_hand(form, mask, **options):
    network = normed(form, V, [1.3, 30.0])
    state = {
        "target": 4 / 6,
        "masks": {NAMES[form][1]: torch.tensor(mask).bool()},
        "rng": torch.Generator().get_state(),
    }
    return network, MaskedNetwork(network, 0.5, state=state, **options)


@BOTH_FORMS
def test_growth_goes_by_the_gradient_of_the_effective_weight(form):
    # The rows are now (0, 4, 12) and (0, 2, 2). The loss is linear in the weight: its gradient is (5, ., .), (4, ., .).
    # That of v is smaller in row 0: times g / |v| = 0.1 there, and 10 in row 1.
    network, sparse = masked_by_hand(form, [[0, 1, 1], [0, 1, 1]])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    gradients = MaskEnforcer(sparse, [optimizer]).gradients
    gradients.recording = True
    inputs, factors = torch.eye(3), torch.tensor([[5.0, 1.0, -2.0], [4.0, 3.0, 1.0]])
    (network(inputs).t() * factors).sum().backward()
    optimizer.step()
    (found,) = kept.values() if (kept := gradients.pop()) else ()
    assert found[:, 0].tolist() == pytest.approx([5.0, 4.0])
    before = effective(network)
    sparse.resize(5 / 6, kept)
    (mask,) = sparse.masks.values()
    assert mask.tolist() == [[True, True, True], [False, True, True]]
    assert torch.equal(effective(network), before)  # a grown entry of v is 0


@BOTH_FORMS
def test_a_norm_of_zero_has_no_gradient_to_grow_by(form):
    _, sparse = masked_by_hand(form, [[0, 1, 1], [0, 1, 1]])
    (weight,) = sparse.weights.values()
    with torch.no_grad():
        weight.norm.g[0] = 0
    gradient = weight.norm.effective_gradient(torch.tensor([[0.0, 0.0, 0.0], [20.0, 0.0, 0.0]]))
    assert gradient[:, 0].tolist() == pytest.approx([0.0, 20 * math.sqrt(8) / weight.norm.g[1].item()])


# ---- always ------------------------------------------------------------------------------------------


def rows_of(values, dim):
    return values.reshape(1, -1) if dim is None else values.movedim(dim, 0).flatten(1)


def assert_alive(sparse, dim):
    (weight,), (mask,) = sparse.weights.values(), sparse.masks.values()
    assert not weight.parameter[~mask].any()
    assert rows_of(weight.parameter * mask, dim).any(1).all()
    assert weight.effective().isfinite().all()
    assert sparse.layer_counts[weight.name] == int(mask.sum())


LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv": lambda: nn.Conv1d(3, 4, 5),
    "transposed": lambda: nn.ConvTranspose2d(3, 2, 2),
}


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(sorted(FORMS)),
    kind=st.sampled_from(sorted(LAYERS)),
    dim=st.sampled_from([0, 1, None]),
    initial=st.sampled_from(["random", "magnitude"]),
    regrown=st.sampled_from(["keep", "reset"]),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_every_norm_keeps_an_entry_and_survivors_their_effective_weights(
    form, kind, dim, initial, regrown, scope, seed, data
):
    torch.manual_seed(seed)
    layer = FORMS[form](LAYERS[kind](), dim=dim)
    (weight,) = maskable_weights(layer)
    total, least = weight.parameter.numel(), weight.norm.groups
    with torch.no_grad():
        weight.norm.g.mul_(torch.randn_like(weight.norm.g))
        weight.parameter[torch.rand_like(weight.parameter) < data.draw(st.sampled_from([0.0, 0.3]))] = 0
        rows = rows_of(weight.parameter, weight.norm.dim)
        rows[:, 0] += 0.5 * (rows == 0).all(1)  # a norm of 0 has no direction, masked or not
        if dim is not None:
            weight.parameter.copy_(rows.view(weight.parameter.movedim(dim, 0).shape).movedim(0, dim))
    counts = st.integers(least, total)
    dense = weight.effective()
    options = {"initial": initial, "regrown": regrown, "scope": scope, "growth": "random", "seed": seed}
    sparse = MaskedNetwork(layer, data.draw(counts) / total, **options)
    (weight,) = sparse.weights.values()
    assert_alive(sparse, weight.norm.dim)
    (mask,) = sparse.masks.values()
    assert torch.allclose(weight.effective(), dense * mask, rtol=1e-4)
    for _ in range(3):
        before, held = weight.effective(), mask.clone()
        if data.draw(st.booleans()):
            sparse.explore(data.draw(st.sampled_from([0.3, 1.0])))
        else:
            sparse.resize(data.draw(counts) / total)
        (mask,) = sparse.masks.values()
        assert_alive(sparse, weight.norm.dim)
        now, stays = weight.effective(), held & mask
        regrew = stays & (now == 0)  # with "reset", what was pruned and grew again starts from 0
        assert torch.allclose(now[stays & ~regrew], before[stays & ~regrew], rtol=1e-4)
        assert not now[mask & ~held].any()


def test_random_masks_are_those_without_weight_norm_if_these_leave_an_entry_to_every_row():
    plain = MaskedNetwork(nn.Sequential(nn.Linear(20, 10)), 0.5, seed=3)
    norm = MaskedNetwork(nn.Sequential(parametrizations.weight_norm(nn.Linear(20, 10))), 0.5, seed=3)
    (expected,), (mask,) = plain.masks.values(), norm.masks.values()
    assert expected.any(1).all()
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("initial", ["random", "magnitude"])
def test_masks_of_two_of_four(initial):
    torch.manual_seed(0)
    network = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(8, 4), dim=dim) for dim in (0, 1)))
    sparse = MaskedNetwork(network, 0.5, granularity="2:4", growth="random", initial=initial)
    assert list(sparse.masks) == ["0.parametrizations.weight.original1"]  # every column of the other has a norm
    (mask,) = sparse.masks.values()
    for _ in range(10):
        sparse.explore(1.0)
        assert (mask.view(4, 2, 4).sum(-1) == 2).all()
        assert_alive(sparse, 0)


# ---- training ----------------------------------------------------------------------------------------


@BOTH_FORMS
@pytest.mark.parametrize("regrown", ["keep", "reset"])
def test_inactive_effective_weights_are_exactly_zero_in_training(form, regrown):
    torch.manual_seed(0)
    network = nn.Sequential(FORMS[form](nn.Linear(6, 16)), nn.Tanh(), FORMS[form](nn.Linear(16, 2)))
    sparse = MaskedNetwork(network, 0.3, regrown=regrown)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05, weight_decay=0.1)
    gradients = MaskEnforcer(sparse, [optimizer]).gradients
    losses, inputs = [], torch.randn(32, 6)
    for step in range(60):
        gradients.recording = step % 5 == 4
        optimizer.zero_grad()
        loss = (network(inputs) - inputs[:, :2].sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 5 == 4:
            assert sparse.explore(0.3, gradients.pop()) > 0
        network(inputs)  # the old form computes its weight in a call
        for layer, mask in zip((network[0], network[2]), sparse.masks.values(), strict=True):
            assert not layer.weight[~mask].any()
            assert mask.any(1).all()
    assert losses[-1] < losses[0] / 5


def test_copies_of_a_masked_network_are_masked_and_independent():
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)))
    sparse = MaskedNetwork(network, 0.5, growth="random")
    other = copy.deepcopy(sparse)
    before = effective(network)
    other.resize(0.25)
    (weight,) = other.weights.values()
    assert weight.norm.v is weight.parameter is other.network.get_parameter(weight.name)
    assert effective(other.network).count_nonzero() == 6
    assert torch.equal(effective(network), before)
