import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

from lightning_ddst.sparsity import MaskedNetwork, maskable_weights

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
    """Everything that may not be masked, around three layers that may, nested."""

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


def test_norms_embeddings_biases_and_learned_constants_are_not_found():
    assert names(Mixed()) == ["body.first.0.weight", "body.second.0.weight", "head.weight"]


# ---- recurrent layers and attention ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LSTM(3, 4, proj_size=2), {"ih_l0": (16, 3), "hh_l0": (16, 2), "hr_l0": (2, 4)}),
        (nn.GRU(3, 4, num_layers=2), {"ih_l0": (12, 3), "hh_l0": (12, 4), "ih_l1": (12, 4), "hh_l1": (12, 4)}),
        (
            nn.RNN(3, 4, bidirectional=True),
            {"ih_l0": (4, 3), "hh_l0": (4, 4), "ih_l0_reverse": (4, 3), "hh_l0_reverse": (4, 4)},
        ),
        (nn.LSTMCell(3, 4), {"ih": (16, 3), "hh": (16, 4)}),
        (nn.GRUCell(3, 4), {"ih": (12, 3), "hh": (12, 4)}),
        (nn.RNNCell(3, 4), {"ih": (4, 3), "hh": (4, 4)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_matrix_of_a_recurrent_layer_is_found(module, expected):
    found = maskable_weights(nn.Sequential(module))
    assert {weight.tensor.removeprefix("weight_"): weight.fans for weight in found} == expected
    assert {weight.name for weight in found} == {f"0.weight_{name}" for name in expected}
    assert all(weight.layers == {"0": module} for weight in found)


def test_the_projections_of_attention_are_found():
    assert names(nn.MultiheadAttention(8, 2, add_bias_kv=True)) == ["in_proj_weight", "out_proj.weight"]
    apart = maskable_weights(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
    assert {weight.name: weight.fans for weight in apart} == {
        "q_proj_weight": (8, 8),
        "k_proj_weight": (8, 4),
        "v_proj_weight": (8, 6),
        "out_proj.weight": (8, 8),
    }


def test_a_recurrent_weight_under_weight_norm_is_found():
    network = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    plain, normed = maskable_weights(network)
    assert (plain.tensor, plain.norm) == ("weight_ih_l0", None)
    assert (normed.tensor, normed.norm.groups) == ("weight_hh_l0", 16)


# ---- layers of a user's own --------------------------------------------------------------------------


def own(kind="Own", base=nn.Module, **shapes):
    """A module of a user's own with parameters of these shapes."""
    module = type(kind, (base,), {})()
    for tensor, shape in shapes.items():
        setattr(module, tensor, nn.Parameter(torch.randn(shape)))
    return module


@pytest.mark.parametrize(
    ("shape", "dims", "fans"),
    [
        ((6, 5), (0, 1), (6, 5)),
        ((6, 5, 3, 3), (0, 1), (6, 5, 3, 3)),
        ((1, 6, 5, 3, 3), (1, 2), (6, 5, 3, 3)),  # modulated convolution
        ((1, 6, 5, 1, 1), (1, 2), (6, 5, 1, 1)),
        ((1, 5, 3, 3), (0, 1), (1, 5, 3, 3)),
    ],
)
@pytest.mark.parametrize("tensor", ["weight", "weight_up", "conv_weight", "weights"])
def test_a_parameter_that_is_named_as_a_weight_is_found(shape, dims, fans, tensor):
    layer = own(**{tensor: shape})
    (found,) = maskable_weights(nn.Sequential(nn.ReLU(), layer))
    assert (found.name, found.tensor, found.layers) == (f"1.{tensor}", tensor, {"1": layer})
    assert (found.out_dim, found.in_dim, found.fans) == (*dims, fans)


@pytest.mark.parametrize(
    "module",
    [
        own(weight=(8,)),
        own(weight=(1, 8)),
        own(weight=(1, 8, 1, 1)),  # a scale of channels
        own(input=(1, 8, 4, 4)),
        own(const=(1, 8, 4, 4)),
        own(pos_embed=(1, 16, 8)),
        own(codebook=(16, 8)),
        own(embed_weight=(16, 8)),
        own("ConstantInput", weight=(1, 8, 4, 4)),
        own("PositionalEncoding", weight=(16, 8)),
        own("VectorQuantizer", weight=(16, 8)),
        own(scale=(8, 8)),
    ],
    ids=lambda module: f"{type(module).__name__} {[(n, tuple(p.shape)) for n, p in module.named_parameters()]}",
)
def test_scales_constants_embeddings_and_codebooks_of_a_users_own_are_not_found(module):
    assert names(nn.Sequential(module, nn.Linear(2, 2))) == ["1.weight"]


def test_subclasses_of_embeddings_and_norms_are_not_found():
    class Table(nn.Embedding):
        pass

    class Norm(nn.LayerNorm):
        pass

    assert names(nn.Sequential(Table(4, 4), Norm((4, 4)), nn.Linear(2, 2))) == ["2.weight"]


def test_weights_that_a_sequential_of_a_users_own_holds_are_found():
    assert names(own(base=nn.Sequential, weight=(3, 4))) == ["weight"]


@pytest.mark.parametrize("norm", [old_spectral_norm, parametrizations.spectral_norm], ids=["old", "new"])
def test_a_weight_of_a_users_own_layer_under_spectral_norm_is_found(norm):
    (found,) = maskable_weights(norm(own(weight=(3, 4))))
    assert found.parameter.shape == (3, 4)
    assert len(found.spectral) == 1


def test_a_weight_of_a_users_own_layer_that_is_computed_in_another_way_stays_dense():
    layer = own(weight=(4, 4))
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    assert names(nn.Sequential(layer, nn.Linear(2, 2))) == ["1.weight"]


def test_declared_parameters_are_found_with_their_dimensions():
    network = nn.ModuleDict({"a": own(kernel=(5, 3, 3, 7)), "b": own(kernel=(2, 3)), "c": own(pos=(4, 4))})
    found = maskable_weights(network, {"net.a.kernel": (-1, 0), "*.kernel": [0, 1]}, name="net")  # the first counts
    assert [(w.name, w.out_dim, w.in_dim, w.fans) for w in found] == [
        ("a.kernel", 3, 0, (7, 5, 3, 3)),
        ("b.kernel", 0, 1, (2, 3)),
    ]


def test_a_declaration_replaces_the_rule_by_names():
    (found,) = maskable_weights(own(weight=(6, 5)), {"weight": (1, 0)})
    assert found.fans == (5, 6)


def test_a_declared_parameter_stands_for_the_weight_that_a_hook_computes():
    layer = nn.Linear(4, 3)
    layer.weight_orig = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.weight_orig * 0.5))
    with pytest.raises(ValueError, match=r"layer '0' .*cannot be masked"):
        maskable_weights(nn.Sequential(layer))
    (found,) = maskable_weights(nn.Sequential(layer), {"*.weight_orig": (0, 1)})
    assert found.name == "0.weight_orig"


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"*.kernel": (0, 1)}, r"'\*.kernel' matches no parameter of ModuleList"),
        ({"0.matrix": (0, 0)}, r"masked_parameters\['0.matrix'\]=\(0, 0\).*\(4, 3, 2\).*differ"),
        ({"0.matrix": (-1, 2)}, r"\(-1, 2\).*differ"),
        ({"0.matrix": (0, 3)}, r"\(0, 3\).*\(4, 3, 2\).*out_dim, in_dim"),
        ({"0.matrix": (0, 1, 2)}, r"\(0, 1, 2\).*out_dim, in_dim"),
        ({"0.matrix": ("out", "in")}, "out_dim, in_dim"),
        ({"1.*": (0, 1)}, r"'1.weight', which is masked without it"),
        ({"2.weight": (0, 1)}, r"'2.weight', which is computed"),
    ],
)
def test_a_declaration_that_does_not_fit_is_rejected(declared, message):
    network = nn.ModuleList([own(matrix=(4, 3, 2)), nn.Linear(4, 4), own(weight=(4, 4))])
    nn.utils.parametrize.register_parametrization(network[2], "weight", nn.Tanh())
    with pytest.raises(ValueError, match=message):
        maskable_weights(network, declared)


# ---- frozen weights, order ---------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.orthogonal, _pruned, _doubled],
    ids=["orthogonal", "prune", "spectral norm and another"],
)
def test_a_weight_computed_in_another_way_is_rejected_by_its_layers_name_unless_the_layer_stays_dense(wrap):
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), wrap(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match=r"weight of layer '1\.1' .*cannot be masked"):
        maskable_weights(network)
    assert [weight.name for weight in maskable_weights(network, dense_layers=["1.1"])] == ["0.weight"]
    assert list(MaskedNetwork(network, 0.5, dense_layers=["net.1.*"], name="net").masks) == ["0.weight"]


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
