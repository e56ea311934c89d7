"""Discriminators of all kinds, networks of several parts, and training steps of all kinds, measured as by hand."""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from gans import BATCH, BATCHES, GAN, IMAGE, LATENT, Discriminator, Generator, Images, adam, fitted, static
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.data import DataLoader
from toys import toy_trainer

from lightning_ddst import DynamicSparsityCallback, GeneratorEMA

softplus = F.softplus


def mean(scores: list[Tensor]) -> Tensor:
    """The mean of several scores' means."""
    return torch.stack([score.mean() for score in scores]).mean()


class Usual(GAN):
    """The discriminator first, then the generator; `scores` are those of the user's loss."""

    first: ClassVar = "discriminator"
    missing: ClassVar = 0
    """Updates at the start that cannot be measured."""

    def scores(self, x: Tensor) -> list[Tensor]:
        return [self.discriminator(x)]

    def by_forward(self, x: Tensor) -> list[Tensor]:
        return [self.discriminator.forward(x)]

    def generate(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def generate_by_forward(self, z: Tensor) -> Tensor:
        return self.generator.forward(z)

    def real(self, batch: Any) -> Tensor:
        return batch[0]

    def code(self, batch: Any) -> Tensor:
        return self.noise(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for role in (self.first, "generator" if self.first == "discriminator" else "discriminator"):
            getattr(self, f"step_{role}")(batch)

    def step_discriminator(self, batch: Any) -> None:
        _, d = self.optimizers()
        real, fake = self.scores(self.real(batch)), self.scores(self.generate(self.code(batch)).detach())
        self.step(d, sum(softplus(-a).mean() + softplus(b).mean() for a, b in zip(real, fake, strict=True)))

    def step_generator(self, batch: Any) -> None:
        g, _ = self.optimizers()
        x, z = self.real(batch), self.code(batch)
        state = torch.get_rng_state()
        loss = sum(softplus(-score).mean() for score in self.scores(self.generate(z)))

        def fake() -> Tensor:
            with torch.random.fork_rng():
                torch.set_rng_state(state)  # the generator may draw noise of its own
                return mean(self.by_forward(self.generate_by_forward(z)))

        with self.worked_out(lambda: mean(self.by_forward(x)), fake):
            self.step(g, loss)


# ---- several discriminators ------------------------------------------------------------------------------


class TwoDiscriminators(Usual):
    """One optimizer for both."""

    arguments: ClassVar = {"discriminator": ["model.mpd", "msd"]}

    def make_networks(self) -> None:
        self.generator, self.msd = Generator(), Discriminator()
        self.model = nn.ModuleDict({"mpd": nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))})

    def configure_optimizers(self) -> Any:
        return [adam(self.generator), Adam(chain(self.model.parameters(), self.msd.parameters()), 0.01)]

    def scores(self, x: Tensor) -> list[Tensor]:
        return [self.model["mpd"](x), self.msd(x)]

    def by_forward(self, x: Tensor) -> list[Tensor]:
        return [self.model["mpd"].forward(x), self.msd.forward(x)]


class TwoDiscriminatorsGeneratorFirst(TwoDiscriminators):
    first = "generator"


class OfTwo(nn.Module):
    """A vocoder's discriminator: scores and features of two parts, of real and of generated signals at once."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.convs = nn.ModuleList([nn.Conv1d(1, 4, 3, stride=2) for _ in range(2)])
        self.scores = nn.ModuleList([nn.Conv1d(4, 1, 1) for _ in range(2)])

    def forward(self, y: Tensor, y_hat: Tensor) -> Any:
        scores_real, scores_fake, maps_real, maps_fake = [], [], [], []
        for conv, score in zip(self.convs, self.scores, strict=True):
            for x, scores, maps in ((y, scores_real, maps_real), (y_hat, scores_fake, maps_fake)):
                features = conv(F.avg_pool1d(x, self.factor)).relu()
                scores.append(score(features).flatten(1))
                maps.append([features])
        return scores_real, scores_fake, maps_real, maps_fake


class Vocoder(GAN):
    """Multi-period and multi-scale discriminators with feature matching; a batch is of signals without channels."""

    arguments: ClassVar = {"discriminator": ["mpd", "msd"], "discriminator_output": {"real": 0, "fake": 1}}
    shape: ClassVar = (16,)

    def make_networks(self) -> None:
        self.generator, self.mpd, self.msd = Generator((1, 16)), OfTwo(1), OfTwo(2)

    def configure_optimizers(self) -> Any:
        return [adam(self.generator), Adam(chain(self.mpd.parameters(), self.msd.parameters()), 0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (g, d), y, z = self.optimizers(), batch[0].unsqueeze(1), self.noise(batch[0])
        y_hat = self.generator(z)
        loss = 0
        for part in (self.mpd, self.msd):
            real, fake, _, _ = part(y, y_hat.detach())
            loss = loss + sum((1 - a).square().mean() + b.square().mean() for a, b in zip(real, fake, strict=True))
        self.step(d, loss)
        loss = F.l1_loss(y_hat, y)
        for part in (self.mpd, self.msd):
            _, fake, maps_real, maps_fake = part(y, y_hat)
            loss = loss + sum((1 - b).square().mean() for b in fake)
            loss = loss + sum(F.l1_loss(b[0], a[0]) for a, b in zip(maps_real, maps_fake, strict=True))

        def score(kind: int) -> Tensor:
            image = self.generator.forward(z)
            return torch.stack([mean(part.forward(y, image)[kind]) for part in (self.mpd, self.msd)])

        with self.worked_out(lambda: score(0), lambda: score(1)):
            self.step(g, loss)


class MultiScale(Usual):
    """A list of feature maps for each scale, the score last (pix2pixHD)."""

    arguments: ClassVar = {"discriminator_output": "*.-1"}

    def make_networks(self) -> None:
        class Scales(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.ModuleList([nn.Conv2d(1, 4, 2) for _ in range(2)])
                self.last = nn.ModuleList([nn.Conv2d(4, 1, 1) for _ in range(2)])

            def forward(self, x: Tensor) -> list[list[Tensor]]:
                maps = []
                for first, last in zip(self.first, self.last, strict=True):
                    maps.append([first(x).relu()])
                    maps[-1].append(last(maps[-1][0]))
                    x = F.avg_pool2d(x, 2)
                return maps

        self.generator, self.discriminator = Generator(), Scales()

    def scores(self, x: Tensor) -> list[Tensor]:
        return [maps[-1] for maps in self.discriminator(x)]

    def by_forward(self, x: Tensor) -> list[Tensor]:
        return [maps[-1] for maps in self.discriminator.forward(x)]


class Judged(NamedTuple):
    features: Tensor
    logits: Tensor


@dataclass
class JudgedToo:
    features: list[Tensor]
    logits: Tensor


class ReturnsANamedTuple(Usual):
    arguments: ClassVar = {"discriminator_output": "logits"}
    kind: ClassVar[Any] = Judged

    def make_networks(self) -> None:
        kind = self.kind

        class Named(Discriminator):
            def forward(self, x: Tensor) -> Any:
                features = self.features(x)
                return kind(features, self.score(features))

        self.generator, self.discriminator = Generator(), Named()

    def scores(self, x: Tensor) -> list[Tensor]:
        return [self.discriminator(x).logits]

    def by_forward(self, x: Tensor) -> list[Tensor]:
        return [self.discriminator.forward(x).logits]


class ReturnsADataclass(ReturnsANamedTuple):
    kind = staticmethod(lambda features, score: JudgedToo([features], score))


# ---- both kinds of images in one call ------------------------------------------------------------------------


class InOneCall(GAN):
    """``D(real, fake)`` returns how much more real the first looks."""

    arguments: ClassVar = {"discriminator_output": {"difference": ""}}

    def make_networks(self) -> None:
        class Relativistic(Discriminator):
            def forward(self, real: Tensor, fake: Tensor) -> Any:
                return self.compare(super().forward(real), super().forward(fake))

            @staticmethod
            def compare(real: Tensor, fake: Tensor) -> Any:
                return compare(real, fake)

        compare = self.compare
        self.generator, self.discriminator = Generator(), Relativistic()

    @staticmethod
    def compare(real: Tensor, fake: Tensor) -> Any:
        return real - fake

    def loss(self, output: Any, sign: int) -> Tensor:
        return softplus(-sign * output).mean()

    def of_real(self, x: Tensor, fake: Tensor) -> Tensor:
        return -self.discriminator.forward(x, x)

    def of_fake(self, x: Tensor, fake: Tensor) -> Tensor:
        return -self.discriminator.forward(x, fake)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        self.step(d, self.loss(self.discriminator(x, self.generator(z).detach()), 1))
        loss = self.loss(self.discriminator(x, fake=self.generator(z)), -1)
        with self.worked_out(
            lambda: self.of_real(x, self.generator.forward(z)), lambda: self.of_fake(x, self.generator.forward(z))
        ):
            self.step(g, loss)


class RelativisticAverage(InOneCall):
    """``D(real, fake)`` returns both scores, each relative to the mean of the other."""

    arguments: ClassVar = {"discriminator_output": {"real": 0, "fake": 1}}

    @staticmethod
    def compare(real: Tensor, fake: Tensor) -> Any:
        return real - fake.mean(), fake - real.mean()

    def loss(self, output: Any, sign: int) -> Tensor:
        return softplus(-sign * output[0]).mean() + softplus(sign * output[1]).mean()

    def of_real(self, x: Tensor, fake: Tensor) -> Tensor:
        return self.discriminator.forward(x, fake)[0]

    def of_fake(self, x: Tensor, fake: Tensor) -> Tensor:
        return self.discriminator.forward(x, fake)[1]


# ---- generators of several parts ---------------------------------------------------------------------------


class VariationalAutoencoder(Usual):
    """Both parts are called in ``self(x)``, with noise between them."""

    arguments: ClassVar = {"generator": ["encoder", "decoder"]}

    def make_networks(self) -> None:
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 2 * LATENT))
        self.decoder, self.discriminator = Generator(), Discriminator()

    def configure_optimizers(self) -> Any:
        return [Adam(chain(self.encoder.parameters(), self.decoder.parameters()), 0.01), adam(self.discriminator)]

    def code(self, batch: Any) -> Tensor:
        return batch[0]

    def forward(self, x: Tensor) -> Any:
        center, scale = self.encoder(x).chunk(2, dim=1)
        return self.decoder(center + scale.exp() * torch.randn_like(center)), center, scale

    def generate(self, x: Tensor) -> Tensor:
        return self(x)[0]

    def generate_by_forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x.flatten(1), self.encoder[1].weight, self.encoder[1].bias)
        center, scale = hidden.chunk(2, dim=1)
        return self.decoder.forward(center + scale.exp() * torch.randn_like(center))


class HeldByAModel(VariationalAutoencoder):
    """The innermost module that holds both is not the LightningModule."""

    arguments: ClassVar = {"generator": ["model.encoder", "model.decoder"]}

    def make_networks(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 2 * LATENT))
                self.decoder = Generator()

            forward = VariationalAutoencoder.forward

        self.model, self.discriminator = Model(), Discriminator()

    def configure_optimizers(self) -> Any:
        return [adam(self.model), adam(self.discriminator)]

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def generate_by_forward(self, x: Tensor) -> Tensor:
        return VariationalAutoencoder.generate_by_forward(self.model, x)


class CodeFirst(VariationalAutoencoder):
    """``self(x)`` returns the images after the code."""

    def forward(self, x: Tensor) -> Any:
        images, center, scale = super().forward(x)
        return center, images, {"scale": scale}

    def generate(self, x: Tensor) -> Tensor:
        return self(x)[1]


class Sampler(nn.Module):
    """A part without parameters."""

    def forward(self, moments: Tensor) -> Any:
        center, scale = moments.chunk(2, dim=1)
        return {"scale": scale}, center + scale.exp() * torch.randn_like(center)


class SampledBetween(VariationalAutoencoder):
    """The training step passes the second entry that the sampler returns to the decoder."""

    arguments: ClassVar = {"generator": ["encoder", "sampler", "decoder"]}

    def make_networks(self) -> None:
        super().make_networks()
        self.sampler = Sampler()

    def generate(self, x: Tensor) -> Tensor:
        return self.decoder(self.sampler(self.encoder(x))[1])


class Chain(VariationalAutoencoder):
    """The training step passes the code from part to part as it is."""

    arguments: ClassVar = {"generator": ["decoder", "encoder"]}

    def make_networks(self) -> None:
        super().make_networks()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, LATENT))

    def generate(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def generate_by_forward(self, x: Tensor) -> Tensor:
        return self.decoder.forward(F.linear(x.flatten(1), self.encoder[1].weight, self.encoder[1].bias))


class ByItsSecondPart(Chain):
    """The discriminator sees what the decoder makes of noise."""

    def code(self, batch: Any) -> Tensor:
        return self.noise(batch[0])

    def generate(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def generate_by_forward(self, z: Tensor) -> Tensor:
        return self.decoder.forward(z)

    def step_discriminator(self, batch: Any) -> None:
        super().step_discriminator(batch)
        (x, _), (g, _) = batch, self.optimizers()
        g.zero_grad()
        self.manual_backward(F.mse_loss(self.decoder(self.encoder(x)), x))  # its gradients are not used


class SeveralOfEach(TwoDiscriminators):
    arguments: ClassVar = {"generator": ["encoder", "decoder"], "discriminator": ["model.mpd", "msd"]}

    def make_networks(self) -> None:
        super().make_networks()
        del self.generator
        self.encoder, self.decoder = nn.Linear(LATENT, LATENT), Generator()

    def configure_optimizers(self) -> Any:
        return [
            Adam(chain(self.encoder.parameters(), self.decoder.parameters()), 0.01),
            Adam(chain(self.model.parameters(), self.msd.parameters()), 0.01),
        ]

    def generate(self, z: Tensor) -> Tensor:
        return self.decoder(self.encoder(z))

    def generate_by_forward(self, z: Tensor) -> Tensor:
        return self.decoder.forward(self.encoder.forward(z))


class UsualNamesInside(Usual):
    """Networks are found one level down, in different submodules."""

    def make_networks(self) -> None:
        self.model = nn.ModuleDict({"net_g": Generator()})
        self.loss = nn.ModuleDict({"discriminator": Discriminator(), "perceptual": nn.Linear(16, 4)})

    def configure_optimizers(self) -> Any:
        return [adam(self.model), adam(self.loss["discriminator"])]

    def scores(self, x: Tensor) -> list[Tensor]:
        return [self.loss["discriminator"](x)]

    def by_forward(self, x: Tensor) -> list[Tensor]:
        return [self.loss["discriminator"].forward(x)]

    def generate(self, z: Tensor) -> Tensor:
        return self.model["net_g"](z)

    def generate_by_forward(self, z: Tensor) -> Tensor:
        return self.model["net_g"].forward(z)


# ---- training steps ------------------------------------------------------------------------------------------


class PenaltiesOnBoth(Usual):
    """R1 on real images and R2 on detached fakes, which share memory with them (R3GAN); a relativistic loss."""

    changed = False

    def step_discriminator(self, batch: Any) -> None:
        (x, _), (_, d) = batch, self.optimizers()
        x, fake = x.detach().clone().requires_grad_(), self.generator(self.noise(x)).detach().requires_grad_()
        shown = fake.view_as(fake) if self.changed else fake
        real_score, fake_score = self.discriminator(x), self.discriminator(shown)
        loss = softplus(fake_score - real_score).mean()
        for score, images in ((real_score, x), (fake_score, fake)):
            (slope,) = torch.autograd.grad(score.sum(), images, create_graph=True)
            loss = loss + slope.square().sum((1, 2, 3)).mean()
        self.step(d, loss)


class PenaltiesAfterwards(PenaltiesOnBoth):
    """The penalty is scored last before the update, on a view of the detached fakes."""

    changed = True

    def step_generator(self, batch: Any) -> None:
        (x, _), (g, _) = batch, self.optimizers()
        z = self.noise(x)
        fake = self.generator(z)
        loss = softplus(self.discriminator(x) - self.discriminator(fake)).mean()
        copied = fake.detach().requires_grad_()
        torch.autograd.grad(self.discriminator(copied.view_as(copied)).sum(), copied)
        with self.unconditional(x, z):
            self.step(g, loss)


class LazyPenalty(Usual):
    """R1 every second step, in a step of its own (StyleGAN2)."""

    def step_discriminator(self, batch: Any) -> None:
        super().step_discriminator(batch)
        if len(self.by_hand) % 2:
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.discriminator(x).sum(), x, create_graph=True)
            self.step(self.optimizers()[1], slope.square().sum())


class TwoFakes(Usual):
    """BR is that of the last fake that is scored."""

    def step_generator(self, batch: Any) -> None:
        (x, _), (g, _) = batch, self.optimizers()
        other, z = self.noise(x), self.noise(x)
        loss = self.generator_loss(self.generator(other)) + self.generator_loss(self.generator(z))
        with self.unconditional(x, z):
            self.step(g, loss)


class InfoGAN(Usual):
    """The information is a loss of the generator's step; the discriminator returns the code that it reads."""

    arguments: ClassVar = {"discriminator_output": 0}

    def make_networks(self) -> None:
        class WithCode(Discriminator):
            def __init__(self) -> None:
                super().__init__()
                self.code = nn.Linear(24, 2)

            def forward(self, x: Tensor) -> Any:
                features = self.features(x)
                return self.score(features), self.code(features)

        self.generator, self.discriminator = Generator(), WithCode()

    def scores(self, x: Tensor) -> list[Tensor]:
        return [self.discriminator(x)[0]]

    def by_forward(self, x: Tensor) -> list[Tensor]:
        return [self.discriminator.forward(x)[0]]

    def step_generator(self, batch: Any) -> None:
        (x, _), (g, _) = batch, self.optimizers()
        z = self.noise(x)
        score, code = self.discriminator(self.generator(z))
        with self.worked_out(lambda: self.by_forward(x)[0], lambda: self.by_forward(self.generator.forward(z))[0]):
            self.step(g, softplus(-score).mean() + F.mse_loss(code, z[:, :2]))


# ---- layouts ---------------------------------------------------------------------------------------------------


class ChannelsLast(Usual):
    """The step moves the channels of real images; copies of them are scored."""

    shape: ClassVar = (4, 3, 2)
    views: ClassVar = False

    def make_networks(self) -> None:
        self.generator, self.discriminator = Generator((2, 4, 3)), Discriminator((2, 4, 3))

    def real(self, batch: Any) -> Tensor:
        moved = batch[0].permute(0, 3, 1, 2)
        return moved if self.views else moved.contiguous()


class ChannelsLastViews(ChannelsLast):
    views = True


class ChannelsLastGeneratorFirst(ChannelsLast):
    """Which axis is which is seen when the discriminator is called on real images: after the first update."""

    first = "generator"
    missing = 1


class ChannelsLastNamed(ChannelsLast):
    arguments: ClassVar = {"real": "target"}

    @staticmethod
    def item(x: Tensor, label: Tensor) -> Any:
        return {"input": x * 0.5, "target": x}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((batch["target"], None), batch_idx)


class ChannelsLastJoined(ChannelsLast):
    """``D(cat(real, fake))``, the real ones moved."""

    def step_discriminator(self, batch: Any) -> None:
        x, fake = self.real(batch), self.generator(self.noise(batch[0])).detach()
        real, fake = self.discriminator(torch.cat([x, fake])).chunk(2)
        self.step(self.optimizers()[1], softplus(-real).mean() + softplus(fake).mean())


class AddedChannel(Usual):
    """(B, T) becomes (B, 1, T)."""

    shape: ClassVar = (10,)

    def make_networks(self) -> None:
        self.generator, self.discriminator = Generator((1, 10)), Discriminator((1, 10))

    def real(self, batch: Any) -> Tensor:
        return batch[0].unsqueeze(1)


class Flattened(Usual):
    """Images become vectors."""

    def make_networks(self) -> None:
        self.generator, self.discriminator = Generator((16,)), Discriminator((16,))

    def real(self, batch: Any) -> Tensor:
        return batch[0].flatten(1)


class GeneratorChannelsLast(ChannelsLast):
    """Fakes and real images are both moved."""

    def make_networks(self) -> None:
        self.generator, self.discriminator = (
            Generator((4, 3, 2)),
            nn.Sequential(nn.Conv2d(2, 6, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(36, 1)),
        )

    def generate(self, z: Tensor) -> Tensor:
        return self.generator(z).permute(0, 3, 1, 2)

    def generate_by_forward(self, z: Tensor) -> Tensor:
        return self.generator.forward(z).permute(0, 3, 1, 2)


class GeneratorChannelsLastFirst(GeneratorChannelsLast):
    """Real images have the shape of the fakes, so both are moved alike from the first update on."""

    first = "generator"


class SquareChannelsLast(ChannelsLast):
    """Moved images have the shape of images that were not moved."""

    shape: ClassVar = (3, 3, 3)

    def make_networks(self) -> None:
        self.generator, self.discriminator = Generator((3, 3, 3)), Discriminator((3, 3, 3))


PATTERNS: list[type[GAN]] = [
    TwoDiscriminators,
    TwoDiscriminatorsGeneratorFirst,
    Vocoder,
    MultiScale,
    ReturnsANamedTuple,
    ReturnsADataclass,
    InOneCall,
    RelativisticAverage,
    VariationalAutoencoder,
    HeldByAModel,
    CodeFirst,
    SampledBetween,
    Chain,
    ByItsSecondPart,
    SeveralOfEach,
    UsualNamesInside,
    PenaltiesOnBoth,
    PenaltiesAfterwards,
    LazyPenalty,
    TwoFakes,
    InfoGAN,
    ChannelsLast,
    ChannelsLastViews,
    ChannelsLastGeneratorFirst,
    ChannelsLastNamed,
    ChannelsLastJoined,
    AddedChannel,
    Flattened,
    GeneratorChannelsLast,
    GeneratorChannelsLastFirst,
    SquareChannelsLast,
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_update_is_measured_as_worked_out_by_hand(pattern: type[GAN]) -> None:
    callback = static(pattern)
    gan = fitted(pattern, callback)
    missing = getattr(pattern, "missing", 0)
    assert callback.generator_updates == len(gan.by_hand) == BATCHES
    assert callback.measurements == callback.balance.samples == BATCHES - missing
    real, old, new = torch.tensor(gan.by_hand[missing:]).double().mean(0).tolist()
    assert abs(new - old) > 1e-4, "an update that moves nothing would hide mistakes"
    assert callback.balance.real == pytest.approx(real, abs=1e-6)
    assert callback.balance.fake == pytest.approx(old, abs=1e-6)
    assert callback.balance.beta == pytest.approx(new - old, abs=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_are_those_of_a_run_that_is_not_measured(pattern: type[GAN]) -> None:
    measured = fitted(pattern, static(pattern)).state_dict()
    plain = fitted(pattern, static(pattern, probe_interval=None)).state_dict()
    assert all(torch.equal(measured[name], value) for name, value in plain.items())


# ---- what must be said ---------------------------------------------------------------------------------------


class FeaturesFirst(MultiScale):
    arguments: ClassVar = {}


class ReconstructionError(Usual):
    """BEGAN: the discriminator is an autoencoder, and the score is its error."""

    def make_networks(self) -> None:
        self.generator = Generator()
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 16), nn.Unflatten(1, IMAGE))

    def scores(self, x: Tensor) -> list[Tensor]:
        return [-(self.discriminator(x) - x).abs().mean((1, 2, 3))]


class InOneCallUntold(InOneCall):
    arguments: ClassVar = {}


class ChangedInOneCall(RelativisticAverage):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, _) = batch, self.optimizers()
        self.step(g, self.loss(self.discriminator(x, self.generator(self.noise(x)).tanh()), -1))


class BrokenChain(VariationalAutoencoder):
    """Noise is added between the parts in the training step itself."""

    def generate(self, x: Tensor) -> Tensor:
        center, scale = self.encoder(x).chunk(2, dim=1)
        return self.decoder(center + scale.exp() * torch.randn_like(center))


class PartsUnseen(SeveralOfEach):
    """One of two discriminators is not called itself."""

    def scores(self, x: Tensor) -> list[Tensor]:
        return [self.model["mpd"](x), self.msd.forward(x)]


class WrongShape(Usual):
    arguments: ClassVar = {"real": 0}

    @staticmethod
    def item(x: Tensor, label: Tensor) -> Any:
        return F.pad(x, (1, 1, 1, 1)), label

    def real(self, batch: Any) -> Tensor:
        return batch[0][:, :, 1:-1, 1:-1]


class TakesADict(Usual):
    def make_networks(self) -> None:
        class OfDicts(Discriminator):
            def forward(self, images: dict[str, Tensor]) -> Tensor:
                return super().forward(images["large"])

        self.generator, self.discriminator = Generator(), OfDicts()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        self.step(d, F.softplus(-self.discriminator({"large": x})).mean())
        self.step(g, F.softplus(-self.discriminator({"large": self.generator(self.noise(x))})).mean())


class ImagesSecond(Usual):
    """The generator returns its features before its images."""

    class Networks(Generator):
        def forward(self, z: Tensor) -> dict[str, Tensor]:
            images = super().forward(z)
            return {"features": 2 * images, "images": images}

    def make_networks(self) -> None:
        self.generator, self.discriminator = self.Networks(), Discriminator()

    def generate(self, z: Tensor) -> Tensor:
        return self.generator(z)["images"]

    def generate_by_forward(self, z: Tensor) -> Tensor:
        return self.generator.forward(z)["images"]


class DetachedFirst(ImagesSecond):
    class Networks(Generator):
        def forward(self, z: Tensor) -> dict[str, Tensor]:
            return {"norms": z.norm(dim=1), "images": super().forward(z)}


class RescaledAndMoved(ChannelsLast):
    def real(self, batch: Any) -> Tensor:
        return 2 * super().real(batch) - 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            FeaturesFirst,
            r'4 floating-point tensors.*discriminator_output="0\.0".*0\.0 \(4, 4, 3, 3\).*1\.1 \(4, 1, 1, 1\)',
        ),
        (ReconstructionError, r"as many values as its images have, of shape \(4, 1, 4, 4\): .*BEGAN.*balance_scores"),
        (InOneCallUntold, r'in one call and returns one tensor\. Pass discriminator_output=\{"difference": ""\}'),
        (ChangedInOneCall, "changes what the generator returns before one call scores both"),
        (
            BrokenChain,
            r"changes what one part of the generator \(encoder, decoder\) returns .*`self\(x\)`.*balance_scores",
        ),
        (PartsUnseen, r"discriminator \(msd\) was not called, .*\(4, 1, 4, 4\); it was called on nothing"),
        (WrongShape, r"real=0 has the shape \(4, 1, 6, 6\) in the batch, and .* images of shape \(batch, 1, 4, 4\)"),
        (RescaledAndMoved, "changes the values of the batch's images"),
        (TakesADict, "called on arguments that are no tensors"),
        (DetachedFirst, r"first output of the generator \(Networks\) has no gradients; .*: return them first"),
        (ImagesSecond, "the generator returns several tensors, and the first counts as its images: return them first"),
    ],
)
def test_the_first_update_says_what_is_needed(pattern: type[GAN], message: str) -> None:
    callback = static(pattern)
    with pytest.raises(RuntimeError, match=f"the balance ratio cannot be measured: .*{message}"):
        fitted(pattern, callback)
    assert callback.generator_updates <= 1


class OfAContainer(TwoDiscriminators):
    arguments: ClassVar = {}

    def make_networks(self) -> None:
        super().make_networks()
        self.discriminator = nn.ModuleList([self.model["mpd"], self.msd])


def test_the_parts_of_a_container_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"is a ModuleList.*discriminator=\['discriminator.0', 'discriminator.1'\]"):
        fitted(OfAContainer, static(OfAContainer))
    parts = static(OfAContainer, discriminator=["discriminator.0", "discriminator.1"])
    fitted(OfAContainer, parts)
    assert parts.measurements == BATCHES


class Noisy(Usual):
    def real(self, batch: Any) -> Tensor:
        return batch[0] + 0.1 * torch.randn_like(batch[0])


class Part(Usual):
    def real(self, batch: Any) -> Tensor:
        return batch[0][:3]


@pytest.mark.parametrize(("pattern", "told"), [(Noisy, 1), (Part, 0), (Usual, 0)])
def test_real_images_that_are_never_seen_as_they_are_are_told_of_once(
    pattern: type[GAN], told: int, recwarn: pytest.WarningsRecorder
) -> None:
    seed_everything(0, verbose=False)
    data = DataLoader(Images(lambda x, label: (x, label), IMAGE), batch_size=BATCH)
    toy_trainer(static(pattern), epochs=5).fit(pattern(), data)
    assert sum("not called on the batch's real images as they are" in str(each.message) for each in recwarn) == told


class NeverMovedAlike(ChannelsLast):
    """Other images than the batch's are scored as real ones."""

    def real(self, batch: Any) -> Tensor:
        return super().real(batch) + torch.randn(1, 2, 4, 3)


def test_axes_that_are_never_seen_end_the_run(recwarn: pytest.WarningsRecorder) -> None:
    callback = static(NeverMovedAlike)
    seed_everything(0, verbose=False)
    data = DataLoader(Images(lambda x, label: (x, label), (4, 3, 2)), batch_size=BATCH)
    with pytest.raises(RuntimeError, match=r"\(batch, 2, 4, 3\).*\(batch, 4, 3, 2\), but in 20 training steps"):
        toy_trainer(callback, epochs=4).fit(NeverMovedAlike(), data)
    assert callback.measurements == 0
    assert callback.generator_updates == 20


@pytest.mark.parametrize("argument", [{"real": 0}, {"real": 0, "fake": 1, "other": 2}])
def test_unknown_kinds_of_images_are_rejected_at_once(argument: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="discriminator_output="):
        DynamicSparsityCallback(0.1, discriminator_output=argument)


def test_masks_of_channels_need_a_network_of_one_module() -> None:
    callback = static(TwoDiscriminators, granularity="channel")
    with pytest.raises(ValueError, match=r"discriminator=\['model.mpd', 'msd'\] with granularity=\"channel\""):
        callback.attach(TwoDiscriminators())


# ---- phases without a discriminator ----------------------------------------------------------------------------


class Pretraining(Usual):
    """The first updates are of a pixel loss alone (ESRGAN, SRGAN, VQGAN's disc_start); some later ones, too."""

    alone: ClassVar = {0, 1, 4}
    seen: ClassVar = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx not in self.alone:
            super().training_step(batch, batch_idx)
            return
        x, z = self.real(batch), self.code(batch)
        self.step(self.optimizers()[0], F.mse_loss(self.generate(z), x))


class WeightZero(Usual):
    """The discriminator is called from the start, but its losses are multiplied by 0 (VQGAN's `disc_factor`)."""

    alone: ClassVar = {0, 1}
    factor = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.factor = float(batch_idx not in self.alone)
        super().training_step(batch, batch_idx)

    def step(self, optimizer: Any, loss: Tensor) -> None:
        torch.autograd.grad(loss, self.discriminator.score.weight, retain_graph=True)  # for an adaptive weight
        super().step(optimizer, self.factor * loss)

    def worked_out(self, *scores: Any) -> Any:
        return super().worked_out(*scores) if self.factor else nullcontext()


class WeightZeroGeneratorFirst(WeightZero):
    first = "generator"


class PretrainingOfAnEpoch(Pretraining):
    alone: ClassVar = {*range(BATCHES)}


class PretrainingWithValidation(Pretraining):
    """Validation calls the discriminator all the while."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.discriminator(batch[0])


class PretrainingGeneratorFirst(Pretraining):
    first = "generator"


class PretrainingThenUnseen(Pretraining):
    """Once the discriminator is in use, its scores must be seen."""

    def scores(self, x: Tensor) -> list[Tensor]:
        return [self.discriminator.forward(x)]


class PretrainingWithScores(Pretraining):
    alone: ClassVar = {0, 1}

    def scores(self, x: Tensor) -> list[Tensor]:
        return [self.discriminator.forward(x)]

    def balance_scores(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.discriminator(batch[0]), self.discriminator(self.generator(self.kept))

    def code(self, batch: Any) -> Tensor:
        self.kept = super().code(batch)
        return self.kept


class PretrainingWithScoresGeneratorFirst(PretrainingWithScores):
    first = "generator"

    def step_discriminator(self, batch: Any) -> None:
        kept = self.kept
        super().step_discriminator(batch)
        self.kept = kept


@pytest.mark.parametrize(
    ("pattern", "measured"),
    [
        (Pretraining, 3),
        (PretrainingGeneratorFirst, 3),
        (PretrainingWithValidation, 3),
        (WeightZero, 4),
        (WeightZeroGeneratorFirst, 4),
        (PretrainingWithScores, 4),
        (PretrainingWithScoresGeneratorFirst, 4),
    ],
)
def test_updates_without_the_discriminator_are_not_measured(
    pattern: type[Pretraining], measured: int, recwarn: pytest.WarningsRecorder
) -> None:
    callback = static(pattern)
    seed_everything(0, verbose=False)
    gan = pattern()
    data = DataLoader(Images(lambda x, label: (x, label), IMAGE), batch_size=BATCH)
    evaluates = pattern is PretrainingWithValidation
    toy_trainer(callback, val_check_interval=1).fit(gan, data, data if evaluates else None)
    assert callback.generator_updates == BATCHES
    assert callback.measurements == callback.balance.samples == len(gan.by_hand) == measured
    real, old, new = torch.tensor(gan.by_hand).double().mean(0).tolist()
    assert callback.balance.real == pytest.approx(real, abs=1e-6)
    assert callback.balance.fake == pytest.approx(old, abs=1e-6)
    assert callback.balance.beta == pytest.approx(new - old, abs=1e-6)
    assert not any("discriminator" in str(warning.message) for warning in recwarn)


def test_decisions_are_undecided_until_the_discriminator_is_used(caplog: pytest.LogCaptureFixture) -> None:
    callback = static(PretrainingOfAnEpoch, method="ddst", interval=2, explore_interval=1, stop_on_divergence=True)
    seed_everything(0, verbose=False)
    gan = PretrainingOfAnEpoch()
    with caplog.at_level("INFO"):
        toy_trainer(callback, epochs=5).fit(gan, DataLoader(Images(lambda x, y: (x, y), IMAGE), batch_size=BATCH))
    told = [record for record in caplog.records if "trained without the discriminator" in record.message]
    assert len(told) == 1
    assert callback.generator_updates == 5 * BATCHES
    assert [decision.action for _, decision in callback.decisions] == ["undecided"] * 15
    assert callback.measurements == 0


def test_a_run_that_never_uses_its_discriminator_ends_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="neither called nor trained in 6 generator updates"):
        fitted(PretrainingOfAnEpoch, static(PretrainingOfAnEpoch))


def test_calls_that_cannot_be_seen_are_rejected_when_the_discriminator_is_in_use() -> None:
    callback = static(PretrainingThenUnseen)
    with pytest.raises(RuntimeError, match=r"discriminator \(Discriminator\) was not called"):
        fitted(PretrainingThenUnseen, callback)
    assert callback.generator_updates == 3


def test_a_window_forgets_what_was_measured_before_a_long_gap() -> None:
    class Gap(Pretraining):
        alone: ClassVar = {3, 4, 5}

    callback = static(Gap, interval=3)
    fitted(Gap, callback)
    assert callback.measurements == 3
    assert callback.balance.samples == 0
    assert callback.balance_ratio is None


# ---- resuming, averages and exports of several parts -----------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [TwoDiscriminators, Vocoder, VariationalAutoencoder, SeveralOfEach, ChannelsLastGeneratorFirst, Pretraining],
)
def test_runs_resume_bit_for_bit(pattern: type[GAN], tmp_path: Path) -> None:
    arguments = {"interval": 2, "explore_interval": 1, "probe_interval": 1} | pattern.arguments
    data = Images(getattr(pattern, "item", lambda x, label: (x, label)), getattr(pattern, "shape", IMAGE))

    def fit(folder: str, ckpt_path: Path | None = None) -> tuple[Trainer, DynamicSparsityCallback, GAN]:
        seed_everything(0, verbose=False)
        callback = DynamicSparsityCallback(0.3, 0.3, "ddst", bounds=(0.01, 0.02), seed=0, **arguments)
        average = GeneratorEMA(0.5, generator=pattern.arguments.get("generator"))
        gan = pattern()
        saving = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        trainer = toy_trainer(callback, average, saving, epochs=2, enable_checkpointing=True)
        trainer.fit(gan, DataLoader(data, batch_size=BATCH), ckpt_path=ckpt_path)
        assert average.state_dict()["updates"] == callback.generator_updates
        return trainer, callback, gan

    full, whole, expected = fit("full")
    resumed, callback, gan = fit("resumed", tmp_path / "full" / "epoch=0.ckpt")
    full.save_checkpoint(tmp_path / "full.ckpt")
    resumed.save_checkpoint(tmp_path / "resumed.ckpt")
    assert whole.decisions == callback.decisions
    assert whole.balance == callback.balance
    assert all(torch.equal(value, gan.state_dict()[name]) for name, value in expected.state_dict().items())
    states = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"] for name in ("full", "resumed")]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        if key.startswith("GeneratorEMA"):
            averages = states[1][key]["averages"]
            assert all(torch.equal(value, averages[name]) for name, value in state["averages"].items())


def test_parts_share_one_density_and_keep_the_names_of_the_module(tmp_path: Path) -> None:
    callback = static(SeveralOfEach, dense_layers=["encoder"])
    gan = fitted(SeveralOfEach, callback)
    assert set(callback.masks("generator")) == {"decoder.layers.0.weight", "decoder.layers.2.weight"}
    masks = callback.masks("discriminator")
    assert set(masks) == {
        "model.mpd.1.weight",
        "model.mpd.3.weight",
        "msd.features.1.weight",
        "msd.score.weight",
    }
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * sum(mask.numel() for mask in masks.values()))
    assert all(not gan.get_parameter(name)[~mask].any() for name, mask in masks.items())
