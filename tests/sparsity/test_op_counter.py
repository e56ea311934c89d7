"""Operations of weights that layers, functions and other modules use, against torch's counter and figures by hand."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_ddst.sparsity.op_counter import OpCounter

BATCH = 5


def count(network, run):
    """Uses of each weight of two and more dimensions, and those that computed its gradient."""
    norms = ("original0", "weight_g")
    weights = {name: p for name, p in network.named_parameters() if p.dim() > 1 and not name.endswith(norms)}
    counter = OpCounter(weights)
    with counter.counted():
        run()
    uses, gradients = dict(counter.uses), dict(counter.gradient_uses)
    return uses, gradients, sum(2 * number * weights[name].numel() for name, number in uses.items())


def total(run):
    """The operations that torch's counter counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Functional(nn.Module):
    """A layer that is never called, whose weight is scaled at run time, and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.layer.weight / 3, self.layer.bias)), self.weight * 0.5)


class Modulated(nn.Module):
    """StyleGAN2's convolution: a weight for every image, or scaled images, as its `fused_modconv` has it."""

    def __init__(self, inputs, outputs, *, fused):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3))
        self.affine = nn.Linear(2, inputs)
        self.fused = fused

    def forward(self, x, latent):
        batch, _, *size = x.shape
        style = self.affine(latent)
        weight = self.weight * 0.1 * style.view(batch, 1, -1, 1, 1)
        demodulation = (weight.square().sum((2, 3, 4)) + 1e-8).rsqrt()
        if self.fused:
            weight = (weight * demodulation.view(batch, -1, 1, 1, 1)).flatten(0, 1)
            return F.conv2d(x.reshape(1, -1, *size), weight, padding=1, groups=batch).view(batch, -1, *size)
        x = F.conv2d(x * style.view(batch, -1, 1, 1), self.weight[0] * 0.1, padding=1)
        return x * demodulation.view(batch, -1, 1, 1)


def normed(norm):
    return nn.Sequential(norm(nn.Conv1d(2, 4, 3)), nn.Tanh(), norm(nn.ConvTranspose1d(4, 1, 3)))


NETWORKS = {
    "linear": (nn.Linear(3, 2), (BATCH, 3)),
    "convolutions": (nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ConvTranspose2d(3, 2, 4)), (2, 2, 8, 8)),
    "functions": (Functional(), (BATCH, 3)),
    "weight norm": (normed(parametrizations.weight_norm), (2, 2, 9)),
    "old weight norm": (normed(nn.utils.weight_norm), (2, 2, 9)),
    "spectral norm": (normed(parametrizations.spectral_norm), (2, 2, 9)),
    "old spectral norm": (normed(nn.utils.spectral_norm), (2, 2, 9)),
    "GRU": (nn.GRU(3, 2, num_layers=2, bidirectional=True), (4, BATCH, 3)),
    "LSTM with projections": (nn.LSTM(3, 4, proj_size=2), (4, BATCH, 3)),
    "LSTM cell": (nn.LSTMCell(3, 2), (BATCH, 3)),
    "transformer": (nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (2, 3, 4)),
}
CHECKPOINTED = {True: "re-entrant", False: "not re-entrant"}


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("input_trains", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_counts_what_torchs_counter_counts(name, input_trains):
    network, shape = NETWORKS[name]
    x = torch.randn(shape, requires_grad=input_trains)

    def run():
        first(network(x)).sum().backward()

    assert count(network, run)[2] == total(run) > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NETWORKS)
def test_calls_without_gradients_count_what_torchs_counter_counts(name, mode):
    network, shape = NETWORKS[name]
    x = torch.randn(shape)

    def run():
        with mode():
            network(x)

    assert count(network, run)[2] == total(lambda: network(x)) > 0


@pytest.mark.parametrize("reentrant", CHECKPOINTED, ids=CHECKPOINTED.values())
@pytest.mark.parametrize("name", ["linear", "convolutions", "functions", "weight norm", "transformer"])
def test_checkpointed_calls_count_what_is_computed(name, reentrant):
    network, shape = NETWORKS[name]
    x = torch.randn(shape, requires_grad=True)

    def run():
        checkpoint(network, x, use_reentrant=reentrant).sum().backward()

    # Re-entrant checkpoints run forward a second time, others stop where nothing more is needed.
    expected = total(lambda: network(x).sum().backward()) + total(lambda: network(x)) if reentrant else total(run)
    assert count(network, run)[2] == expected > 0


@pytest.mark.parametrize("name", ["linear", "convolutions", "functions", "weight norm", "old spectral norm"])
def test_gradient_penalties_count_what_torchs_counter_counts(name):
    network, shape = NETWORKS[name]

    def run():
        x = torch.randn(shape, requires_grad=True) * 1  # torch's counter rejects leaves
        (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    assert count(network, run)[2] == total(run) > 0


def test_a_gradient_penalty_by_hand():
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))

    def run():
        x = torch.randn(BATCH, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()

    # First layer: forward, the input's gradient, that gradient's two derivatives, the first pass's weight: 5 * 5 uses,
    # 2 * 5 of them for the weight, and the input's gradient, which is a leaf. Second layer: forward and the gradient of
    # its input, and of that the weight's: 3 * 5, 5 of them for the weight; its score is a sum, so nothing else.
    uses, gradients, _ = count(network, run)
    assert uses == {"0.weight": 30, "2.weight": 15}
    assert gradients == {"0.weight": 10, "2.weight": 5}


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_gradient_penalty_through_groups_by_hand(kind, groups):
    """Torch computes the weight's gradient in the second backward pass group by group."""
    network = kind(4, 8, 3, padding=1, groups=groups, bias=False)

    def run():
        x = torch.randn(BATCH, 4, 7, 7, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    # Forward, the input's gradient, and each one's two derivatives: 6 passes with each weight at 49 places of 5 images.
    uses, gradients, _ = count(network, run)
    assert uses == {"weight": 6 * 49 * BATCH}
    assert gradients == {"weight": 2 * 49 * BATCH}


def test_an_lstm_by_hand():
    """Torch's counter does not count oneDNN's LSTM."""
    network = nn.LSTM(3, 2, bidirectional=True)
    x = torch.randn(4, BATCH, 3, requires_grad=True)
    uses, gradients, _ = count(network, lambda: network(x)[0].sum().backward())
    assert set(uses) == {name for name, parameter in network.named_parameters() if parameter.dim() > 1}
    assert set(uses.values()) == {3 * 4 * BATCH}
    assert set(gradients.values()) == {4 * BATCH}


def test_attention_by_hand():
    """Products of activations do not count."""
    network = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4, requires_grad=True)
    uses, gradients, _ = count(network, lambda: network(x, x, x)[0].sum().backward())
    assert uses == {"in_proj_weight": 3 * 6, "out_proj.weight": 3 * 6}
    assert gradients == {"in_proj_weight": 6, "out_proj.weight": 6}
    # Of in_proj_weight, a third is used at the 6 places of the queries, the rest at the 10 of keys and values.
    keys = torch.randn(2, 5, 4)
    with torch.no_grad():
        uses, _, _ = count(network, lambda: network(x, keys, keys))
    assert uses == {"in_proj_weight": Fraction(6 + 2 * 10, 3), "out_proj.weight": 6}


def test_attention_in_evaluation_counts_in_torchs_fast_path():
    network = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).eval()
    with torch.no_grad():
        uses, _, _ = count(network, lambda: network(torch.randn(2, 3, 4)))
    assert list(uses.values()) == 4 * [6]


@pytest.mark.parametrize("fused", [True, False])
def test_modulated_convolutions_by_hand(fused):
    network = nn.ModuleList([Modulated(2, 3, fused=fused), Modulated(3, 2, fused=fused)])
    images, latent = torch.randn(4, 2, 5, 5), torch.randn(4, 2)

    def run():
        network[1](F.leaky_relu(network[0](images, latent)), latent).sum().backward()

    # Each weight at 4 * 25 places: forward and for the weight, and for the images that need gradients: those of the
    # second layer, and, scaled, of the first. The affine layers' 4 latents need none.
    first_passes = 2 if fused else 3
    uses, gradients, _ = count(network, run)
    assert uses == {"0.weight": first_passes * 100, "1.weight": 300, "0.affine.weight": 8, "1.affine.weight": 8}
    assert gradients == {"0.weight": 100, "1.weight": 100, "0.affine.weight": 4, "1.affine.weight": 4}


def test_a_weight_that_two_layers_share():
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    network[2].weight = network[0].weight
    uses, gradients, _ = count(network, lambda: network(torch.randn(BATCH, 3)).sum().backward())
    assert (uses, gradients) == ({"0.weight": 2 * BATCH + 3 * BATCH}, {"0.weight": 2 * BATCH})


def test_a_custom_function():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return (x @ weight.t()) * 2

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return 2 * gradient @ weight, 2 * gradient.t() @ x

    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    x = torch.randn(BATCH, 3)

    def run():
        Product.apply(Product.apply(x, network[0].weight).relu(), network[1].weight).sum().backward()

    uses, gradients, _ = count(network, run)
    assert uses == {"0.weight": 3 * BATCH, "1.weight": 3 * BATCH}
    assert gradients == {"0.weight": BATCH, "1.weight": BATCH}


def test_weights_that_share_memory():
    memory = torch.randn(20)
    network = nn.ParameterList([memory[:12].view(4, 3), memory[12:].view(2, 4)])
    uses, _, _ = count(network, lambda: torch.randn(BATCH, 3) @ network[0].t() @ network[1].t())
    assert uses == {"0": BATCH, "1": BATCH}


def test_averages_and_optimizers_do_not_become_weights():
    network = nn.Linear(3, 3, bias=False)
    average = torch.zeros(3, 3)
    optimizer = torch.optim.Adam(network.parameters(), weight_decay=0.1)

    def run():
        network(torch.randn(BATCH, 3)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            average.lerp_(network.weight, 0.5)
        F.linear(torch.randn(BATCH, 3), average)

    assert count(network, run)[0] == {"weight": 2 * BATCH}


def test_a_backward_pass_of_a_call_before():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    loss = network(torch.randn(BATCH, 3)).sum()
    uses, gradients, _ = count(network, loss.backward)
    assert uses == {"0.weight": BATCH, "2.weight": 2 * BATCH}
    assert gradients == {"0.weight": BATCH, "2.weight": BATCH}


def test_casts_that_autocast_keeps():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(BATCH, 3)
    with torch.autocast("cpu", torch.bfloat16):
        network(x)
        uses, gradients, _ = count(network, lambda: network(x).sum().backward())
    assert uses == {"0.weight": 2 * BATCH, "2.weight": 3 * BATCH}
    assert gradients == {"0.weight": BATCH, "2.weight": BATCH}


def test_writes_into_views_of_other_weights_without_gradients():
    layer, other = nn.Linear(3, 4), nn.Linear(3, 4)

    def run():
        with torch.no_grad():
            other.weight[1] *= 0.5
            other.weight[:, 1] *= 0.5
        layer(torch.ones(BATCH, 3)).sum().backward()

    assert count(layer, run)[:2] == ({"weight": 2 * BATCH}, {"weight": BATCH})
