"""Sparse training in a loop without a Trainer."""

import copy
import warnings
from contextlib import suppress

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import seed_everything
from test_resume import METHODS
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel
from torch.optim import SGD, Adam
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import (
    DynamicSparsityCallback,
    GeneratorEMA,
    SparseLoop,
    random_states,
    set_random_states,
    sparsify,
)
from lightning_ddst.sparsity.averaging import WeightAverage

SETTINGS = {"generator_density": 0.3, "interval": 5, "explore_interval": 4, "bounds": (0.2, 0.3), "delta": 0.1}


def settings_of(method):
    given = SETTINGS | METHODS[method]
    if given["method"] in ("static", "sdst", "posthoc", "imp", "ramp"):
        given = {name: value for name, value in given.items() if name not in ("bounds", "delta")}
    return given


class PlainLoop:
    """The training of `ToyGAN`, without Lightning."""

    def __init__(self, batches=20, **settings):
        seed_everything(0, verbose=False)
        gan = ToyGAN()
        self.generator, self.discriminator = gan.networks()
        self.optimizers = gan.configure_optimizers()
        self.data = toy_data(batches)
        self.logged = []
        settings = {"length": batches, "log": self.log, "log_every": 2} | settings
        self.sparse = sparsify(self.generator, self.discriminator, self.optimizers, **settings)

    def log(self, values, update):
        self.logged.append((update, values))

    def train(self, start=0, end=None):
        if start == 0:
            seed_everything(1, verbose=False)
        with torch.random.fork_rng():  # loaders draw a seed
            batches = list(self.data)
        for batch in batches[start:end]:
            with self.sparse.step(batch):
                self.step(*batch)
        return self

    def step(self, real):
        generator_optimizer, discriminator_optimizer = self.optimizers
        fake = self.generator(torch.randn(len(real), LATENT)).detach()
        loss = F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean()
        discriminator_optimizer.zero_grad()
        loss.backward()
        discriminator_optimizer.step()
        loss = -self.discriminator(self.generator(torch.randn(len(real), LATENT))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()

    def save(self):
        return {
            "generator": copy.deepcopy(self.generator.state_dict()),
            "discriminator": copy.deepcopy(self.discriminator.state_dict()),
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers],
            "sparse": self.sparse.state_dict(),
            "random": random_states(),
        }

    def load_networks(self, saved):
        self.generator.load_state_dict(saved["generator"])
        self.discriminator.load_state_dict(saved["discriminator"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def assert_alike(first, second):
    """Two pairs of networks and their readings are equal, bit for bit."""
    (one, readings), (other, others) = first, second
    for network, twin in zip(one, other, strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name
    for role in ("generator", "discriminator"):
        masks, twins = readings.masks(role), others.masks(role)
        assert masks.keys() == twins.keys()
        assert all(torch.equal(mask, twins[name]) for name, mask in masks.items())
    assert readings.decisions == others.decisions
    assert str(readings.balance) == str(others.balance)  # NaN is not itself
    assert readings.generator_updates == others.generator_updates == 20
    assert readings.flops_ledger == others.flops_ledger


def of(loop):
    return (loop.generator, loop.discriminator), loop.sparse


# ---- the same as in a Trainer ------------------------------------------------------------------------


class Logger(GeneratorEMA):
    """Keeps what is logged; draws from the random state of a loop's start."""

    def __init__(self):
        super().__init__(0.9)
        self.logged = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:
            seed_everything(1, verbose=False)

    def record_scalars(self, values, updates):
        self.logged.append((updates, dict(values)))


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_is_the_same_as_a_trainer_with_the_callback(method):
    given = settings_of(method)
    callback, logger = DynamicSparsityCallback(**given), Logger()
    seed_everything(0, verbose=False)
    gan = ToyGAN()
    toy_trainer(callback, logger, log_every_n_steps=2).fit(gan, toy_data(20))
    example = {"example_inputs": torch.zeros(2, LATENT)} if method == "channels" else {}
    loop = PlainLoop(ema_decay=0.9, **given, **example).train()
    assert_alike((gan.networks(), callback), of(loop))
    averages = loop.sparse.averages()
    assert all(torch.equal(value, averages[name]) for name, value in logger.averages().items())
    assert str(logger.logged) == str(loop.logged)
    assert {update for update, _ in loop.logged} >= {2, 4, 20}
    if method == "ddst":
        assert {action.action for _, action in callback.decisions} >= {"grow"}


# ---- resuming ----------------------------------------------------------------------------------------


def assert_same_end(whole, resumed):
    assert_alike(of(whole), of(resumed))
    one, other = whole.sparse.averages(), resumed.sparse.averages()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for first, second in zip(whole.optimizers, resumed.optimizers, strict=True):
        states = zip(first.state.values(), second.state.values(), strict=True)
        assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in states)


@pytest.mark.parametrize(("method", "after"), [("strict", 9), ("strict", 10), ("imp", 14), ("channels", 11)])
def test_a_resumed_run_is_the_same_as_an_uninterrupted_one(tmp_path, method, after):
    given = settings_of(method) | {"ema_decay": 0.9}
    given |= {"example_inputs": torch.zeros(2, LATENT)} if method == "channels" else {}
    whole = PlainLoop(**given).train()
    torch.save(PlainLoop(**given).train(end=after).save(), tmp_path / "last.pt")
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    resumed = PlainLoop(**given)
    resumed.load_networks(saved)
    resumed.sparse.load_state_dict(saved["sparse"])
    set_random_states(saved["random"])
    resumed.train(start=after)
    assert_same_end(whole, resumed)
    assert [line for line in whole.logged if line[0] > after][-1][1].keys() == resumed.logged[-1][1].keys()
    assert str([line for line in whole.logged if line[0] > after]) == str(resumed.logged)


@pytest.mark.parametrize("order", ["networks before sparsify", "networks after the masks"])
def test_states_may_be_loaded_in_any_order(order):
    given = settings_of("strict") | {"ema_decay": 0.9}
    whole, saved = PlainLoop(**given).train(), PlainLoop(**given).train(end=9).save()
    resumed = PlainLoop(**given)
    if order == "networks before sparsify":
        resumed.sparse.close()
        resumed.load_networks(saved)
        networks = resumed.generator, resumed.discriminator
        resumed.sparse = sparsify(*networks, resumed.optimizers, length=20, seed=5, **given)  # which masks others
    resumed.sparse.load_state_dict(saved["sparse"])
    if order == "networks after the masks":
        resumed.load_networks(saved)
    set_random_states(saved["random"])
    assert_same_end(whole, resumed.train(start=9))


class Accumulating(PlainLoop):
    """Gradients of both networks add up over three batches, and are clipped."""

    calls = 0

    def step(self, real):
        self.calls += 1
        noise = torch.randn(2, len(real), LATENT)
        (self.discriminator(self.generator(noise[0]).detach()).mean() - self.discriminator(real).mean()).backward()
        generator_optimizer, discriminator_optimizer = self.optimizers
        if self.calls % 3 == 0:
            nn.utils.clip_grad_norm_(self.discriminator.parameters(), 0.1)
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()
        self.discriminator.requires_grad_(False)
        (-self.discriminator(self.generator(noise[1])).mean()).backward()
        self.discriminator.requires_grad_(True)
        if self.calls % 3 == 0:
            nn.utils.clip_grad_norm_(self.generator.parameters(), 0.1)
            generator_optimizer.step()
            generator_optimizer.zero_grad()


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_gradients_that_wait_for_a_step_are_resumed(growth):
    given = SETTINGS | {"interval": 4, "explore_interval": 1, "growth": growth, "ema_decay": 0.9}
    whole, killed, resumed = (Accumulating(60, **given, length=20) for _ in range(3))
    whole.train()
    saved = killed.train(end=20).save()
    resumed.load_networks(saved)
    resumed.sparse.load_state_dict(saved["sparse"])
    resumed.calls = 20
    set_random_states(saved["random"])
    assert_same_end(whole, resumed.train(start=20))


def test_a_state_of_another_run_is_rejected():
    saved = PlainLoop(**SETTINGS).train(end=2).sparse.state_dict()
    loop = PlainLoop(**SETTINGS | {"generator_density": 0.4})
    with pytest.raises(ValueError, match=r"generator_density=0.4: .*generator_density=0.3"):
        loop.sparse.load_state_dict(saved)
    loop = PlainLoop(method="static", generator_density=0.3)
    with pytest.raises(ValueError, match=r'method="ddst".*method="static"'):
        loop.sparse.load_state_dict(saved)
    assert loop.train().sparse.generator_density == pytest.approx(0.3, abs=1e-2)


# ---- Fabric ------------------------------------------------------------------------------------------


class FabricLoop(PlainLoop):
    """The same training in the style of Fabric."""

    def __init__(self, fabric=None, **settings):
        seed_everything(0, verbose=False)
        self.fabric = fabric or Fabric(accelerator="cpu", devices=1)
        gan = ToyGAN()
        self.generator, self.discriminator = gan.networks()
        wrapped = [self.fabric.setup(*each) for each in zip(gan.networks(), gan.configure_optimizers(), strict=True)]
        (self.wrapped_generator, first), (self.wrapped_discriminator, second) = wrapped
        self.optimizers = [first, second]
        self.data = self.fabric.setup_dataloaders(toy_data(20))
        self.sparse = sparsify(
            self.wrapped_generator, self.wrapped_discriminator, self.optimizers, **{"length": 20} | settings
        )

    def step(self, real):
        generator, discriminator = self.wrapped_generator, self.wrapped_discriminator
        generator_optimizer, discriminator_optimizer = self.optimizers
        fake = generator(torch.randn(len(real), LATENT)).detach()
        loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()
        discriminator_optimizer.zero_grad()
        self.fabric.backward(loss)
        discriminator_optimizer.step()
        loss = -discriminator(generator(torch.randn(len(real), LATENT))).mean()
        generator_optimizer.zero_grad()
        self.fabric.backward(loss)
        generator_optimizer.step()

    def state(self):
        return {
            "generator": self.wrapped_generator,
            "discriminator": self.wrapped_discriminator,
            "generator_optimizer": self.optimizers[0],
            "discriminator_optimizer": self.optimizers[1],
            "sparse": self.sparse,
        }


def test_fabric_trains_as_a_plain_loop_and_saves_and_loads_the_masks(tmp_path):
    whole = PlainLoop(ema_decay=0.9, **SETTINGS).train()
    assert_same_end(whole, FabricLoop(ema_decay=0.9, **SETTINGS).train())
    killed = FabricLoop(ema_decay=0.9, **SETTINGS).train(end=9)
    killed.fabric.save(tmp_path / "last.ckpt", killed.state())
    random = random_states()
    resumed = FabricLoop(ema_decay=0.9, **SETTINGS)
    resumed.fabric.load(tmp_path / "last.ckpt", resumed.state())
    set_random_states(random)
    assert_same_end(whole, resumed.train(start=9))


class HalfPrecision(FabricLoop):
    """Keeps the generator's gradients as growth sees them."""

    def step(self, real):
        super().step(real)
        self.scores = self.sparse.balance


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_fabrics_half_precision(precision):
    loop = FabricLoop(Fabric(accelerator="cpu", devices=1, precision=precision), **SETTINGS)
    loop.data = [[batch[0].to(next(loop.generator.parameters()).dtype)] for batch in loop.data]
    loop.train()
    assert loop.sparse.generator_updates == 20
    assert loop.sparse.balance_ratio is not None
    for name, mask in loop.sparse.masks("generator").items():
        weight = loop.generator.get_parameter(name.removeprefix("generator."))
        assert not weight[~mask].any()


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_a_loss_scale_does_not_change_what_grows(growth):
    class Scaled(PlainLoop):
        def step(self, real):
            for optimizer, loss in ((self.optimizers[1], self.loss_of_d), (self.optimizers[0], self.loss_of_g)):
                optimizer.zero_grad()
                value = loss(real)
                (self.scaler.scale(value) if self.scaler else value).backward()
                if self.scaler:
                    self.scaler.step(optimizer)
                else:
                    optimizer.step()
            if self.scaler:
                self.scaler.update()

        def loss_of_d(self, real):
            fake = self.generator(torch.randn(len(real), LATENT)).detach()
            return F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean()

        def loss_of_g(self, real):
            return -self.discriminator(self.generator(torch.randn(len(real), LATENT))).mean()

    # Powers of 2 change no digit; the scale doubles every third step.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_factor=2.0, growth_interval=3)
    plain, scaled = Scaled(growth=growth, **SETTINGS), Scaled(growth=growth, scaler=scaler, **SETTINGS)
    plain.scaler, scaled.scaler = None, scaler
    assert_alike(of(plain.train()), of(scaled.train()))
    assert scaler.get_scale() == 2.0**16
