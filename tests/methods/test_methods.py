"""The methods that start dense, and the one without feedback, in real runs of the toy GAN."""

import re
import warnings
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, callbacks
from toys import ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, GeneratorEMA

# Maskable weights of the toy: 8*32 + 32*16 and 16*32 + 32*1.
GENERATOR_WEIGHTS = 768
DISCRIMINATOR_WEIGHTS = 544


class Watch(Callback):
    """Active weights of both networks and the weights themselves after every generator update."""

    def __init__(self, sparsity):
        self.sparsity = sparsity
        self.counts = []
        self.weights = []
        self.state = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.counts.append(tuple(network.active for network in self.sparsity.networks().values()))
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        self.state.append([len(optimizer.state) for optimizer in trainer.optimizers])
        for role in ("generator", "discriminator"):
            for name, mask in self.sparsity.masks(role).items():
                assert not self.weights[-1][name][~mask].any()


def watched(epochs=3, seed=0, **settings):
    """30 updates."""
    sparsity = DynamicSparsityCallback(**settings)
    watch = Watch(sparsity)
    trained(sparsity, watch, seed=seed, epochs=epochs)
    return sparsity, watch


def test_post_hoc_pruning_is_dense_training_then_one_pruning_by_magnitude():
    sparsity, watch = watched(generator_density=0.25, method="posthoc")
    assert watch.counts == [(768, 544)] * 19 + [(192, 544)] * 11  # at update 20 of 30, and D stays dense
    dense = watched(generator_density=1.0, method="dense")[1]
    for name, weight in watch.weights[18].items():
        assert torch.equal(weight, dense.weights[18][name])
    # What was pruned is what was smallest after the 20th update.
    masks, after = sparsity.masks("generator"), dense.weights[19]
    smallest_kept = min(float(after[name][mask].abs().min()) for name, mask in masks.items())
    largest_pruned = max(float(after[name][~mask].abs().max()) for name, mask in masks.items())
    assert largest_pruned <= smallest_kept
    ((update, decision),) = sparsity.decisions
    assert (update, decision.action) == (20, "prune")
    assert decision.reason == "round 1 of 1: pruned by magnitude, the generator to 0.25, the discriminator to 1"


def test_post_hoc_pruning_of_both_networks():
    _, watch = watched(generator_density=0.25, discriminator_density=0.5, method="posthoc")
    assert watch.counts[-1] == (192, 272)


def test_iterative_pruning_goes_back_to_the_initial_weights_in_every_round():
    gan = ToyGAN()
    initial = {name: p.detach().clone() for name, p in gan.named_parameters()}
    sparsity = DynamicSparsityCallback(0.5, method="imp", seed=1)
    began = []

    class Began(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if len(sparsity.decisions) > len(began):
                masks = sparsity.masks("generator") | sparsity.masks("discriminator")
                for name, parameter in pl_module.named_parameters():
                    expected = initial[name] * masks[name] if name in masks else initial[name]
                    torch.testing.assert_close(parameter, expected, rtol=0, atol=0)
                assert not any(optimizer.state for optimizer in trainer.optimizers)
                began.append(tuple(network.active for network in sparsity.networks().values()))

    trained(sparsity, Began(), gan=gan, epochs=3)
    # 30 updates, rounds at 6, 12, 18 and 24 to 0.8, 0.64, 0.512 and 0.5.
    assert [update for update, _ in sparsity.decisions] == [6, 12, 18, 24]
    assert began == [(614, 435), (492, 348), (393, 279), (384, 272)]
    assert sparsity.decisions[-1][1].reason.endswith(
        "the generator to 0.5, the discriminator to 0.5, and back to the initial weights"
    )


def test_the_ticket_of_iterative_pruning_keeps_what_was_largest_in_each_round():
    sparsity, watch = watched(generator_density=0.64, discriminator_density=1.0, method="imp")
    # 30 updates, rounds at 10 and 20: D stays dense.
    assert watch.counts == [(768, 544)] * 9 + [(614, 544)] * 10 + [(492, 544)] * 11
    assert {update for update, _ in sparsity.decisions} == {10, 20}


def test_the_average_restarts_with_the_weights():
    sparsity = DynamicSparsityCallback(0.64, method="imp")
    ema = GeneratorEMA(0.9)
    seen = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(
                (ema.state_dict()["updates"], ema.averages()["0.bias"], pl_module.generator[0].bias.detach().clone())
            )

    trained(sparsity, ema, Seen(), epochs=3)
    # The average takes in the weights of the update at which training goes back, once they are the initial ones.
    assert [updates for updates, _, _ in seen] == [*range(1, 10), *range(1, 11), *range(1, 12)]
    assert torch.equal(seen[9][1], seen[9][2])


class TwoPairs(ToyGAN):
    """A second pair, trained like the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = ToyGAN(), ToyGAN()
        del self.generator, self.discriminator

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for pair, own in ((self.first, optimizers[:2]), (self.second, optimizers[2:])):
            pair.optimizers, pair.manual_backward = lambda own=own: own, self.manual_backward
            pair.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return [*self.first.configure_optimizers(), *self.second.configure_optimizers()]


def test_only_the_average_of_the_rewound_pair_restarts():
    callbacks, averages = [], []
    for pair, method in (("first", "imp"), ("second", "static")):
        names = {"generator": f"{pair}.generator", "discriminator": f"{pair}.discriminator"}
        callbacks.append(DynamicSparsityCallback(0.64, method=method, **names))
        averages.append(GeneratorEMA(0.9, generator=names["generator"]))
    trained(*callbacks, *averages, gan=TwoPairs(), epochs=3)
    assert [ema.state_dict()["updates"] for ema in averages] == [11, 30]


def test_bounds_start_over_for_another_module():
    def reasons(sparsity):
        return [decision.reason for _, decision in sparsity.decisions]

    sparsity = DynamicSparsityCallback(0.25, bounds="auto", interval=5, explore_interval=5, seed=0)
    trained(sparsity, epochs=3)
    first = reasons(sparsity)
    assert "highest level" in "".join(first)
    trained(sparsity, epochs=3, seed=1)
    again = DynamicSparsityCallback(0.25, bounds="auto", interval=5, explore_interval=5, seed=0)
    trained(again, epochs=3, seed=1)
    assert reasons(sparsity) == reasons(again) != first


@pytest.mark.parametrize(
    ("before", "after"), [("ddst", "posthoc"), ("ddst", "dense"), ("dense", "posthoc"), ("ddst", "imp")]
)
def test_a_run_does_not_resume_with_another_method(tmp_path, before, after):
    trainer = toy_trainer(DynamicSparsityCallback(0.25, method=before), folder=tmp_path)
    trainer.fit(ToyGAN(), toy_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    later = toy_trainer(DynamicSparsityCallback(0.25, method=after), epochs=2)
    with pytest.raises(ValueError, match=f'of a run with method="{before}", and this one has method="{after}"'):
        later.fit(ToyGAN(), toy_data(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(("before", "after"), [((0.4, 0.5), "auto"), ("auto", (0.4, 0.5))])
def test_a_run_resumes_with_other_bounds(tmp_path, before, after):
    trainer = toy_trainer(DynamicSparsityCallback(0.25, bounds=before, interval=2), folder=tmp_path)
    trainer.fit(ToyGAN(), toy_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    sparsity = DynamicSparsityCallback(0.25, bounds=after, interval=2)
    toy_trainer(sparsity, epochs=3).fit(ToyGAN(), toy_data(), ckpt_path=tmp_path / "last.ckpt")
    reasons = [decision.reason for update, decision in sparsity.decisions if update > 10]
    assert ("highest level" in "".join(reasons)) == (after == "auto")


def test_a_run_resumed_with_automatic_bounds_steps_as_one_that_began_with_them(tmp_path):
    trainer = toy_trainer(DynamicSparsityCallback(0.25, bounds=(0.4, 0.5), interval=2), folder=tmp_path, epochs=2)
    trainer.fit(ToyGAN(), toy_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    sparsity = DynamicSparsityCallback(0.25, bounds="auto", interval=2)
    toy_trainer(sparsity, epochs=4).fit(ToyGAN(), toy_data(), ckpt_path=tmp_path / "last.ckpt")
    densities = [decision.density for update, decision in sparsity.decisions if update >= 20]
    # A straight line from 0.25 to 1 in 40 updates, the length of the resumed run, adds 0.0375 at a time.
    steps = [abs(after - before) for before, after in pairwise(densities)]
    assert max(steps) == pytest.approx(0.0375, abs=0.001)


def test_a_new_run_forgets_the_last_runs_balance_ratio(tmp_path):
    trainer = toy_trainer(DynamicSparsityCallback(0.25, bounds="auto", interval=2), folder=tmp_path, epochs=2)
    trainer.fit(ToyGAN(), toy_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    sparsity = DynamicSparsityCallback(0.25, bounds="auto", interval=2)
    toy_trainer(sparsity, epochs=3).fit(ToyGAN(), toy_data(), ckpt_path=tmp_path / "last.ckpt")
    (resize, _) = sparsity.settings.mask_updates()
    assert resize.controller.state_dict() == {"last": [], "highest": 0.0}


@pytest.mark.parametrize(("bounds", "warns"), [((1e6, 2e6), True), ((0.0, 1e-9), False)])
def test_a_signal_that_stays_below_its_bounds_is_warned_of_once(bounds, warns):
    sparsity = DynamicSparsityCallback(0.25, bounds=bounds, interval=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(sparsity, epochs=6)
    said = [str(warning.message) for warning in caught if "of the last 10 decisions" in str(warning.message)]
    assert len(said) == warns
    if warns:
        assert re.fullmatch(
            r"at generator update \d+: BR \d\.\d+ < 1e\+06: the discriminator is too strong, but at its smallest "
            r"density 0\.25; so it was in \d+ of the last 10 decisions\. If the signal stays on one side of its "
            r"bounds at any density of the discriminator, the bounds do not fit the GAN and keep the discriminator too "
            r'sparse to learn\. bounds="auto" and method="ramp" do not depend on the signal\'s level\.',
            said[0],
        )


@pytest.mark.parametrize("method", ["dense", "posthoc", "imp"])
def test_densities_of_layers_are_rejected_where_networks_start_dense(method):
    with pytest.raises(ValueError, match=f'layer_densities=.*with method="{method}": its networks are dense'):
        DynamicSparsityCallback(0.25, method=method, layer_densities={"*.0": 0.5})


def test_a_layer_of_given_density_caps_the_discriminator_once():
    sparsity = DynamicSparsityCallback(
        0.25, method="dda", bounds=(0.0, 1e-9), interval=2, delta=0.1, layer_densities={"discriminator.0": 0.25}
    )
    trained(sparsity, epochs=2)
    grown = [decision for _, decision in sparsity.decisions if decision.action == "grow"]
    held = [decision for _, decision in sparsity.decisions if decision.action == "hold"]
    assert grown
    assert held
    assert sparsity.discriminator_density == grown[-1].density == (128 + 32) / 544
    assert held[-1].reason.endswith("but its layers' densities allow no other")


@pytest.mark.parametrize("maximum", [1.0, 0.6])
def test_the_ramp_raises_the_discriminator_in_a_straight_line(maximum):
    sparsity, watch = watched(
        generator_density=0.25, method="ramp", interval=6, explore_interval=5, max_discriminator_density=maximum
    )
    densities = [decision.density for _, decision in sparsity.decisions]
    assert densities == pytest.approx([0.25 + (maximum - 0.25) * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert [count for _, count in watch.counts[5::6]] == [round(d * DISCRIMINATOR_WEIGHTS) for d in densities]
    assert {count for count, _ in watch.counts} == {192}
    assert sparsity.decisions[1][1].reason == "40% of the run is done"


def test_the_ramps_generator_explores_and_needs_no_measurement():
    sparsity = DynamicSparsityCallback(0.25, method="ramp", interval=6, explore_interval=5, probe_interval=None, seed=1)
    gan = ToyGAN()
    sparsity.attach(gan)
    before = {name: mask.clone() for name, mask in sparsity.masks("generator").items()}
    trained(sparsity, gan=gan, epochs=3)
    assert any(not torch.equal(mask, before[name]) for name, mask in sparsity.masks("generator").items())
    assert sparsity.measurements == 0
    assert sparsity.discriminator_density == 1.0


@pytest.mark.parametrize("method", ["ramp", "posthoc", "imp"])
def test_what_is_spread_over_the_run_needs_its_length(method):
    sparsity = DynamicSparsityCallback(0.25, method=method)
    trainer = toy_trainer(sparsity, epochs=-1)
    with pytest.raises(ValueError, match=f'length in generator updates is unknown, and method="{method}"'):
        trainer.fit(ToyGAN(), toy_data())


@pytest.mark.parametrize("argument", ["generator_density", "discriminator_density"])
@pytest.mark.parametrize("method", ["posthoc", "imp"])
def test_a_density_that_leaves_layers_empty_is_rejected_before_training(method, argument):
    settings = {"generator_density": 0.5, "discriminator_density": 0.5} | {argument: 1e-3}
    sparsity = DynamicSparsityCallback(method=method, **settings)
    with pytest.raises(ValueError, match=f"{argument}=0.001"):
        trained(sparsity)
    assert sparsity.generator_updates == 0


def test_averages_that_ignore_masks_are_rejected_with_pruning():
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("it came with Lightning 2.6")
    with pytest.raises(ValueError, match=r"EMAWeightAveraging .*changing masks"):
        trained(DynamicSparsityCallback(0.25, method="posthoc"), callbacks.EMAWeightAveraging())
