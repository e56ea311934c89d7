import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

from lightning_ddst.sparsity import MaskedNetwork
from lightning_ddst.sparsity.spectral import spectral_norms

pytestmark = pytest.mark.usefixtures("every_device")

BOTH_NORMS = pytest.mark.parametrize("norm", [old_spectral_norm, parametrizations.spectral_norm], ids=["old", "new"])
LAYERS = {
    "small linear": (lambda: nn.Linear(24, 16), (2, 24)),
    "linear": (lambda: nn.Linear(128, 128), (2, 128)),
    "conv": (lambda: nn.Conv2d(32, 64, 3), (2, 32, 4, 4)),
    "grouped conv": (lambda: nn.Conv2d(32, 64, 3, groups=4), (2, 32, 4, 4)),
    "transposed conv": (lambda: nn.ConvTranspose2d(64, 32, 4), (2, 64, 3, 3)),
}


def normalised(layer, inputs):
    """The weight that the layer computes in evaluation mode, as it is used in a forward pass."""
    layer.eval()
    with torch.no_grad():
        layer(inputs)
    return layer.weight.detach()


def largest_singular_value(weight, layer):
    rows = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    return torch.linalg.svdvals(weight.double().movedim(rows, 0).flatten(1))[0].item()


def buffers(network):
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def assert_normalised(sparse, layer, inputs):
    weight = normalised(layer, inputs)
    (mask,) = sparse.masks.values()
    assert largest_singular_value(weight, layer) == pytest.approx(1, abs=1e-2)
    assert not weight[~mask].any()
    assert weight[mask].any()


@BOTH_NORMS
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_after_every_change_of_the_mask_the_largest_singular_value_is_one(norm, kind, seed):
    make, shape = LAYERS[kind]
    torch.manual_seed(seed)
    layer = norm(make())
    inputs = torch.randn(shape)
    sparse = MaskedNetwork(nn.Sequential(layer), 0.1, seed=seed + 100)
    assert_normalised(sparse, layer, inputs)
    (weight,) = sparse.weights.values()
    gradient = {weight.name: torch.randn(weight.parameter.shape)}
    sparse.explore(0.5, gradient)
    assert_normalised(sparse, layer, inputs)
    with torch.no_grad():  # what training would do to weights that just grew
        weight.parameter.add_(0.05 * torch.randn(weight.parameter.shape) * sparse.masks[weight.name])
    for _ in range(50):
        layer.train()(inputs)
    sparse.resize(0.05)
    assert_normalised(sparse, layer, inputs)
    sparse.resize(0.5, gradient)
    assert_normalised(sparse, layer, inputs)


@BOTH_NORMS
def test_also_when_every_row_that_the_old_vector_pointed_to_was_pruned(norm):
    # Rows 0 to 3 hold many small entries (norm 0.1 * sqrt(4 * 60) = 1.55), the others one large entry each (at most 1),
    # in columns of their own. So the leading vector lies in rows 0 to 3, whose entries are all pruned.
    plain = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        plain.weight.zero_()
        plain.weight[:4, :60] = 0.1
        for row, value in ((4, 1.0), (5, 0.8), (6, 0.7), (7, 0.6)):
            plain.weight[row, 56 + row] = value
    layer = norm(plain)
    for _ in range(100):
        layer(torch.zeros(1, 64))
    network = nn.Sequential(layer)
    sparse = MaskedNetwork(network, 1.0)
    (weight,) = sparse.weights.values()
    u, _ = weight.spectral[0].vectors()
    assert u[4:].abs().max() < 1e-30
    with torch.no_grad():
        u[4:] = 0
    sparse.resize(4 / 512)
    assert weight.parameter.count_nonzero() == 4
    assert not weight.parameter[:4].any()
    assert_normalised(sparse, layer, torch.zeros(1, 64))
    assert normalised(layer, torch.zeros(1, 64))[4, 60].item() == pytest.approx(1, abs=1e-2)


@BOTH_NORMS
def test_the_output_is_finite_even_when_only_weights_grown_from_zero_are_left(norm):
    torch.manual_seed(0)
    layer = norm(nn.Linear(4, 3))
    sparse = MaskedNetwork(nn.Sequential(layer), 0.25, scope="layer", seed=1)
    (name,) = sparse.weights
    # All three active weights are pruned, and others grow.
    sparse.explore(1.0, {name: (~sparse.masks[name]).float()})
    assert layer(torch.ones(2, 4)).isfinite().all()


@BOTH_NORMS
@pytest.mark.parametrize("training", [True, False])
def test_the_vectors_are_singular_vectors_of_unit_length_in_either_mode(norm, training):
    torch.manual_seed(0)
    layer = norm(nn.Linear(24, 16)).train(training)
    sparse = MaskedNetwork(nn.Sequential(layer), 0.2, seed=1)
    (weight,) = sparse.weights.values()
    u, v = weight.spectral[0].vectors()
    assert u.norm().item() == pytest.approx(1, abs=1e-5)
    assert v.norm().item() == pytest.approx(1, abs=1e-5)
    sigma = largest_singular_value(weight.parameter.detach(), layer)
    assert (u @ weight.parameter @ v).item() == pytest.approx(sigma, rel=1e-2)
    assert layer.training is training


@BOTH_NORMS
def test_vectors_are_changed_in_place(norm):
    layer = norm(nn.Linear(24, 16))
    held = dict(layer.named_buffers())
    before = buffers(layer)
    MaskedNetwork(nn.Sequential(layer), 0.2, seed=1)
    assert dict(layer.named_buffers()).keys() == held.keys()
    assert all(dict(layer.named_buffers())[name] is buffer for name, buffer in held.items())
    assert not any(torch.equal(before[name], buffer) for name, buffer in held.items())


@BOTH_NORMS
def test_vectors_stay_as_they_are_where_no_mask_changes(norm):
    network = nn.Sequential(norm(nn.Linear(24, 16)))
    before = buffers(network)
    sparse = MaskedNetwork(network, 1.0, growth="random")
    sparse.explore(0.5)
    sparse.resize(1.0)
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


@BOTH_NORMS
def test_vectors_that_were_saved_with_the_network_are_kept_when_masks_are_restored(norm):
    network = nn.Sequential(norm(nn.Linear(24, 16)))
    sparse = MaskedNetwork(network, 0.2)
    network(torch.zeros(1, 24))  # one power iteration more
    state, saved = sparse.state_dict(), buffers(network)
    other = nn.Sequential(norm(nn.Linear(24, 16)))
    other.load_state_dict(network.state_dict())
    MaskedNetwork(other, 0.2, state=state)
    assert all(torch.equal(saved[name], buffer) for name, buffer in other.named_buffers())


def test_double_precision_is_kept():
    layer = parametrizations.spectral_norm(nn.Linear(24, 16, dtype=torch.float64))
    sparse = MaskedNetwork(nn.Sequential(layer), 0.2)
    assert_normalised(sparse, layer, torch.zeros(1, 24, dtype=torch.float64))
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.float64}


@BOTH_NORMS
def test_every_spectral_norm_of_a_network_is_found_of_whatever_layer(norm):
    table, linear, conv = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Conv2d(3, 4, 3)
    network = nn.ModuleList([norm(table), nn.Linear(4, 4), nn.Sequential(norm(linear), norm(conv))])
    originals = [p for name, p in network.named_parameters() if "orig" in name]
    assert [spectral.parameter.shape for spectral in spectral_norms(network)] == [(5, 4), (4, 4), (4, 3, 3, 3)]
    assert all(one.parameter is p for one, p in zip(spectral_norms(network), originals, strict=True))


@BOTH_NORMS
def test_a_shared_weight_is_normalised_in_each_of_its_layers(norm):
    torch.manual_seed(0)
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    sparse = MaskedNetwork(nn.Sequential(norm(first), norm(second)), 0.2, seed=1)
    for layer in (first, second):
        assert_normalised(sparse, layer, torch.zeros(1, 16))


@pytest.mark.parametrize("seed", [20, 23, 29, 35, 43])
def test_empty_rows_and_columns_do_not_keep_the_vectors_from_being_found(seed):
    """With them the eigenvalues of these did not converge."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(128, generator=generator) < 0.31 for _ in range(2))
    layer = parametrizations.spectral_norm(nn.Conv2d(128, 128, 3))
    (spectral,) = spectral_norms(layer)
    with torch.no_grad():
        weight = torch.randn(128, 128, 3, 3, generator=generator) * 0.03
        spectral.parameter.copy_(weight * rows[:, None, None, None] * columns[:, None, None])
    spectral.refresh()
    assert largest_singular_value(normalised(layer, torch.zeros(1, 128, 3, 3)), layer) == pytest.approx(1, abs=1e-5)
    left, right = spectral.vectors()
    assert not left[~rows].any()
    assert not right.view(128, 9)[~columns].any()


def test_vectors_of_a_weight_without_active_entries_stay():
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    (spectral,) = spectral_norms(layer)
    before = buffers(layer)
    with torch.no_grad():
        spectral.parameter.zero_()
    spectral.refresh()
    assert all(torch.equal(value, before[name]) for name, value in buffers(layer).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_vectors(dtype):
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Conv2d(32, 64, 3))
    (spectral,) = spectral_norms(layer)
    spectral.refresh()
    exact = buffers(layer)
    with torch.autocast("cpu", dtype):
        spectral.refresh()
    assert all(torch.equal(value, exact[name]) for name, value in buffers(layer).items())
