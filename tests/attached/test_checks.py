import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from toys import ToyGAN, trained

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.attached.checks import largest_step


@pytest.mark.parametrize(
    ("betas", "steps"),
    [
        ((0.0, 0.9), 1 / math.sqrt(0.1)),  # the paper's
        ((0.0, 0.999), 1 / math.sqrt(0.001)),
        ((0.5, 0.999), 0.75 / math.sqrt(1 - 0.999**2)),  # the second step is the largest
        ((0.9, 0.99), None),
        ((0.9, 0.999), None),  # torch's default
    ],
)
def test_the_largest_step_is_adams_own(betas, steps):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Adam([weight], lr=1.0, betas=betas, eps=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    state["step"].fill_(1e6)  # late in a run, a weight that grows has moments of 0
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()
    sizes = []
    for _ in range(50):
        before = weight.item()
        optimizer.step()
        sizes.append(before - weight.item())
    assert largest_step(*betas) == pytest.approx(max(sizes), rel=1e-6)
    assert steps is None or max(sizes) == pytest.approx(steps, rel=1e-6)


class WithOptimizers(ToyGAN):
    def __init__(self, generator: Optimizer, discriminator: Optimizer) -> None:
        super().__init__()
        self.kinds = (generator, discriminator)

    def configure_optimizers(self):
        return [make(network.parameters()) for make, network in zip(self.kinds, self.networks(), strict=True)]


def adam(beta1: float, beta2: float, kind=Adam):
    return lambda parameters: kind(parameters, lr=1e-3, betas=(beta1, beta2))


def warned_of(generator, discriminator, **arguments) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(DynamicSparsityCallback(0.5, **arguments), gan=WithOptimizers(generator, discriminator))
    return [str(each.message) for each in caught if "fresh optimizer state" in str(each.message)]


@pytest.mark.parametrize(
    ("generator", "discriminator", "arguments", "expected"),
    [
        (adam(0.0, 0.999), adam(0.0, 0.9), {}, ["31.6 learning rates for about 1,000 .* generator's betas=.0, 0.999."]),
        (adam(0.9, 0.999, AdamW), adam(0.0, 0.9), {}, ["6.6 learning rates .* the generator's betas=.0.9, 0.999."]),
        (
            *(adam(0.0, 0.9), adam(0.5, 0.999), {"method": "dda"}),
            ["16.8 learning rates .* the discriminator's betas=.0.5, 0.999."],
        ),
        (
            *(adam(0.0, 0.99), adam(0.0, 0.999), {}),
            ["10.0 learning rates for about 100 .* the generator's betas=.0, 0.99.,", "31.6 .* the discriminator's"],
        ),
    ],
)
def test_one_warning_gives_the_size_of_first_steps(generator, discriminator, arguments, expected):
    (warning,) = warned_of(generator, discriminator, **arguments)
    assert re.search("large: up to " + " up to ".join(expected), warning)
    assert warning.count("up to") == len(expected)


@pytest.mark.parametrize(
    ("generator", "discriminator", "arguments"),
    [
        (adam(0.0, 0.9), adam(0.0, 0.9), {}),
        (adam(0.0, 0.9), adam(0.0, 0.999), {"method": "sdst"}),  # whose discriminator never grows
        (adam(0.0, 0.999), adam(0.0, 0.999), {"method": "static"}),
        (adam(0.0, 0.999), adam(0.0, 0.999), {"optimizer_state": "keep"}),
        (lambda p: SGD(p, lr=1e-3), lambda p: SGD(p, lr=1e-3), {}),
    ],
)
def test_other_runs_bring_no_such_warning(generator, discriminator, arguments):
    assert warned_of(generator, discriminator, **arguments) == []
