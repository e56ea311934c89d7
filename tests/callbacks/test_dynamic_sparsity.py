import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import Adam
from toys import LATENT, ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, sparsify
from lightning_ddst.methods import SDST, Explore, Plan

# Maskable weights of the toy: 8*32 + 32*16 and 16*32 + 32*1.
GENERATOR_WEIGHTS = 768
DISCRIMINATOR_WEIGHTS = 544


def test_the_generator_explores_with_the_documented_methods() -> None:
    for method, explores in (("static", False), ("sdst", True), ("dda", False), ("ddst", True)):
        sparsity = DynamicSparsityCallback(0.25, method=method, interval=10, explore_interval=3, seed=1)
        gan = ToyGAN()
        sparsity.attach(gan)
        before = {name: mask.clone() for name, mask in sparsity.masks("generator").items()}
        trained(sparsity, gan=gan)
        after = sparsity.masks("generator")
        assert any(not torch.equal(before[name], after[name]) for name in before) == explores


@pytest.mark.parametrize("probe_interval", ["auto", None])
@pytest.mark.parametrize(("method", "density"), [("static", 1.0), ("dense", 0.1)])
def test_a_dense_run_is_bit_identical_to_one_without_the_callback(method, density, probe_interval) -> None:
    sparsity = DynamicSparsityCallback(density, method=method, probe_interval=probe_interval)
    plain, watched = trained(epochs=2), trained(sparsity, epochs=2)
    assert sparsity.measurements == (20 if probe_interval == "auto" else 0)
    assert (sparsity.generator_density, sparsity.discriminator_density) == (1.0, 1.0)
    expected = plain.state_dict()
    assert watched.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in watched.state_dict().items())


@pytest.mark.parametrize("method", ["static", "sdst"])
def test_probing_changes_nothing_in_a_sparse_run(method: str) -> None:
    probed, unprobed = (
        trained(DynamicSparsityCallback(0.25, method=method, explore_interval=4, probe_interval=probe), epochs=2)
        for probe in ("auto", None)
    )
    expected = unprobed.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in probed.state_dict().items())


def test_the_ratio_of_means_is_the_default() -> None:
    def ratio(**estimator: str) -> float | None:
        sparsity = DynamicSparsityCallback(0.5, method="static", interval=10, seed=1, **estimator)
        trained(sparsity, epochs=3)
        assert sparsity.measurements == 30
        return sparsity.balance_ratio

    assert ratio() == ratio(estimator="ratio_of_means") != ratio(estimator="mean_of_ratios")


def test_operations_of_validation_are_not_counted() -> None:
    class Validated(ToyGAN):
        def validation_step(self, batch, batch_idx) -> None:
            generator, discriminator = self.networks()
            discriminator(generator(torch.zeros(50, LATENT)))

    def ledger(**validation) -> dict:
        sparsity = DynamicSparsityCallback(0.25, method="static", probe_interval=None, seed=1)
        trainer = toy_trainer(sparsity, epochs=3, **validation)
        trainer.fit(Validated(), toy_data(), toy_data(2))
        return sparsity.flops_ledger

    # After every batch, so also between the two updates whose operations are counted.
    assert ledger(val_check_interval=1) == ledger(limit_val_batches=0) != {}


def test_everything_can_be_read_before_fitting() -> None:
    sparsity = DynamicSparsityCallback(0.25, discriminator_density=0.5)
    assert (sparsity.generator_density, sparsity.discriminator_density) == (0.25, 0.5)
    assert sparsity.balance_ratio is None
    assert sparsity.masks("generator") == {}
    gan = ToyGAN()
    sparsity.attach(gan)
    parameters = dict(gan.named_parameters())
    names = {
        "generator": {"generator.0.weight", "generator.3.weight"},
        "discriminator": {f"discriminator.{i}.parametrizations.weight.original" for i in (0, 3)},
    }
    for role, expected in names.items():
        masks = sparsity.masks(role)
        assert masks.keys() == expected
        for name, mask in masks.items():
            assert mask.dtype == torch.bool
            assert mask.shape == parameters[name].shape
            assert torch.equal(mask, parameters[name] != 0)
    assert sum(int(mask.sum()) for mask in sparsity.masks("discriminator").values()) == DISCRIMINATOR_WEIGHTS // 2


def test_masks_of_a_dense_run_are_all_true() -> None:
    sparsity = DynamicSparsityCallback(0.1, method="dense")
    trained(sparsity)
    for role, total in (("generator", GENERATOR_WEIGHTS), ("discriminator", DISCRIMINATOR_WEIGHTS)):
        masks = sparsity.masks(role).values()
        assert all(mask.all() for mask in masks)
        assert sum(mask.numel() for mask in masks) == total


def test_the_masks_drawn_follow_the_seed_and_not_the_random_state() -> None:
    def drawn(seed: int | None = None) -> torch.Tensor:
        sparsity = DynamicSparsityCallback(0.25, seed=seed)
        state = torch.get_rng_state()
        sparsity.attach(ToyGAN())
        torch.set_rng_state(state)
        return sparsity.masks("generator")["generator.0.weight"]

    torch.manual_seed(5)
    first = drawn()
    torch.rand(3)
    assert torch.equal(first, drawn())
    torch.manual_seed(6)
    assert not torch.equal(first, drawn())
    assert torch.equal(drawn(7), drawn(7))


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        # 20 batches of one update each: a tenth would be 2, so the least.
        ({"epochs": 2}, Plan(interval=10, explore_interval=5, probe_interval=1, updates=20)),
        ({"epochs": 50}, Plan(interval=50, explore_interval=25, probe_interval=1, updates=500)),
        # 300 epochs of 10 updates, ended by the test after 2.
        ({"epochs": 300}, Plan(interval=100, explore_interval=50, probe_interval=2, updates=3000)),
        # 99 updates a decision have 99 measurements, 100 have 50.
        ({"epochs": 99}, Plan(interval=99, explore_interval=49, probe_interval=1, updates=990)),
        ({"epochs": 100}, Plan(interval=100, explore_interval=50, probe_interval=2, updates=1000)),
        # Both optimizers' steps count: 60,000 steps are 30,000 generator updates.
        ({"epochs": -1, "max_steps": 60000}, Plan(interval=300, explore_interval=150, probe_interval=3, updates=30000)),
        # The nearer of two ends.
        ({"epochs": 300, "max_steps": 100000}, Plan(interval=100, explore_interval=50, probe_interval=2, updates=3000)),
        ({"epochs": -1}, Plan(interval=1000, explore_interval=500, probe_interval=10)),
    ],
)
def test_default_intervals_come_from_the_length_of_the_run(settings, plan) -> None:
    sparsity = DynamicSparsityCallback(0.25)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop = sparsity.generator_updates >= 12

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(sparsity, Stop(), **settings)
    assert sparsity.plan == plan


def test_the_length_of_a_run_counts_generator_updates_whatever_else_steps() -> None:
    class CriticGAN(ToyGAN):
        """Updates the generator in every fifth batch only."""

        def training_step(self, batch, batch_idx) -> None:
            generator_optimizer = self.optimizers()[0]
            step = generator_optimizer.step
            if batch_idx % 5 != 4:
                generator_optimizer.step = lambda: None
            super().training_step(batch, batch_idx)
            generator_optimizer.step = step

    sparsity = DynamicSparsityCallback(0.25)
    trained(sparsity, gan=CriticGAN(), epochs=50)
    assert sparsity.generator_updates == 100
    assert sparsity.plan.updates == 100


def test_a_run_of_unknown_length_warns_that_exploration_is_not_annealed() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop = trainer.global_step >= 6

    with pytest.warns(UserWarning, match="length in generator updates is unknown"):
        trained(DynamicSparsityCallback(0.25), Stop(), epochs=-1)


def test_br_is_measured_at_every_probe_interval_in_every_method() -> None:
    for method in ("dense", "static", "sdst", "dda", "ddst"):
        sparsity = DynamicSparsityCallback(0.25, method=method, interval=10, probe_interval=5)
        trained(sparsity, epochs=2)
        assert sparsity.generator_updates == 20
        assert sparsity.measurements == 4
        assert sparsity.balance.samples == 2  # the window is one decision interval


def test_a_balance_outside_the_bounds_resizes_the_discriminator_and_gives_the_reason() -> None:
    # Bounds that no ratio of this toy reaches: always too weak, then always too strong.
    growing = DynamicSparsityCallback(0.25, method="dda", interval=5, bounds=(0.0, 1e-9), delta=0.1)
    pruned = DynamicSparsityCallback(0.25, 0.5, method="dda", interval=5, bounds=(1e6, 1e7), delta=0.1)
    trained(growing, epochs=2)
    trained(pruned, epochs=2)
    for sparsity, action in ((growing, "grow"), (pruned, "prune")):
        decided = [decision for _, decision in sparsity.decisions if decision.action != "undecided"]
        assert [update for update, _ in sparsity.decisions] == [5, 10, 15, 20]
        assert decided
        assert all(re.search(r"BR \S+ [<>]", decision.reason) for decision in decided)
        assert any(decision.action == action for decision in decided)
        assert sparsity.discriminator_density == pytest.approx(decided[-1].density, abs=0.5 / DISCRIMINATOR_WEIGHTS)


def test_networks_are_found_by_usual_and_by_given_names() -> None:
    for names in (("netG", "netD"), ("G", "D"), ("gen", "critic")):
        sparsity = DynamicSparsityCallback(0.25)
        trained(sparsity, gan=ToyGAN(names))
        assert all(name.startswith(names[0] + ".") for name in sparsity.masks("generator"))

    gan = ToyGAN(("maker", "judge"))
    sparsity = DynamicSparsityCallback(0.25, generator="maker", discriminator="judge")
    trained(sparsity, gan=gan)
    assert {name.split(".")[0] for name in sparsity.masks("discriminator")} == {"judge"}


def hooks(gan: ToyGAN) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in gan.modules())
    parameters = sum(len(p._backward_hooks or ()) for p in gan.parameters())
    accumulated = sum(len(p._post_accumulate_grad_hooks or ()) for p in gan.parameters())
    return modules + parameters + accumulated


def test_hooks_are_gone_after_fitting_and_after_a_failure() -> None:
    assert hooks(trained(DynamicSparsityCallback(0.25))) == 0

    class Broken(ToyGAN):
        def training_step(self, batch, batch_idx) -> None:
            super().training_step(batch, batch_idx)
            if batch_idx == 3:
                raise RuntimeError("broken on purpose")

    gan = Broken()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        trained(DynamicSparsityCallback(0.25), gan=gan)
    assert hooks(gan) == 0


class BrokenUpdate(Explore):
    def begin(self, training) -> None:
        raise RuntimeError("broken on purpose")


@dataclass(frozen=True, kw_only=True)
class BrokenMethod(SDST):
    def mask_updates(self) -> tuple[Explore, ...]:
        return (BrokenUpdate("generator", self.drop_fraction),)


@pytest.mark.parametrize("reason", ["method", "warning"])
def test_hooks_are_gone_after_a_start_that_fails(reason) -> None:
    gan = ToyGAN()
    networks = gan.networks()
    betas = (0.5, 0.999) if reason == "warning" else (0.0, 0.9)  # of too large steps
    optimizers = [Adam(network.parameters(), betas=betas) for network in networks]
    method = "ddst" if reason == "warning" else BrokenMethod(generator_density=0.25)
    density = {"generator_density": 0.25} if reason == "warning" else {}
    names = [set(network.state_dict()) for network in networks]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, UserWarning)):
            sparsify(*networks, optimizers, length=10, method=method, **density)
    assert hooks(gan) == 0
    assert not any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in optimizers)
    assert [set(network.state_dict()) for network in networks] == names


@pytest.mark.parametrize("ends", ["on_fit_end", "on_exception"])
def test_hooks_are_gone_and_results_written_where_a_logger_fails_at_the_end(ends, tmp_path) -> None:
    class Full(CSVLogger):
        is_full = False

        def log_metrics(self, metrics, step=None) -> None:
            if self.is_full:
                raise OSError("no space left on device")

    class Ends(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            trainer.logger.is_full = True
            if ends == "on_exception":
                raise RuntimeError("broken on purpose")

    gan = ToyGAN()
    with pytest.raises(OSError, match="no space left"):
        trained(DynamicSparsityCallback(0.25), Ends(), gan=gan, logger=Full(tmp_path))
    assert hooks(gan) == 0
    assert list(tmp_path.rglob("results.json"))


def test_scalars_have_names_and_generator_updates_as_steps(tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.25, interval=5, bounds=(0.0, 1e-9), probe_interval=1)
    trained(sparsity, epochs=2, folder=tmp_path, log_every_n_steps=2)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {f"balance/{part}" for part in ("ratio", "alpha", "beta", "real", "fake")} - {
        "balance/ratio" for _, decision in sparsity.decisions if decision.action == "undecided"
    }
    assert tags >= {
        "density/generator",
        "density/generator_target",
        "density/discriminator",
        "density/discriminator_target",
        "layer_density/generator.0.weight",
        "layer_density/discriminator.3.parametrizations.weight.original",
        "decision/grow",
        "decision/undecided",
        "flops/training_ratio",
    }
    density = events.Scalars("density/discriminator")
    assert [event.step for event in density] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    assert density[-1].value == pytest.approx(sparsity.discriminator_density)
    alpha, beta = (events.Scalars(f"balance/{part}")[-1].value for part in ("alpha", "beta"))
    assert sparsity.balance.alpha == pytest.approx(alpha)
    assert sparsity.balance.beta == pytest.approx(beta)
    reasons = events.Tensors("decision/reason/text_summary")
    assert [event.step for event in reasons] == [5, 10, 15, 20]
    assert sparsity.decisions[-1][1].reason.encode() in reasons[-1].tensor_proto.string_val[0]


def test_a_checkpoint_loads_into_the_plain_module_and_brings_the_sparsity_back(tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.25, interval=5, explore_interval=3, bounds=(0.0, 1e-9))
    gan = trained(sparsity, epochs=2, folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    ToyGAN().load_state_dict(checkpoint["state_dict"])

    resumed = DynamicSparsityCallback(0.25, interval=5, explore_interval=3, bounds=(0.0, 1e-9))
    toy_trainer(resumed, epochs=2).fit(again := ToyGAN(), toy_data(), ckpt_path=path)  # nothing is left to do
    assert resumed.generator_updates == 20
    assert resumed.decisions == sparsity.decisions
    assert resumed.balance == sparsity.balance
    assert resumed.flops_ratio == sparsity.flops_ratio
    assert resumed.plan == sparsity.plan
    for role in ("generator", "discriminator"):
        expected = sparsity.masks(role)
        assert all(torch.equal(mask, expected[name]) for name, mask in resumed.masks(role).items())
    expected = gan.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_densities_and_masks_of_a_checkpoint_can_be_read_where_nothing_is_trained(tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.25, 0.5)
    gan = trained(sparsity, folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    gan.validation_step = lambda batch, batch_idx: None
    read = DynamicSparsityCallback(0.1)
    toy_trainer(read).validate(gan, toy_data(), ckpt_path=path, verbose=False)
    assert (read.generator_density, read.discriminator_density) == (0.25, sparsity.discriminator_density)
    assert read.masks("generator").keys() == sparsity.masks("generator").keys()


def test_fitting_resumes_where_it_ended() -> None:
    sparsity = DynamicSparsityCallback(0.25, interval=5, explore_interval=3)
    gan = trained(sparsity)
    masks = {name: mask.clone() for name, mask in sparsity.masks("generator").items()}
    toy_trainer(sparsity, epochs=1).fit(gan, toy_data())
    assert sparsity.generator_updates == 20
    kept = sum(int((masks[name] & mask).sum()) for name, mask in sparsity.masks("generator").items())
    assert kept > 0.5 * 192  # explored on, not drawn anew
