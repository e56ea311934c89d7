"""Masks of whole channels, in training."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from toys import PIXELS, ToyGAN, for_method, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.utils.example_inputs import get_generator_inputs, infer_inputs

CHANNELS = {
    "granularity": "channel",
    "interval": 5,
    "explore_interval": 4,
    "bounds": (0.01, 0.02),
    "exploration_rate": 0.5,
    "seed": 1,
}


class EveryUpdate(Callback):
    """Notes channels, how many the layers computed, and whether all that is inactive is 0."""

    def __init__(self):
        self.counts, self.widths, self.checksums, self.clean = [], [], [], []

    def on_train_start(self, trainer, pl_module):
        generator, _ = pl_module.networks()
        self.handle = generator[0].register_forward_hook(
            lambda layer, args, output: self.widths.append(output.shape[1])
        )

    def on_train_batch_end(self, trainer, pl_module, *args):
        (sparsity,) = (c for c in trainer.callbacks if isinstance(c, DynamicSparsityCallback))
        networks = sparsity.networks()
        self.counts.append(
            {role: list(zip(network.units.now, network.units.sizes, strict=True)) for role, network in networks.items()}
        )
        self.checksums.append(networks["generator"].checksum)
        for network in networks.values():
            assert network.active == sum(int(mask.sum()) for mask in network.masks.values())
            for name, mask in network.masks.items():
                state = [own["exp_avg"] for o in trainer.optimizers if (own := o.state.get(network.parameters[name]))]
                self.clean += [not tensor[~mask].any() for tensor in (network.parameters[name].detach(), *state)]


@pytest.mark.parametrize("method", ["static", "sdst", "dda", "ddst", "ramp", "posthoc"])
def test_counts_are_exact_layers_smaller_and_inactive_weights_zero(method):
    every, sparsity = EveryUpdate(), DynamicSparsityCallback(0.3, **for_method(method, **CHANNELS))
    gan = trained(sparsity, every, epochs=2)
    every.handle.remove()
    assert all(every.clean)
    # 8 x 32 + 32 x 16 weights of the generator's, and 16 x 32 + 32 of the discriminator's; n of 32 channels each.
    last = every.counts[-1]
    assert last["generator"] == [(10, 32)]  # 10 of 32 are nearest to 30 %
    assert sparsity.generator_density == 10 * 24 / (32 * 24)
    grown = {"dda": 16, "ddst": 16, "ramp": 32, "posthoc": 32}.get(method, 10)  # four decisions, 5 % each
    assert last["discriminator"] == [(grown, 32)]
    assert set(every.widths) == ({10} if method != "posthoc" else {10, 32})
    assert "forward" not in gan.generator.__dict__
    assert (len(set(every.checksums)) > 2) == (method in ("sdst", "ddst", "ramp"))


def test_a_checkpoint_loads_into_the_plain_module(tmp_path):
    gan = trained(DynamicSparsityCallback(0.3, **CHANNELS), folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "end.ckpt")
    plain = ToyGAN()
    plain.load_state_dict(torch.load(tmp_path / "end.ckpt")["state_dict"])
    z = torch.randn(3, 8)
    assert torch.equal(plain.generator.eval()(z), gan.generator.eval()(z))


def test_training_equals_the_whole_network_with_zeros(monkeypatch):
    """Up to rounding, for a few updates."""

    def weights(narrow):
        monkeypatch.setattr("lightning_ddst.methods.training.can_run_structured", lambda network: narrow)
        sparsity = DynamicSparsityCallback(0.3, **CHANNELS)
        seed_everything(0, verbose=False)
        gan = ToyGAN()
        gan.discriminator[2].p = 0.0  # draws another mask for fewer channels
        toy_trainer(sparsity, limit_train_batches=5).fit(gan, toy_data())
        return {full: gan.get_parameter(full).detach() * mask for full, mask in sparsity.masks("generator").items()}

    whole, narrow = weights(False), weights(True)
    for name, value in whole.items():
        torch.testing.assert_close(narrow[name], value, rtol=1e-3, atol=1e-4)


def test_averages_of_channels_that_grew_do_not_remember_that_they_were_0():
    average = GeneratorEMA(0.9)
    sparsity = DynamicSparsityCallback(0.3, **CHANNELS)
    trained(sparsity, average, epochs=2)
    for name, mask in sparsity.networks()["generator"].masks.items():
        assert torch.equal(average.averages()[name] != 0, mask & (average.averages()[name] != 0))


class Features(nn.Module):
    """A score, and the features before it."""

    def __init__(self):
        super().__init__()
        self.first, self.score = nn.Linear(PIXELS, 32), nn.Linear(32, 1)

    def forward(self, x):
        features = self.first(x).relu()
        return self.score(features), [features]


class Matching(ToyGAN):
    """Feature matching, and a generator whose first layer is followed by a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, PIXELS)
        )
        self.discriminator = Features()
        self.widths = []

    def training_step(self, batch, batch_idx):
        generator_optimizer, discriminator_optimizer = self.optimizers()
        (real,) = batch
        fake = self.generator(torch.randn(len(real), 8))
        loss = (1 - self.discriminator(real)[0]).relu().mean() + (
            1 + self.discriminator(fake.detach())[0]
        ).relu().mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()
        score, features = self.discriminator(self.generator(torch.randn(len(real), 8)))
        _, wanted = self.discriminator(real)
        self.widths.append(features[0].shape[1])
        generator_optimizer.zero_grad()
        self.manual_backward((features[0] - wanted[0].detach()).abs().mean() - score.mean())
        generator_optimizer.step()


def test_features_that_are_matched_have_the_active_channels(caplog):
    gan, every = Matching(), EveryUpdate()
    sparsity = DynamicSparsityCallback(
        0.7, discriminator_density=0.5, discriminator_output=0, **for_method("ramp", **CHANNELS)
    )
    with caplog.at_level("INFO"):
        trained(sparsity, every, gan=gan)
    active = [16, *(counts["discriminator"][0][0] for counts in every.counts[:-1])]  # the masks before each update
    assert gan.widths == active
    assert len(set(active)) > 1
    assert every.counts[-1]["generator"] == [(13, 20)]  # 96 + 28 x 13 weights are nearest to 0.7 x 656
    with torch.no_grad():
        _, (features,) = gan.discriminator.eval()(torch.randn(6, PIXELS))
    inactive = ~sparsity.masks("discriminator")["discriminator.first.weight"].any(1)
    assert features.shape == (6, 32)
    assert torch.equal(features[:, inactive], gan.discriminator.first.bias[inactive].relu().expand(6, -1))
    assert "generator: All channels of these layers stay: '0' (LayerNorm '1' mixes channels)." in caplog.messages


# ---- what the networks are called with ----------------------------------------------------------------


def test_examples_are_a_gan_modules_noise_or_lightnings_example():
    def module(classes):
        return GANModule(
            SmallGenerator(num_classes=classes), SmallDiscriminator(num_classes=classes), num_classes=classes
        )

    (noise,) = get_generator_inputs(module(None))
    assert noise.shape == (2, 64)
    noise, labels = get_generator_inputs(module(3), batch=5)
    assert noise.shape == (5, 64)
    assert labels.tolist() == [0, 1, 2, 0, 1]
    (example,) = get_generator_inputs(ToyGAN())
    assert example.shape == (2, 8)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_discriminator_takes_all_that_a_generator_returns_or_the_first_tensor(pairs):
    class InDict(nn.Linear):
        def forward(self, z):
            return {"image": super().forward(z), "z": z}

    class OfPairs(nn.Linear):
        def forward(self, made):
            return super().forward(made["image"])

    module = ToyGAN()
    discriminator = OfPairs(PIXELS, 1) if pairs else nn.Linear(PIXELS, 1)
    _, (argument,) = infer_inputs(module, InDict(8, PIXELS), discriminator)
    assert argument["image"].shape == (2, PIXELS) if pairs else argument.shape == (2, PIXELS)


class Unknown(ToyGAN):
    def __init__(self):
        super().__init__()
        self.example_input_array = None


class Wrong(ToyGAN):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(2, 9)


@pytest.mark.parametrize(
    ("gan", "message"),
    [
        (
            Unknown,
            "Unknown has no latent_dim.*example_input_array",
        ),
        (Wrong, "the generator cannot be called with the module's example: "),
    ],
)
def test_networks_that_cannot_be_called_are_rejected_before_training(gan, message):
    with pytest.raises(ValueError, match=message):
        trained(DynamicSparsityCallback(0.3, **CHANNELS), gan=gan())


def test_a_network_whose_channels_cannot_be_traced_is_rejected_before_training():
    gan = ToyGAN()
    gan.generator = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
    before = {name: value.clone() for name, value in gan.state_dict().items()}
    message = "generator with generator_density=0.3: Sequential has no channels that can be taken out"
    with pytest.raises(ValueError, match=message):
        trained(DynamicSparsityCallback(0.3, **CHANNELS), gan=gan)
    assert all(torch.equal(value, before[name]) for name, value in gan.state_dict().items())


def test_a_density_below_a_channel_a_group_names_network_and_argument():
    with pytest.raises(ValueError, match=r"generator .*generator_density=0\.01: .*one channel per group.*at least 0\."):
        trained(DynamicSparsityCallback(0.01, **CHANNELS))


@pytest.mark.parametrize(
    "given",
    [
        {"growth": "momentum"},
        {"distribution": "uniform"},
        {"scope": "layer"},
        {"layer_floor": 0.5},
        {"layer_densities": {"generator.0": 0.5}},
    ],
)
def test_arguments_for_single_weights_are_rejected(given):
    (name,) = given
    with pytest.raises(ValueError, match=rf'{name}=.* granularity="channel"'):
        DynamicSparsityCallback(0.3, granularity="channel", **given)
    DynamicSparsityCallback(0.3, granularity="channel", growth="random")


def test_another_granularity_is_rejected():
    with pytest.raises(ValueError, match=r"granularity='row' .*channel, weight, .*N:M such as 2:4"):
        DynamicSparsityCallback(0.3, granularity="row")


def test_a_run_with_masks_of_single_weights_does_not_resume_with_channels(tmp_path):
    gan = trained(DynamicSparsityCallback(0.3, seed=1), folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer = toy_trainer(DynamicSparsityCallback(0.3, **CHANNELS), epochs=2)
    with pytest.raises(ValueError, match=r"granularity=.channel.*weight"):
        trainer.fit(ToyGAN(), toy_data(), ckpt_path=tmp_path / "end.ckpt")


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_channels_explore_and_grow_in_other_precisions_than_the_example_input(precision):
    class Converting(ToyGAN):
        def training_step(self, batch, batch_idx):
            (real,) = batch
            dtype = next(self.parameters()).dtype
            noise = torch.randn(2, len(real), 8, dtype=dtype)
            generator, discriminator = self.networks()
            generator_optimizer, discriminator_optimizer = self.optimizers()
            for optimizer, sign, z in ((discriminator_optimizer, 1, noise[0]), (generator_optimizer, -1, noise[1])):
                loss = sign * (discriminator(generator(z)).mean() - discriminator(real).mean())
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    sparsity = DynamicSparsityCallback(0.3, **CHANNELS | {"bounds": (0.0, 1e-9)})
    trained(sparsity, gan=Converting(), epochs=2, precision=precision)
    generator = sparsity.networks()["generator"]
    assert next(generator.network.parameters()).dtype == {"64-true": torch.float64}.get(precision, torch.bfloat16)
    assert sparsity.generator_density == 10 / 32
    assert generator.coverage > sparsity.generator_density


@pytest.mark.parametrize("change", ["explore", "resize"])
def test_weights_of_inactive_channels_are_positive_zeros_right_after_a_change(change):
    gan = ToyGAN()
    gan.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sparsity = DynamicSparsityCallback(0.3, granularity="channel", method="static", seed=0)
    sparsity.attach(gan)
    network = sparsity.networks()["generator"]
    network.explore(0.5) if change == "explore" else network.resize(0.7)
    for name, mask in network.masks.items():
        inactive = network.parameters[name].detach()[~mask]
        assert not inactive.any()
        assert not inactive.signbit().any(), name
