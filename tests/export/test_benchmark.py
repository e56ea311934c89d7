"""Linear layers as sparse tensors."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_ddst.export import benchmark, save_onnx
from lightning_ddst.sparsity import MaskedNetwork


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 4, 7)])
def test_a_sparse_layer_computes_what_the_dense_one_does(shape, bias):
    torch.manual_seed(0)
    dense = nn.Linear(7, 5, bias=bias)
    MaskedNetwork(dense, 0.3)
    x = torch.randn(shape)
    sparse = benchmark.SparseLinear(dense)
    assert torch.allclose(sparse(x), dense(x), atol=1e-6)
    assert sparse.weight.values().numel() == round(0.3 * 35)


def test_only_layers_that_are_faster_are_replaced(monkeypatch):
    network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), spectral_norm(nn.Linear(8, 2)))
    network.train()
    noise = torch.randn(3, 4)
    before = network.eval()(noise)
    network.train()
    measured = iter([0.94, 0.96])
    monkeypatch.setattr(benchmark, "time_ratio", lambda *_: next(measured))
    assert benchmark.sparse_linears(network, noise) == {"0": 0.94, "1.1": 0.96}
    assert [type(layer) for layer in (network[0], network[1][1])] == [benchmark.SparseLinear, nn.Linear]
    assert network.training
    assert torch.allclose(network.eval()(noise), before, atol=1e-6)


class InDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = weight_norm(nn.Linear(4, 8))

    def forward(self, z, factor):
        return {"z": z, "image": self.layer(z) * factor}


def test_generators_with_weight_norm_that_return_a_dict(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    network, z = InDict(), torch.randn(3, 4)
    with torch.no_grad():
        network.layer.parametrizations.weight.original1[:, 1:] = 0
    expected = network(z, 2)["image"]
    save_onnx(network, tmp_path / "file", z, 2, output="image")
    assert benchmark.onnx_time_ratio(tmp_path / "file", network, z, 2) > 0
    monkeypatch.setattr(benchmark, "time_ratio", lambda *_: 0.5)
    assert benchmark.sparse_linears(network, z, 2) == {"layer": 0.5}
    assert network.layer.weight.values().numel() == 8
    torch.testing.assert_close(network(z, 2)["image"], expected)


def test_the_time_ratio_is_of_medians(monkeypatch):
    # The first turn warms up: 100 each. Then one takes 2 and the other 8, but for one turn each.
    lasts = itertools.chain([100.0, 100.0], [50.0, 8.0], [2.0, 1.0], itertools.cycle([2.0, 8.0]))
    clock = 0.0

    def work():
        nonlocal clock
        clock += next(lasts)

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock)
    assert benchmark.time_ratio(work, work) == 0.25
