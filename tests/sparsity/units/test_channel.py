from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_ddst.sparsity import MaskedNetwork, MaskEnforcer

X = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))


def chain(*widths):
    """Linear layers, two inputs, tanh between them, one output."""
    torch.manual_seed(0)
    sizes = [2, *widths, 1]
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def groups(sparse):
    """Active channels, and all, of each group."""
    return list(zip(sparse.units.now, sparse.units.sizes, strict=True))


def rows(sparse, name="0.weight"):
    """Which rows of a weight are active."""
    return sparse.masks[name].any(1).nonzero().squeeze(1).tolist()


def test_counts_are_those_of_the_nearest_number_of_channels():
    # Three channels between 2 inputs and 1 output: 3, 6 or 9 active weights of 9.
    for density, active in ((1 / 3, 3), (0.4, 3), (0.5, 3), (0.51, 6), (0.8, 6), (0.9, 9), (1.0, 9)):
        sparse = MaskedNetwork(chain(3), density, granularity="channel", inputs=(X,))
        assert (sparse.active, sparse.total) == (active, 9)
        assert groups(sparse) == [(active // 3, 3)]
        assert (
            sparse.allocation(density) == {"0.weight": active // 3 * 2, "2.weight": active // 3} == sparse.layer_counts
        )
        assert sparse.target == density
        assert sparse.density == active / 9


def test_the_emptiest_group_gets_the_next_channel():
    # Of 4 and 2 channels, with 2 a + a b + b active weights of 18. Two of four and one of two are as full.
    counts = ((1, 1), (2, 1), (3, 1), (3, 2), (4, 2))
    for (a, b), active in zip(counts, (4, 7, 10, 14, 18), strict=True):
        sparse = MaskedNetwork(chain(4, 2), active / 18, granularity="channel", inputs=(X,))
        assert groups(sparse) == [(a, 4), (b, 2)]
        assert sparse.active == active == sum(int(mask.sum()) for mask in sparse.masks.values())


def test_a_weight_is_active_where_both_its_channels_are():
    sparse = MaskedNetwork(chain(4, 4), 0.4, granularity="channel", inputs=(X,))
    first, second = rows(sparse), rows(sparse, "4.weight")
    assert second == [0]  # the output
    between = sparse.masks["2.weight"]
    columns, lines = between.any(0), between.any(1)
    assert torch.equal(between, lines[:, None] & columns[None])
    assert columns.nonzero().squeeze(1).tolist() == first
    assert torch.equal(sparse.masks["4.weight"][0], lines)
    for name, parameter in sparse.parameters.items():
        assert not parameter[~sparse.masks[name]].any()


def test_the_channels_of_smallest_share_of_squares_are_pruned():
    network = chain(4)
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]))  # squares 9 1 4 2 of 16
        network[2].weight.copy_(torch.tensor([[0.0, 0.5, 0.1, 0.1]]))  # 0, 25, 1, 1 of 27: that outweighs 1 of 16
    sparse = MaskedNetwork(network, 0.5, granularity="channel", inputs=(X,), initial="magnitude")
    assert rows(sparse) == [0, 1]


def test_pruning_keeps_what_is_largest_of_what_is_active():
    sparse = MaskedNetwork(chain(4), 0.75, granularity="channel", inputs=(X,))
    active = rows(sparse)
    with torch.no_grad():
        sparse.network[0].weight[active[1]] *= 1e-3
        sparse.network[2].weight[:, active[1]] *= 1e-3
    sparse.resize(0.5)
    assert rows(sparse) == [active[0], active[2]]
    assert sparse.target == 0.5
    assert sparse.overlap == 6 / 9


def test_growth_keeps_the_output_and_gives_rows_as_large_as_the_others():
    network = chain(64, 64)
    sparse = MaskedNetwork(network, 0.3, granularity="channel", inputs=(X,))
    before, counts = network(X), groups(sparse)
    old = {name: mask.clone() for name, mask in sparse.masks.items()}
    scales = {
        name: float(p.detach()[sparse.masks[name]].square().mean().sqrt()) for name, p in sparse.parameters.items()
    }
    sparse.resize(0.9)
    torch.testing.assert_close(network(X), before, rtol=0, atol=1e-6)
    assert all(now > was for (now, _), (was, _) in zip(groups(sparse), counts, strict=True))
    for name, parameter in sparse.parameters.items():
        new = sparse.masks[name] & ~old[name]
        values = parameter.detach()
        assert not values[~sparse.masks[name]].any()
        grown_columns = sparse.masks[name].any(0) & ~old[name].any(0)
        if name != "0.weight":  # whose inputs are no channels
            assert grown_columns.any()
            assert not values[:, grown_columns].any()
        grown_rows = new[:, ~grown_columns]
        if name != "4.weight":
            assert float(values[:, ~grown_columns][grown_rows].square().mean().sqrt()) == pytest.approx(
                scales[name], rel=0.2
            )


def test_grown_channels_learn():
    network = chain(8)
    sparse = MaskedNetwork(network, 0.25, granularity="channel", inputs=(X,))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    MaskEnforcer(sparse, [optimizer])
    sparse.resize(1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (network(X) - X.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    assert network[2].weight.detach().abs().min() > 0


def test_exploring_replaces_a_share_of_every_group():
    sparse = MaskedNetwork(chain(10, 10), 0.3, granularity="channel", inputs=(X,))
    counts, active = groups(sparse), sparse.active
    ((first, _), (second, _)) = counts
    replaced = sparse.explore(0.5)
    left = (first - first // 2, second - second // 2)
    assert replaced == active - (2 * left[0] + left[0] * left[1] + left[1])
    assert groups(sparse) == counts
    assert sparse.active == active
    assert 0 < sparse.overlap <= 1
    assert sparse.explore(0.0) == 0


def test_a_group_keeps_a_channel_and_a_dense_network_stays_as_it_is():
    sparse = MaskedNetwork(chain(3), 1 / 3, granularity="channel", inputs=(X,))
    assert sparse.explore(1.0) == 0
    dense = MaskedNetwork(chain(3), 1.0, granularity="channel", inputs=(X,))
    before = dense.checksum
    assert dense.explore(0.5) == 0
    assert dense.checksum == before
    assert not dense.kept


def test_a_density_of_less_than_a_channel_a_group_is_rejected_and_changes_nothing():
    sparse = MaskedNetwork(chain(4), 0.5, granularity="channel", inputs=(X,))
    before = sparse.checksum
    with pytest.raises(ValueError, match=r"density=0\.1 .*one channel per group; .*at least 0\.25"):
        sparse.resize(0.1)
    assert (sparse.checksum, sparse.target) == (before, 0.5)
    assert sparse.reachable(0.1) == 0.25
    assert sparse.reachable(0.6) == 0.6


def test_layers_whose_channels_stay_are_named_with_the_reason():
    network = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
    sparse = MaskedNetwork(network, 0.7, granularity="channel", inputs=(X,))
    reason = "All channels of these layers stay: '0' (LayerNorm '1' mixes channels)."
    assert sparse.units.remarks() == reason
    with pytest.raises(ValueError, match=r"at least 0\.3571\. All channels of these layers stay: '0' "):
        sparse.resize(0.3)  # 16 weights stay, and 8 + 1 for every one of 6 channels
    assert MaskedNetwork(chain(4), 0.5, granularity="channel", inputs=(X,)).units.remarks() == ""


def test_dense_layers_keep_their_channels():
    sparse = MaskedNetwork(chain(4, 4), 0.5, granularity="channel", inputs=(X,), dense_layers=["0"])
    assert sparse.weights.keys() == {"2.weight", "4.weight"}
    assert groups(sparse) == [(2, 4)]
    assert sparse.masks["2.weight"].all(1).sum() == 2


def test_spectral_norms_vectors_fit_after_changes():
    network = nn.Sequential(spectral_norm(nn.Linear(2, 16)), nn.ReLU(), spectral_norm(nn.Linear(16, 1)))
    sparse = MaskedNetwork(network, 0.5, granularity="channel", inputs=(X,))
    for change in (lambda: sparse.explore(0.5), lambda: sparse.resize(0.9), lambda: sparse.resize(0.2)):
        change()
        for layer in (network[0], network[2]):
            network.eval()
            assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(1, abs=1e-5)
            network.train()


def test_state_resumes_identically_and_loads_safely(tmp_path):
    one = MaskedNetwork(chain(8, 8), 0.4, granularity="channel", inputs=(X,), seed=3)
    one.explore(0.3)
    torch.save({"sparse": one.state_dict(), "network": one.network.state_dict()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    network = chain(8, 8)
    network.load_state_dict(saved["network"])
    other = MaskedNetwork(network, 0.9, granularity="channel", inputs=(X,), seed=4, state=saved["sparse"])
    assert other.checksum == one.checksum
    for sparse in (one, other):
        sparse.explore(0.5)
        sparse.resize(0.7)
    assert other.checksum == one.checksum
    assert (other.coverage, other.overlap, other.target) == (one.coverage, one.overlap, one.target)
    assert {n: {d: i.tolist() for d, i in k.items()} for n, k in other.kept.items()} == {
        n: {d: i.tolist() for d, i in k.items()} for n, k in one.kept.items()
    }
    for name, value in network.state_dict().items():
        assert torch.equal(value, one.network.state_dict()[name])


def test_masks_of_single_weights_or_other_channels_are_rejected():
    state = MaskedNetwork(chain(4), 0.5, granularity="channel", inputs=(X,)).state_dict()
    with pytest.raises(ValueError, match=r"saved masks .*another network's: '0.weight' is"):
        MaskedNetwork(chain(5), 0.5, granularity="channel", inputs=(X,), state=state)
    state["channels"] = state["channels"][1:]
    with pytest.raises(ValueError, match=r"saved masks are of single weights, or .*other channels"):
        MaskedNetwork(chain(4), 0.5, granularity="channel", inputs=(X,), state=state)
    del state["channels"]
    with pytest.raises(ValueError, match="the saved masks are of single weights"):
        MaskedNetwork(chain(4), 0.5, granularity="channel", inputs=(X,), state=state)


def reachable_counts(widths):
    """Active weights of a chain from one channel in each group to all; the emptiest group gets the next channel."""
    numbers, counts = [1] * len(widths), []
    while True:
        sizes = [2, *numbers, 1]
        counts.append(sum(n * m for n, m in pairwise(sizes)))
        if numbers == widths:
            return counts
        emptiest = min((numbers[i] / width, i) for i, width in enumerate(widths) if numbers[i] < width)
        numbers[emptiest[1]] += 1


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("resize"), st.floats(0.1, 1.0)),
        st.tuples(st.just("explore"), st.floats(0.0, 1.0)),
    ),
    max_size=6,
)


@given(widths=st.lists(st.integers(2, 9), min_size=1, max_size=3), changes=CHANGES, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_whatever_changes_masks_are_of_channels_and_counts_exact(widths, changes, seed):
    sparse = MaskedNetwork(chain(*widths), 1.0, granularity="channel", inputs=(X,), seed=seed)
    lowest = sparse.reachable(1e-9)
    for change, value in changes:
        value = max(value, lowest) if change == "resize" else value
        before = groups(sparse)
        getattr(sparse, change)(value)
        if change == "resize":
            # No other step of the way is nearer.
            counts, wanted = reachable_counts(widths), value * sparse.total
            assert sparse.active in counts
            assert abs(sparse.active - wanted) == min(abs(count - wanted) for count in counts)
        else:
            assert groups(sparse) == before
        assert sparse.layer_counts == {name: int(mask.sum()) for name, mask in sparse.masks.items()}
        names = list(sparse.masks)
        for upper, lower in pairwise(names):
            assert torch.equal(sparse.masks[upper].any(1), sparse.masks[lower].any(0))
        for name, mask in sparse.masks.items():
            assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None])
            assert not sparse.parameters[name][~mask].any()
        assert sum(active for active, _ in groups(sparse)) >= len(widths)
        assert sparse.density <= sparse.coverage + 1e-9
