import pytest
from torch import nn

from lightning_ddst.utils.modules import eval_mode, find_raising_module


def test_every_module_gets_its_own_mode_back_also_after_an_error():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval()))
    modes = [module.training for module in network.modules()]
    assert modes == [True, True, True, True, False]
    with eval_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == modes
    with pytest.raises(KeyError), eval_mode(network):
        raise KeyError
    assert [module.training for module in network.modules()] == modes


def test_the_innermost_module_that_raised_is_found():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError

    network = nn.Sequential(nn.Sequential(nn.Identity(), Fails()))
    with pytest.raises(RuntimeError) as raised:
        network(1)
    assert find_raising_module(network, raised.value) is network[0][1]
    assert find_raising_module(network, ValueError()) is network
