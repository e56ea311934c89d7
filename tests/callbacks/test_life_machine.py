"""One callback in fits, evaluations, resumed runs, failures and copies, in any order."""

import copy
import pickle
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lightning.pytorch import Callback
from torch import nn
from toys import LATENT, PIXELS, ToyGAN, for_method, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.methods import METHODS, Plan

BATCHES = 3
ROLES = ("generator", "discriminator")
WEAK, STRONG = (0.0, 1e-9), (1e8, 1e9)
"""Bounds that every balance ratio is above, so that no decision prunes, or below, so that none grows."""
GRANULARITIES = {"weight": 0.25, "channel": 0.4, "2:4": 0.5}
TOTALS = {"generator": LATENT * 32 + 32 * PIXELS, "discriminator": PIXELS * 32 + 32}
OFTEN = st.integers(1, 4)
FAILURES = ("setup", "configure_optimizers", "on_fit_start", "on_train_start", "training_step", "on_train_batch_end")
"""Places of an exception, in the order of Lightning's calls."""


class Failed(Exception):
    """Raised on purpose."""


class LiveGAN(ToyGAN):
    """Evaluates, fails where it is asked to, and can be pickled (torch pickles no spectral norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(nn.Linear(PIXELS, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
        self.fails_at = ""

    def fail(self, place: str) -> None:
        if place == self.fails_at:
            raise Failed(place)

    def setup(self, stage: str) -> None:
        self.fail("setup")

    def configure_optimizers(self) -> Any:
        self.fail("configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:  # with the discriminator's gradients of this step
            generator, discriminator = self.networks()
            if self.fails_at == "training_step":
                discriminator(generator(torch.randn(4, LATENT))).mean().backward()
            self.fail("training_step")
        super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.networks()[0](torch.randn(4, LATENT))

    test_step = validation_step


class Failing(Callback):
    """Comes after the callback."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.fail("on_fit_start")

    def on_train_start(self, trainer, pl_module):
        pl_module.fail("on_train_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            pl_module.fail("on_train_batch_end")


@dataclass
class Known:
    """The expected readings of a callback, as far as they follow from the calls."""

    module: nn.Module | None = None  # whose weights are masked; None if the callback only reads a checkpoint
    fitted: bool = False
    updates: int = 0
    measurements: int = 0
    decided: tuple[int, ...] = ()
    counted: bool = False  # operations, which takes two updates of one fit

    def trained(self, updates: int, arguments: dict[str, Any]) -> None:
        self.fitted = True
        new = range(self.updates + 1, self.updates + updates + 1)
        self.measurements += sum(update % arguments["probe_interval"] == 0 for update in new)
        self.decided += tuple(update for update in new if update % arguments["interval"] == 0)
        self.updates += updates
        self.counted |= updates >= 2


@dataclass(frozen=True)
class Saved:
    """A checkpoint."""

    path: Path
    known: Known
    arguments: dict[str, Any]
    epochs: int
    weights: dict[str, torch.Tensor]


class Life(RuleBasedStateMachine):
    """Models one callback in use; earlier callbacks are forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.checkpoints: list[Saved] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(
        method=st.sampled_from(sorted(METHODS)),
        granularity=st.sampled_from(sorted(GRANULARITIES)),
        density=st.sampled_from([0.2, 0.25, 0.5]),
        discriminator=st.sampled_from([None, 0.6, 1.0]),
        bounds=st.sampled_from([WEAK, STRONG]),
        growth=st.sampled_from(["gradient", "random", "momentum"]),
        seed=st.none() | st.integers(0, 9),
    )
    def begin(self, method, granularity, density, discriminator, bounds, growth, seed):
        if granularity == "2:4" and method not in ("static", "sdst"):
            granularity = "weight"
        density = density if granularity == "weight" else GRANULARITIES[granularity]
        if granularity == "2:4" or method == "dense":
            discriminator = None
        self.fixed = for_method(method, generator_density=density, discriminator_density=discriminator, bounds=bounds)
        self.fixed |= {"granularity": granularity, "seed": seed}
        if granularity != "channel":
            self.fixed["growth"] = growth
        self.arguments = self.fixed | {"interval": 2, "explore_interval": 1, "probe_interval": 1}
        self.gans = [LiveGAN(), LiveGAN()]
        self.new_callback()

    def new_callback(self) -> None:
        self.sparsity = DynamicSparsityCallback(**self.arguments)
        self.known, self.bounded_at = Known(), 0
        self.mixed = False  # whether the masked module's weights are those of a checkpoint

    # ---- rules -----------------------------------------------------------------------------------------

    @rule(
        gan=st.integers(0, 1),
        epochs=st.integers(1, 2),
        fails_at=st.sampled_from(FAILURES) | st.just(""),
        smoke=st.booleans(),
    )
    def fit(self, gan, epochs, fails_at, smoke):
        module = self.gans[gan]
        again = self.known.module is module
        if again and self.mixed:
            with pytest.raises(ValueError, match="ckpt_path"):
                self.run(module, epochs)
            return
        limits = {"fast_dev_run": 2} if smoke and self.arguments["method"] not in ("ramp", "posthoc", "imp") else {}
        made = self.run(module, epochs, fails_at=fails_at, **limits)
        if FAILURES.index(fails_at or "on_train_batch_end") < FAILURES.index("on_fit_start"):
            return
        if not again:
            self.known, self.bounded_at = Known(module), 0
        self.known.trained(made, self.arguments)
        self.mixed, self.last = False, self.weights(module)

    @precondition(lambda self: self.checkpoints)
    @rule(
        data=st.data(),
        gan=st.integers(0, 1),
        more=st.integers(0, 2),
        fails_at=st.sampled_from(FAILURES) | st.just(""),
        new=st.booleans(),
        changed=st.fixed_dictionaries({}, optional={"interval": OFTEN, "explore_interval": OFTEN}),
        bounds=st.none() | st.sampled_from([WEAK, STRONG]),
    )
    def resume(self, data, gan, more, fails_at, new, changed, bounds):
        saved = self.checkpoints[data.draw(st.integers(0, len(self.checkpoints) - 1))]
        if new:
            self.arguments = (
                self.arguments | changed | ({"bounds": bounds} if bounds and "bounds" in self.fixed else {})
            )
            self.new_callback()
        module = self.gans[gan]
        made = self.run(module, saved.epochs + more, saved, fails_at=fails_at)
        place = FAILURES.index(fails_at or "on_train_batch_end")
        if place < FAILURES.index("configure_optimizers"):
            return
        self.mixed, self.last = False, self.weights(module)
        if place < FAILURES.index("on_train_start"):  # a state that could not be resumed is forgotten
            self.known, self.bounded_at = Known(), 0
            return
        self.known, self.bounded_at = copy.copy(saved.known), saved.known.updates
        self.known.module = module
        self.known.trained(made, self.arguments)

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data(), gan=st.integers(0, 1), density=st.booleans())
    def resume_rejected(self, data, gan, density):
        """A run with another density or dense layers."""
        saved = self.checkpoints[data.draw(st.integers(0, len(self.checkpoints) - 1))]
        if self.fixed["granularity"] == "2:4" or self.fixed["method"] == "dense":
            return
        other = {"generator_density": 0.55} if density else {"dense_layers": ["generator.0"]}
        rejected = DynamicSparsityCallback(**self.arguments | other)
        with pytest.raises(ValueError, match=next(iter(other))):
            toy_trainer(rejected, epochs=saved.epochs + 1).fit(LiveGAN(), toy_data(BATCHES), ckpt_path=saved.path)
        assert rejected.generator_updates == 0
        assert rejected.masks("generator") == {}

    @rule(test=st.booleans(), gan=st.integers(0, 1))
    def evaluate(self, test, gan):
        before = self.weights(self.gans[gan])
        self.evaluated(self.gans[gan], test, None)
        assert all(torch.equal(value, before[name]) for name, value in self.weights(self.gans[gan]).items())

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data(), test=st.booleans(), gan=st.integers(0, 1))
    def evaluate_a_checkpoint(self, data, test, gan):
        saved = self.checkpoints[data.draw(st.integers(0, len(self.checkpoints) - 1))]
        module = self.gans[gan]
        self.evaluated(module, test, saved.path)
        if self.known.module is None or not self.known.fitted:
            self.known, self.bounded_at = copy.copy(saved.known), saved.known.updates
        elif self.known.module is module:
            self.mixed = any(not torch.equal(value, saved.weights[name]) for name, value in self.last.items())

    @rule(how=st.sampled_from(["deepcopy", "pickle"]), alone=st.booleans())
    def copied(self, how, alone):
        make = copy.deepcopy if how == "deepcopy" else lambda value: pickle.loads(pickle.dumps(value))
        if alone:
            self.sparsity = make(self.sparsity)
            if self.known.module is not None:
                weights = self.known.module.state_dict()
                self.known.module = LiveGAN()  # like the copy that only the callback has
                self.known.module.load_state_dict(weights)
        else:
            place = next((i for i, gan in enumerate(self.gans) if gan is self.known.module), None)
            self.sparsity, self.gans = make((self.sparsity, self.gans))
            if place is not None:
                self.known.module = self.gans[place]

    @rule(gan=st.integers(0, 1))
    def attach(self, gan):
        """Draws masks by hand; the run of before ends."""
        self.new_callback()
        self.sparsity.attach(self.gans[gan])
        self.known = Known(self.gans[gan])

    @precondition(lambda self: self.known.module is not None and not self.mixed)
    @rule(gan=st.integers(0, 1))
    def attach_again(self, gan):
        self.sparsity.attach(self.gans[gan])
        self.known = Known(self.gans[gan])

    # ---- helpers ---------------------------------------------------------------------------------------

    def run(self, module, epochs, saved=None, fails_at="", **limits):
        """Fits, and returns the updates that were made."""
        module.fails_at = fails_at
        path = None if saved is None else saved.path
        done = 0 if saved is None else saved.epochs
        trainer = toy_trainer(self.sparsity, Failing(), epochs=epochs, num_sanity_val_steps=0, **limits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                trainer.fit(module, toy_data(BATCHES), ckpt_path=path)
            except Failed:
                assert fails_at
                module.fails_at = ""
                place = FAILURES.index(fails_at)
                if epochs == done and place >= FAILURES.index("training_step"):
                    raise AssertionError("nothing was left to train") from None
                return max(0, place - FAILURES.index("on_train_start"))
        module.fails_at = ""
        if limits:
            return limits["fast_dev_run"] // 2
        path = Path(self.folder.name) / f"{len(self.checkpoints)}.ckpt"
        trainer.save_checkpoint(path)
        made = (epochs - done) * BATCHES
        known = copy.copy(self.known) if saved is None else copy.copy(saved.known)
        if saved is None and known.module is not module:
            known = Known()
        known.trained(made, self.arguments)
        known.module = None
        self.checkpoints.append(Saved(path, known, self.arguments, epochs, self.weights(module)))
        return made

    def evaluated(self, module, test, path):
        trainer = toy_trainer(self.sparsity)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (trainer.test if test else trainer.validate)(module, toy_data(2), ckpt_path=path, verbose=False)

    def weights(self, module):
        return {name: value.clone() for name, value in module.state_dict().items()}

    # ---- what holds at any time --------------------------------------------------------------------------

    @invariant()
    def counters_are_true(self):
        sparsity, known = self.sparsity, self.known
        assert sparsity.generator_updates == known.updates
        assert sparsity.measurements == known.measurements
        decided = [update for update, _ in sparsity.decisions]
        assert decided == sorted(set(decided))
        if self.arguments["method"] in ("ddst", "dda"):
            assert decided == list(known.decided)
        elif self.arguments["method"] in ("dense", "static", "sdst"):
            assert decided == []
        assert all(update <= known.updates for update in decided)

    @invariant()
    def counts_are_those_of_the_densities(self):
        sparsity = self.sparsity
        masks = {role: sparsity.masks(role) for role in ROLES}
        if not masks["generator"]:
            assert self.known.module is None
            assert self.known.updates == 0
            return
        for role, expected in self.expected_densities().items():
            active = sum(int(mask.sum()) for mask in masks[role].values())
            total = sum(mask.numel() for mask in masks[role].values())
            assert total == TOTALS[role]
            assert getattr(sparsity, f"{role}_density") == active / total
            if self.fixed["granularity"] == "channel":
                step = total // 32
                assert active == step * min(range(1, 33), key=lambda n: (round(abs(n * step - expected * total), 6), n))
            else:
                assert active == round(expected * total)

    def expected_densities(self):
        """The densities that follow from the arguments and the decisions."""
        settings, decisions = self.sparsity.settings, self.sparsity.decisions
        densities = dict(settings.initial_densities)
        if decisions:
            densities["discriminator"] = decisions[-1][1].density
        pruned = [decision for _, decision in decisions if decision.action == "prune"]
        if settings.starts_dense and pruned:
            rounds = int(pruned[-1].reason.split()[1])
            keeps = 0.8 if settings.name == "imp" else 0.0
            densities = {role: max(last, keeps**rounds) for role, last in settings.final_densities.items()}
        return densities

    @invariant()
    def weights_outside_of_masks_are_zero(self):
        module = self.known.module
        if module is None or self.mixed:
            return
        parameters = dict(module.named_parameters())
        for role in ROLES:
            for name, mask in self.sparsity.masks(role).items():
                inactive = parameters[name].detach()[~mask]
                assert not inactive.any()
                assert not inactive.signbit().any()

    @invariant()
    def settings_are_those_in_use(self):
        sparsity, given = self.sparsity, self.arguments
        for name in sparsity.settings.arguments():
            if name in given and given[name] is not None:
                assert getattr(sparsity.settings, name) == given[name]
        if self.known.module is not None and self.known.fitted:
            plan = sparsity.plan
            assert (plan.interval, plan.explore_interval, plan.probe_interval) == tuple(
                given[name] for name in ("interval", "explore_interval", "probe_interval")
            )
            if state := sparsity.state_dict():
                plain = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
                assert {name: state["settings"][name] for name in plain if name not in ("method", "seed")} == {
                    name: value for name, value in plain.items() if name not in ("method", "seed")
                }
        else:
            assert sparsity.plan == Plan()

    @invariant()
    def bounds_are_those_in_use(self):
        actions = {decision.action for update, decision in self.sparsity.decisions if update > self.bounded_at}
        if "bounds" in self.arguments:
            assert ("prune" if self.arguments["bounds"] == WEAK else "grow") not in actions

    @invariant()
    def operations_are_those_of_the_module(self):
        means = self.sparsity.mean_layer_densities
        assert (self.sparsity.flops_ratio is not None) == (self.known.module is not None and self.known.counted)
        if self.known.module is not None and self.known.updates and self.arguments["method"] in ("static", "dense"):
            masks = {name: mask for role in ROLES for name, mask in self.sparsity.masks(role).items()}
            assert means == pytest.approx({name: float(mask.float().mean()) for name, mask in masks.items()})


def test_a_callback_tells_the_truth_in_any_order_of_calls():
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=10,
            stateful_step_count=8,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
