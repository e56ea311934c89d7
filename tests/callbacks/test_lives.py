"""One callback in several fits, evaluations and resumed runs; and a world that changes under it."""

import copy
import io
import pickle
import re
import warnings
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LambdaCallback, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA
from lightning_ddst.methods import Plan


def fit(sparsity, gan=None, epochs=2, ckpt_path=None, **settings):
    gan = gan or ToyGAN()
    toy_trainer(sparsity, epochs=epochs, **settings).fit(gan, toy_data(), ckpt_path=ckpt_path)
    return gan


def saved_run(folder, epochs=2, **settings):
    sparsity = DynamicSparsityCallback(0.25, **settings)
    trainer = toy_trainer(sparsity, epochs=epochs, folder=folder)
    trainer.fit(ToyGAN(), toy_data())
    trainer.save_checkpoint(folder / "last.ckpt")
    return sparsity, folder / "last.ckpt"


# ---- fits ----------------------------------------------------------------------------------------------


def test_the_length_of_a_smoke_test_does_not_stay():
    sparsity = DynamicSparsityCallback(0.25)
    gan = ToyGAN()
    toy_trainer(sparsity, fast_dev_run=4).fit(gan, toy_data())  # 4 steps of 2 optimizers
    assert sparsity.generator_updates == 2
    fit(sparsity, gan, epochs=10)
    assert sparsity.generator_updates == 102
    assert sparsity.plan == Plan(10, 5, 1, 102)
    assert sparsity.networks()["generator"].coverage > 0.25  # it explored


def test_a_second_fit_knows_its_length_before_its_first_update():
    class Planned(Callback):
        def __init__(self):
            self.plans = []

        def on_train_batch_start(self, *_):
            self.plans.append(sparsity.plan.updates)

    sparsity, gan = DynamicSparsityCallback(0.25, interval=10, explore_interval=5), ToyGAN()
    toy_trainer(sparsity, epochs=2).fit(gan, toy_data(9))
    for epochs, length in ((3, 18 + 27), (1, 18 + 27 + 9)):
        planned = Planned()
        toy_trainer(sparsity, planned, epochs=epochs).fit(gan, toy_data(9))
        assert set(planned.plans) == {length}


def test_a_second_fit_after_an_exception_counts_whole_epochs():
    class Broken(ToyGAN):
        breaks = True

        def training_step(self, batch, batch_idx):
            if self.breaks and self.trainer.current_epoch == 1 and batch_idx == 5:
                raise RuntimeError("broken on purpose")
            super().training_step(batch, batch_idx)

    sparsity, gan = DynamicSparsityCallback(0.25, interval=10, explore_interval=5), Broken()
    trainer = toy_trainer(sparsity, epochs=3)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(gan, toy_data())
    gan.breaks = False
    planned = []
    trainer.callbacks.append(LambdaCallback(on_train_batch_start=lambda *_: planned.append(sparsity.plan.updates)))
    trainer.fit(gan, toy_data())
    assert set(planned) == {15 + 20} == {sparsity.generator_updates}


def test_a_second_fit_that_is_limited_by_time_waits_for_a_rate(recwarn):
    sparsity, gan = DynamicSparsityCallback(0.25, method="imp"), ToyGAN()
    toy_trainer(sparsity, epochs=2).fit(gan, toy_data())
    toy_trainer(sparsity, epochs=-1, max_time={"seconds": 1}).fit(gan, toy_data())
    assert sparsity.plan.updates is not None


def test_another_module_starts_anew():
    sparsity = DynamicSparsityCallback(0.25, interval=5)
    fit(sparsity)
    fit(sparsity, epochs=1)
    assert sparsity.generator_updates == 10
    assert [update for update, _ in sparsity.decisions] == [5, 10]


@pytest.mark.parametrize("evaluation", ["test", "validate"])
def test_an_evaluated_checkpoint_leaves_what_was_learnt_and_no_fit_resumes_it(evaluation, tmp_path):
    class Evaluated(ToyGAN):
        def validation_step(self, batch, batch_idx):
            pass

        test_step = validation_step

    _, checkpoint = saved_run(tmp_path, interval=4)
    sparsity = DynamicSparsityCallback(0.25, interval=5)
    gan = Evaluated()
    fit(sparsity, gan)
    decisions, flops, balance = sparsity.decisions, sparsity.flops_ratio, sparsity.balance
    trainer = toy_trainer(sparsity)
    getattr(trainer, evaluation)(gan, toy_data(), ckpt_path=checkpoint, verbose=False)
    assert (sparsity.decisions, sparsity.flops_ratio, sparsity.balance) == (decisions, flops, balance)
    fresh = DynamicSparsityCallback(0.25, interval=5)
    getattr(toy_trainer(fresh), evaluation)(Evaluated(), toy_data(), ckpt_path=checkpoint, verbose=False)
    assert fresh.generator_updates == 20  # which can be read
    fit(fresh, epochs=1)
    assert fresh.generator_updates == 10


def evaluated(sparsity, gan, checkpoint):
    class Evaluated(ToyGAN):
        def validation_step(self, batch, batch_idx):
            pass

    gan.__class__ = Evaluated
    toy_trainer(sparsity).validate(gan, toy_data(), ckpt_path=checkpoint, verbose=False)


def test_a_fit_of_weights_that_an_evaluation_loaded_is_rejected(tmp_path):
    _, checkpoint = saved_run(tmp_path, interval=4, seed=1)
    sparsity = DynamicSparsityCallback(0.25, interval=5, seed=2)
    gan = fit(sparsity)
    evaluated(sparsity, gan, checkpoint)
    with pytest.raises(ValueError, match=r"ckpt_path.*masks"):
        fit(sparsity, gan, epochs=1)
    assert sparsity.generator_updates == 20
    fit(DynamicSparsityCallback(0.25), gan, epochs=1)


@pytest.mark.parametrize("interval", [5, 100])
def test_an_evaluation_of_the_last_checkpoint_changes_nothing(interval, tmp_path):
    sparsity = DynamicSparsityCallback(0.25, interval=interval)
    trainer = toy_trainer(sparsity, epochs=2)
    gan = ToyGAN()
    trainer.fit(gan, toy_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    evaluated(sparsity, gan, tmp_path / "last.ckpt")
    fit(sparsity, gan, epochs=1)
    assert sparsity.generator_updates == 30


def test_a_rejected_checkpoint_does_not_go_on_with_its_weights(tmp_path):
    _, checkpoint = saved_run(tmp_path, interval=4, seed=1)
    sparsity = DynamicSparsityCallback(0.5, interval=5)
    gan = fit(sparsity)
    with pytest.raises(ValueError, match=r"generator_density=0\.5"):
        fit(sparsity, gan, epochs=4, ckpt_path=checkpoint)
    with pytest.raises(ValueError, match="ckpt_path"):
        fit(sparsity, gan)
    assert sparsity.generator_updates == 20


def test_a_fit_of_weights_that_something_else_wrote_is_rejected():
    sparsity = DynamicSparsityCallback(0.25)
    gan = fit(sparsity)
    gan.load_state_dict(ToyGAN().state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        fit(sparsity, gan)


def test_a_callback_that_read_a_checkpoint_tells_its_decisions_and_measurements(tmp_path):
    trained_callback, checkpoint = saved_run(tmp_path, interval=4)
    sparsity = DynamicSparsityCallback(0.25, interval=4)
    evaluated(sparsity, ToyGAN(), checkpoint)
    assert sparsity.generator_updates == sparsity.measurements == 20
    assert sparsity.decisions == trained_callback.decisions
    assert [update for update, _ in sparsity.decisions] == [4, 8, 12, 16, 20]


def test_a_rejected_module_leaves_the_run_before_it():
    class OtherNames(ToyGAN):
        def __init__(self):
            super().__init__(names=("one", "other"))

    sparsity = DynamicSparsityCallback(0.25, interval=5)
    gan = fit(sparsity)
    with pytest.raises(ValueError, match="no generator was found"):
        fit(sparsity, OtherNames())
    assert len(sparsity.flops_ledger) == 4
    fit(sparsity, gan, epochs=1)
    assert sparsity.generator_updates == 30


def test_a_module_that_was_rejected_at_first_starts_anew():
    sparsity = DynamicSparsityCallback(0.25, interval=5)
    fit(sparsity)
    other = ToyGAN()
    with torch.no_grad():
        other.generator[0].bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        fit(sparsity, other)
    assert (sparsity.generator_updates, sparsity.decisions, sparsity.measurements) == (0, [], 0)
    with torch.no_grad():
        other.generator[0].bias[0] = 0.0
    fit(sparsity, other, epochs=1)
    assert sparsity.generator_updates == 10


def test_masks_that_are_drawn_again_start_anew():
    sparsity = DynamicSparsityCallback(0.25, interval=5)
    gan = fit(sparsity)
    sparsity.attach(gan)
    assert (sparsity.generator_updates, sparsity.decisions) == (0, [])
    fit(sparsity, gan, epochs=1)
    assert sparsity.generator_updates == 10


@pytest.mark.parametrize("place", ["configure_optimizers", "validation_step", "on_train_start"])
def test_a_fit_after_a_resumed_one_that_failed_starts_anew(place, tmp_path):
    class Failing(ToyGAN):
        def validation_step(self, batch, batch_idx):
            pass

        def fail(self, *args):
            raise KeyError(place)

    _, checkpoint = saved_run(tmp_path, interval=5)
    sparsity = DynamicSparsityCallback(0.25, interval=5)
    gan = Failing()
    setattr(gan, place, gan.fail)
    with pytest.raises(KeyError, match=place):
        toy_trainer(sparsity, epochs=4).fit(gan, toy_data(), toy_data(), ckpt_path=checkpoint)
    states = []

    class Watch(Callback):
        def on_train_start(self, *args):
            states.append(torch.get_rng_state())

    for each in (sparsity, DynamicSparsityCallback(0.25)):
        torch.manual_seed(3)
        toy_trainer(each, Watch(), epochs=1).fit(ToyGAN(), toy_data())
        assert each.generator_updates == 10
    assert torch.equal(*states)  # not the checkpoint's


# ---- resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sdst", "ddst", "ramp"])
def test_with_more_epochs_schedules_extend_over_the_new_length(method, tmp_path):
    _, checkpoint = saved_run(tmp_path, method=method)
    sparsity = DynamicSparsityCallback(0.25, method=method)
    masks = []

    class Watch(Callback):
        def on_train_batch_end(self, *args):
            masks.append(sparsity.networks()["generator"].checksum)

    before = torch.load(checkpoint)["callbacks"]["DynamicSparsityCallback"]["networks"]["discriminator"]["target"]
    toy_trainer(sparsity, Watch(), epochs=6).fit(ToyGAN(), toy_data(), ckpt_path=checkpoint)
    assert sparsity.plan.updates == 60
    assert len(set(masks)) > 1  # the generator explores again
    densities = [before, *(decision.density for update, decision in sparsity.decisions if update > 20)]
    assert all(abs(later - earlier) <= 0.16 for earlier, later in pairwise(densities))


def test_the_new_length_counts_from_the_first_update_on(tmp_path):
    _, checkpoint = saved_run(tmp_path, method="ramp", interval=1, max_discriminator_density=0.5)
    sparsity = DynamicSparsityCallback(0.25, method="ramp", interval=1, max_discriminator_density=0.5)
    densities = []

    class Watch(Callback):
        def on_train_batch_end(self, *args):
            densities.append((sparsity.plan.updates, sparsity.decisions[-1][1].reason))

    toy_trainer(sparsity, Watch(), epochs=4).fit(ToyGAN(), toy_data(), ckpt_path=checkpoint)
    assert densities[0] == (40, "52% of the run is done")  # the 21st of 40 updates


@pytest.mark.parametrize(
    ("saves", "size", "updates"),
    [
        ("on_train_epoch_end", 16, 20 + 2 * 5),
        ("on_train_epoch_end", 4, 20 + 2 * 20),
        ("on_train_batch_end", 16, 20 + 2 * 5),
        ("on_train_batch_end", 8, 40),
        ("on_validation_end", 8, 40),
    ],
)
def test_the_length_of_a_run_that_resumes_with_another_batch_size(saves, size, updates, tmp_path):
    class Validated(ToyGAN):
        def validation_step(self, batch, batch_idx):
            pass

    class Save(Callback):
        def save(self, trainer, *args):
            if trainer.fit_loop.total_batch_idx == 19:
                trainer.save_checkpoint(tmp_path / "second.ckpt")

    class Watch(Callback):
        def on_train_batch_start(self, *args):
            planned.append(sparsity.plan.updates)

    setattr(Save, saves, Save.save)
    planned = []
    toy_trainer(DynamicSparsityCallback(0.25), Save(), epochs=2).fit(Validated(), toy_data(), toy_data(1))
    sparsity = DynamicSparsityCallback(0.25)
    trainer = toy_trainer(sparsity, Watch(), epochs=4)
    trainer.fit(Validated(), toy_data(80 // size, size), toy_data(1), ckpt_path=tmp_path / "second.ckpt")
    assert sparsity.generator_updates == updates
    assert planned == [updates] * (updates - 20)


@pytest.mark.parametrize(
    ("argument", "value"), [("interval", 7), ("explore_interval", 3), ("bounds", (0.1, 0.2)), ("growth", "random")]
)
def test_other_settings_take_effect_with_one_warning(argument, value, tmp_path):
    _, checkpoint = saved_run(tmp_path)
    sparsity = DynamicSparsityCallback(0.25, **{argument: value})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(sparsity, epochs=4, ckpt_path=checkpoint)
    said = [str(warning.message) for warning in caught if "other settings" in str(warning.message)]
    assert len(said) == 1
    assert f"{argument}=" in said[0]
    assert "before" in said[0]
    if hasattr(sparsity.plan, argument):
        assert getattr(sparsity.plan, argument) == value


def test_the_same_settings_say_nothing(tmp_path):
    _, checkpoint = saved_run(tmp_path, bounds=(0.3, 0.4), layer_densities={"generator.0": 0.5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            DynamicSparsityCallback(0.25, bounds=(0.3, 0.4), layer_densities={"generator.0": 0.5}),
            epochs=4,
            ckpt_path=checkpoint,
        )
    assert not [str(warning.message) for warning in caught if "settings" in str(warning.message)]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("generator_density", 0.6),
        ("granularity", "channel"),
        ("dense_layers", ["generator.0"]),
        ("layer_densities", {"generator.0": 0.5}),
    ],
)
def test_other_masked_weights_are_rejected_before_training(argument, value, tmp_path):
    _, checkpoint = saved_run(tmp_path)
    sparsity = DynamicSparsityCallback(**{"generator_density": 0.25} | {argument: value})
    with pytest.raises(ValueError, match=f"{argument}=.*checkpoint"):
        fit(sparsity, epochs=4, ckpt_path=checkpoint)
    assert sparsity.generator_updates == 0


@pytest.mark.parametrize(
    ("settings", "argument", "value", "density"),
    [
        ({"method": "ramp", "max_discriminator_density": 0.5}, "max_discriminator_density", 0.4, 0.5),
        ({"bounds": (0, 1e-9), "max_discriminator_density": 0.5}, "max_discriminator_density", 0.4, 0.5),
        ({"bounds": (50, 60), "min_discriminator_density": 0.1}, "min_discriminator_density", 0.2, 0.1),
        ({"bounds": (50, 60), "min_discriminator_density": 0.1}, "min_discriminator_density", None, 0.1),
    ],
)
def test_limits_that_exclude_the_present_density_are_rejected(settings, argument, value, density, tmp_path):
    settings = settings | {"interval": 1}
    saved, checkpoint = saved_run(tmp_path, **settings)
    assert saved.networks()["discriminator"].target == density
    with pytest.raises(ValueError, match=f"{argument}=.* has the density {density}"):
        fit(DynamicSparsityCallback(0.25, **settings | {argument: value}), epochs=4, ckpt_path=checkpoint)
    resumed = DynamicSparsityCallback(0.25, **settings)
    fit(resumed, epochs=4, ckpt_path=checkpoint)
    assert resumed.generator_updates == 40


# ---- a world that changes ------------------------------------------------------------------------------


def test_optimizers_made_anew_are_followed():
    class Reset(ToyGAN):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.trainer.strategy.setup_optimizers(self.trainer)

    sparsity = DynamicSparsityCallback(0.25, interval=5)
    gan = fit(sparsity, Reset(), epochs=5)
    assert sparsity.generator_updates == 50
    assert [update for update, _ in sparsity.decisions] == list(range(5, 51, 5))
    parameters = dict(gan.named_parameters())
    for role in ("generator", "discriminator"):
        assert not any(parameters[name][~mask].any() for name, mask in sparsity.masks(role).items())


def test_a_network_that_is_replaced_between_two_fits_is_named():
    sparsity = DynamicSparsityCallback(0.25)
    gan = fit(sparsity)
    gan.generator = ToyGAN().generator
    with pytest.raises(RuntimeError, match=r"generator's weight '0\.weight' was replaced"):
        fit(sparsity, gan)


@pytest.mark.parametrize("change", ["added", "replaced", "written", "network"])
def test_other_changes_stop_the_run_naming_the_weight(change):
    class Changing(ToyGAN):
        def on_train_epoch_end(self):
            if self.current_epoch == 1 and change == "added":
                self.generator.add_module("late", nn.Linear(PIXELS, PIXELS))
            elif self.current_epoch == 1 and change == "replaced":
                self.generator[0].weight = nn.Parameter(torch.ones(32, LATENT))
            elif self.current_epoch == 1 and change == "network":
                self.generator = ToyGAN().generator
                self.trainer.strategy.setup_optimizers(self.trainer)
            elif self.current_epoch == 1:
                with torch.no_grad():
                    self.generator[0].weight.add_(1)

    with pytest.raises(RuntimeError, match=r"'?(late\.weight|0\.weight)'?"):
        fit(DynamicSparsityCallback(0.25), Changing(), epochs=4)


class OneOptimizer(ToyGAN):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        (real,) = batch
        generator, discriminator = self.networks()
        fake = generator(torch.randn(len(real), LATENT)).detach()
        loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()
        for each in (loss, -discriminator(generator(torch.randn(len(real), LATENT))).mean()):
            optimizer.zero_grad()
            self.manual_backward(each)
            optimizer.step()

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=1e-2, betas=(0.0, 0.9))


@pytest.mark.parametrize("other", [lambda: StochasticWeightAveraging(1e-2), lambda: ModelPruning("l1_unstructured")])
def test_other_callbacks_that_write_weights_are_rejected(other):
    callback = other()
    with pytest.raises(ValueError, match=type(callback).__name__):
        toy_trainer(DynamicSparsityCallback(0.25), callback).fit(OneOptimizer(), toy_data())


class Tuned(ToyGAN):
    batch_size = 2

    def train_dataloader(self):
        return toy_data(40, self.batch_size)


def test_a_run_starts_anew_after_a_tuner_has_tried_batch_sizes(tmp_path):
    sparsity, gan = DynamicSparsityCallback(0.25, interval=5), Tuned()
    trainer = toy_trainer(sparsity, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(gan, steps_per_trial=3, max_trials=2)
    assert sparsity.masks("generator") == {}
    trainer.fit(gan)
    assert sparsity.generator_updates == sparsity.measurements == 40
    assert [update for update, _ in sparsity.decisions] == [5, 10, 15, 20, 25, 30, 35, 40]


def test_a_run_starts_anew_after_a_callback_has_tried_batch_sizes(tmp_path):
    sparsity, gan = DynamicSparsityCallback(0.25), Tuned()
    finder = BatchSizeFinder(steps_per_trial=3, max_trials=2)
    toy_trainer(sparsity, finder, GeneratorEMA(), default_root_dir=tmp_path).fit(gan)
    assert sparsity.generator_updates == sparsity.plan.updates == 40


def test_a_checkpoint_of_a_dense_run_is_rejected_with_a_tuner_too(tmp_path):
    trainer = toy_trainer()
    trainer.fit(Tuned())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    sparsity = DynamicSparsityCallback(0.25)
    with pytest.raises(ValueError, match="holds no masks"):
        toy_trainer(sparsity, BatchSizeFinder(), epochs=2).fit(Tuned(), ckpt_path=tmp_path / "dense.ckpt")


def test_a_lazy_layer_is_named():
    gan = ToyGAN()
    gan.generator[3] = nn.LazyLinear(PIXELS)
    with pytest.raises(ValueError, match="Layer '3' is lazy"):
        fit(DynamicSparsityCallback(0.25), gan)


def test_a_module_may_have_extra_state_that_is_no_tensor():
    class WithState(ToyGAN):
        def get_extra_state(self):
            return {"version": 2}

    sparsity = DynamicSparsityCallback(0.25)
    fit(sparsity, WithState())
    assert sparsity.generator_updates == 20


# ---- shared, split and frozen parameters ---------------------------------------------------------------


def test_a_shared_layer_is_rejected_with_both_names():
    gan = ToyGAN()
    gan.discriminator = nn.Sequential(nn.Linear(PIXELS, 32), gan.generator[3], nn.Linear(PIXELS, 1))
    with pytest.raises(ValueError, match=r"generator's '3\.weight' is the discriminator's '1\.weight'"):
        trained(DynamicSparsityCallback(0.25, method="static", probe_interval=None), gan=gan)


def test_a_shared_layer_that_is_frozen_stays_as_it_is():
    gan = ToyGAN()
    encoder = nn.Linear(PIXELS, PIXELS).requires_grad_(False)
    gan.generator.append(encoder)
    gan.discriminator = nn.Sequential(encoder, nn.Linear(PIXELS, 1))
    before = encoder.weight.clone()
    sparsity = DynamicSparsityCallback(0.25)
    fit(sparsity, gan)
    assert torch.equal(encoder.weight, before)
    assert sparsity.generator_updates == sparsity.measurements == 20
    assert "generator.4.weight" not in sparsity.masks("generator")
    assert "discriminator.0.weight" not in sparsity.masks("discriminator")


def test_weights_that_are_written_to_after_the_last_step_are_named():
    class Averaged(ToyGAN):
        def on_train_end(self):
            nn.init.ones_(self.discriminator[0].parametrizations.weight.original)

    with pytest.warns(UserWarning, match="after the last training step: .* of the discriminator: 0.parametrizations"):
        fit(DynamicSparsityCallback(0.25, method="sdst"), Averaged())


def test_a_layer_that_comes_with_new_optimizers_is_named():
    class Growing(ToyGAN):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.generator.append(nn.Linear(PIXELS, PIXELS))
                self.trainer.strategy.setup_optimizers(self.trainer)

    with pytest.raises(RuntimeError, match=r"weights that came since it was masked .*: generator\.4\.weight"):
        fit(DynamicSparsityCallback(0.25), Growing())


def test_a_generator_that_is_never_updated_is_told_of():
    class Discriminates(ToyGAN):
        def training_step(self, batch, batch_idx):
            _, optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(-self.discriminator(batch[0]).mean())
            optimizer.step()

    sparsity = DynamicSparsityCallback(0.25)
    with pytest.warns(UserWarning, match="no optimizer step was seen that had gradients of the generator"):
        fit(sparsity, Discriminates())
    assert sparsity.generator_updates == 0


class TwoGeneratorOptimizers(ToyGAN):
    """Each updates a layer of the generator; `together` in one batch, or in turn."""

    together = True

    def training_step(self, batch, batch_idx):
        first, second, discriminator_optimizer = self.optimizers()
        generator, discriminator = self.networks()
        (real,) = batch
        fake = generator(torch.randn(len(real), LATENT)).detach()
        loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(-discriminator(generator(torch.randn(len(real), LATENT))).mean())
        for number, optimizer in enumerate((first, second)):
            if self.together or batch_idx % 2 == number:
                optimizer.step()

    def configure_optimizers(self):
        generator, discriminator = self.networks()
        parts = (generator[:2], generator[2:], discriminator)
        return [Adam(part.parameters(), lr=1e-2, betas=(0.0, 0.9)) for part in parts]


@pytest.mark.parametrize("together", [True, False])
def test_steps_of_several_generator_optimizers_in_a_batch_are_one_update(together):
    gan = TwoGeneratorOptimizers()
    gan.together = together
    growth = "momentum" if together else "random"
    sparsity = DynamicSparsityCallback(0.25, interval=5, explore_interval=3, growth=growth)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*postponed")
        fit(sparsity, gan, epochs=2)
    assert sparsity.generator_updates == sparsity.measurements == 20
    assert sparsity.networks()["generator"].coverage > 0.25


def test_a_frozen_layer_stays_dense_outside_the_density():
    gan = ToyGAN()
    gan.generator[0].weight.requires_grad_(False)
    frozen = gan.generator[0].weight.clone()
    sparsity = DynamicSparsityCallback(0.25, explore_interval=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*postponed")
        fit(sparsity, gan)
    assert torch.equal(gan.generator[0].weight, frozen)
    assert list(sparsity.masks("generator")) == ["generator.3.weight"]
    assert sparsity.generator_density == 0.25
    assert sparsity.networks()["generator"].coverage > 0.25


class FrozenLater(ToyGAN):
    """A layer of the generator is frozen in epochs 1 and 2."""

    def on_train_epoch_start(self):
        self.generator[0].weight.requires_grad_(self.current_epoch not in (1, 2))
        if self.current_epoch == 1:
            self.frozen = self.generator[0].weight.clone()
        if self.current_epoch == 3:
            self.thawed = self.generator[0].weight.clone()


@pytest.mark.parametrize("growth", ["gradient", "random", "momentum"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_layer_that_is_frozen_later_keeps_its_weights_and_the_others_explore(growth, scope):
    seed_everything(0, verbose=False)
    sparsity, watched = DynamicSparsityCallback(0.25, explore_interval=3, growth=growth, scope=scope), {}

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, module):
            watched[trainer.current_epoch] = {name: mask.clone() for name, mask in sparsity.masks("generator").items()}

    gan = FrozenLater()
    with pytest.warns(UserWarning, match=r"generator were frozen since they were masked, '0\.weight'") as said:
        toy_trainer(sparsity, Watch(), epochs=5).fit(gan, toy_data())
    assert sum("frozen" in str(each.message) for each in said) == 1
    assert not any("postponed" in str(each.message) for each in said)
    assert torch.equal(gan.frozen, gan.thawed)
    changed = {
        epoch: {name for name in watched[0] if not torch.equal(watched[epoch - 1][name], watched[epoch][name])}
        for epoch in (1, 2, 3)
    }
    assert changed[1] == changed[2] == {"generator.3.weight"}
    assert "generator.0.weight" in changed[3]
    assert sparsity.networks()["generator"].active == round(0.25 * sparsity.networks()["generator"].total)


def test_growth_collects_gradients_over_batches_of_several_generator_optimizers():
    gan = TwoGeneratorOptimizers()
    gan.together = False
    sparsity = DynamicSparsityCallback(0.25, explore_interval=4, growth="gradient")
    with pytest.warns(UserWarning, match="generator's mask is postponed: at generator update 4 ") as said:
        fit(sparsity, gan, epochs=2)
    assert sum("postponed" in str(each.message) for each in said) == 1
    assert sparsity.networks()["generator"].coverage > 0.25


def test_a_layer_that_is_frozen_between_two_fits_keeps_its_mask():
    gan, sparsity = ToyGAN(), DynamicSparsityCallback(0.25, explore_interval=3)
    fit(sparsity, gan)
    gan.generator[0].weight.requires_grad_(False)
    weight, mask = gan.generator[0].weight.clone(), sparsity.masks("generator")["generator.0.weight"].clone()
    with pytest.warns(UserWarning, match="frozen since they were masked"):
        fit(sparsity, gan)
    assert torch.equal(gan.generator[0].weight, weight)
    assert torch.equal(sparsity.masks("generator")["generator.0.weight"], mask)


def test_a_layer_that_thaws_between_two_fits_is_named(tmp_path):
    gan = ToyGAN()
    gan.generator[0].requires_grad_(False)
    sparsity = DynamicSparsityCallback(0.25)
    trainer = toy_trainer(sparsity)
    trainer.fit(gan, toy_data())
    trainer.save_checkpoint(tmp_path / "frozen.ckpt")
    gan.generator[0].requires_grad_(True)
    for callback, ckpt_path in ((sparsity, None), (DynamicSparsityCallback(0.25), tmp_path / "frozen.ckpt")):
        with pytest.raises(ValueError, match=r"none of '0\.weight': frozen, or not there"):
            fit(callback, gan, ckpt_path=ckpt_path)
    gan.generator[0].requires_grad_(False)
    fit(sparsity, gan)
    assert sparsity.generator_updates == 30
    gan.generator[0].requires_grad_(True)
    again = DynamicSparsityCallback(0.25, initial_masks="magnitude")
    fit(again, gan)
    assert again.networks()["generator"].maskable_share() == 1


@pytest.mark.parametrize("method", ["ddst", "ramp"])
def test_a_layer_that_thaws_with_new_optimizers_stays_dense(method):
    class Thawing(ToyGAN):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.generator[0].requires_grad_(True)
                self.trainer.strategy.setup_optimizers(self.trainer)

    gan = Thawing()
    gan.generator[0].requires_grad_(False)
    before = gan.generator[0].weight.clone()
    sparsity = DynamicSparsityCallback(0.25, method=method, interval=5)
    fit(sparsity, gan, epochs=3)
    assert sparsity.generator_updates == sparsity.measurements == sparsity.plan.updates == 30
    assert [update for update, _ in sparsity.decisions] == [5, 10, 15, 20, 25, 30]
    assert list(sparsity.masks("generator")) == ["generator.3.weight"]
    assert not torch.equal(gan.generator[0].weight, before)
    assert (gan.generator[0].weight != 0).all()
    assert not gan.generator[3].weight[~sparsity.masks("generator")["generator.3.weight"]].any()


def test_a_network_that_is_frozen_as_a_whole_for_the_moment_is_masked():
    gan = ToyGAN()
    gan.discriminator.requires_grad_(False)
    sparsity = DynamicSparsityCallback(0.25)
    sparsity.attach(gan)
    assert len(sparsity.masks("discriminator")) == 2


# ---- numbers -------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_at_the_start_are_named():
    gan = ToyGAN()
    with torch.no_grad():
        gan.generator[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"generator's '3\.weight'"):
        trained(DynamicSparsityCallback(0.25), gan=gan)


def test_a_buffer_that_is_nan_at_the_start_is_named():
    gan = ToyGAN()
    gan.generator[1].running_mean[0] = float("nan")
    with pytest.raises(ValueError, match=r"generator's '1\.running_mean'"):
        trained(DynamicSparsityCallback(0.25), gan=gan)


def test_infinite_buffers_are_allowed():
    gan = ToyGAN()
    gan.generator.register_buffer("causal", torch.full((2, 2), float("-inf")))
    sparsity = DynamicSparsityCallback(0.25)
    fit(sparsity, gan)
    assert sparsity.generator_updates == 20


@pytest.mark.parametrize(
    "wrong", [{"seed": "a"}, {"seed": 1.5}, {"generator": 3}, {"discriminator": ["mpd", 1]}], ids=str
)
def test_arguments_of_other_types_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        DynamicSparsityCallback(0.25, **wrong)


def test_a_seed_of_numpy_is_the_same_seed():
    import numpy as np

    masks = []
    for seed in (3, np.int32(3)):
        sparsity = DynamicSparsityCallback(0.25, seed=seed)
        sparsity.attach(ToyGAN())
        masks.append(sparsity.masks("generator")["generator.0.weight"])
    assert torch.equal(*masks)


def test_an_empty_layer_is_left_out():
    gan = ToyGAN()
    gan.generator.add_module("empty", nn.Linear(0, 5))
    gan.generator.forward = lambda z: gan.generator[3](gan.generator[2](gan.generator[1](gan.generator[0](z))))
    sparsity = DynamicSparsityCallback(0.25)
    sparsity.attach(gan)
    assert len(sparsity.masks("generator")) == 2


def test_integers_and_floats_of_any_kind_are_taken():
    import numpy as np

    numbers = {"interval": np.int64(5), "probe_interval": np.int32(1), "bounds": (np.float32(0.25), np.float64(0.5))}
    layers = {"generator.0": np.float64(0.5)}
    sparsity = DynamicSparsityCallback(np.float64(0.25), delta=np.float64(0.125), layer_densities=layers, **numbers)
    fit(sparsity)
    assert sparsity.generator_density == 0.25
    plain = {"interval": 5, "probe_interval": 1, "bounds": (0.25, 0.5), "delta": 0.125}
    same = DynamicSparsityCallback(0.25, layer_densities={"generator.0": 0.5}, **plain)
    fit(same)
    assert sparsity.state_dict()["settings"] == same.state_dict()["settings"]
    file = io.BytesIO()
    torch.save(sparsity.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["training"]["plan"]["interval"] == 5
    with pytest.raises(ValueError, match="generator_density='10%'"):
        DynamicSparsityCallback("10%")


def test_the_window_of_measurements_is_bounded():
    assert Plan(10**7, 5, 1).window == 10_000
    assert Plan(2**40, 5, 1).window == 10_000


@pytest.mark.parametrize("settings", [{}, {"probe_interval": 1}, {"probe_interval": 2**39, "explore_interval": 2**40}])
def test_a_huge_interval_costs_no_memory(settings, tmp_path):
    _, checkpoint = saved_run(tmp_path, interval=2**40, **settings)
    assert checkpoint.stat().st_size < 500_000
    window = torch.load(checkpoint, weights_only=True)["callbacks"]["DynamicSparsityCallback"]["training"]["window"]
    assert len(window["samples"]) <= 10_000
    sparsity = DynamicSparsityCallback(0.25, interval=2**40, **settings)
    fit(sparsity, epochs=3, ckpt_path=checkpoint)
    assert sparsity.generator_updates == 30
    assert sparsity.plan.interval == 2**40
    assert sparsity.decisions == []


def test_averages_follow_optimizers_made_anew():
    class Reset(ToyGAN):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    ema = GeneratorEMA(0.9)
    toy_trainer(DynamicSparsityCallback(0.25), ema, epochs=3).fit(Reset(), toy_data())
    assert ema.state_dict()["updates"] == 30


# ---- plain objects -------------------------------------------------------------------------------------


def test_a_callback_can_be_pickled_after_a_fit():
    sparsity = DynamicSparsityCallback(0.25, interval=5)
    gan = ToyGAN()
    gan.discriminator = nn.Sequential(
        nn.Linear(PIXELS, 32), nn.ReLU(), nn.Linear(32, 1)
    )  # torch pickles no spectral norm
    fit(sparsity, gan)
    again = pickle.loads(pickle.dumps(sparsity))
    assert again.decisions == sparsity.decisions
    assert again.flops_ratio == sparsity.flops_ratio
    assert all(torch.equal(mask, sparsity.masks("generator")[name]) for name, mask in again.masks("generator").items())
    fit(again, epochs=1)
    assert again.generator_updates == 10


@pytest.mark.parametrize("granularity", ["weight", "channel", "2:4"])
def test_a_copy_of_a_callback_and_its_module_goes_on_like_them(granularity):
    sparsity = DynamicSparsityCallback(0.5, method="sdst", granularity=granularity, explore_interval=2, seed=0)
    gan = ToyGAN()
    gan.discriminator = nn.Sequential(nn.Linear(PIXELS, 32), nn.ReLU(), nn.Linear(32, 1))
    fit(sparsity, gan)
    copies = [copy.deepcopy((sparsity, gan)), pickle.loads(pickle.dumps((sparsity, gan)))]
    for each, module in [(sparsity, gan), *copies]:
        torch.manual_seed(0)
        fit(each, module, epochs=1)
        assert each.generator_updates == 30
        assert each.networks()["generator"].checksum == sparsity.networks()["generator"].checksum
        assert all(torch.equal(value, gan.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("granularity", ["weight", "channel", "2:4"])
def test_a_copy_of_a_callback_with_masks_trains(granularity):
    sparsity = DynamicSparsityCallback(0.5, method="sdst", granularity=granularity, explore_interval=2)
    gan = ToyGAN()
    gan.discriminator = nn.Sequential(nn.Linear(PIXELS, 32), nn.ReLU(), nn.Linear(32, 1))
    sparsity.attach(gan)
    for make in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        each, module = make((sparsity, gan))
        fit(each, module)
        network = each.networks()["generator"]
        assert network.coverage > network.density
        assert network.active == sum(int(mask.sum()) for mask in network.masks.values())


def test_an_error_in_a_fit_of_a_copied_callback_is_not_hidden():
    class Failing(ToyGAN):
        def setup(self, stage):
            raise KeyError("setup")

    sparsity = DynamicSparsityCallback(0.25)
    fit(sparsity)
    with pytest.raises(KeyError, match="setup"):
        fit(copy.deepcopy(sparsity), Failing())


def make_module():
    return GANModule(*ToyGAN().networks(), latent_dim=LATENT)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6")
@pytest.mark.parametrize("make", [ToyGAN, make_module])
def test_a_compiled_module_says_that_operations_are_not_counted(make):
    sparsity = DynamicSparsityCallback(0.25)
    with pytest.warns(UserWarning, match="operations are not counted"):
        toy_trainer(sparsity, epochs=2).fit(torch.compile(make(), backend="eager"), toy_data())
    assert (sparsity.generator_updates, sparsity.flops_ratio) == (20, None)


def test_reentrant_checkpointing_is_named_as_the_cause():
    class Checkpointed(ToyGAN):
        def training_step(self, batch, batch_idx):
            (real,) = batch
            generator, discriminator = self.networks()
            optimizer, _ = self.optimizers()
            z = torch.randn(len(real), LATENT, requires_grad=True)
            loss = -discriminator(checkpoint(generator, z, use_reentrant=True)).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fit(DynamicSparsityCallback(0.25), Checkpointed())
