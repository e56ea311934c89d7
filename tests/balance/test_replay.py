import random

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from lightning_ddst.balance.replay import CallState, replay, swap_weights


class Drawing(nn.Module):
    """Depends on everything that a call can depend on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return self.norm(self.linear(x)) * self.calls + torch.randn(3) + random.random() + np.random.rand()  # noqa: NPY002


def everything(network):
    values = [value.clone() for value in network.state_dict().values()]
    return [*values, torch.get_rng_state(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002


def same(ones, others):
    return all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(ones, others, strict=True)
    )


def test_a_call_gives_again_what_it_gave_and_is_not_noticed():
    network, x = Drawing(), torch.randn(4, 3)
    state = CallState.capture(network)
    first = network(x)
    network(x)
    now, buffers = everything(network), dict(network.named_buffers())
    for _ in range(2):  # the state can be used again
        with replay(network, state):
            again = network(x)
            assert not again.requires_grad
        assert torch.equal(again, first)
    assert same(everything(network), now)
    assert all(buffer is buffers[name] for name, buffer in network.named_buffers())


def test_everything_is_put_back_after_an_error():
    network, x = Drawing(), torch.randn(4, 3)
    state = CallState.capture(network)
    network(x)
    now = everything(network)
    try:
        with replay(network, state):
            network(x)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert same(everything(network), now)
    assert torch.is_grad_enabled()


def test_replay_uses_the_autocast_of_the_call():
    network, x = nn.Linear(3, 3), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = CallState.capture(network)
    full = CallState.capture(network)
    for state, dtype in ((half, torch.bfloat16), (full, torch.float32)):
        with replay(network, state):
            assert network(x).dtype == dtype
        with torch.autocast("cpu", torch.float16), replay(network, state):
            assert network(x).dtype == dtype


def test_weights_are_exchanged_and_put_back_past_autograd():
    network = nn.Linear(2, 2)
    kept = {network.weight: network.weight.detach().clone(), network.bias: network.bias.detach().clone()}
    loss = network(torch.ones(1, 2)).square().sum()
    versions = [parameter._version for parameter in network.parameters()]
    updated = [parameter.detach() + 1 for parameter in network.parameters()]
    for parameter, value in zip(network.parameters(), updated, strict=True):
        parameter.data.copy_(value)
    with swap_weights(kept, only=[network.weight]):
        assert torch.equal(network.weight, kept[network.weight])
        assert torch.equal(network.bias, updated[1])
    assert all(torch.equal(p, value) for p, value in zip(network.parameters(), updated, strict=True))
    assert [parameter._version for parameter in network.parameters()] == versions
    loss.backward()  # pending all the while
    SGD(network.parameters(), 0.1).step()


def test_only_what_was_kept_is_exchanged():
    network = nn.Linear(2, 2)
    before = network.bias.detach().clone()
    with swap_weights({}, only=network.parameters()):
        assert torch.equal(network.bias, before)


def test_a_call_of_a_network_without_parameters_is_repeated():
    noise, x = nn.Dropout(), torch.ones(8, 8)
    state = CallState.capture(noise, (x,), {})
    first = noise(x)
    with replay(noise, state):
        assert torch.equal(noise(x), first)
    assert CallState.capture(nn.Identity()).autocast[0] == "cpu"
