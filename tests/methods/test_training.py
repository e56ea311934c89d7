"""Every generator update of a tiny GAN that is trained by hand, without Lightning."""

import io
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ddst.balance import Balance, BalanceProbe, BalanceWindow, Controller, Decision, DensityController
from lightning_ddst.methods import DropFractionSchedule, Explore, Plan, Resize, ResizeByBalance, SparseTraining
from lightning_ddst.sparsity import MaskedNetwork

NOISE, PIXELS = 3, 6


def make_generator():
    return nn.Sequential(nn.Linear(NOISE, 20), nn.LeakyReLU(0.2), nn.Linear(20, PIXELS))  # 60 + 120 weights


def make_discriminator():
    return nn.Sequential(nn.Linear(PIXELS, 10), nn.LeakyReLU(0.2), nn.Linear(10, 4))  # 60 + 40 = 100 weights


class Recorded(MaskedNetwork):
    """Also remembers the rate of every exploration, and how many weights it replaced."""

    def __init__(self, *args, **kwargs):
        self.explorations = []
        super().__init__(*args, **kwargs)

    def explore(self, rate, gradients=None):
        number = super().explore(rate, gradients)
        self.explorations.append((rate, number))
        return number


class Gan:
    """A GAN under sparse training; `saved` is what `save` gave for another one."""

    def __init__(
        self,
        plan,
        *,
        densities=(0.5, 0.5),
        explores=True,
        controller="default",
        measured=True,
        growth="gradient",
        exploration=None,
        discriminator=make_discriminator,
        seed=0,
        saved=None,
    ):
        torch.manual_seed(seed)
        self.modules = [make_generator(), discriminator()]
        self.optimizers = [torch.optim.Adam(module.parameters(), 0.01, betas=(0.0, 0.9)) for module in self.modules]
        if saved is not None:
            for module, state in zip(self.modules, saved["modules"], strict=True):
                module.load_state_dict(state)
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        self.generator, self.discriminator = (
            Recorded(module, density, growth=growth, seed=seed, state=saved and saved["networks"][i])
            for i, (module, density) in enumerate(zip(self.modules, densities, strict=True))
        )
        schedule = exploration or DropFractionSchedule()
        updates = [Explore("generator", schedule)] if explores else []
        if controller is not None:
            resize = ResizeByBalance if measured else Resize
            updates.insert(0, resize(DensityController() if controller == "default" else controller, schedule))
        self.training = SparseTraining(
            self.generator,
            self.discriminator,
            self.optimizers,
            updates,
            probe=BalanceProbe(*self.modules) if measured else None,
            plan=plan,
        )
        if saved is not None:
            self.training.load_state_dict(saved["training"])
            torch.set_rng_state(saved["rng"])

    def save(self):
        """Everything, as it comes back from a file."""
        state = {
            "modules": [module.state_dict() for module in self.modules],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "networks": [network.state_dict() for network in (self.generator, self.discriminator)],
            "training": self.training.state_dict(),
            "rng": torch.get_rng_state(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    # ---- training steps ------------------------------------------------------------------------

    def discriminator_loss(self, real, fake):
        discriminator = self.modules[1]
        return F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()

    def step_discriminator(self, loss):
        self.optimizers[1].zero_grad()
        loss.backward()
        self.optimizers[1].step()

    def step_generator(self, loss, real):
        self.optimizers[0].zero_grad()
        loss.backward()
        self.training.before_step(self.optimizers[0])
        self.optimizers[0].step()
        self.training.after_step(self.optimizers[0], real)

    def batch(self):
        return 0.5 * torch.randn(16, PIXELS) + 1, torch.randn(16, NOISE)

    def step(self):
        """One discriminator update and one generator update."""
        real, z = self.batch()
        fake = self.modules[0](z)
        self.step_discriminator(self.discriminator_loss(real, fake.detach()))
        self.step_generator(-self.modules[1](fake).mean(), real)

    def train(self, updates):
        for _ in range(updates):
            self.step()
        return self

    # ---- what is looked at ---------------------------------------------------------------------

    def masks(self):
        """A copy of both networks' masks, each as one tensor."""
        return [
            torch.cat([mask.flatten() for mask in network.masks.values()])
            for network in (self.generator, self.discriminator)
        ]

    def weights(self):
        """Both networks' maskable weights, each as one tensor, in the order of `masks`."""
        return [
            torch.cat([weight.parameter.detach().flatten() for weight in network.weights.values()])
            for network in (self.generator, self.discriminator)
        ]

    def changes(self, updates):
        """The generator updates at which the generator explored, and after which the discriminator's mask was another.

        (An exploration may grow what it pruned, so it does not always change the mask; nothing else may.)
        """
        explored, changed = [], []
        for _ in range(updates):
            before, explorations = self.masks(), len(self.generator.explorations)
            self.step()
            same = [torch.equal(old, new) for old, new in zip(before, self.masks(), strict=True)]
            if len(self.generator.explorations) > explorations:
                explored.append(self.training.updates)
            else:
                assert same[0]
            if not same[1]:
                changed.append(self.training.updates)
        return explored, changed

    def decided(self):
        return [(update, decision.action, decision.density) for update, decision in self.training.decisions]


class Scripted(BalanceWindow):
    """Returns scripted ratios, one per reading (None is undecided), whatever was measured."""

    def __init__(self, ratios):
        super().__init__(1)
        self.ratios = list(ratios)

    def read(self):
        ratio = self.ratios.pop(0)
        if ratio is None:
            return Balance(None, -0.1, 0.2, 0.0, 0.1, 1, "alpha = -0.1 +- 0.3")
        return Balance(ratio, 1.0, ratio, 1.0, 0.0, 1, "")


HIGH, LOW, WITHIN = 0.9, 0.1, 0.5


def scripted(ratios, plan, **options):
    gan = Gan(plan, **options)
    gan.training.window = Scripted(ratios)
    return gan


# ---- when things happen -----------------------------------------------------------------------------


@pytest.mark.parametrize("growth", ["gradient", "random", "momentum"])
@pytest.mark.parametrize("interval", [1, 4])
def test_the_generator_is_explored_at_multiples_of_the_interval(interval, growth):
    gan = Gan(Plan(100, interval, 1), densities=(0.3, 0.3), growth=growth)
    start = gan.masks()[0]
    assert gan.changes(13) == (list(range(interval, 14, interval)), [])
    assert not torch.equal(gan.masks()[0], start)
    assert gan.discriminator.explorations == []


@pytest.mark.parametrize("interval", [1, 5])
def test_decisions_come_at_multiples_of_the_interval(interval):
    gan = scripted([HIGH, LOW] * 8, Plan(interval, 100, 1))
    due = list(range(interval, 14, interval))
    assert gan.changes(13) == ([], due)
    assert [update for update, *_ in gan.decided()] == due


def test_both_may_fall_on_the_same_update():
    gan = scripted([HIGH, HIGH], Plan(4, 2, 1))
    assert gan.changes(9) == ([2, 4, 6, 8], [4, 8])


@pytest.mark.parametrize(("probe_interval", "expected"), [(1, 11), (2, 5), (3, 3), (11, 1), (12, 0)])
def test_measurements_come_at_multiples_of_the_interval(probe_interval, expected):
    gan = Gan(Plan(1000, 1000, probe_interval))
    for update in range(1, 12):
        gan.step()
        assert gan.training.measurements == update // probe_interval
    assert gan.training.measurements == gan.training.window.read().samples == expected
    assert gan.training.updates == 11


def test_the_window_holds_what_was_measured_between_decisions():
    gan = Gan(Plan(6, 100, 2))
    expected = []

    def score(images):
        with torch.no_grad():
            hidden = F.leaky_relu(F.linear(images, gan.modules[1][0].weight, gan.modules[1][0].bias), 0.2)
            return F.linear(hidden, gan.modules[1][2].weight, gan.modules[1][2].bias).double().mean().item()

    def generated(z):
        with torch.no_grad():
            hidden = F.leaky_relu(F.linear(z, gan.modules[0][0].weight, gan.modules[0][0].bias), 0.2)
            return F.linear(hidden, gan.modules[0][2].weight, gan.modules[0][2].bias)

    for update in range(1, 7):
        real, z = gan.batch()
        fake = gan.modules[0](z)
        gan.step_discriminator(gan.discriminator_loss(real, fake.detach()))
        loss = -gan.modules[1](fake).mean()
        scores = [score(real), score(generated(z))]
        gan.optimizers[0].zero_grad()
        loss.backward()
        gan.training.before_step(gan.optimizers[0])
        gan.optimizers[0].step()
        scores.append(score(generated(z)))  # the sixth update's decision comes after this
        gan.training.after_step(gan.optimizers[0], real)
        if update % 2 == 0:
            expected.append(scores)
    balance = gan.training.window.read()
    real, old, new = torch.tensor(expected).double().mean(0).tolist()
    assert balance.samples == 3
    assert (balance.real, balance.fake) == pytest.approx((real, old), abs=1e-6)
    assert (balance.alpha, balance.beta) == pytest.approx((real - old, new - old), abs=1e-6)
    # The decision is made from the window with the sixth update's measurement in it.
    decision = DensityController().decide(balance, 0.5)
    assert gan.training.decisions == [(6, decision)]


def test_a_plan_that_is_not_known_yet_lets_nothing_happen():
    gan = Gan(Plan(probe_interval=1))
    assert gan.changes(12) == ([], [])
    assert gan.decided() == []
    assert gan.training.measurements == 12
    assert gan.training.window.read().samples == 10  # a few, while the interval is not known


def test_a_plan_that_becomes_known_is_followed():
    gan = scripted([HIGH, HIGH], Plan(probe_interval=1))
    assert gan.changes(2) == ([], [])
    gan.training.schedule(Plan(5, 3, 1))
    assert gan.changes(8) == ([3, 6, 9], [5, 10])
    assert [update for update, *_ in gan.decided()] == [5, 10]


def test_the_window_follows_the_plan_and_keeps_the_last_measurements():
    gan = Gan(Plan(probe_interval=1)).train(12)
    assert gan.training.window.read().samples == 10
    gan.training.schedule(Plan(100, 100, 2))
    gan.train(4)  # two of them are measured
    assert gan.training.window.read().samples == 12
    gan.training.schedule(Plan(6, 100, 2))
    assert gan.training.window.read().samples == 3
    assert gan.training.measurements == 14


@pytest.mark.parametrize(
    ("plan", "window"),
    [(Plan(1000, 500, 10), 100), (Plan(7, 5, 2), 3), (Plan(5, 5, 10), 1), (Plan(), 10), (Plan(200), 200)],
)
def test_the_window_spans_the_interval(plan, window):
    assert plan.window == window


def test_the_share_explored_falls_over_the_run():
    # 0.4 (1 + cos(pi t)) / 2 at t = 1/4, 1/2, 3/4, 1
    gan = Gan(
        Plan(100, 2, None, updates=8), exploration=DropFractionSchedule(0.4, "cosine"), controller=None, measured=False
    )
    gan.train(8)
    rates, numbers = zip(*gan.generator.explorations, strict=True)
    assert rates == pytest.approx([0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5)), 0.0])
    assert numbers == (30, 18, 5, 0)  # of 90 active weights: 30.7, 18 and 5.3, rounded down


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.0, 0.5),
        ("cosine", 0.5, 0.25),
        ("cosine", 1.0, 0.0),
        ("cosine", 1.2, 0.0),
        ("linear", 0.25, 0.375),
        ("constant", 0.99, 0.5),
    ],
)
def test_exploration_rates_by_hand(schedule, progress, expected):
    assert DropFractionSchedule(0.5, schedule).at(progress) == pytest.approx(expected)


# ---- counts and densities ---------------------------------------------------------------------------


def test_counts_equal_targets_after_every_update():
    # A step of 0.07 from 0.3 to the limits 0.11 and 0.93, with 100 weights in the discriminator.
    ratios = [HIGH] * 11 + [LOW] * 14
    controller = DensityController(delta=0.07, min_density=0.11, max_density=0.93)
    gan = scripted(ratios, Plan(2, 3, 1), densities=(0.25, 0.3), controller=controller)
    for _ in range(50):
        gan.step()
        assert gan.generator.active == round(0.25 * 180)
        assert gan.discriminator.active == round(gan.discriminator.target * 100)
        for mask, weights, network in zip(gan.masks(), gan.weights(), (gan.generator, gan.discriminator), strict=True):
            assert int(mask.sum()) == network.active
            assert not weights[~mask].any()
            assert weights[mask].count_nonzero() > 0.5 * network.active
    counts = [round(density * 100) for *_, density in gan.decided()]
    assert counts == [
        37,
        44,
        51,
        58,
        65,
        72,
        79,
        86,
        93,
        93,
        93,
        86,
        79,
        72,
        65,
        58,
        51,
        44,
        37,
        30,
        23,
        16,
        11,
        11,
        11,
    ]


def test_the_discriminator_follows_a_script():
    gan = scripted([HIGH, HIGH, WITHIN, LOW, None, HIGH, LOW, LOW], Plan(2, 100, 1), densities=(0.3, 0.3))
    assert gan.discriminator.target == 0.3
    counts = []
    for _ in range(8):
        gan.train(2)
        counts.append(gan.discriminator.active)
    assert counts == [35, 40, 40, 35, 35, 40, 35, 30]
    assert gan.decided() == [
        (2, "grow", 0.35),
        (4, "grow", 0.4),
        (6, "hold", 0.4),
        (8, "prune", 0.35),
        (10, "undecided", 0.35),
        (12, "grow", 0.4),
        (14, "prune", 0.35),
        (16, "prune", 0.3),
    ]
    assert gan.discriminator.target == gan.discriminator.density == 0.3


def test_growing_only_adds_and_pruning_only_removes():
    gan = scripted([HIGH, LOW], Plan(3, 100, 1), densities=(0.3, 0.3))
    gan.train(2)
    start = gan.masks()[1]
    gan.train(1)
    grown = gan.masks()[1]
    assert int((grown & ~start).sum()) == 5
    assert not (start & ~grown).any()
    assert not gan.weights()[1][grown & ~start].any()  # they start from zero
    gan.train(3)
    pruned = gan.masks()[1]
    assert int((grown & ~pruned).sum()) == 5
    assert not (pruned & ~grown).any()


class FiftySix(nn.Sequential):
    """48 + 8 weights, so that densities are no whole numbers of them."""

    def __init__(self):
        super().__init__(nn.Linear(PIXELS, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def test_the_discriminator_grows_where_its_own_dense_gradient_is_largest():
    gan = scripted([HIGH], Plan(2, 100, 1), densities=(0.3, 0.25), discriminator=FiftySix)
    gan.train(1)
    mask = gan.masks()[1]
    real, z = gan.batch()
    fake = gan.modules[0](z)
    loss = gan.discriminator_loss(real, fake.detach())
    # Without its hooks, in a copy: the gradient of every weight, active or not.
    copy = FiftySix()
    copy.load_state_dict(gan.modules[1].state_dict())
    (F.relu(1 - copy(real)).mean() + F.relu(1 + copy(fake.detach())).mean()).backward()
    gradient = torch.cat([copy[0].weight.grad.flatten(), copy[2].weight.grad.flatten()]).abs()
    gan.step_discriminator(loss)
    gan.step_generator(-gan.modules[1](fake).mean(), real)
    expected = torch.where(mask, -1.0, gradient).topk(3).indices  # 17 weights for 14
    assert set((gan.masks()[1] & ~mask).nonzero().flatten().tolist()) == set(expected.tolist())


def test_densities_step_from_the_requested_value():
    # 0.1, 0.15, 0.2 ... of 56 weights are 5.6, 8.4, 11.2, 14: rounded only for the count, not for the next step.
    gan = scripted([HIGH, HIGH, HIGH], Plan(1, 100, 1), densities=(0.3, 0.1), discriminator=FiftySix)
    assert gan.discriminator.active == 6
    counts = []
    for _ in range(3):
        gan.train(1)
        counts.append(gan.discriminator.active)
    assert gan.decided() == [(1, "grow", 0.15), (2, "grow", 0.2), (3, "grow", 0.25)]
    assert counts == [8, 11, 14]


def test_strict_explores_at_once_where_it_starts_at_its_largest_density():
    # Of 56 weights 0.55 is 30.8, so 31 are active (0.5536), and 0.45 is 25.2, so 25 are (0.4464): neither is less
    # than the largest density, nor more.
    for density in (0.55, 0.45):
        controller = DensityController(max_density=density)
        options = {"densities": (0.3, density), "discriminator": FiftySix, "controller": controller}
        gan = scripted([HIGH], Plan(1, 100, 1), **options).train(1)
        assert gan.decided() == [(1, "explore", density)]
        gan.training.detach()  # it waits for the next update to count operations


def test_strict_explores_the_discriminator_at_its_largest_density():
    # Random growth does not grow what was pruned just now, or hardly: the mask changes.
    options = {"controller": DensityController(max_density=0.5), "growth": "random"}
    gan = scripted([HIGH] * 3, Plan(2, 100, 1, updates=8), densities=(0.3, 0.45), **options)
    gan.train(2)
    assert gan.decided() == [(2, "grow", 0.5)]
    for update in (4, 6):
        before = gan.masks()[1]
        gan.train(2)
        assert gan.decided()[-1] == (update, "explore", 0.5)
        assert gan.discriminator.active == 50
        assert not torch.equal(gan.masks()[1], before)
    # 0.5 (1 + cos(pi t)) / 2 at t = 1/2 and 3/4, of 50 active weights: 12.5 and 3.7.
    rates, numbers = zip(*gan.discriminator.explorations, strict=True)
    assert rates == pytest.approx([0.25, 0.25 * (1 - math.sqrt(0.5))])
    assert numbers == (12, 3)


def test_undecided_leaves_the_discriminator():
    gan = scripted([None] * 4, Plan(2, 100, 1))
    assert gan.changes(8) == ([], [])
    assert gan.decided() == [(update, "undecided", 0.5) for update in (2, 4, 6, 8)]
    assert all(decision.reason == "alpha = -0.1 +- 0.3" for _, decision in gan.training.decisions)


def test_scores_that_are_not_finite_leave_the_discriminator():
    gan = Gan(Plan(2, 100, 1))
    gan.step()
    gan.training.window.add(torch.tensor([math.nan, 0.0, 0.0, 0.0]))
    assert gan.changes(1) == ([], [])
    assert gan.decided() == [(2, "undecided", 0.5)]
    assert gan.training.decisions[0][1].reason == "a score is not finite"


def test_without_a_controller_the_discriminators_density_stays():
    gan = Gan(Plan(2, 3, 1), controller=None)
    assert gan.changes(9) == ([3, 6, 9], [])
    assert gan.training.decisions == []
    assert gan.discriminator.target == 0.5
    assert gan.training.measurements == 9


def test_without_exploration_the_generators_masks_stay():
    gan = scripted([HIGH] * 4, Plan(2, 2, 1), explores=False)
    assert gan.changes(8) == ([], [2, 4, 6, 8])


def test_a_dense_generator_does_not_explore():
    gan = scripted([HIGH] * 2, Plan(2, 2, 1), densities=(1.0, 0.5))
    assert gan.changes(4) == ([], [2, 4])
    assert gan.generator.explorations == []


def test_a_dense_discriminator_can_be_pruned():
    gan = scripted([LOW, HIGH], Plan(2, 100, 1), densities=(0.5, 1.0))
    gan.train(2)
    assert gan.discriminator.active == 95
    for _ in range(2):
        gan.train(1)
        mask, weights = gan.masks()[1], gan.weights()[1]
        assert not weights[~mask].any()
    assert gan.discriminator.active == 100


def test_nothing_is_measured_without_a_probe():
    gan = Gan(Plan(4, 2, 1), controller=None, measured=False).train(5)
    assert gan.training.measurements == 0
    assert gan.training.window.read().samples == 0


def test_a_weight_without_operations_is_one_warning_that_names_it():
    class Summed(nn.Linear):
        def forward(self, x):
            return x + self.weight.sum()

    gan = Gan(
        Plan(4, 2, 1), discriminator=lambda: nn.Sequential(nn.Linear(PIXELS, 10), Summed(10, 10), nn.Linear(10, 1))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gan.train(5)
    (message,) = [str(each.message) for each in caught if "operations" in str(each.message)]
    assert "'1.weight'" in message
    assert "'0.weight'" not in message
    assert gan.training.flops.layers[1]["1.weight"].dense == 0


@pytest.mark.parametrize("order", ["as usual", "losses first"])
def test_operations_of_every_update_by_hand(order):
    gan = (Gan if order == "as usual" else BothLossesFirst)(
        Plan(4, 2, 1), controller=None, explores=False, measured=False
    )
    gan.train(6)
    sizes = [network.total for network in (gan.generator, gan.discriminator)]
    first = [next(iter(network.masks.values())).numel() for network in (gan.generator, gan.discriminator)]
    # 16 images. The generator runs forward once and backward for its weights, and for the inputs of its last layer. The
    # discriminator runs forward on real and generated images, and backward for its weights and its last layer's inputs;
    # then the same for the generator, with gradients of its first layer's inputs.
    uses = [3 * sizes[0] - first[0], 2 * (3 * sizes[1] - first[1]) + 3 * sizes[1]]
    # Where losses come first, the last backward pass of the discriminator belongs to the next update.
    later = 2 * (2 * sizes[1] - first[1]) if order == "losses first" else 0
    assert gan.training.flops.total.dense == 2 * 16 * (6 * sum(uses) - later)


def test_measuring_changes_nothing():
    measured = Gan(Plan(4, 2, 1), controller=None).train(10)
    not_measured = Gan(Plan(4, 2, 1), controller=None, measured=False).train(10)
    assert measured.training.measurements == 10
    assert measured.training.flops.total.dense == not_measured.training.flops.total.dense
    # A measurement has a forward pass of the generator and 2 of the discriminator (the old generator's score is
    # training's own), with 16 images each and 2 operations for each of their 90 and 50 active weights:
    # 2 * 16 * (90 + 2 * 50) = 6,080.
    assert measured.training.flops.total.sparse - not_measured.training.flops.total.sparse == 10 * 6_080
    for one, other in zip(
        measured.masks() + measured.weights(), not_measured.masks() + not_measured.weights(), strict=True
    ):
        assert torch.equal(one, other)


def test_the_error_names_a_weight_that_no_optimizer_updates():
    modules = [make_generator(), make_discriminator()]
    networks = [MaskedNetwork(module, 0.5) for module in modules]
    optimizers = [torch.optim.SGD(modules[0].parameters(), 0.1), torch.optim.SGD(modules[1][2].parameters(), 0.1)]
    with pytest.raises(ValueError, match=r"no optimizer updates '0\.weight' \(1 of 2"):
        SparseTraining(*networks, optimizers, [Explore("generator", DropFractionSchedule())])


def test_only_the_generators_optimizers_make_generator_updates():
    gan = Gan(Plan())
    assert gan.training.generator_optimizers == [gan.optimizers[0]]


# ---- other orders of training ---------------------------------------------------------------------------


class GeneratorFirst(Gan):
    def step(self):
        real, z = self.batch()
        self.step_generator(-self.modules[1](self.modules[0](z)).mean(), real)
        with torch.no_grad():
            fake = self.modules[0](torch.randn(16, NOISE))
        self.step_discriminator(self.discriminator_loss(real, fake))


class SeveralDiscriminatorSteps(Gan):
    def step(self):
        for _ in range(3):
            real, z = self.batch()
            self.step_discriminator(self.discriminator_loss(real, self.modules[0](z).detach()))
        self.step_generator(-self.modules[1](self.modules[0](torch.randn(16, NOISE))).mean(), real)


class Toggled(Gan):
    """Freezes each network while the other is updated, as Lightning's `toggle_optimizer` does."""

    def step(self):
        real, z = self.batch()
        self.modules[0].requires_grad_(False)
        self.step_discriminator(self.discriminator_loss(real, self.modules[0](z)))
        self.modules[0].requires_grad_(True)
        self.modules[1].requires_grad_(False)
        self.step_generator(-self.modules[1](self.modules[0](z)).mean(), real)
        self.modules[1].requires_grad_(True)


class BothLossesFirst(Gan):
    """Computes the discriminator's loss before the generator's update, and differentiates it after."""

    def step(self):
        real, z = self.batch()
        fake = self.modules[0](z)
        loss = self.discriminator_loss(real, fake.detach())
        self.step_generator(-self.modules[1](fake).mean(), real)
        self.step_discriminator(loss)


@pytest.mark.parametrize("order", [GeneratorFirst, SeveralDiscriminatorSteps, Toggled, BothLossesFirst])
def test_any_order_of_training_steps_is_followed(order):
    gan = order(Plan(4, 3, 2), densities=(0.3, 0.3))
    gan.training.window = Scripted([HIGH, LOW, HIGH])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is postponed
        assert gan.changes(12) == ([3, 6, 9, 12], [4, 8, 12])
    assert gan.decided() == [(4, "grow", 0.35), (8, "prune", 0.3), (12, "grow", 0.35)]
    assert gan.training.measurements == 6
    assert gan.training.flops.total.dense > 0


class Normalised(nn.Sequential):
    """80 weights under both spectral norms, with BatchNorm in between."""

    def __init__(self):
        super().__init__(
            nn.utils.spectral_norm(nn.Linear(PIXELS, 10)),
            nn.BatchNorm1d(10),
            nn.LeakyReLU(0.2),
            nn.utils.parametrizations.spectral_norm(nn.Linear(10, 2)),
        )


@pytest.mark.parametrize("order", [Gan, GeneratorFirst, BothLossesFirst])
def test_a_normalised_discriminator_changes_within_any_order(order):
    gan = order(Plan(3, 2, 1), densities=(0.3, 0.5), discriminator=Normalised)
    gan.training.window = Scripted([HIGH, LOW, LOW])
    gan.train(10)
    assert gan.decided() == [(3, "grow", 0.55), (6, "prune", 0.5), (9, "prune", 0.45)]
    assert gan.discriminator.active == 36
    assert all(weights.isfinite().all() for weights in gan.weights())


# ---- what cannot be done now -----------------------------------------------------------------------------


class NotFinite(Gan):
    """The gradients of one network are NaN in some updates; its weights are kept from becoming so."""

    bad_updates = (4,)
    network = 1
    remedy = "cleaned"

    def _loss(self, loss, network):
        bad = network == self.network and self.training.updates + 1 in self.bad_updates
        if not bad:
            return loss, False
        return loss * math.nan, True

    def step_discriminator(self, loss):
        loss, bad = self._loss(loss, 1)
        self._optimize(1, loss, bad)

    def step_generator(self, loss, real):
        loss, bad = self._loss(loss, 0)
        optimizer = self.optimizers[0]
        before, after = (
            partial(self.training.before_step, optimizer),
            partial(self.training.after_step, optimizer, real),
        )
        self._optimize(0, loss, bad, before, after)

    def _optimize(self, network, loss, bad, before=None, after=None):
        self.optimizers[network].zero_grad()
        loss.backward()
        if before:
            before()
        if bad and self.remedy == "cleaned":
            for parameter in self.modules[network].parameters():
                parameter.grad.nan_to_num_(0.0)
        if not (bad and self.remedy == "skipped"):
            self.optimizers[network].step()
        if after:
            after()


@pytest.mark.parametrize("remedy", ["cleaned", "skipped"])
def test_a_decision_to_grow_waits_for_a_finite_gradient(remedy):
    gan = NotFinite(Plan(4, 100, 1), densities=(0.3, 0.3))
    gan.remedy, gan.bad_updates = remedy, (4, 5)
    gan.training.window = Scripted([HIGH] * 4)
    gan.train(3)
    for update, warned in ((4, 1), (5, 0)):  # one warning for a change that waits, which names the weight
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gan.train(1)
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == warned
        assert all(f"discriminator's mask is postponed: at generator update {update} " in each for each in messages)
        assert all("'0.weight'" in each and "dense_layers" in each for each in messages)
        assert gan.discriminator.active == 30
        assert gan.discriminator.target == 0.3
        assert gan.decided() == []
    gan.train(1)
    assert gan.decided() == [(6, "grow", 0.35)]
    assert gan.discriminator.active == 35
    gan.train(2)  # and the next one comes when it was due
    assert gan.decided() == [(6, "grow", 0.35), (8, "grow", 0.4)]


def test_a_decision_that_waits_is_made_from_the_window_as_it_is_then():
    gan = NotFinite(Plan(4, 100, 1), densities=(0.3, 0.3))
    gan.training.window = Scripted([HIGH, WITHIN])
    gan.train(3)
    with pytest.warns(UserWarning, match="postponed"):
        gan.train(1)
    gan.train(1)
    assert gan.decided() == [(5, "hold", 0.3)]


@pytest.mark.parametrize(
    ("ratio", "action", "count"), [(LOW, "prune", 25), (WITHIN, "hold", 30), (None, "undecided", 30)]
)
def test_what_needs_no_gradient_does_not_wait(ratio, action, count):
    gan = NotFinite(Plan(4, 100, 1), densities=(0.3, 0.3))
    gan.training.window = Scripted([ratio])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gan.train(4)
    assert [(update, action) for update, action, _ in gan.decided()] == [(4, action)]
    assert gan.discriminator.active == count


def test_a_mask_update_that_returns_nothing_is_rejected(monkeypatch):
    gan = Gan(Plan(4, 2, 1))
    monkeypatch.setattr(Explore, "apply", lambda self, training: None)
    gan.train(1)
    with pytest.raises(TypeError, match=r"Explore\.apply\(\) returned None; it must return True or False\."):
        gan.train(1)


@pytest.mark.parametrize("grows", [False, True])
def test_a_mask_update_that_waits_by_itself_is_named(monkeypatch, grows):
    gan = Gan(Plan(4, 2, 1))
    monkeypatch.setattr(Explore, "apply", lambda self, training: False)
    monkeypatch.setattr(Explore, "grows", grows, raising=False)
    with pytest.warns(UserWarning, match=r"Explore\.apply\(\) returned False at generator update 2") as warned:
        gan.train(4)
    assert len(warned) == 1


@pytest.mark.parametrize("state", [None, {"seen": {1, 2}}, {"deep": [object()]}])
def test_a_state_that_does_not_load_is_rejected_at_the_start(monkeypatch, state):
    monkeypatch.setattr(Explore, "state_dict", lambda self: state)
    with pytest.raises(TypeError, match=r"Explore\.state_dict\(\) returned"):
        Gan(Plan(4, 2, 1))


def test_numbers_of_numpy_in_a_state_and_in_densities_load(monkeypatch):
    state = {"number": np.float64(0.5), "list": [np.int64(3)], "tensor": torch.ones(2)}
    monkeypatch.setattr(Explore, "state_dict", lambda self: state)
    gan = Gan(Plan(4, 2, 1))
    gan.generator.resize(np.float64(0.2))
    saved = gan.save()["training"]["mask_updates"][-1]["state"]
    assert (saved["number"], saved["list"], type(saved["list"][0])) == (0.5, [3], int)


@pytest.mark.parametrize("roles", ["generator", ("gen",)])
def test_roles_are_names_of_networks(monkeypatch, roles):
    monkeypatch.setattr(Resize, "roles", roles)
    with pytest.raises(ValueError, match=r"Resize\.roles=.* must be a tuple of generator, discriminator"):
        Gan(Plan(4, 2, 1), measured=False, controller="default")


@pytest.mark.parametrize(
    ("decision", "error", "message"),
    [
        (None, TypeError, "must return a Decision"),
        (Decision("grow", 0.2, ""), ValueError, "action='grow' with density=0.2; the density is 0.3 now"),
        (Decision("prune", 0.4, ""), ValueError, "action='prune' with density=0.4; the density is 0.3 now"),
    ],
)
def test_a_decision_that_contradicts_itself_is_rejected(decision, error, message):
    class Wrong(Controller):
        def decide(self, *_):
            return decision

    gan = Gan(Plan(4, 100, 1), densities=(0.3, 0.3), controller=Wrong())
    gan.train(3)
    with pytest.raises(error, match=rf"Wrong\.decide\(\) returned .*{message}"):
        gan.train(1)


def test_random_growth_needs_no_gradient():
    gan = NotFinite(Plan(4, 100, 1), densities=(0.3, 0.3), growth="random")
    gan.training.window = Scripted([HIGH])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gan.train(4)
    assert gan.decided() == [(4, "grow", 0.35)]


def test_an_exploration_waits_for_a_finite_gradient():
    gan = NotFinite(Plan(100, 4, 1), densities=(0.3, 0.3))
    gan.network = 0
    explored, explore = [], gan.generator.explore
    gan.generator.explore = lambda *arguments: explored.append((gan.training.updates, explore(*arguments)))
    gan.train(3)
    with pytest.warns(UserWarning, match=r"generator's mask is postponed: at generator update 4 "):
        assert gan.changes(1) == ([], [])
    gan.train(7)
    assert explored == [(5, 27), (8, 27)]  # half of the 54 active weights


# ---- leaving -----------------------------------------------------------------------------------------------


def hooks(gan):
    """Every hook on modules, parameters and optimizers."""
    owners = [part for module in gan.modules for part in [*module.modules(), *module.parameters()]] + gan.optimizers
    found = []
    for owner in owners:
        for name in dir(owner) if isinstance(owner, torch.Tensor) else vars(owner):
            if name.endswith(("_hooks", "_with_kwargs", "_always_called")):
                value = getattr(owner, name)
                if isinstance(value, dict) and value:
                    found.append((type(owner).__name__, name))
    return found


@pytest.mark.parametrize("updates", [0, 1, 2, 7])
def test_detaching_leaves_no_hooks(updates):
    gan = scripted([HIGH] * 9, Plan(2, 3, 2)).train(updates)
    owners = {owner for owner, _ in hooks(gan)}
    assert {"Sequential", "Parameter", "Adam"} <= owners
    gan.training.detach()
    assert hooks(gan) == []


def test_a_detached_gan_trains_freely():
    gan = Gan(Plan(2, 3, 1)).train(3)
    gan.training.detach()
    masks = gan.masks()
    real, z = gan.batch()
    fake = gan.modules[0](z)
    gan.step_discriminator(gan.discriminator_loss(real, fake.detach()))
    assert gan.weights()[1][~masks[1]].any()
    assert gan.training.updates == 3


# ---- saving ------------------------------------------------------------------------------------------------


def assert_equal(one, other):
    assert one.decided() == other.decided()
    assert one.training.decisions == other.training.decisions
    for name in ("updates", "measurements", "plan"):
        assert getattr(one.training, name) == getattr(other.training, name)
    assert one.discriminator.target == other.discriminator.target
    assert repr(one.training.window.read()) == repr(other.training.window.read())
    assert one.training.flops.total.ratio == other.training.flops.total.ratio
    assert one.training.flops.total.sparse == other.training.flops.total.sparse
    for mine, others in zip(one.masks() + one.weights(), other.masks() + other.weights(), strict=True):
        assert torch.equal(mine, others)
    for mine, others in zip(one.modules, other.modules, strict=True):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, others.state_dict()[name])


@pytest.mark.parametrize("growth", ["gradient", "random", "momentum"])
@pytest.mark.parametrize("saved_at", [0, 1, 5, 6, 9, 12])
def test_a_resumed_run_is_the_uninterrupted_one(saved_at, growth):
    # Bounds this high have the discriminator pruned and grown in turn.
    options = {
        "densities": (0.3, 0.6),
        "growth": growth,
        "controller": DensityController(bounds=(0.02, 0.05), max_density=0.7),
        "exploration": DropFractionSchedule(0.5, "cosine"),
    }
    plan = Plan(6, 4, 2, updates=30)
    whole = Gan(plan, **options).train(saved_at)
    saved = whole.save()
    whole.train(24 - saved_at)

    # Another seed and plan: everything has to come from what was saved.
    resumed = Gan(Plan(3, 3, 1), seed=5, saved=saved, **options)
    assert resumed.training.updates == saved_at
    resumed.train(24 - saved_at)
    assert_equal(resumed, whole)
    assert [update for update, *_ in whole.decided()] == [6, 12, 18, 24]
    assert {action for _, action, _ in whole.decided()} & {"grow", "prune", "explore"}
    assert len(resumed.generator.explorations) == 6 - saved_at // 4


def test_a_run_saved_after_its_first_update_counts_the_same_operations():
    # The work of a step is measured between the first two updates, and the second one's decision changes the masks.
    options = {"densities": (0.3, 0.5), "controller": DensityController(bounds=(0, 1e-9))}
    whole = Gan(Plan(2, 100, 1), **options).train(1)
    saved = whole.save()
    whole.train(5)
    resumed = Gan(Plan(2, 100, 1), saved=saved, **options).train(5)
    assert [action for _, action, _ in whole.decided()] == ["grow"] * 3
    assert_equal(resumed, whole)


def test_saving_and_what_was_saved_are_independent_of_further_training():
    gan = Gan(Plan(4, 3, 1)).train(5)
    state = gan.training.state_dict()
    shown = repr(state)
    gan.train(8)
    assert repr(state) == shown


def test_what_was_postponed_is_made_up_for_after_resuming():
    options = {"densities": (0.3, 0.3), "controller": DensityController(bounds=(0, 1e-9))}
    runs = []
    for resumes in (False, True):
        gan = NotFinite(Plan(4, 100, 1), **options)
        gan.train(3)
        with pytest.warns(UserWarning, match="postponed"):
            gan.train(1)
        if resumes:
            gan = NotFinite(Plan(4, 100, 1), seed=3, saved=gan.save(), **options)
        runs.append(gan.train(2))
    assert [(update, action) for update, action, _ in runs[0].decided()] == [(5, "grow")]
    assert_equal(runs[1], runs[0])
