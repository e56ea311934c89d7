import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_ddst.export import to_semi_structured
from lightning_ddst.sparsity import MaskedNetwork


def masked(*layers):
    torch.manual_seed(0)
    network = nn.Sequential(*layers)
    MaskedNetwork(network, 0.5, granularity="2:4")
    return network


def unchanged(network, message):
    before = dict(network.named_parameters())
    with pytest.raises(ValueError, match=message) as raised:
        to_semi_structured(network)
    assert "\n" not in str(raised.value)
    assert all(parameter is before[name] for name, parameter in network.named_parameters())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(4, 8, 3)], "Sequential has nothing to make semi-structured: it has no Linear layer whose weight"),
        ([spectral_norm(nn.Linear(64, 64))], "it has no Linear layer whose weight is a plain parameter"),
        ([nn.Linear(64, 64)], "0: the zeros of its .64, 64. weights are not 2:4"),
        ([nn.Linear(6, 64)], "0: the zeros of its .64, 6. weights are not 2:4"),
    ],
    ids=["conv", "spectral norm", "dense", "six inputs"],
)
def test_networks_without_2_to_4_zeros_are_rejected(layers, message):
    unchanged(nn.Sequential(*layers), message)


def test_without_a_gpu_the_network_is_rejected():
    unchanged(masked(nn.Linear(64, 64)), "0: it is on cpu, and semi-structured tensors need a CUDA GPU")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: masked(nn.Linear(64, 64)), "0: its type is torch.float32, and it must be float16 or bfloat16"),
        (lambda: masked(nn.Linear(8, 3)).half(), r"0: .*shape"),
    ],
    ids=["type", "shape"],
)
def test_types_and_shapes_that_torch_does_not_support_are_rejected(network, message):
    unchanged(network().cuda(), message)


@needs_gpu
def test_a_2_to_4_network_computes_the_same():
    network = masked(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1)).half().cuda()
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = network(x)
        assert to_semi_structured(network) == ["0", "2"]  # one row is too few
        torch.testing.assert_close(network(x), expected, rtol=1e-2, atol=1e-2)
