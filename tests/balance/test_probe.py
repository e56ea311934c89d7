"""The measurement of the balance ratio's three scores, against arithmetic by hand and unmeasured training.

Where scores are compared for equality, every number is a small multiple of a power of 2 (learning rates,
batch sizes and weights are), so that neither float32 nor float64 rounds anything.
"""

import copy
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ddst.balance import BalanceProbe

NOISE, PIXELS, BATCH, CLASSES = 3, 2, 2, 3
LEARNING_RATE = 0.5
COLORS = torch.tensor([2.0, 1.0]).double()


def drawn(*shape, step=0.5, seed=0):
    """Random multiples of `step` from -2 to 2 steps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).double() * step


@torch.no_grad()
def fill(network, seed):
    for i, parameter in enumerate(network.parameters()):
        parameter.copy_(drawn(*parameter.shape, seed=seed + i))


class LinearGenerator(nn.Module):
    """G(z) = z A' + a, and with labels + E[label]."""

    def __init__(self, conditional=False):
        super().__init__()
        self.linear = nn.Linear(NOISE, PIXELS).double()
        self.classes = nn.Embedding(CLASSES, PIXELS).double() if conditional else None
        fill(self, seed=10)

    def forward(self, z, labels=None):
        images = self.linear(z)
        return images if self.classes is None else images + self.classes(labels)

    def by_hand(self, z, labels=None):
        """The same, past every hook, from the weights as they are now."""
        with torch.no_grad():
            images = z @ self.linear.weight.T + self.linear.bias
            return images if self.classes is None else images + self.classes.weight[labels]


class LinearDiscriminator(nn.Module):
    """D(x) = x w' + b, and with labels + e[label]."""

    def __init__(self, conditional=False):
        super().__init__()
        self.linear = nn.Linear(PIXELS, 1).double()
        self.classes = nn.Embedding(CLASSES, 1).double() if conditional else None
        fill(self, seed=20)
        if conditional:
            self.classes.weight.data.copy_(torch.tensor([[0.0], [8.0], [-4.0]]))  # mixed up labels are seen

    def forward(self, x, labels=None):
        scores = self.linear(x)
        return scores if self.classes is None else scores + self.classes(labels)

    def by_hand(self, x, labels=None):
        """The mean score, past every hook, from the weights as they are now."""
        with torch.no_grad():
            scores = x @ self.linear.weight.T + self.linear.bias
            return (scores if self.classes is None else scores + self.classes.weight[labels]).mean()


class Measured:
    """A linear GAN in training; each generator update is measured, and computed by hand for comparison."""

    def __init__(self, generator=None, discriminator=None, **options):
        self.generator = generator or LinearGenerator()
        self.discriminator = discriminator or LinearDiscriminator()
        self.of_generator = torch.optim.SGD(self.generator.parameters(), LEARNING_RATE)
        self.of_discriminator = torch.optim.SGD(self.discriminator.parameters(), LEARNING_RATE)
        self.probe = BalanceProbe(self.generator, self.discriminator, **options)
        self.probe.watching = True
        self.measured, self.expected = [], []

    def step_discriminator(self, loss):
        self.of_discriminator.zero_grad()
        loss.backward()
        self.of_discriminator.step()

    def step_generator(self, loss, batch, real, z, real_labels=None, labels=None):
        self.of_generator.zero_grad()
        loss.backward()
        score = partial(self.discriminator.by_hand, labels=labels)
        expected = [self.discriminator.by_hand(real, real_labels), score(self.generator.by_hand(z, labels))]
        self.probe.before_update(self.generator.parameters())
        self.of_generator.step()
        self.measured.append(self.probe.after_update(batch))
        expected.append(score(self.generator.by_hand(z, labels)))
        self.expected.append(torch.stack(expected))

    def check(self, updates=2, **tolerance):
        assert len(self.measured) == updates
        for measured, expected in zip(self.measured, self.expected, strict=True):
            assert len(expected.unique()) == 3, "three different scores, or the comparison says little"
            torch.testing.assert_close(measured[:3].double(), expected, **{"rtol": 0, "atol": 0, **tolerance})


# ---- the order of training steps ------------------------------------------------------------------------


def discriminator_first_shared_fake(gan, real, noise):
    fake = gan.generator(noise(0))
    gan.step_discriminator(gan.discriminator(fake.detach()).mean() - gan.discriminator(real).mean())
    gan.step_generator(-gan.discriminator(fake).mean(), real, real, noise(0))


def generator_first(gan, real, noise):
    gan.step_generator(-gan.discriminator(gan.generator(noise(0))).mean(), real, real, noise(0))
    fake = gan.generator(noise(1)).detach()
    gan.step_discriminator(gan.discriminator(fake).mean() - gan.discriminator(real).mean())


def fresh_fakes_without_gradients(gan, real, noise):
    with torch.no_grad():
        fake = gan.generator(noise(0))
    gan.step_discriminator(gan.discriminator(fake).mean() - gan.discriminator(real).mean())
    gan.step_generator(-gan.discriminator(gan.generator(noise(1))).mean(), real, real, noise(1))


def several_discriminator_steps(gan, real, noise):
    for i in range(2):
        fake = gan.generator(noise(i)).detach()
        gan.step_discriminator(gan.discriminator(fake).mean() - gan.discriminator(real).mean())
    gan.step_generator(-gan.discriminator(gan.generator(noise(2))).mean(), real, real, noise(2))


def noise_of_another_batch_size(gan, real, noise):
    gan.step_discriminator(-gan.discriminator(real).mean())
    z = torch.cat([noise(0), noise(1)])
    gan.step_generator(-gan.discriminator(gan.generator(z)).mean(), real, real, z)


def real_images_in_parts(gan, real, noise):
    fake = gan.generator(noise(0))
    for part in real.split(1):
        gan.step_discriminator(gan.discriminator(fake.detach()).mean() - gan.discriminator(part).mean())
    gan.step_generator(-gan.discriminator(fake).mean(), real, real, noise(0))


def frozen_discriminator(gan, real, noise):
    gan.step_discriminator(gan.discriminator(gan.generator(noise(0)).detach()).mean() - gan.discriminator(real).mean())
    gan.discriminator.requires_grad_(False)
    gan.step_generator(-gan.discriminator(gan.generator(noise(1))).mean(), real, real, noise(1))
    gan.discriminator.requires_grad_(True)


def real_and_fake_joined(gan, real, noise):
    fake = gan.generator(noise(0))
    scores = gan.discriminator(torch.cat([real, fake.detach()]))
    gan.step_discriminator(scores[BATCH:].mean() - scores[:BATCH].mean())
    scores = gan.discriminator(torch.cat([real, fake]))
    gan.step_generator(-scores[BATCH:].mean(), real, real, noise(0))


def augmented_fake(gan, real, noise):
    gan.step_discriminator(-gan.discriminator(real * COLORS).mean())
    gan.step_generator(-gan.discriminator(gan.generator(noise(0)) * COLORS).mean(), real, real, noise(0))


def relativistic(gan, real, noise):
    fake = gan.generator(noise(0))
    gan.step_discriminator((gan.discriminator(fake.detach()) - gan.discriminator(real)).mean())
    gan.step_generator((gan.discriminator(real) - gan.discriminator(fake)).mean(), real, real, noise(0))


def real_images_last(gan, real, noise):
    fake = gan.generator(noise(0))
    gan.step_discriminator((gan.discriminator(fake.detach()) - gan.discriminator(real)).mean())
    scores = gan.discriminator(fake), gan.discriminator(real)
    gan.step_generator((scores[1] - scores[0]).mean(), real, real, noise(0))


def fakes_to_look_at_before_the_update(gan, real, noise):
    gan.step_discriminator(-gan.discriminator(real).mean())
    loss = -gan.discriminator(gan.generator(noise(0))).mean()
    with torch.no_grad():
        gan.discriminator(gan.generator(noise(1)))
    gan.step_generator(loss, real, real, noise(0))


def cycles_after_the_adversarial_part(gan, real, noise):
    gan.step_discriminator(-gan.discriminator(real).mean())
    loss = -gan.discriminator(gan.generator(noise(0))).mean()
    loss = loss + (gan.generator(noise(1)) - real).square().mean() * 0  # scored by nobody
    gan.step_generator(loss, real, real, noise(0))


def penalties_that_need_gradients(gan, real, noise):
    gan.step_generator(-gan.discriminator(gan.generator(noise(0))).mean(), real, real, noise(0))
    points = real.clone().requires_grad_()  # as R1 and the gradient penalty do
    (slope,) = torch.autograd.grad(gan.discriminator(points).sum(), points, create_graph=True)
    gan.step_discriminator(slope.square().mean() - gan.discriminator(real).mean())


@pytest.mark.parametrize(
    "step",
    [
        discriminator_first_shared_fake,
        generator_first,
        fresh_fakes_without_gradients,
        several_discriminator_steps,
        noise_of_another_batch_size,
        real_images_in_parts,
        frozen_discriminator,
        real_and_fake_joined,
        augmented_fake,
        relativistic,
        real_images_last,
        fakes_to_look_at_before_the_update,
        cycles_after_the_adversarial_part,
        penalties_that_need_gradients,
    ],
)
def test_scores_are_those_worked_out_by_hand(step: Callable):
    gan = Measured()
    for update in range(2):
        real = drawn(BATCH, PIXELS, seed=200 + update) + 1
        step(gan, real, lambda number, update=update: drawn(BATCH, NOISE, step=1, seed=10 * update + number))
    gan.check()


def test_scores_of_one_update_in_numbers():
    # G(z) = a z with a = 2, D(x) = x w with w = (1, 1): z = (1), batch of one, real (3, 5).
    generator, discriminator = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    nn.init.constant_(generator.weight, 2)
    nn.init.constant_(discriminator.weight, 1)
    optimizer = torch.optim.SGD(generator.parameters(), 0.5)
    probe = BalanceProbe(generator, discriminator)
    probe.watching = True
    (-discriminator(generator(torch.ones(1, 1)))).mean().backward()
    probe.before_update(generator.parameters())
    optimizer.step()  # d(-D(G(z)))/da = -w z = -1 each: a = 2 + 0.5
    assert probe.after_update(torch.tensor([[3.0, 5.0]]))[:3].tolist() == [8.0, 4.0, 5.0]


def test_double_precision_is_kept():
    torch.manual_seed(0)
    gan = Measured()
    for network in (gan.generator, gan.discriminator):
        for parameter in network.parameters():
            nn.init.normal_(parameter)
    for _ in range(2):
        real, z = torch.randn(2, BATCH, NOISE).double()
        discriminator_first_shared_fake(gan, real[:, :PIXELS], lambda _, z=z: z)
    gan.check(rtol=0, atol=1e-12)


# ---- labels ------------------------------------------------------------------------------------------------

REAL_LABELS, FAKE_LABELS = torch.tensor([1, 1]), torch.tensor([0, 2])


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("batch_of", [lambda x, y: (x, y), lambda x, y: {"label": y, "image": x}])
@pytest.mark.parametrize("order", ["fake first", "real first"])
def test_real_images_are_scored_with_their_own_labels(keyword, batch_of, order):
    gan = Measured(LinearGenerator(conditional=True), LinearDiscriminator(conditional=True))

    def called(network, first, labels):
        return network(first, labels=labels) if keyword else network(first, labels)

    for update in range(2):
        real, z = drawn(BATCH, PIXELS, seed=100 + update) + 1, drawn(BATCH, NOISE, step=1, seed=update)
        fake = called(gan.generator, z, FAKE_LABELS)
        losses = [
            called(gan.discriminator, fake.detach(), FAKE_LABELS).mean(),
            -called(gan.discriminator, real, REAL_LABELS).mean(),
        ]
        gan.step_discriminator(sum(losses if order == "fake first" else losses[::-1]))
        loss = -called(gan.discriminator, fake, FAKE_LABELS).mean()
        gan.step_generator(loss, batch_of(real, REAL_LABELS), real, z, REAL_LABELS, FAKE_LABELS)
    gan.check()


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("real_batch", [1, 4])
def test_labels_follow_the_batch_size_of_the_real_images(real_batch, keyword):
    gan = Measured(LinearGenerator(conditional=True), LinearDiscriminator(conditional=True))
    real, z = drawn(real_batch, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    labels = torch.ones(real_batch, dtype=torch.long)
    fake = gan.generator(z, FAKE_LABELS)
    scores = gan.discriminator(fake, labels=FAKE_LABELS) if keyword else gan.discriminator(fake, FAKE_LABELS)
    batch = [torch.zeros(real_batch), real, labels]  # the zeros are of the labels' shape, but not of their type
    gan.step_generator(-scores.mean(), batch, real, z, labels, FAKE_LABELS)
    gan.check(1)


def test_fakes_keep_their_labels_where_real_images_are_scored_after_them():
    gan = Measured(LinearGenerator(conditional=True), LinearDiscriminator(conditional=True))
    real, z = drawn(BATCH, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    fake_score = gan.discriminator(gan.generator(z, FAKE_LABELS), FAKE_LABELS)
    loss = (gan.discriminator(real, REAL_LABELS) - fake_score).mean()
    gan.step_generator(loss, (real, REAL_LABELS), real, z, REAL_LABELS, FAKE_LABELS)
    gan.check(1)


def test_fakes_have_the_labels_of_the_last_call_also_where_they_are_augmented():
    gan = Measured(LinearGenerator(conditional=True), LinearDiscriminator(conditional=True))
    real, z = drawn(BATCH, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    other = gan.generator(drawn(BATCH, NOISE, step=1, seed=7), REAL_LABELS).detach()
    gan.step_discriminator(gan.discriminator(other, REAL_LABELS).mean())
    loss = -gan.discriminator(gan.generator(z, FAKE_LABELS) * 2, FAKE_LABELS).mean()
    gan.step_generator(loss, (real, REAL_LABELS), real, z, REAL_LABELS, FAKE_LABELS)
    gan.check(1)


def test_fakes_have_the_labels_of_the_generators_step():
    gan = Measured(LinearGenerator(conditional=True), LinearDiscriminator(conditional=True))
    real, z = drawn(BATCH, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    fake = gan.generator(z, FAKE_LABELS)
    gan.step_discriminator(gan.discriminator(fake.detach(), REAL_LABELS).mean())  # others in the discriminator's
    loss = -gan.discriminator(fake, FAKE_LABELS).mean()
    gan.step_generator(loss, (real, REAL_LABELS), real, z, REAL_LABELS, FAKE_LABELS)
    gan.check(1)


def one_hot(labels):
    return F.one_hot(labels, CLASSES).double()


class OneHotDiscriminator(LinearDiscriminator):
    """A conditional discriminator that is given one-hot labels."""

    def __init__(self):
        super().__init__(conditional=True)

    def forward(self, x, one_hot_labels):
        return self.linear(x) + one_hot_labels @ self.classes.weight


def test_labels_that_the_training_step_encoded_are_those_of_the_real_images():
    # The batch holds class numbers and the discriminator takes one-hot vectors, which the batch does not hold.
    gan = Measured(LinearGenerator(conditional=True), OneHotDiscriminator())
    real, z = drawn(BATCH, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    fake = gan.generator(z, FAKE_LABELS)
    gan.step_discriminator(
        gan.discriminator(fake.detach(), one_hot(FAKE_LABELS)).mean()
        - gan.discriminator(real, one_hot(REAL_LABELS)).mean()
    )
    loss = -gan.discriminator(fake, one_hot(FAKE_LABELS)).mean()
    gan.step_generator(loss, (real, REAL_LABELS), real, z, REAL_LABELS, FAKE_LABELS)
    gan.check(1)


def test_labels_are_not_confused_with_other_integers_of_the_batch():
    gan = Measured(LinearGenerator(conditional=True), LinearDiscriminator(conditional=True))
    real, z = drawn(BATCH, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    batch = {"index": torch.arange(BATCH), "image": real, "label": REAL_LABELS}
    fake = gan.generator(z, FAKE_LABELS)
    gan.step_discriminator(
        gan.discriminator(fake.detach(), FAKE_LABELS).mean() - gan.discriminator(batch["image"], batch["label"]).mean()
    )
    gan.step_generator(-gan.discriminator(fake, FAKE_LABELS).mean(), batch, real, z, REAL_LABELS, FAKE_LABELS)
    gan.check(1)


# ---- what networks return, and what batches are ------------------------------------------------------------


class Wrapped(LinearDiscriminator):
    """Returns its scores in some other shape or container."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


@pytest.mark.parametrize(
    ("wrap", "place", "first"),
    [
        (lambda score: (score, score * 7 + 100), 0, lambda output: output[0]),
        (lambda score: [[score], "features"], None, lambda output: output[0][0]),
        (lambda score: {"features": score + 100, "score": score}, "score", lambda output: output["score"]),
        (lambda score: score.squeeze(1), None, lambda output: output),
        (lambda score: score.view(-1, 1, 1, 1).expand(-1, 1, 4, 4), None, lambda output: output),
    ],
    ids=["tuple", "nested list", "dict", "flat", "patches"],
)
def test_the_score_is_the_mean_of_the_tensor_at_its_place(wrap, place, first):
    gan = Measured(discriminator=Wrapped(wrap), discriminator_output=place)
    real, z = drawn(BATCH, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    gan.step_generator(-first(gan.discriminator(gan.generator(z))).mean(), real, real, z)
    gan.check(1)


def test_a_generator_may_return_more_than_images():
    class Named(LinearGenerator):
        def forward(self, z):
            return {"images": super().forward(z), "styles": z}

    gan = Measured(Named())
    real, z = drawn(BATCH, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    gan.step_generator(-gan.discriminator(gan.generator(z)["images"]).mean(), real, real, z)
    gan.check(1)


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda real: real,
        lambda real: (real, torch.arange(BATCH)),
        lambda real: [torch.arange(BATCH), real],
        lambda real: {"image": real, "index": torch.arange(BATCH), "path": ["a", "b"]},
        lambda real: {"data": ({"x": real}, None), "mask": torch.ones(BATCH, PIXELS, dtype=torch.bool)},
        lambda real: (real, torch.ones(BATCH, PIXELS, dtype=torch.long), torch.ones(BATCH, PIXELS + 1)),
    ],
    ids=["tensor", "tuple", "list", "dict", "nested", "other tensors"],
)
def test_real_images_are_found_in_any_batch(batch_of):
    gan = Measured()
    real, z = drawn(BATCH, PIXELS, seed=1) + 1, drawn(BATCH, NOISE, step=1)
    gan.step_generator(-gan.discriminator(gan.generator(z)).mean(), batch_of(real), real, z)
    gan.check(1)


# ---- no trace ------------------------------------------------------------------------------------------------


def plain(layer):
    return layer


def discriminator_with(normalised=plain, norm=None, dropout=0.0):
    layers = [normalised(nn.Linear(4, 8)), nn.LeakyReLU(0.2), nn.Dropout(dropout), normalised(nn.Linear(8, 1))]
    return nn.Sequential(*layers[:1], norm, *layers[1:]) if norm else nn.Sequential(*layers)


class NoisyGenerator(nn.Module):
    """BatchNorm, dropout and noise of its own in every forward call."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(NOISE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 4)
        )

    def forward(self, z):
        images = self.layers(z)
        return images + 0.1 * torch.randn_like(images)


DISCRIMINATORS = {
    "plain": discriminator_with,
    "batchnorm": lambda: discriminator_with(norm=nn.BatchNorm1d(8)),
    "dropout": lambda: discriminator_with(dropout=0.5),
    "old spectral norm": lambda: discriminator_with(nn.utils.spectral_norm),
    "new spectral norm": lambda: discriminator_with(nn.utils.parametrizations.spectral_norm),
    "all of them": lambda: discriminator_with(
        nn.utils.parametrizations.spectral_norm, norm=nn.BatchNorm1d(8), dropout=0.5
    ),
}


def discriminator_loss(discriminator, real, fake):
    return F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()


class Training:
    """20 steps of a small GAN from a fixed seed, with the probe on every generator update or without it."""

    def __init__(self, make_discriminator, probed, mode=True, make_generator=NoisyGenerator):
        torch.manual_seed(0)
        self.generator, self.discriminator = make_generator().train(mode), make_discriminator().train(mode)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), 0.01, betas=(0.0, 0.9))
            for network in (self.generator, self.discriminator)
        ]
        self.probe = BalanceProbe(self.generator, self.discriminator) if probed else None
        if self.probe is not None:
            self.probe.watching = True
        self.scores = []

    def run(self, order, steps=20):
        for _ in range(steps):
            order(self, torch.randn(8, 4) + 1)
        return self

    def step_generator(self, loss, real):
        self.optimizers[0].zero_grad()
        loss.backward()
        if self.probe is not None:
            self.probe.before_update(self.generator.parameters())
        self.optimizers[0].step()
        if self.probe is not None:
            self.scores.append(self.probe.after_update(real))

    def step_discriminator(self, loss):
        self.optimizers[1].zero_grad()
        loss.backward()
        self.optimizers[1].step()

    def everything(self):
        """Every tensor that training has changed, by name."""
        found = {"random state": torch.get_rng_state()}
        for role, network, optimizer in zip("GD", (self.generator, self.discriminator), self.optimizers, strict=True):
            found |= {f"{role}.{name}": value for name, value in network.named_parameters()}
            found |= {f"{role}.{name}": value for name, value in network.named_buffers()}
            found |= {f"{role}.{name}.grad": value.grad for name, value in network.named_parameters()}
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"{role}.optimizer.{index}.{name}": value for name, value in state.items()}
        return found


def losses_one_after_the_other(gan, real):
    fake = gan.generator(torch.randn(8, NOISE))
    gan.step_discriminator(discriminator_loss(gan.discriminator, real, fake.detach()))
    gan.step_generator(-gan.discriminator(fake).mean(), real)


def generator_before_discriminator(gan, real):
    gan.step_generator(-gan.discriminator(gan.generator(torch.randn(8, NOISE))).mean(), real)
    with torch.no_grad():
        fake = gan.generator(torch.randn(8, NOISE))
    gan.step_discriminator(discriminator_loss(gan.discriminator, real, fake))


def both_losses_before_both_updates(gan, real):
    fake = gan.generator(torch.randn(8, NOISE))
    loss = discriminator_loss(gan.discriminator, real, fake.detach())
    gan.step_generator(-gan.discriminator(fake).mean(), real)
    gan.step_discriminator(loss)


def assert_no_trace(order, make_discriminator, mode=True, make_generator=NoisyGenerator):
    probed = Training(make_discriminator, True, mode, make_generator).run(order)
    state = probed.everything()
    expected = Training(make_discriminator, False, mode, make_generator).run(order).everything()
    assert state.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert different == []
    assert len(probed.scores) == 20
    assert torch.stack(probed.scores).isfinite().all()


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("order", [losses_one_after_the_other, generator_before_discriminator])
@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_training_is_the_same_bit_for_bit(kind, order, mode):
    assert_no_trace(order, DISCRIMINATORS[kind], mode)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_backward_pass_may_be_pending_while_measuring(kind, mode):
    # The discriminator's loss is computed before the generator's update and differentiated after it.
    assert_no_trace(both_losses_before_both_updates, DISCRIMINATORS[kind], mode)


class Scaled(nn.Module):
    """A buffer that the backward pass needs, like the blur kernels and noise images of StyleGAN."""

    def __init__(self):
        super().__init__()
        self.layers = discriminator_with()
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x):
        return self.layers(x) * self.scale


def test_a_pending_backward_pass_may_need_a_buffer():
    assert_no_trace(both_losses_before_both_updates, Scaled)


class Averaging(nn.Module):
    """Replaces its buffer by a new tensor in every call."""

    def __init__(self):
        super().__init__()
        self.layers = discriminator_with()
        self.register_buffer("center", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
        return self.layers(x - self.center)


def test_buffers_that_a_call_replaces_are_put_back():
    assert_no_trace(losses_one_after_the_other, Averaging)


def test_measuring_leaves_gradients_alone_and_needs_none():
    gan = Training(DISCRIMINATORS["all of them"], probed=True)
    real, fake = torch.randn(8, 4), gan.generator(torch.randn(8, NOISE))
    (-gan.discriminator(fake).mean()).backward()
    gradients = {name: value.clone() for name, value in gan.everything().items() if name.endswith("grad")}
    gan.probe.before_update(gan.generator.parameters())
    gan.optimizers[0].step()
    scores = gan.probe.after_update(real)
    assert not scores.requires_grad
    assert all(torch.equal(gan.everything()[name], value) for name, value in gradients.items())


def test_a_measurement_that_fails_leaves_no_trace():
    class Particular(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = DISCRIMINATORS["all of them"]()

        def forward(self, x):
            scores = self.layers(x)
            if len(x) != 8:
                raise ValueError("not a batch of 8")
            return scores

    gan = Training(Particular, probed=True)
    fake = gan.generator(torch.randn(8, NOISE))
    (-gan.discriminator(fake).mean()).backward()
    gan.probe.before_update(gan.generator.parameters())
    with torch.no_grad():
        for parameter in gan.generator.parameters():
            parameter.add_(1)  # the update
    state = {name: value.clone() for name, value in gan.everything().items() if value is not None}
    with pytest.raises(ValueError, match="not a batch of 8"):
        gan.probe.after_update(torch.randn(5, 4, generator=torch.Generator()))
    assert all(torch.equal(gan.everything()[name], value) for name, value in state.items())
    assert len(gan.discriminator.layers(torch.randn(5, 4))) == 5


def test_nothing_is_kept_of_a_measured_step():
    gan = Training(DISCRIMINATORS["plain"], probed=True)
    real, z = torch.randn(8, 4), torch.randn(8, NOISE)
    gan.step_generator(-gan.discriminator(gan.generator(z)).mean(), real)
    noise, images = weakref.ref(z.untyped_storage()), weakref.ref(real)
    del z, real
    assert noise() is None
    assert images() is None


# ---- in which mode, and by which discriminator, scores are made ------------------------------------------------


def one_measurement(generator, discriminator, z, real, optimizer=None, **options):
    """Measures one update (without one, of learning rate 0)."""
    optimizer = optimizer or torch.optim.SGD(generator.parameters(), 0.0)
    probe = BalanceProbe(generator, discriminator, **options)
    probe.watching = True
    discriminator(generator(z)).mean().backward()
    probe.before_update(generator.parameters())
    optimizer.step()
    return probe.after_update(real)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_batchnorm_scores_in_the_mode_of_the_networks(mode):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(NOISE, 4), nn.BatchNorm1d(4)).train(mode)
    generator[1].running_mean.fill_(5.0)
    generator[1].running_var.fill_(9.0)
    discriminator = nn.Sequential(nn.Linear(4, 1), nn.ReLU())
    z, real = torch.randn(16, NOISE), torch.randn(16, 4)
    before = [buffer.clone() for buffer in generator.buffers()]  # measured after one forward call of training
    scores = one_measurement(generator, discriminator, z, real)
    with torch.no_grad():
        hidden = z @ generator[0].weight.T + generator[0].bias
        if mode:  # the batch's own statistics
            mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)
        else:
            mean, variance = before[0], before[1]
        fake = (hidden - mean) / (variance + 1e-5).sqrt()  # at the start BatchNorm scales by 1 and shifts by 0
        expected = F.relu(fake @ discriminator[0].weight.T + discriminator[0].bias).mean()
    assert scores[1].item() == pytest.approx(expected.item(), rel=1e-5)
    assert scores[2].item() == scores[1].item()


def test_dropout_is_off_where_the_networks_are_in_evaluation_mode():
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(NOISE, 4), discriminator_with(dropout=0.5).eval()
    z, real = torch.randn(16, NOISE), torch.randn(16, 4)
    scores = one_measurement(generator, discriminator, z, real)
    with torch.no_grad():
        assert scores[0] == discriminator(real).mean()
        assert scores[1] == discriminator(generator(z)).mean()


def test_dropout_and_noise_are_the_same_before_and_after_the_update():
    torch.manual_seed(0)
    generator, discriminator = NoisyGenerator(), discriminator_with(dropout=0.5)
    scores = one_measurement(generator, discriminator, torch.randn(16, NOISE), torch.randn(16, 4))
    assert scores[2] == scores[1]  # the learning rate is 0, so only what is drawn could differ
    again = one_measurement(generator, discriminator, torch.randn(16, NOISE), torch.randn(16, 4))
    assert again[1] != scores[1]


def test_dropout_and_noise_are_the_same_where_the_update_itself_draws():
    class Langevin(torch.optim.SGD):
        """Draws noise (of size 0 here) in every step."""

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.0)

    torch.manual_seed(0)
    generator, discriminator = NoisyGenerator(), discriminator_with(dropout=0.5)
    optimizer = Langevin(generator.parameters(), 0.0)
    scores = one_measurement(generator, discriminator, torch.randn(16, NOISE), torch.randn(16, 4), optimizer)
    assert scores[2] == scores[1]


@pytest.mark.parametrize("kind", ["old spectral norm", "new spectral norm"])
def test_every_score_starts_from_the_spectral_norm_that_training_started_from(kind):
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(NOISE, 4), DISCRIMINATORS[kind]()
    # New weights, so that u and v are far from converged and every iteration gives another norm.
    for parameter in discriminator.parameters():
        nn.init.normal_(parameter)
    z, real = torch.randn(16, NOISE), torch.randn(16, 4) + 1
    state = {name: value.clone() for name, value in discriminator.state_dict().items()}
    scores = one_measurement(generator, discriminator, z, real)

    def alone(images):
        discriminator.load_state_dict(state)
        with torch.no_grad():
            return discriminator(images).mean()

    with torch.no_grad():
        assert scores[0] == alone(real)
        assert scores[1] == scores[2] == alone(generator(z))
        assert scores[1] != discriminator(generator(z)).mean(), "one iteration further the score is another"


@pytest.mark.parametrize(
    ("changes", "counted", "expected"), [(False, False, 0), (True, False, 3), (False, True, 3), (True, True, 3)]
)
def test_all_scores_take_the_weights_that_training_normalized(changes, counted, expected):
    class Products(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number += function.overloadpacket.__name__ == "mv"
            return function(*args, **kwargs or {})

    torch.manual_seed(0)
    generator, discriminator = nn.Linear(NOISE, 4), spectral_norm(nn.Linear(4, 1))
    z, real = torch.randn(16, NOISE), torch.randn(16, 4)
    nn.init.normal_(discriminator.parametrizations.weight.original)  # far from what the vectors fit
    state = {name: value.clone() for name, value in discriminator.state_dict().items()}
    probe = BalanceProbe(generator, discriminator)
    probe.watching = True
    discriminator(generator(z)).mean().backward()
    if changes:
        for parameter in discriminator.parameters():
            nn.init.normal_(parameter)
    state |= {name: value.detach().clone() for name, value in discriminator.named_parameters()}
    images = [real, generator(z)]
    probe.before_update(generator.parameters())
    with torch.no_grad():
        generator.weight *= 2
    images.append(generator(z))
    with Products() as products:
        scores = probe.after_update(real, counted=counted)
    assert products.number == expected
    with torch.no_grad():
        for score, each in zip(scores, images, strict=False):
            discriminator.load_state_dict(state)
            assert score == discriminator(each).mean()


def test_the_old_score_is_trainings_own_unless_something_changed_since():
    def calls(change=lambda generator, discriminator: None, of=lambda fake: fake):
        generator, discriminator, probe = watched()
        z, real = drawn(BATCH, NOISE, seed=3), drawn(BATCH, PIXELS, seed=4)
        discriminator(of(generator(z)))
        change(generator, discriminator)
        counted = []
        discriminator.register_forward_hook(lambda *_: counted.append("D"))
        generator.register_forward_hook(lambda *_: counted.append("G"))
        probe.before_update(generator.parameters())
        expected = [discriminator.by_hand(real), discriminator.by_hand(generator.by_hand(z))]
        with torch.no_grad():
            generator.linear.bias += 1
        expected.append(discriminator.by_hand(generator.by_hand(z)))
        assert probe.after_update(real)[:3].tolist() == [value.item() for value in expected]
        return "".join(counted)

    def change(parameter):
        with torch.no_grad():
            parameter.mul_(2)

    assert calls() == "DGD"  # real images, and the new generator's
    assert calls(lambda generator, discriminator: change(generator.linear.weight)) == "DGDGD"
    assert calls(lambda generator, discriminator: change(discriminator.linear.weight)) == "DGDGD"
    assert calls(of=lambda fake: fake * COLORS) == "DGDGD"
    assert calls(of=lambda fake: torch.cat([fake, fake])) == "DGDGD"
    assert calls(of=lambda fake: fake[:1]) == "DGDGD"


half_precision = partial(torch.autocast, "cpu", torch.bfloat16)


def test_scores_are_made_in_the_precision_of_training():
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(NOISE, 4), discriminator_with()
    z, real = torch.randn(16, NOISE), torch.randn(16, 4)
    with half_precision():
        scores = one_measurement(generator, discriminator, z, real)
    with torch.no_grad(), half_precision():
        expected = [discriminator(real).float().mean(), discriminator(generator(z)).float().mean()]
        assert discriminator(real).dtype == torch.bfloat16
    assert scores[:3].tolist() == [value.item() for value in (*expected, expected[1])]
    assert scores[:2].tolist() != one_measurement(generator, discriminator, z, real)[:2].tolist()


def test_scores_are_made_in_the_precision_of_each_network_alone():
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(NOISE, 4), nn.Linear(4, 1)
    probe = BalanceProbe(generator, discriminator)
    probe.watching = True
    z, real = torch.randn(16, NOISE), torch.randn(16, 4)
    with half_precision():
        fake = generator(z)
        with torch.autocast("cpu", enabled=False):
            discriminator(fake.float())
        probe.before_update([])
        scores = probe.after_update(real)
    with torch.no_grad():
        assert scores[0] == discriminator(real).mean()
        assert scores[1] == scores[2] == discriminator(fake.float()).mean()


def test_the_new_score_is_not_made_from_weights_cached_before_the_update():
    # Inside autocast torch keeps the half precision copies of weights until the outermost context ends.
    generator, discriminator = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    nn.init.constant_(generator.weight, 2)
    nn.init.constant_(discriminator.weight, 1)
    optimizer = torch.optim.SGD(generator.parameters(), 0.5)
    probe = BalanceProbe(generator, discriminator)
    probe.watching = True
    with half_precision():  # the whole training step in it
        (-discriminator(generator(torch.ones(1, 1)))).float().mean().backward()
        probe.before_update(generator.parameters())
        optimizer.step()
        assert probe.after_update(torch.tensor([[3.0, 5.0]]))[:3].tolist() == [8.0, 4.0, 5.0]
        assert torch.is_autocast_cache_enabled()


# ---- updates that do not happen, calls that are not seen ---------------------------------------------------------


def watched():
    generator, discriminator = LinearGenerator(), LinearDiscriminator()
    probe = BalanceProbe(generator, discriminator)
    probe.watching = True
    return generator, discriminator, probe


def test_an_update_that_was_skipped_is_not_measured():
    # As when a gradient scaler finds an overflow: the step begins, the update does not come.
    generator, discriminator, probe = watched()
    discriminator(generator(drawn(BATCH, NOISE, seed=1)))
    probe.before_update(generator.parameters())
    z, real = drawn(BATCH, NOISE, seed=3), drawn(BATCH, PIXELS, seed=4)
    discriminator(generator(z))
    probe.before_update(generator.parameters())
    expected = [discriminator.by_hand(real), discriminator.by_hand(generator.by_hand(z))]
    with torch.no_grad():
        generator.linear.bias += 1
    expected.append(discriminator.by_hand(generator.by_hand(z)))
    assert probe.after_update(real)[:3].tolist() == [value.item() for value in expected]


@pytest.mark.parametrize("both", [True, False])
def test_the_discriminator_that_scores_is_the_one_before_the_update(both):
    generator, discriminator, probe = watched()
    z, real = drawn(BATCH, NOISE, seed=3), drawn(BATCH, PIXELS, seed=4)
    discriminator(generator(z))
    probe.before_update([*generator.parameters(), *discriminator.parameters()])
    expected = [discriminator.by_hand(real), discriminator.by_hand(generator.by_hand(z))]
    with torch.no_grad():
        generator.linear.bias += 1
        expected.append(discriminator.by_hand(generator.by_hand(z)))
        discriminator.linear.weight.mul_(4 if both else 1)  # one step of one optimizer updates both
    updated = [value.clone() for value in (*generator.parameters(), *discriminator.parameters())]
    assert probe.after_update(real)[:3].tolist() == [value.item() for value in expected]
    now = [*generator.parameters(), *discriminator.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(now, updated, strict=True))


@pytest.mark.parametrize(("a", "b"), [(2, -1), (-1, 0), (1, 0.5), (127.5, 127.5)])
@pytest.mark.parametrize("order", ["discriminator first", "generator first"])
def test_images_that_the_training_step_rescales_are_not_scored_as_they_come(order, a, b):
    generator, discriminator, probe = watched()
    real = torch.rand(8, PIXELS).double()
    if order == "discriminator first":
        discriminator(a * real + b)
        discriminator(generator(drawn(BATCH, NOISE)))
        with pytest.raises(RuntimeError, match="changes the values of the batch's images"):
            probe.after_update(real)
    else:
        discriminator(generator(drawn(BATCH, NOISE)))
        probe.after_update(real)
        assert not probe.checked
        discriminator(a * real + b)
        with pytest.raises(RuntimeError, match="changes the values of the batch's images"):
            probe.check(real)


def test_the_check_waits_for_real_images():
    generator, discriminator, probe = watched()
    real = torch.rand(8, PIXELS).double()
    discriminator(generator(drawn(8, NOISE)))
    probe.after_update(real)
    probe.check(real)
    assert not probe.checked
    discriminator(2 * real)  # in the next batch
    with pytest.raises(RuntimeError, match="changes the values of the batch's images"):
        probe.check(real)


class WritesIntoItsArgument(LinearDiscriminator):
    def forward(self, x, labels=None):
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("order", ["discriminator first", "generator first"])
def test_arguments_that_a_network_writes_into_are_those_before_the_call(order):
    class Generator(LinearGenerator):
        def forward(self, z, labels=None):
            return super().forward(z.mul_(2))

    generator, discriminator = Generator(), WritesIntoItsArgument()
    probe = BalanceProbe(generator, discriminator)
    probe.watching = True
    z, real = drawn(BATCH, NOISE, seed=3), drawn(BATCH, PIXELS, seed=4)
    expected = [discriminator.by_hand(2 * real), discriminator.by_hand(2 * generator.by_hand(2 * z))]
    batch, noise = real.clone(), z.clone()
    if order == "discriminator first":
        discriminator(real.clone())
    discriminator(generator(noise).clone())
    probe.before_update(generator.parameters())
    with torch.no_grad():
        generator.linear.bias += 1
    expected.append(discriminator.by_hand(2 * generator.by_hand(2 * z)))
    assert probe.after_update(batch)[:3].tolist() == [value.item() for value in expected]
    assert torch.equal(batch, real)


def test_a_generator_that_hardly_changes_its_input_is_no_mistake():
    class Residual(LinearGenerator):
        def forward(self, x):
            return 1.01 * x + 0.001 * torch.ones(1).double() * self.linear.bias

    generator, discriminator = Residual(), LinearDiscriminator()
    probe = BalanceProbe(generator, discriminator, real="target")
    probe.watching = True
    batch = {"input": torch.rand(8, PIXELS).double(), "target": torch.rand(8, PIXELS).double()}
    batch["target"] = batch["input"].clone()
    discriminator(generator(batch["input"]))
    probe.after_update(batch)
    probe.check(batch)


def test_a_copy_of_the_generator_is_not_the_generator():
    # An average of the generator, or a copy to evaluate, made while it is measured.
    generator, discriminator, probe = watched()
    z, real = drawn(BATCH, NOISE, seed=1), drawn(BATCH, PIXELS, seed=2)
    discriminator(generator(z))
    copy.deepcopy(generator)(drawn(BATCH, NOISE, seed=5))
    fake = discriminator.by_hand(generator.by_hand(z)).item()
    assert probe.after_update(real)[:3].tolist() == [discriminator.by_hand(real).item(), fake, fake]


# ---- watching, and leaving ----------------------------------------------------------------------------------------


def test_only_calls_while_watching_are_measured():
    generator, discriminator, probe = watched()
    z, real = drawn(BATCH, NOISE, seed=1), drawn(BATCH, PIXELS, seed=2)
    discriminator(generator(z))
    probe.watching = False
    discriminator(generator(drawn(BATCH, NOISE, seed=5)))
    probe.watching = True
    fake = discriminator.by_hand(generator.by_hand(z)).item()
    assert probe.after_update(real)[:3].tolist() == [discriminator.by_hand(real).item(), fake, fake]


def test_a_probe_that_was_removed_measures_nothing():
    generator, discriminator, probe = watched()
    probe.remove()
    discriminator(generator(drawn(BATCH, NOISE)))
    assert probe.after_update(drawn(BATCH, PIXELS)) is None
    assert not probe.used


def test_a_module_that_gives_scores_itself_is_not_watched():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator, self.discriminator = LinearGenerator(), LinearDiscriminator()

        def balance_scores(self, batch):
            fake = self.generator(drawn(BATCH, NOISE, seed=1))
            return self.discriminator(batch), self.discriminator(fake)

    module = Module()
    probe = BalanceProbe(module.generator, module.discriminator, module=module)
    assert probe.checked
    assert not probe.watching
    assert not module.generator._forward_hooks
    real, z = drawn(BATCH, PIXELS, seed=2), drawn(BATCH, NOISE, seed=1)
    probe.watching = True
    assert probe.after_update(real) is None  # while the discriminator is not used
    module.discriminator.linear.bias.grad = torch.ones(1).double()
    probe.before_update(module.generator.parameters())
    expected = [module.discriminator.by_hand(real), module.discriminator.by_hand(module.generator.by_hand(z))]
    with torch.no_grad():
        module.generator.linear.bias += 1
    expected.append(module.discriminator.by_hand(module.generator.by_hand(z)))
    assert probe.after_update(real)[:3].tolist() == [value.item() for value in expected]
