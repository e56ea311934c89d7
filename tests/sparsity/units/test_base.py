"""Units of a user's own: whole rows of a weight, each layer for itself."""

import pytest
import torch
from torch import nn

from lightning_ddst.sparsity import UNITS, MaskedNetwork, Units, find_units
from lightning_ddst.sparsity.selection import largest
from lightning_ddst.utils.validation import check_density


class RowUnits(Units):
    drop_fraction = 0.2

    def __init__(self, network, weights, generator, *, inputs=(), name="", growth="random"):
        super().__init__(network, weights, generator, inputs=inputs, name=name, growth=growth)
        self.active = {name: torch.ones(len(weight.parameter), dtype=torch.bool) for name, weight in weights.items()}
        self.masks |= {name: torch.ones_like(weight.parameter, dtype=torch.bool) for name, weight in weights.items()}

    def numbers(self, density):
        check_density("density", density)
        return [max(1, round(density * len(active))) for active in self.active.values()]

    def allocation(self, density):
        rows = zip(self.masks.items(), self.numbers(density), strict=True)
        return {name: mask[0].numel() * number for (name, mask), number in rows}

    def magnitudes(self):
        return {name: weights.flatten(1).norm(dim=1) for name, weights in super().magnitudes().items()}

    def growth(self, gradients):
        return {name: scores.flatten(1).sum(1) for name, scores in super().growth(gradients).items()}

    def begin(self, density, initial):
        scores = self.growth(None) if initial == "random" else self.magnitudes()
        for (name, active), number in zip(self.active.items(), self.numbers(density), strict=True):
            active.copy_(largest(scores[name], number))
        self.update_masks()

    def update_masks(self):
        for name, active in self.active.items():
            self.masks[name].copy_(active[:, None].expand_as(self.masks[name]))
        self.counts = {name: int(active.sum()) for name, active in self.active.items()}
        self.layer_counts = {name: int(mask.sum()) for name, mask in self.masks.items()}

    def count_weights(self, without):
        return sum(
            int((self.active[name] & ~without.get(name, ~active)).sum()) * self.masks[name][0].numel()
            for name, active in self.active.items()
        )

    def load_state_dict(self, state):
        for name, active in self.active.items():
            active.copy_(state["masks"][name].any(1))
        self.update_masks()


@pytest.fixture(autouse=True)
def registered():
    UNITS.register("row")(RowUnits)
    yield
    del UNITS["row"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 4))


def test_units_of_ones_own_resize_explore_and_are_saved():
    sparse = MaskedNetwork(network(), 0.5, granularity="row")
    assert find_units("row").drop_fraction == 0.2
    assert sparse.layer_counts == sparse.allocation(0.5) == {"0.weight": 5 * 3, "1.weight": 2 * 10}
    assert sparse.explore(0.5) == 2 * 3 + 1 * 10
    assert sparse.active == 35
    sparse.resize(0.8)
    assert sparse.layer_counts == {"0.weight": 8 * 3, "1.weight": 3 * 10}
    assert sparse.overlap == 35 / 54
    sparse.resize(0.2)
    assert sparse.layer_counts == {"0.weight": 2 * 3, "1.weight": 10}
    for name, mask in sparse.masks.items():
        assert torch.equal(mask, mask.any(1)[:, None].expand_as(mask))
        assert not sparse.parameters[name][~mask].any()
    other = MaskedNetwork(network(), 0.5, granularity="row", state=sparse.state_dict())
    for each in (sparse, other):
        each.resize(0.9)
    assert sparse.checksum == other.checksum


def test_rows_by_magnitude_are_the_largest():
    net = network()
    with torch.no_grad():
        net[1].weight[2] *= 100
    sparse = MaskedNetwork(net, 0.25, granularity="row", initial="magnitude")
    assert sparse.masks["1.weight"].any(1).tolist() == [False, False, True, False]


def test_options_are_checked_and_the_error_names_the_granularity():
    with pytest.raises(ValueError, match=r'scope=\'layer\' is no option of masks with granularity="row"'):
        MaskedNetwork(network(), 0.5, granularity="row", scope="layer")
    with pytest.raises(ValueError, match=r"growth='luck' .*gradient.* granularity=\"weight\""):
        find_units("weight").check_options("weight", {"growth": "luck"})
    find_units("channel").check_options("channel", {"growth": "random"})
    with pytest.raises(ValueError, match=r"growth='gradient' .* random with granularity=\"channel\""):
        find_units("channel").check_options("channel", {"growth": "gradient"})


@pytest.mark.parametrize(
    ("granularity", "facts"),
    [
        ("weight", (0.5, False, True, None)),
        ("channel", (0.1, True, False, None)),
        ("2:4", (0.5, False, True, 0.5)),
        ("1:4", (0.5, False, True, 0.25)),
    ],
)
def test_facts_that_others_decide_by(granularity, facts):
    units = find_units(granularity)
    assert (units.drop_fraction, units.needs_inputs, units.dense_kernels, units.fixed_density) == facts
    assert find_units(granularity) is units


@pytest.mark.parametrize("granularity", ["rows", "", None, 4])
def test_an_unknown_granularity_is_rejected(granularity):
    with pytest.raises(ValueError, match=rf"granularity={granularity!r} is unknown; allowed are channel, weight, row"):
        find_units(granularity)
