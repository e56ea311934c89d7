"""Random settings, checked after every step, killed and resumed: pytest -m long tests/test_fuzz.py.

One setting again: pytest -m long tests/test_fuzz.py -k "seed123 and not seed1234". Others: FUZZ_SEEDS=1000-1999.
"""

import itertools
import os
import random
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import TensorDataset
from toys import for_method, toy_trainer

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.data import ResumableLoader
from lightning_ddst.methods import METHODS
from lightning_ddst.methods.base import ROLES
from lightning_ddst.sparsity import DISTRIBUTIONS, SCHEDULES, find_units

FIRST, _, LAST = os.environ.get("FUZZ_SEEDS", "0-319").partition("-")
BATCHES, EPOCHS, BATCH_SIZE = 7, 3, 6
LATENT, PIXELS, CLASSES, SIDE = 8, 16, 3, 4

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: optim.SGD(p, lr=0.02),
    "sgd momentum": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov foreach": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: optim.SGD(p, lr=0.02, momentum=0.5, fused=True),
    "adam": lambda p: optim.Adam(p, lr=1e-2, betas=(0.0, 0.9)),
    "adam foreach": lambda p: optim.Adam(p, lr=1e-2, betas=(0.5, 0.9), weight_decay=1e-2, foreach=True),
    "adam fused": lambda p: optim.Adam(p, lr=1e-2, betas=(0.5, 0.9), fused=True),
    "adam amsgrad": lambda p: optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw fused": lambda p: optim.AdamW(p, lr=1e-2, amsgrad=True, fused=True),
    "adamax": lambda p: optim.Adamax(p, lr=1e-2),
    "nadam": lambda p: optim.NAdam(p, lr=1e-2),
    "nadam decoupled": lambda p: optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True, foreach=True),
    "radam": lambda p: optim.RAdam(p, lr=1e-2),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3),
    "rmsprop centered": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, foreach=True),
    "rprop": lambda p: optim.Rprop(p, lr=1e-3),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adagrad fused": lambda p: optim.Adagrad(p, lr=1e-2, lr_decay=1e-2, fused=True),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "asgd": lambda p: optim.ASGD(p, lr=1e-2, t0=3),
    "adafactor": lambda p: optim.Adafactor(p, lr=1e-2),
    "muon": lambda p: optim.Muon(p, lr=1e-2),
}
"""Every optimizer of torch that needs no closure and takes dense gradients; Muon takes matrices only."""
LOSSES = {
    "hinge": (lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean()),
    "wasserstein": (lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()),
    "non-saturating": (
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
}
"""The discriminator's and the generator's loss."""


class Conditioned(nn.Module):
    """Takes labels."""

    def __init__(self, network: nn.Module, inputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, inputs)
        self.network = network

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.network(x + self.embedding(labels))


def networks(kind: str) -> tuple[nn.Module, nn.Module]:
    if kind == "conv":
        return (
            nn.Sequential(
                nn.Linear(LATENT, 8 * 4),
                nn.Unflatten(1, (8, 2, 2)),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.ConvTranspose2d(8, 4, 4, 2, 1),
                nn.ReLU(),
                nn.Conv2d(4, 1, 3, padding=1),
                nn.Tanh(),
            ),
            nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.LeakyReLU(),
                spectral_norm(nn.Conv2d(8, 8, 4, 2, 1)),
                nn.LeakyReLU(),
                nn.Flatten(),
                nn.Linear(32, 1),
            ),
        )
    norm = {"spectral": spectral_norm, "old spectral": nn.utils.spectral_norm}.get(kind, lambda layer: layer)
    generator = nn.Sequential(nn.Linear(LATENT, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, PIXELS))
    discriminator = nn.Sequential(
        norm(nn.Linear(PIXELS, 16)), nn.LeakyReLU(), nn.Dropout(0.1), norm(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 1)
    )
    if kind == "conditional":
        return Conditioned(generator, LATENT), Conditioned(discriminator, PIXELS)
    return generator, discriminator


@dataclass(frozen=True)
class Setting:
    """A GAN, its training and its sparsity."""

    kind: str
    loss: str
    generator_first: bool
    n_critic: int
    accumulate: int
    clip: tuple[str, float] | None
    toggles: bool
    groups: bool
    generator_optimizer: str
    discriminator_optimizer: str
    precision: str
    sparsity: dict[str, Any]
    saved_after: int
    killed_at: int
    killed_in: str


def draw(seed: int) -> Setting:
    """A setting whose masks can be made; others are rejected by name and drawn again."""
    torch.manual_seed(seed)  # tracing channels draws weights
    rng = random.Random(seed)
    while True:
        setting = drawn(rng)
        try:
            DynamicSparsityCallback(**setting.sparsity).attach(FuzzGAN(setting))
        except ValueError as error:
            if not any(name in str(error) for name in [*setting.sparsity, "discriminator_density"]):
                raise
        else:
            return setting


def drawn(rng: random.Random) -> Setting:
    pick, chance = rng.choice, lambda share: rng.random() < share
    granularity = pick(["weight", "weight", "weight", "channel", "2:4"])
    method = pick([name for name in METHODS if granularity != "2:4" or name in ("static", "sdst")])
    kind = pick(["mlp", "conv", "spectral", "old spectral", "conditional"])
    density = 0.5 if granularity == "2:4" else round(rng.uniform(0.15, 0.9), 3)
    interval = rng.randint(1, 5)
    arguments: dict[str, Any] = {
        "generator_density": density,
        "interval": interval,
        "explore_interval": rng.randint(1, 5),
        "probe_interval": rng.randint(1, interval),
        "granularity": granularity,
        "seed": rng.randint(0, 99),
        "initial_masks": pick(["random", "random", "magnitude"]),
        "regrown": pick(["reset", "keep"]),
        "optimizer_state": pick(["reset", "reset", "keep"]),
        "estimator": pick(["ratio_of_means", "mean_of_ratios"]),
        "exploration_rate": pick([None, 0.1, 0.3, 1.0]),
        "schedule": pick([None, *SCHEDULES]),
        "signal": pick(["balance_ratio", "balance_ratio", "real_sign"]),
        "delta": pick([None, 0.03, 0.3]),
    }
    if granularity != "2:4" and chance(0.5):
        arguments["discriminator_density"] = round(rng.uniform(0.15, 1.0), 3)
    if chance(0.3):
        arguments["min_discriminator_density"] = round(rng.uniform(0.1, 0.5), 3)
    if chance(0.3):
        arguments["max_discriminator_density"] = round(rng.uniform(0.5, 1.0), 3)
    if chance(0.8):
        lower = 0.0 if arguments["signal"] == "balance_ratio" else -0.1
        bounds = [(lower, lower + 1e-9), (5.0, 6.0), (0.1, 0.2), (0.45, 0.55)]
        arguments["bounds"] = pick([*bounds, "auto"] if arguments["signal"] == "balance_ratio" else bounds)
    if granularity == "weight":
        arguments |= {
            "growth": pick(["gradient", "random", "momentum"]),
            "distribution": pick(list(DISTRIBUTIONS)),
            "scope": pick(["global", "layer"]),
            "layer_floor": pick([0.25, 0.05, 1.0]),
        }
        if chance(0.2):
            arguments["layer_densities"] = {pick(["generator*3", "discriminator*0", "Linear"]): 0.5}
    elif granularity == "2:4":
        arguments["growth"] = pick(["gradient", "random", "momentum"])
    if chance(0.2):
        arguments["dense_layers"] = [pick(["generator*0", "discriminator*3", "Conv2d"])]
    first, second = rng.choice(list(OPTIMIZERS)), rng.choice(list(OPTIMIZERS))
    saved_after = rng.randint(1, BATCHES * EPOCHS - 2)
    return Setting(
        kind=kind,
        loss=pick(list(LOSSES)),
        generator_first=chance(0.4),
        n_critic=pick([1, 1, 2, 3]),
        accumulate=pick([1, 1, 2]),
        clip=pick([None, None, ("norm", 0.5), ("value", 0.05)]),
        toggles=chance(0.5),
        groups=chance(0.4),
        generator_optimizer=first,
        discriminator_optimizer=second,
        precision=pick(["32-true", "32-true", "bf16-mixed", "64-true"]),
        sparsity=for_method(method, **{name: value for name, value in arguments.items() if value is not None}),
        saved_after=saved_after,
        killed_at=rng.randint(saved_after + 1, BATCHES * EPOCHS),
        killed_in=pick(["before", "middle", "after"]),
    )


class Killed(Exception):
    pass


class FuzzGAN(LightningModule):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.setting = setting
        self.generator, self.discriminator = networks(setting.kind)
        labels = (torch.zeros(2, dtype=torch.long),) if setting.kind == "conditional" else ()
        self.example_input_array = (torch.zeros(2, LATENT), *labels)
        self.killed = False

    def configure_optimizers(self) -> list[optim.Optimizer]:
        self.of = {
            "generator": self.made(self.generator, self.setting.generator_optimizer),
            "discriminator": self.made(self.discriminator, self.setting.discriminator_optimizer),
        }
        return [optimizer for made in self.of.values() for optimizer in made]

    def made(self, network: nn.Module, name: str) -> list[optim.Optimizer]:
        parameters = list(network.parameters())
        if name == "muon":
            matrices = [parameter for parameter in parameters if parameter.dim() == 2]
            others = [parameter for parameter in parameters if parameter.dim() != 2]
            return [optim.Muon(matrices, lr=1e-2), optim.SGD(others, lr=1e-2)]
        if not self.setting.groups:
            return [OPTIMIZERS[name](parameters)]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in parameters if parameter.dim() > 1], "lr": 5e-3},
            {"params": [parameter for parameter in parameters if parameter.dim() <= 1]},
        ]
        return [OPTIMIZERS[name](groups)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        given = (labels,) if self.setting.kind == "conditional" else ()
        steps = [self.train_discriminator]
        if (batch_idx + 1) % self.setting.n_critic == 0:
            steps.insert(0 if self.setting.generator_first else 1, self.train_generator)
        for number, step in enumerate(steps):
            if number == 1 and self.killed:
                raise Killed
            step(images, given, (batch_idx // self.setting.n_critic + 1) % self.setting.accumulate == 0)

    def train_discriminator(self, images: Tensor, given: Any, steps: bool) -> None:
        with torch.no_grad():
            fake = self.generator(self.noise(images), *given)
        loss = LOSSES[self.setting.loss][0](self.discriminator(images, *given), self.discriminator(fake, *given))
        self.update("discriminator", loss, steps)

    def train_generator(self, images: Tensor, given: Any, steps: bool) -> None:
        own = [optimizer for optimizer in self.optimizers() if optimizer.optimizer in self.of["generator"]]
        if self.setting.toggles and len(own) == 1:
            self.toggle_optimizer(own[0])
        scores = self.discriminator(self.generator(self.noise(images), *given), *given)
        self.update("generator", LOSSES[self.setting.loss][1](scores), steps)
        if self.setting.toggles and len(own) == 1:
            self.untoggle_optimizer(own[0])

    def noise(self, images: Tensor) -> Tensor:
        return torch.randn(len(images), LATENT, dtype=images.dtype)

    def update(self, role: str, loss: Tensor, steps: bool) -> None:
        optimizers = [optimizer for optimizer in self.optimizers() if optimizer.optimizer in self.of[role]]
        if role == "generator" and not self.setting.toggles:  # its loss has reached the discriminator, too
            parameters = list(self.discriminator.parameters())
            kept = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
        self.manual_backward(loss)
        if role == "generator" and not self.setting.toggles:
            for parameter, grad in zip(parameters, kept, strict=True):
                parameter.grad = grad
        if not steps:
            return
        for optimizer in optimizers:
            if self.setting.clip is not None:
                kind, value = self.setting.clip  # Lightning's clip_gradients rejects fused optimizers in half precision
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[kind](parameters, value)
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


class Checks(Callback):
    """Checks counts, zeros and densities after every step of every optimizer."""

    def __init__(self, sparsity: DynamicSparsityCallback) -> None:
        self.sparsity = sparsity
        self.steps = 0
        self.decided = 0
        self.densities: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # after the callback's hooks
        self.decided = len(self.sparsity.decisions)
        self.densities = {role: network.target for role, network in self.sparsity.networks().items()}
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda optimizer, *_: self.check(optimizer, pl_module))

    def check(self, optimizer: Any, module: Any) -> None:
        self.steps += 1
        parameters = dict(module.named_parameters())
        keeps = module.setting.sparsity["optimizer_state"] == "keep"
        for role, network in self.sparsity.networks().items():
            masks = self.sparsity.masks(role)
            active = {name: int(mask.sum()) for name, mask in masks.items()}
            total = sum(mask.numel() for mask in masks.values())
            assert network.active == sum(active.values())
            assert network.total == total
            if find_units(module.setting.sparsity["granularity"]).fixed_density is not None:
                assert all(2 * count == masks[name].numel() for name, count in active.items())
            elif module.setting.sparsity["granularity"] == "weight":
                assert network.active == round(network.target * total)
            else:
                assert network.active == sum(network.allocation(network.target).values())
            for name, mask in masks.items():
                values = {"weight": parameters[name].detach()}
                if not keeps:
                    values |= optimizer.state.get(parameters[name], {})
                for kind, value in values.items():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        assert not value[~mask].any(), kind
                        assert kind != "weight" or not value[~mask].signbit().any()
        self.check_densities(module)

    def check_densities(self, module: Any) -> None:
        """Each density is the one before, or the one that a decision has just given."""
        settings, decisions = self.sparsity.settings, self.sparsity.decisions
        new, self.decided = decisions[self.decided :], len(decisions)
        assert len(new) <= 1
        now = {role: network.target for role, network in self.sparsity.networks().items()}
        resized = {role for each in settings.mask_updates() if each.resizes for role in each.roles}
        for role in ROLES:
            assert role in resized or now[role] == self.densities[role]
        for update, decision in new:
            plan, before = self.sparsity.plan, self.densities["discriminator"]
            assert now["discriminator"] == decision.density
            if settings.starts_dense:
                rounds = int(decision.reason.split()[1])
                keeps = 0.8 if settings.name == "imp" else 0.0
                assert now == {role: max(last, keeps**rounds) for role, last in settings.final_densities.items()}
            elif settings.name == "ramp":
                assert before <= now["discriminator"] <= max(settings.max_discriminator_density, before)
                assert update % plan.interval == 0
            else:
                assert update % plan.interval == 0 or module.setting.sparsity.get("growth", "gradient") != "random"
                at_most = settings.delta or 1.0
                assert abs(now["discriminator"] - before) <= at_most + 1e-6
        if not new:
            assert now == self.densities
        self.densities = now


class Kill(Callback):
    """Saves a checkpoint after a batch, and fails in a later one."""

    def __init__(self, setting: Setting, path: Any) -> None:
        self.setting, self.path = setting, path

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.setting.killed_at:
            pl_module.killed = self.setting.killed_in == "middle"
            if self.setting.killed_in == "before":
                raise Killed

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        batches = trainer.fit_loop.total_batch_idx + 1
        if batches == self.setting.saved_after:
            trainer.save_checkpoint(self.path)
        if batches == self.setting.killed_at:  # also where there was no middle
            raise Killed


def run(setting: Setting, *callbacks: Callback, seed: int = 0, path: Any = None) -> Any:
    seed_everything(seed, verbose=False)
    generator = torch.Generator().manual_seed(0)
    shape = (1, SIDE, SIDE) if setting.kind == "conv" else (PIXELS,)
    images = torch.randn(40, *shape, generator=generator).tanh()
    data = ResumableLoader(TensorDataset(images, torch.arange(40) % CLASSES), BATCH_SIZE, BATCHES, seed=1)
    gan = FuzzGAN(setting)
    sparsity = DynamicSparsityCallback(**setting.sparsity)
    checks = Checks(sparsity)
    trainer = toy_trainer(sparsity, checks, *callbacks, epochs=EPOCHS, precision=setting.precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(gan, data, ckpt_path=path, weights_only=True)
    assert checks.steps
    return gan, sparsity, [optimizer.state_dict() for optimizer in trainer.optimizers]


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: leaf for key, part in items for place, leaf in leaves(part, f"{path}/{key}").items()}
    return {path: value}


def differing(one: Any, other: Any) -> list[str]:
    ones, others = leaves(one), leaves(other)
    same = {
        path
        for path in ones.keys() & others.keys()
        if (
            torch.equal(ones[path].nan_to_num(), others[path].nan_to_num())
            if isinstance(ones[path], Tensor)
            else repr(ones[path]) == repr(others[path])  # also where both are NaN
        )
    }
    return sorted((ones.keys() | others.keys()) - same)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(int(FIRST), int(LAST or FIRST) + 1), ids=lambda seed: f"seed{seed}")
def test_a_random_setting_holds_its_masks_and_resumes_bit_for_bit(seed, tmp_path):
    setting = draw(seed)
    print(asdict(setting))
    gan, sparsity, optimizers = run(setting)
    with pytest.raises(Killed):
        run(setting, Kill(setting, tmp_path / "saved.ckpt"))
    again, resumed, resumed_optimizers = run(setting, seed=1, path=tmp_path / "saved.ckpt")
    assert differing(gan.state_dict(), again.state_dict()) == []
    assert differing(optimizers, resumed_optimizers) == []
    assert all(differing(sparsity.masks(role), resumed.masks(role)) == [] for role in ROLES)
    assert resumed.decisions == sparsity.decisions
    assert (resumed.generator_updates, resumed.measurements) == (sparsity.generator_updates, sparsity.measurements)
    assert resumed.flops_ledger == sparsity.flops_ledger
    assert differing(asdict(sparsity.balance), asdict(resumed.balance)) == []


def test_settings_are_the_same_for_a_seed_and_cover_every_optimizer_and_method():
    settings = [draw(seed) for seed in range(120)]
    assert settings[:20] == [draw(seed) for seed in range(20)]
    names = itertools.chain.from_iterable((s.generator_optimizer, s.discriminator_optimizer) for s in settings)
    assert set(names) == set(OPTIMIZERS)
    assert {setting.sparsity["method"] for setting in settings} == set(METHODS)
