import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as spectral_norm_hook
from torch.nn.utils import weight_norm as weight_norm_hook
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ddst.sparsity import MaskedNetwork
from lightning_ddst.sparsity.averaging import WeightAverage


def fill(parameter: Tensor, *values: float) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values).reshape(parameter.shape))


def averaged(network: nn.Linear, values: list[float], decay: float) -> list[tuple[float, float]]:
    """The averages of the weight and of the bias of a Linear(1, 1) that takes these values."""
    average = WeightAverage(network, decay)
    found = []
    for value in values:
        fill(network.weight, value)
        fill(network.bias, value)
        average.update()
        found.append((average.values()["weight"].item(), average.values()["bias"].item()))
    return found


def test_the_average_is_the_mean_at_first_and_exponential_later() -> None:
    # Of 1, 2, 3 and 6 over 1 / (1 - 0.75) = 4 updates; then 0.75 * 3 + 0.25 * 7 and 0.75 * 4 + 0.25 * 8.
    values, expected = [1, 2, 3, 6, 7, 8], [1, 1.5, 2, 3, 4, 5]
    for found in zip(*averaged(nn.Linear(1, 1), values, decay=0.75), strict=True):
        assert found == pytest.approx(expected)


def test_the_initial_weights_do_not_count() -> None:
    network = nn.Linear(1, 1)
    fill(network.weight, 1e6)
    assert averaged(network, [2, 4], decay=0.999) == [(2, 2), (3, 3)]


def test_without_decay_the_average_is_the_present_value() -> None:
    assert averaged(nn.Linear(1, 1), [3, 5, 9], decay=0.0) == [(3, 3), (5, 5), (9, 9)]


def test_before_the_first_update_the_average_is_the_initial_value() -> None:
    network = nn.Linear(2, 3)
    average = WeightAverage(network)
    assert average.updates == 0
    expected = network.state_dict()
    assert average.values().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in average.values().items())


def test_an_inactive_weight_is_zero_in_the_average_at_once() -> None:
    network = nn.Linear(3, 1, bias=False)
    average = WeightAverage(network, 0.9)
    for values in ((4.0, 4.0, 0.0), (6.0, 6.0, 0.0), (8.0, 0.0, 0.0)):
        fill(network.weight, *values)
        average.update()
    assert average.values()["weight"].tolist() == [[6, 0, 0]]


def test_a_grown_weight_has_the_mean_of_its_values_since_it_grew() -> None:
    network = nn.Linear(1, 1)
    average = WeightAverage(network, 0.75)
    found = []
    # Active, pruned for two updates, grown (at 0), then trained; the bias is no weight and stays as it is.
    for value in (5.0, 0.0, 0.0, 0.0, 2.0, 4.0, 6.0, 8.0, 9.0):
        fill(network.weight, value)
        fill(network.bias, value)
        average.update()
        found.append(average.values()["weight"].item())
    # Then means of 2, 4, 6, 8, and 0.75 * 5 + 0.25 * 9.
    assert found == pytest.approx([5, 0, 0, 0, 2, 3, 4, 5, 6])
    # 5, 2.5, 5/3, 1.25, then a quarter of each value: 1.4375, 2.078125, 3.05859375, 4.2939453, 5.470459.
    assert average.values()["bias"].item() == pytest.approx(5.470459)


def test_weights_of_one_layer_have_ages_of_their_own() -> None:
    network = nn.Conv2d(1, 1, 2, bias=False)
    average = WeightAverage(network, 0.999)
    for values in ((1.0, 0.0, 1.0, 0.0), (3.0, 5.0, 0.0, 0.0), (5.0, 7.0, 9.0, 0.0)):
        fill(network.weight, *values)
        average.update()
    assert average.values()["weight"].flatten().tolist() == [3, 6, 9, 0]


def test_a_weight_that_two_layers_share_is_masked_in_the_average_too() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    network[1].weight = network[0].weight
    average = WeightAverage(network, 0.999)
    for values in ((1.0, 1.0, 0.0, 0.0), (3.0, 0.0, 5.0, 0.0)):
        fill(network[0].weight, *values)
        average.update()
    assert average.values()["0.weight"].flatten().tolist() == [2, 0, 5, 0]


def test_weights_of_all_layouts_and_dtypes_are_averaged_alike() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(300, 300), nn.Linear(2, 3).double()
    )
    network[2].weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64).t())
    average = WeightAverage(network, 0.999)
    weights = {f"{number}.weight": layer.weight for number, layer in enumerate(network)}
    torch.manual_seed(0)
    values = [{name: torch.rand_like(weight) + 1 for name, weight in weights.items()} for _ in range(3)]
    for drawn in values:
        for name, weight in weights.items():
            fill(weight, *drawn[name].flatten().tolist())
        average.update()
    for name, weight in weights.items():
        found = average.values()[name]
        assert (found.dtype, found.stride()) == (weight.dtype, weight.stride())
        torch.testing.assert_close(found, sum(each[name] for each in values) / 3)


def test_an_average_that_is_not_finite_is_zero_again_once_the_weight_is_inactive() -> None:
    network = nn.Linear(3, 1, bias=False)
    average = WeightAverage(network, 0.9)
    for values in ((float("inf"), float("nan"), 1.0), (0.0, -0.0, 3.0)):
        fill(network.weight, *values)
        average.update()
    assert average.values()["weight"].tolist() == [[0, 0, 2]]
    assert not average.values()["weight"].signbit().any()


def test_an_update_takes_as_many_operations_for_few_layers_as_for_many() -> None:
    class Operations(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number += function.overloadpacket.__name__ not in ("detach", "empty_like", "as_strided", "split")
            return function(*args, **kwargs or {})

    counts = []
    for layers in (2, 20):
        network = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(layers)))
        average = WeightAverage(network)
        with Operations() as done:
            average.update()
        counts.append(done.number)
    assert counts[0] == counts[1] <= 14


# ---- buffers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_statistics_are_averaged_or_left_as_they_are(buffers) -> None:
    network = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    average = WeightAverage(network, 0.999, buffers)
    for value in (1.0, 2.0, 6.0):
        network[1].running_mean.fill_(value)
        network[1].running_var.fill_(10 * value)
        network[1].num_batches_tracked.add_(1)
        average.update()
    average.swap()
    mean, var = (3, 30) if buffers == "average" else (6, 60)
    assert network[1].running_mean.tolist() == [mean, mean]
    assert network[1].running_var.tolist() == [var, var]
    assert network[1].num_batches_tracked == 3
    average.swap()
    assert network[1].running_mean.tolist() == [6, 6]


def test_a_network_with_nothing_to_mask_is_averaged_all_the_same() -> None:
    network = nn.BatchNorm1d(1)
    average = WeightAverage(network, 0.999)
    for value in (1.0, 0.0, 5.0):
        fill(network.weight, value)
        average.update()
    assert average.values()["weight"].item() == pytest.approx(2)


@pytest.mark.parametrize("norm", [weight_norm_hook, weight_norm], ids=["old", "new"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_pruning_keeps_the_averages_of_other_effective_weights_under_weight_norm(norm) -> None:
    network = norm(nn.Linear(2, 1, bias=False))
    g, v = network.parameters()
    fill(g, 10.0)
    fill(v, 3.0, 4.0)  # the effective weight is (6, 8)
    average = WeightAverage(network, 0.9)
    average.update()
    MaskedNetwork(network, 0.5, initial="magnitude")
    average.update()
    assert [value.tolist() for value in average.values().values()] == [[[8.0]], [[0.0, 4.0]]]


# ---- swapping ------------------------------------------------------------------------------------------


def wandering(network: nn.Module, average: WeightAverage, updates: int = 5) -> None:
    """Moves the weights far, as training with a large learning rate would, and averages them."""
    torch.manual_seed(0)
    network.train()
    for _ in range(updates):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn_like(parameter))
        network(torch.randn(6, 4))
        average.update()


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def spectral_network(norm=spectral_norm) -> nn.Sequential:
    return nn.Sequential(
        norm(nn.Linear(4, 18)),
        nn.Unflatten(1, (2, 3, 3)),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        norm(nn.ConvTranspose2d(2, 3, 4)),
        nn.Flatten(),
    )


def test_swapping_exchanges_the_weights_and_again_gives_them_back_bit_for_bit() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    average = WeightAverage(network, 0.9)
    wandering(network, average)
    own, averages, places = copied(network), average.values(), [p.data_ptr() for p in network.parameters()]
    assert not average.swapped
    average.swap()
    assert average.swapped
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in averages.items())
    assert not torch.equal(state["0.weight"], own["0.weight"])
    average.swap()
    assert not average.swapped
    assert same(copied(network), own)
    assert same(average.values(), averages)
    assert [p.data_ptr() for p in network.parameters()] == places  # what optimizers and hooks hold on to


def test_swapping_does_not_change_later_updates() -> None:
    runs = []
    for swaps in (0, 2):
        network = nn.Linear(4, 3)
        average = WeightAverage(network, 0.9)
        wandering(network, average)
        for _ in range(swaps):
            average.swap()
        wandering(network, average)
        runs.append(average.values())
    assert same(*runs)


@pytest.mark.parametrize("norm", [spectral_norm, spectral_norm_hook])
def test_averaged_weights_under_spectral_norm_have_norm_one(norm) -> None:
    network = spectral_network(norm)
    average = WeightAverage(network, 0.9)
    wandering(network, average)
    own = copied(network)
    average.swap()
    network.eval()
    network(torch.randn(2, 4))
    # Rows are the outputs: dimension 0 of Linear, 1 of ConvTranspose.
    for layer, dim in ((network[0], 0), (network[4], 1)):
        matrix = layer.weight.detach().movedim(dim, 0).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=1e-3)
    average.swap()
    assert same(copied(network), own)


def test_spectral_norm_holds_for_layers_that_are_never_masked() -> None:
    network = nn.Sequential(spectral_norm(nn.Embedding(5, 4)), nn.Linear(4, 3))
    average = WeightAverage(network, 0.9)
    torch.manual_seed(0)
    for _ in range(5):
        with torch.no_grad():
            network[0].parametrizations.weight.original.normal_()
        network(torch.arange(5))
        average.update()
    average.swap()
    network.eval()
    assert torch.linalg.matrix_norm(network[0].weight, 2).item() == pytest.approx(1, abs=1e-3)


def test_spectral_norm_holds_next_to_a_layer_that_cannot_be_masked() -> None:
    network = nn.Sequential(spectral_norm(nn.Linear(4, 6)), weight_norm(nn.Linear(6, 3)))
    average = WeightAverage(network, 0.9)
    wandering(network, average)
    average.swap()
    network.eval()
    assert torch.linalg.matrix_norm(network[0].weight, 2).item() == pytest.approx(1, abs=1e-3)


# ---- saving --------------------------------------------------------------------------------------------


def test_a_copy_of_an_average_is_updated_alone() -> None:
    network = nn.Linear(4, 3)
    average = WeightAverage(network, 0.9)
    wandering(network, average)
    before = average.values()
    for again in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        again.update()
        assert not torch.equal(again.values()["weight"], before["weight"])
    assert same(average.values(), before)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_saved_average_resumes_where_it_was() -> None:
    network, other = spectral_network(), spectral_network()
    average = WeightAverage(network, 0.75)
    wandering(network, average)
    with torch.no_grad():
        network[0].parametrizations.weight.original[0] = 0
    average.update()

    again = WeightAverage(other, 0.75)
    again.load_state_dict(through_a_file(average.state_dict()))
    assert again.updates == 6
    assert same(again.values(), average.values())
    other.load_state_dict(network.state_dict())
    for each, each_average in ((network, average), (other, again)):
        wandering(each, each_average, updates=2)
    assert same(again.values(), average.values())


def test_what_was_saved_does_not_change_later() -> None:
    network = nn.Linear(4, 3)
    average = WeightAverage(network)
    state = average.state_dict()
    before = state["averages"]["weight"].clone()
    wandering(network, average)
    assert torch.equal(state["averages"]["weight"], before)
    assert not state["ages"]["weight"].any()


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (nn.Linear(4, 5), "bias"),  # of another size
        (nn.Linear(5, 3), "weight"),
        (nn.Linear(4, 3, bias=False), "bias"),  # without one
        (nn.Sequential(nn.Linear(4, 3)), "0.bias"),  # named otherwise
        (nn.BatchNorm1d(3), "running_mean"),
    ],
)
def test_the_average_of_another_network_is_rejected_and_changes_nothing(other: nn.Module, name: str) -> None:
    average = WeightAverage(nn.Linear(4, 3))
    before = average.values()
    with pytest.raises(ValueError, match=f"saved averages .*another network's: '{name}'"):
        average.load_state_dict(WeightAverage(other).state_dict())
    assert same(average.values(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0 must be in \[0, 1\)"),
        ({"decay": -0.1}, r"decay=-0.1 must be in \[0, 1\)"),
        ({"decay": float("nan")}, r"decay=nan must be in \[0, 1\)"),
        ({"buffers": "keep"}, "buffers='keep' is unknown; allowed are average, copy"),
    ],
)
def test_bad_arguments_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightAverage(nn.Linear(1, 1), **arguments)
