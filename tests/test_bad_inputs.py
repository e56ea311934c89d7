"""Bad input, each with its error: one that names the argument, its value and what is allowed, before training."""

import re

import pytest
from torch import nn
from torch.optim import Adam
from toys import ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA, SampleGrid, SampleQuality, growth_rule
from lightning_ddst.cli import make_cli
from lightning_ddst.data import DigitsDataModule, ResumableLoader
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.sparsity import MaskedNetwork

ARGUMENTS = [
    ({"generator_density": 0.0}, r"generator_density=0.0 must be in \(0, 1\]"),
    ({"generator_density": 1.5}, r"generator_density=1.5 must be in \(0, 1\]"),
    ({"generator_density": float("nan")}, r"generator_density=nan must be in \(0, 1\]"),
    ({"discriminator_density": -0.1}, r"discriminator_density=-0.1 must be in \(0, 1\]"),
    ({"bounds": (0.6, 0.4)}, r"bounds=\(0.6, 0.4\) must be two numbers, lower < upper"),
    ({"bounds": "automatic"}, r"bounds='automatic' .*signal='balance_ratio' must be two numbers"),
    ({"bounds": "auto", "signal": "real_sign"}, r"bounds='auto' .*signal='real_sign' must be two numbers"),
    ({"signal": "br"}, r"signal='br'.*balance_ratio.*real_sign"),
    ({"bounds": (0.5,)}, r"bounds=\(0.5,\) must be two numbers"),
    ({"interval": 0}, "interval=0 must be an integer, at least 1"),
    ({"interval": 2.5}, "interval=2.5 must be an integer, at least 1"),
    ({"explore_interval": -1}, "explore_interval=-1 must be an integer, at least 1"),
    ({"probe_interval": 0}, "probe_interval=0 must be an integer, at least 1"),
    ({"probe_interval": "often"}, "probe_interval='often' must be an integer"),
    ({"interval": 10, "probe_interval": 20}, "probe_interval=20 must not be longer than interval=10"),
    ({"probe_interval": None}, 'probe_interval=None .*method="ddst"'),
    ({"method": "rigl"}, "method='rigl' is unknown; allowed are .*ddst"),
    ({"growth": "best"}, "growth='best' .*random, gradient, momentum"),
    ({"distribution": "er2"}, "distribution='er2' is unknown; allowed are uniform, er, erk"),
    ({"scope": "all"}, "scope='all' is unknown; allowed are global, layer"),
    ({"schedule": "step"}, "schedule='step' is unknown; allowed are cosine, linear, constant"),
    ({"estimator": "median"}, "estimator='median' .*ratio_of_means, mean_of_ratios"),
    ({"delta": 0.0}, r"delta=0.0 must be in \(0, 1\]"),
    ({"exploration_rate": 1.5}, r"exploration_rate=1.5 must be in \[0, 1\]"),
    ({"layer_floor": 0.0}, r"layer_floor=0.0 must be in \(0, 1\]"),
    ({"max_discriminator_density": 1.2}, r"max_discriminator_density=1.2 must be in \(0, 1\]"),
    ({"min_discriminator_density": 0.6, "max_discriminator_density": 0.5}, "min_discriminator_density=0.6 must be"),
    (
        {"discriminator_density": 0.8, "max_discriminator_density": 0.5},
        "discriminator_density=0.8 .*max_discriminator_density=0.5",
    ),
    ({"initial_masks": "ones"}, "initial_masks='ones' .*random, magnitude"),
    ({"dense_layers": "Linear"}, "dense_layers='Linear' must be a list of patterns"),
    ({"layer_densities": {"Linear": 1.5}}, r"layer_densities\['Linear'\]=1.5 must be in \(0, 1\]"),
    ({"bounds": 0.5}, "bounds=0.5 must be two numbers"),
    ({"bounds": ("0.4", "0.5")}, r"bounds=\('0.4', '0.5'\) must be two numbers"),
    ({"dense_layers": None}, "dense_layers=None must be a list of patterns"),
    ({"layer_densities": [("Linear", 0.5)]}, r"layer_densities=\[\('Linear', 0.5\)\] must be a mapping"),
    ({"masked_parameters": ["*.kernel"]}, r"masked_parameters=\['\*.kernel'\] must be a mapping"),
    ({"stop_on_divergence": "no"}, "stop_on_divergence='no' must be True or False"),
    ({"bounds": (0.2, float("nan"))}, r"bounds=\(0.2, nan\) must be two numbers"),
]


class Bare(ToyGAN):
    """A toy whose networks a test replaces."""

    def __init__(self, generator: nn.Module | None = None) -> None:
        super().__init__()
        if generator is not None:
            self.generator = generator


class Half(ToyGAN):
    """Only the generator has an optimizer."""

    def configure_optimizers(self):
        return [Adam(self.generator.parameters())]


FITS = [
    (ToyGAN(("maker", "judge")), {}, r'no generator .*ToyGAN .*generator="\.\.\.".* maker, judge'),
    (ToyGAN(), {"generator": "net.G"}, r"generator='net.G' .*ToyGAN; it has generator, disc"),
    (ToyGAN(), {"discriminator": "generator"}, "generator and discriminator are the same module"),
    (Bare(nn.Sequential(nn.BatchNorm1d(8))), {}, "Sequential has nothing to mask"),
    (
        ToyGAN(),
        {"generator_density": 0.001},  # round(0.768) = 1 weight for 2 layers; 2 of 768 is 0.0026
        r"generator_density=0.001.* 1 .* 2 layers.*at least 0.0026",
    ),
    (
        ToyGAN(),
        {"min_discriminator_density": 0.001, "discriminator_density": 0.25},
        r"min_discriminator_density=0.001.* 1 .* 2 layers.*at least",
    ),
    (Half(), {}, "no optimizer updates '0.parametrizations.weight.original'"),
    (
        ToyGAN(),
        {"dense_layers": ["generator.7"]},
        r"dense_layers: 'generator.7' matches no layer; there are gen",
    ),
    (ToyGAN(), {"dense_layers": ["generator.*"]}, "leaves nothing to mask"),
    (ToyGAN(), {"layer_densities": {"Conv2d": 0.5}}, "layer_densities: 'Conv2d' .* classes Linear"),
    (
        ToyGAN(),
        {"masked_parameters": {"generator.*.bias": 0}},
        r"masked_parameters\['generator.\*.bias'\]=0 .*give two",
    ),
    (ToyGAN(), {"real": "target"}, "real='target' is no tensor in the batch; it holds"),
    (ToyGAN(), {"discriminator_output": "logits"}, "discriminator_output='logits' is no tensor .*returns"),
]


def networks():
    return SmallGenerator(8, 1, 4, 4), SmallDiscriminator(8, 1, 4)


def sparse(**arguments):
    return lambda: MaskedNetwork(nn.Linear(10, 10), **{"density": 0.5} | arguments)


def module(**arguments):
    return lambda: GANModule(*networks(), **arguments)


def sampled_without_sample(callback):
    return lambda: toy_trainer(callback).fit(ToyGAN(), toy_data())


def cli(*arguments):
    return lambda: make_cli(arguments, run=False)


OTHERS = [
    (sparse(density=0), ValueError, r"density=0 must be in \(0, 1\]"),
    (sparse(initial="all"), ValueError, "initial='all' is unknown; allowed are random, magnitude"),
    (lambda: sparse()().resize(2.0), ValueError, r"density=2.0 must be in \(0, 1\]"),
    (lambda: sparse()().explore(-0.1), ValueError, r"rate=-0.1 must be in \[0, 1\]"),
    (lambda: sparse()().explore(0.5), ValueError, "gradients must hold the dense gradient of 'weight'"),
    (lambda: sparse()().load_state_dict({"masks": {}}), ValueError, "the saved masks are another network's: 'weight'"),
    (
        lambda: growth_rule("mine", gradient="all"),
        ValueError,
        "gradient='all' is unknown; allowed are none",
    ),
    (module(loss="mse"), ValueError, "loss='mse' is unknown; allowed are"),
    (module(discriminator_steps=0), ValueError, "discriminator_steps=0 must be an integer, at least 1"),
    (module(gradient_penalty=-1.0), ValueError, "gradient_penalty=-1.0 must not be negative"),
    (module(r1=float("nan")), ValueError, "r1=nan must not be negative"),
    (module(num_classes=0), ValueError, "num_classes=0 must be an integer, at least 1"),
    (lambda: GANModule(nn.Linear(2, 2), nn.Linear(2, 1)), ValueError, "latent_dim=None: Linear has no latent_dim"),
    (lambda: GeneratorEMA(1.0), ValueError, r"decay=1.0 must be in \[0, 1\)"),
    (lambda: GeneratorEMA(buffers="drop"), ValueError, "buffers='drop' is unknown; allowed are average, copy"),
    (lambda: trained(GeneratorEMA(generator="G")), ValueError, "generator='G' is not a submodule of ToyGAN"),
    (
        lambda: SampleQuality(nn.Flatten(), "pixels", samples=0),
        ValueError,
        "samples=0 must be an integer, at least 1",
    ),
    (lambda: SampleGrid(columns=-1), ValueError, "columns=-1 must be an integer, at least 1"),
    (sampled_without_sample(SampleGrid()), TypeError, r"SampleGrid needs ToyGAN.sample\(n, rng=...\)"),
    (lambda: DigitsDataModule(batch_size=0), ValueError, "batch_size=0 must be an integer, at least 1"),
    (
        lambda: DigitsDataModule(batch_size=2000),
        ValueError,
        "batch_size=2000 must not be above the number of images",
    ),
    (lambda: ResumableLoader([1, 2], 1, batches=0), ValueError, "batches=0 must be an integer, at least 1"),
    (cli("--sparsity.interval=0"), SystemExit, "interval=0 must be an integer, at least 1"),
    (cli("--sparsity.generator_density=2"), SystemExit, r"generator_density=2.0 must be in \(0, 1\]"),
    (cli("--sparsity.method=rigl"), SystemExit, "rigl"),
]


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        *[
            (lambda a=arguments: DynamicSparsityCallback(**{"generator_density": 0.25} | a), ValueError, message)
            for arguments, message in ARGUMENTS
        ],
        *[
            (
                lambda g=gan, a=arguments: trained(DynamicSparsityCallback(**{"generator_density": 0.25} | a), gan=g),
                (ValueError, RuntimeError),
                message,
            )
            for gan, arguments, message in FITS
        ],
        *OTHERS,
    ],
)
def test_errors_name_the_argument_its_value_and_what_is_allowed(function, kind, message, capsys):
    with pytest.raises(kind) as error:
        function()
    said = str(error.value)
    if kind is SystemExit:  # of the command, which leaves out the traceback
        assert error.value.code == 2
        said = capsys.readouterr().err
    assert re.search(message, said), said
