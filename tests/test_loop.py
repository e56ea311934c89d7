"""Sparse training in a loop without a Trainer."""

import copy
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DataParallelStrategy
from lightning.pytorch import seed_everything
from test_resume import METHODS
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import spectral_norm
from torch.optim import SGD, Adam
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer

from lightning_ddst import (
    DynamicSparsityCallback,
    GeneratorEMA,
    SparseLoop,
    random_states,
    set_random_states,
    sparsify,
)

SETTINGS = {"generator_density": 0.3, "interval": 5, "explore_interval": 4, "bounds": (0.2, 0.3), "delta": 0.1}


def settings_of(method):
    given = SETTINGS | METHODS[method]
    if given["method"] in ("static", "sdst", "posthoc", "imp", "ramp"):
        given = {name: value for name, value in given.items() if name not in ("bounds", "delta")}
    return given


class PlainLoop:
    """The training of `ToyGAN`, without Lightning."""

    gan = ToyGAN

    def __init__(self, batches=20, **settings):
        seed_everything(0, verbose=False)
        gan = self.gan()
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


@pytest.mark.parametrize("method", ["static", "sdst", "strict", "auto", "imp", "channels"])
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
    *logged, (last, reached) = logger.logged  # a Trainer's loggers also get the number of updates
    assert (last, reached) == (20, {"generator_updates": 20})
    assert str(logged) == str(loop.logged)
    assert {update for update, _ in loop.logged} >= {2, 4, 20}
    if method == "strict":
        assert {decision.action for _, decision in callback.decisions} >= {"grow", "explore"}


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


class OneOutputGAN(ToyGAN):
    """Spectral norm with one output: its left vector starts at -1, and the first masks make it 1, as saved."""

    def __init__(self):
        super().__init__()
        self.discriminator = nn.Sequential(spectral_norm(nn.Linear(PIXELS, 1)))
        self.discriminator[0].weight_u.fill_(-1)


class OneOutputLoop(PlainLoop):
    gan = OneOutputGAN


def test_a_loaded_tensor_that_happens_to_be_as_the_first_masks_left_it_stays():
    given = settings_of("strict") | {"ema_decay": 0.9}
    whole, killed, resumed = (OneOutputLoop(**given) for _ in range(3))
    assert resumed.discriminator[0].weight_u.tolist() == [1]
    whole.train()
    saved = killed.train(end=9).save()
    resumed.load_networks(saved)
    resumed.sparse.load_state_dict(saved["sparse"])
    assert resumed.discriminator[0].weight_u.tolist() == [1]
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
    state = loop.sparse.state_dict()
    state["networks"]["generator"]["masks"].popitem()
    with pytest.raises(ValueError, match="generator"):
        loop.sparse.load_state_dict(state)
    assert loop.train().sparse.generator_density == pytest.approx(0.3, abs=1e-2)


# ---- Fabric ------------------------------------------------------------------------------------------


class FabricLoop(PlainLoop):
    """The same training in the style of Fabric."""

    def __init__(self, fabric=None, **settings):
        seed_everything(0, verbose=False)
        self.fabric = fabric or Fabric(accelerator="cpu", devices=1)
        self.fabric.launch()
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


class Scaling(MixedPrecision):
    """Only scales the loss."""

    def forward_context(self):
        return nullcontext()

    def convert_input(self, data):
        return data


def test_fabrics_loss_scale_does_not_change_what_grows():
    def train(interval):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_factor=2.0, growth_interval=interval)
        precision = Scaling("16-mixed", "cpu", scaler)
        loop = FabricLoop(Fabric(accelerator="cpu", devices=1, plugins=precision), growth="momentum", **SETTINGS)
        return loop.train()

    assert_alike(of(train(1000)), of(train(3)))  # powers of 2 change no digit


def test_networks_in_distributed_data_parallel(tmp_path):
    whole, loop = PlainLoop(ema_decay=0.9, **SETTINGS).train(), PlainLoop(**SETTINGS)
    loop.sparse.close()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        seed_everything(0, verbose=False)
        networks = ToyGAN().networks()
        loop.optimizers = [Adam(network.parameters(), lr=1e-2, betas=(0.0, 0.9)) for network in networks]
        loop.generator, loop.discriminator = (DistributedDataParallel(network) for network in networks)
        wrapped = loop.generator, loop.discriminator
        loop.sparse = sparsify(*wrapped, loop.optimizers, length=20, ema_decay=0.9, **SETTINGS)
        loop.train()
        loop.generator, loop.discriminator = networks
    finally:
        torch.distributed.destroy_process_group()
    assert_same_end(whole, loop)


def test_a_strategy_that_copies_or_splits_networks_is_rejected():
    fabric = Fabric(accelerator="cpu", devices=1)
    networks = [fabric.setup(network) for network in ToyGAN().networks()]
    networks[0]._strategy = DataParallelStrategy()
    with pytest.raises(ValueError, match=r"DataParallelStrategy.*Fabric\(strategy=\"ddp\"\)"):
        sparsify(*networks, [], **SETTINGS)


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


# ---- networks and measurements -----------------------------------------------------------------------


def test_masks_are_there_at_once_and_close_leaves_the_networks_alone():
    loop = PlainLoop(method="static", generator_density=0.25, discriminator_density=0.5)
    with loop.sparse as sparse:
        assert isinstance(sparse, SparseLoop)
        for role, network in (("generator", loop.generator), ("discriminator", loop.discriminator)):
            masks = sparse.masks(role)
            density = {"generator": 0.25, "discriminator": 0.5}[role]
            total = sum(mask.numel() for mask in masks.values())
            assert sum(int(mask.sum()) for mask in masks.values()) == round(density * total)
            assert all(name.startswith(f"{role}.") for name in masks)
            for name, parameter in network.named_parameters():
                if (mask := masks.get(f"{role}.{name}")) is not None:
                    assert not parameter[~mask].any()
        loop.train(end=3)
        assert sparse.generator_updates == 3
    loop.step(*next(iter(loop.data)))  # dense from here on
    assert loop.generator[0].weight[~sparse.masks("generator")["generator.0.weight"]].any()
    assert sparse.generator_updates == 3
    with pytest.raises(RuntimeError, match=r"closed.*sparsify"), sparse.step([]):
        pass


def test_a_network_is_sparsified_once_at_a_time():
    loop = PlainLoop(**SETTINGS)
    with pytest.raises(ValueError, match=r"the generator is trained sparsely already"):
        sparsify(loop.generator, loop.discriminator, loop.optimizers, length=20, **SETTINGS)
    loop.sparse.close()
    sparsify(loop.generator, loop.discriminator, loop.optimizers, length=20, **SETTINGS).close()


@pytest.mark.parametrize(
    ("collect", "names"),
    [
        (list, ["0", "1"]),
        (nn.ModuleList, ["0", "1"]),
        (lambda parts: dict(zip(("mpd", "msd"), parts, strict=True)), ["mpd", "msd"]),
        (lambda parts: nn.ModuleDict(dict(zip(("mpd", "msd"), parts, strict=True))), ["mpd", "msd"]),
    ],
)
def test_several_discriminators_share_one_density_and_are_measured_together(collect, names):
    seed_everything(0, verbose=False)
    generator = nn.Linear(4, 6)
    parts = [nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))]
    optimizers = [SGD(generator.parameters(), 0.1), SGD([p for part in parts for p in part.parameters()], 0.1)]
    settings = {"generator_density": 0.5, "method": "static", "probe_interval": 1, "interval": 1}
    sparse = sparsify([generator], collect(parts), optimizers, length=2, **settings)
    z, real = torch.randn(3, 4), torch.randn(3, 6)

    def score(images):  # the mean over the parts, by calls that no hook sees
        return sum(part.forward(images).mean().item() for part in parts) / 2

    with sparse.step(real):
        expected = [score(real), score(generator.forward(z))]
        sum(part(generator(z)).mean() for part in parts).backward()
        optimizers[0].step()
        expected.append(score(generator.forward(z)))

    masks = sparse.masks("discriminator")
    assert [*masks] == [f"discriminator.{names[0]}.weight", *(f"discriminator.{names[1]}.{i}.weight" for i in (0, 2))]
    assert sum(int(mask.sum()) for mask in masks.values()) == 17  # half of 6 + 24 + 4
    assert [*sparse.masks("generator")] == ["generator.0.weight"]
    balance = sparse.balance
    assert [balance.real, balance.fake, balance.fake + balance.beta] == pytest.approx(expected)
    with pytest.raises(ValueError, match="the discriminator is trained sparsely already"):
        sparsify(nn.Linear(4, 6), parts[1], optimizers, **settings)
    sparse.close()


class Unseen(PlainLoop):
    """The generator is not called itself."""

    def __init__(self, **settings):
        super().__init__(balance_scores=self.scores, **settings)

    def scores(self, batch):
        return self.discriminator(batch[0]), self.discriminator(self.generator.forward(torch.zeros(4, LATENT)))

    def step(self, real):
        generator_optimizer, discriminator_optimizer = self.optimizers
        z = torch.zeros(4, LATENT)
        (self.discriminator(self.generator.forward(z).detach()) - self.discriminator(real)[:4]).mean().backward()
        discriminator_optimizer.step()
        discriminator_optimizer.zero_grad()
        self.generator.zero_grad()
        with torch.random.fork_rng():
            before = [scores.mean().item() for scores in self.scores([real])]
        loss = -self.discriminator(self.generator.forward(z)).mean()
        loss.backward()
        generator_optimizer.step()
        with torch.random.fork_rng():
            after = self.scores([real])[1].mean().item()
        self.expected = (after - before[1]) / (before[0] - before[1])


def test_scores_of_a_function_are_measured():
    loop = Unseen(**SETTINGS | {"interval": 1, "probe_interval": 1})
    loop.generator[1], loop.discriminator[2] = nn.Identity(), nn.Identity()  # no state of calls, and no noise
    loop.train(end=1)
    assert loop.sparse.balance_ratio == pytest.approx(loop.expected, abs=1e-4)


def test_steps_of_several_optimizers_of_the_generator_are_one_update():
    loop = PlainLoop(**SETTINGS)
    loop.sparse.close()
    first, last = (Adam(loop.generator[place].parameters(), lr=1e-2) for place in (0, 3))
    rest = Adam(loop.generator[1].parameters(), lr=1e-2)

    class All:
        def zero_grad(self):
            loop.generator.zero_grad()

        def step(self):
            first.step()
            rest.step()
            last.step()

    optimizers = [last, rest, loop.optimizers[1], first]
    loop.sparse = sparsify(loop.generator, loop.discriminator, optimizers, length=20, ema_decay=0.5, **SETTINGS)
    loop.optimizers = [All(), loop.optimizers[1]]
    assert loop.train().sparse.generator_updates == 20
    assert loop.sparse.measurements == 20
    assert loop.sparse.state_dict()["average"]["updates"] == 20


def test_a_generator_that_was_frozen_when_it_was_sparsified_is_averaged():
    loop = PlainLoop(**SETTINGS)
    loop.sparse.close()
    frozen = loop.generator.requires_grad_(False)
    loop.sparse = sparsify(frozen, loop.discriminator, loop.optimizers, length=20, ema_decay=0.5, **SETTINGS)
    frozen.requires_grad_(True)
    assert loop.train().sparse.state_dict()["average"]["updates"] == 20


def test_the_average_respects_masks_and_is_lent_to_the_generator():
    loop = PlainLoop(ema_decay=0.5, **SETTINGS).train()
    own = copy.deepcopy(loop.generator.state_dict())
    with loop.sparse.averaged():
        for name, value in loop.sparse.averages().items():
            assert torch.equal(loop.generator.state_dict()[name], value)
        for name, mask in loop.sparse.masks("generator").items():
            assert not loop.generator.get_parameter(name.removeprefix("generator."))[~mask].any()
        assert not torch.equal(loop.generator[0].weight, own["0.weight"])
    assert all(torch.equal(value, own[name]) for name, value in loop.generator.state_dict().items())
    with pytest.raises(ValueError, match="ema_decay=None"):
        PlainLoop(**SETTINGS).sparse.averages()


def test_calls_outside_a_step_are_no_training():
    whole, sampling = PlainLoop(**SETTINGS).train(), PlainLoop(**SETTINGS)
    batches = list(sampling.data)
    seed_everything(1, verbose=False)
    for batch in batches:
        with sampling.sparse.step(batch):
            sampling.step(*batch)
        with torch.no_grad(), torch.random.fork_rng():
            sampling.generator.eval()(torch.randn(50, LATENT))
            sampling.generator.train()
    assert sampling.sparse.flops_ledger == whole.sparse.flops_ledger != {}


def test_a_copy_of_the_generator_is_an_ordinary_network():
    loop = PlainLoop(**SETTINGS).train(end=3)
    twin = copy.deepcopy(loop.generator)
    loop.train(start=3)
    assert loop.sparse.generator_updates == 20
    weight = twin[0].weight
    twin(torch.randn(4, LATENT)).sum().backward()
    SGD(twin.parameters(), lr=1.0).step()
    assert weight[~loop.sparse.masks("generator")["generator.0.weight"]].any()


def test_a_run_that_breaks_down_asks_to_stop():
    loop = PlainLoop(**SETTINGS, stop_on_divergence=True)
    healthy = loop.sparse.state_dict()
    loop.generator[0].bias.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"weights of the generator.*not finite.*The run stops"):
        loop.train(end=4)
    assert loop.sparse.should_stop
    loop.sparse.load_state_dict(healthy)
    assert not loop.sparse.should_stop


# ---- errors ------------------------------------------------------------------------------------------


def test_a_step_outside_of_the_context_is_rejected_before_it_changes_a_weight():
    loop = PlainLoop(**SETTINGS)
    batch = next(iter(loop.data))
    before = copy.deepcopy(loop.discriminator.state_dict())
    with pytest.raises(RuntimeError, match=r"with sparse\.step\(batch\)"):
        loop.step(*batch)
    assert torch.equal(
        before["3.parametrizations.weight.original"], loop.discriminator[3].parametrizations.weight.original
    )
    with pytest.raises(RuntimeError, match="inside another"), loop.sparse.step(batch), loop.sparse.step(batch):
        pass
    with pytest.raises(RuntimeError, match="inside"), loop.sparse.step(batch):
        loop.sparse.load_state_dict({})


def test_a_step_that_raises_is_abandoned():
    loop, whole = PlainLoop(**SETTINGS), PlainLoop(**SETTINGS).train()
    with suppress(KeyError), loop.sparse.step(next(iter(loop.data))):
        raise KeyError
    assert_alike(of(whole), of(loop.train()))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"generator_densty": 0.1}, TypeError, "generator_densty"),
        ({}, ValueError, "generator_density is missing"),
        ({"generator_density": 2.0}, ValueError, "generator_density=2.0"),
        ({"generator_density": 0.1, "length": 0}, ValueError, "length=0"),
        ({"generator_density": 0.1, "log_every": 0}, ValueError, "log_every=0"),
        ({"generator_density": 0.1, "method": "imp", "length": None}, ValueError, r'length=None.*method="imp"'),
        ({"generator_density": 0.1, "ema_decay": 1.0}, ValueError, r"decay=1.0"),
        ({"generator_density": 0.1, "granularity": "channel"}, ValueError, "example_inputs=None"),
        ({"generator_density": 0.1, "probe_interval": None}, ValueError, "probe_interval=None"),
        ({"generator_density": 0.1, "dense_layers": ["encoder.*"]}, ValueError, r"dense_layers: 'encoder.\*'"),
    ],
)
def test_arguments_are_checked(settings, error, message):
    with pytest.raises(error, match=message) as raised:
        PlainLoop(**settings)
    assert "\n" not in str(raised.value)


def test_optimizers_and_networks_are_checked():
    generator, discriminator = ToyGAN().networks()
    first, second = (Adam(network.parameters()) for network in (generator, discriminator))
    before = copy.deepcopy([generator.state_dict(), discriminator.state_dict()])
    cases = (([first], "no optimizer updates"), ([first, second, "Adam"], "one is str"), (first, "is one Adam"))
    for optimizers, message in cases:
        with pytest.raises(ValueError, match=message):
            sparsify(generator, discriminator, optimizers, length=20, **SETTINGS)
    with pytest.raises(ValueError, match=r"decay=1\.5"):
        sparsify(generator, discriminator, [first, second], length=20, ema_decay=1.5, **SETTINGS)
    for network, message in ((DataParallel(generator), "DataParallel"), (generator.parameters(), "must be a torch.nn")):
        with pytest.raises(ValueError, match=message):
            sparsify(network, discriminator, [first, second], length=20, **SETTINGS)
    for network, values in zip((generator, discriminator), before, strict=True):  # errors leave nothing behind
        assert all(torch.equal(value, values[name]) for name, value in network.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    sparsify(generator, discriminator, [first, second], length=20, **SETTINGS)


def test_an_unknown_length_keeps_the_exploration_rate_with_a_warning():
    with pytest.warns(UserWarning, match="length=None"):
        loop = PlainLoop(length=None, generator_density=0.3)
    assert (loop.sparse.plan.interval, loop.sparse.plan.explore_interval) == (1000, 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PlainLoop(length=None, generator_density=0.3, method="static")


def test_weights_that_something_else_writes_are_noticed():
    loop = PlainLoop(**SETTINGS)
    loop.generator[0].weight.data.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"inactive weights of the generator: 0\.weight"):
        loop.train(end=1)


def test_layers_that_are_added_in_a_short_run_are_told_of_at_its_end():
    loop = PlainLoop(**SETTINGS)
    loop.train(end=2)
    loop.generator.append(nn.Linear(PIXELS, PIXELS))
    loop.train(start=2)
    with pytest.warns(UserWarning, match=r"weights that came since it was masked .*: generator\.4\.weight"):
        loop.sparse.close()


def test_the_scores_must_be_found():
    loop = PlainLoop(**SETTINGS)
    with pytest.raises(RuntimeError, match="balance ratio cannot be measured"), loop.sparse.step([]):
        loop.step(torch.randn(8, PIXELS))


def test_a_step_of_an_optimizer_that_was_not_given_is_rejected():
    loop = PlainLoop(**SETTINGS).train(end=3)
    loop.optimizers[0] = Adam(loop.generator.parameters(), lr=1e-2)
    with pytest.raises(
        RuntimeError, match=r"'generator\.0\.weight' was updated in step\(batch\) by Adam, .* not given"
    ):
        loop.train(start=3, end=4)


def test_weights_may_change_in_a_step_without_their_optimizer():
    """An optimizer of both networks that waits, as in InfoGAN, and clipped weights."""
    loop = PlainLoop(**SETTINGS)
    loop.sparse.close()
    both = SGD([*loop.generator.parameters(), *loop.discriminator.parameters()], lr=1e-3)
    loop.sparse = sparsify(loop.generator, loop.discriminator, [*loop.optimizers, both], length=20, **SETTINGS)
    loop.train()
    with loop.sparse.step(next(iter(loop.data))), torch.no_grad():
        for parameter in loop.discriminator.parameters():
            parameter.clamp_(-0.5, 0.5)
    assert loop.sparse.decisions


def test_a_run_beyond_its_length_is_warned_of_once():
    loop = PlainLoop(length=5, **SETTINGS)
    with pytest.warns(UserWarning, match="length=5 generator updates are over") as warned:
        loop.train()
    assert len([each for each in warned if "length=5" in str(each.message)]) == 1
