import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from lightning_ddst.sparsity import maskable_weights

LAYERS = [
    nn.Linear(4, 6),
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv3d(4, 6, 3, groups=2),
    nn.ConvTranspose1d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.ConvTranspose3d(4, 6, 3, groups=2),
]


def names(network):
    return [weight.name for weight in maskable_weights(network)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_each_kind_of_layer_is_found_but_for_its_bias(layer):
    network = nn.Sequential(nn.ReLU(), layer)
    (found,) = maskable_weights(network)
    assert found.name == "1.weight"
    assert found.parameter is layer.weight
    assert tuple(found.layers.values()) == (layer,)
    assert found.spectral == ()


def test_a_subclass_is_found_and_so_is_the_network_itself_when_it_is_a_layer():
    class Scaled(nn.Linear):
        pass

    assert names(Scaled(2, 3)) == ["weight"]


class Mixed(nn.Module):
    """Everything that may not be masked, around three weights that may, nested."""

    def __init__(self):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(4, 4))
        self.table = nn.Embedding(10, 4)
        self.body = nn.ModuleDict(
            {
                "first": nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)),
                "second": nn.Sequential(nn.ConvTranspose2d(4, 4, 4), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4)),
            }
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 1)
        self.pair = nn.Bilinear(4, 4, 2)
        self.memory = nn.GRU(4, 4)


def test_norms_embeddings_biases_recurrent_weights_and_bare_parameters_are_not_found():
    assert names(Mixed()) == ["body.first.0.weight", "body.second.0.weight", "head.weight"]


def test_of_attention_only_the_output_layer_is_found():
    assert names(nn.MultiheadAttention(8, 2)) == ["out_proj.weight"]


def test_a_frozen_weight_is_found():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    assert names(network) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    "network",
    [
        Mixed(),
        nn.Sequential(*LAYERS),
        nn.Sequential(old_spectral_norm(nn.Linear(3, 4)), parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))),
    ],
    ids=["mixed", "all kinds", "spectral norms"],
)
def test_names_and_order_are_those_of_the_networks_parameters(network):
    parameters = dict(network.named_parameters())
    found = maskable_weights(network)
    assert all(parameters[weight.name] is weight.parameter for weight in found)
    assert [weight.name for weight in found] == [name for name in parameters if name in names(network)]


# ---- spectral norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "dim"), [(nn.Linear(4, 6), 0), (nn.ConvTranspose2d(4, 6, 3), 1)])
def test_under_the_old_spectral_norm_the_weight_before_normalisation_is_found(layer, dim):
    network = nn.Sequential(old_spectral_norm(layer))
    (found,) = maskable_weights(network)
    assert found.name == "0.weight_orig"
    assert found.parameter is layer.weight_orig
    assert tuple(found.layers.values()) == (layer,)
    (spectral,) = found.spectral
    assert spectral.parameter is layer.weight_orig
    u, v = spectral.vectors()
    assert u is layer.weight_u
    assert v is layer.weight_v
    assert spectral.dim == dim


@pytest.mark.parametrize(("layer", "dim"), [(nn.Linear(4, 6), 0), (nn.ConvTranspose2d(4, 6, 3), 1)])
def test_under_the_new_spectral_norm_the_weight_before_normalisation_is_found(layer, dim):
    network = nn.Sequential(parametrizations.spectral_norm(layer))
    (found,) = maskable_weights(network)
    assert found.name == "0.parametrizations.weight.original"
    assert found.parameter is layer.parametrizations.weight.original
    assert tuple(found.layers.values()) == (layer,)
    (spectral,) = found.spectral
    assert spectral.parameter is layer.parametrizations.weight.original
    u, v = spectral.vectors()
    assert u is layer.parametrizations.weight[0]._u
    assert v is layer.parametrizations.weight[0]._v
    assert spectral.dim == dim


def test_a_layer_of_which_only_the_bias_is_parametrized_is_found():
    layer = nn.Linear(4, 6)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    assert names(nn.Sequential(layer)) == ["0.weight"]


# ---- shared weights ----------------------------------------------------------------------------------


def test_a_weight_shared_by_two_layers_is_found_once_under_its_parameters_name():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    assert [name for name, _ in network.named_parameters()] == ["0.weight", "0.bias", "2.bias"]
    (found,) = maskable_weights(network)
    assert found.name == "0.weight"
    assert found.layers == {"0": network[0], "2": network[2]}


@pytest.mark.parametrize("norm", [old_spectral_norm, parametrizations.spectral_norm], ids=["old", "new"])
def test_a_weight_shared_under_two_spectral_norms_has_the_vectors_of_both(norm):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    (found,) = maskable_weights(nn.Sequential(norm(first), norm(second)))
    vectors = [spectral.vectors()[0] for spectral in found.spectral]
    expected = [next(b for name, b in layer.named_buffers() if name.endswith("_u")) for layer in (first, second)]
    assert all(vector is one for vector, one in zip(vectors, expected, strict=True))


def test_a_layer_that_stands_in_two_places_is_found_once():
    layer = nn.Linear(4, 4)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_weight_shared_with_an_embedding_is_left_out(embedding_first):
    table, out = nn.Embedding(10, 4), nn.Linear(4, 10)
    out.weight = table.weight
    modules = [table, out] if embedding_first else [out, table]
    assert names(nn.ModuleList([*modules, nn.Linear(4, 4)])) == ["2.weight"]


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyConv2d(4, 3)], ids=lambda layer: type(layer).__name__)
def test_a_lazy_layer_is_rejected_by_name_until_the_network_ran(layer):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(layer))
    with pytest.raises(ValueError, match=r"Layer '1\.0' is lazy .*run the network once"):
        maskable_weights(network)
    network(torch.zeros(1, 3, 8, 8))
    assert names(network) == ["0.weight", "1.0.weight"]


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


def _doubled(layer):
    nn.utils.parametrize.register_parametrization(parametrizations.spectral_norm(layer), "weight", nn.Tanh())
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [old_weight_norm, parametrizations.weight_norm, parametrizations.orthogonal, _pruned, _doubled],
    ids=["old weight norm", "new weight norm", "orthogonal", "prune", "spectral norm and another"],
)
def test_a_weight_computed_in_another_way_is_rejected_by_its_layers_name(wrap):
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), wrap(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match=r"weight of layer '1\.1' .*cannot be masked"):
        maskable_weights(network)


@pytest.mark.parametrize(
    "network", [nn.Sequential(nn.LayerNorm(4), nn.Embedding(3, 4)), nn.Identity()], ids=["norm and embedding", "empty"]
)
def test_a_network_without_maskable_weights_is_rejected(network):
    with pytest.raises(ValueError, match=rf"{type(network).__name__} has nothing to mask.*Linear, Conv1d"):
        maskable_weights(network)


def test_a_network_whose_only_weight_is_shared_with_an_embedding_is_rejected():
    network = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    network[1].weight = network[0].weight
    with pytest.raises(ValueError, match="nothing to mask"):
        maskable_weights(network)
