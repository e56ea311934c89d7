"""GANs as people write them, each measured at every generator update, and worked out by hand in its training step.

The networks keep no state, so a score by hand is `forward` without gradients; hooks do not see it.
"""

from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from gans import (
    BATCH,
    BATCHES,
    CLASSES,
    DENSITY,
    GAN,
    IMAGE,
    LATENT,
    Discriminator,
    Generator,
    Images,
    Translator,
    adam,
    fitted,
    static,
)
from lightning.pytorch import Callback, callbacks, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from toys import toggled, toy_trainer

from lightning_ddst import DynamicSparsityCallback, GeneratorEMA

# ---- the patterns -----------------------------------------------------------------------------------------


class LightningsExample(GAN):
    """The generator first, each optimizer toggled, as in Lightning's own example."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        self.toggle_optimizer(g)
        loss = self.generator_loss(self(z))
        self.manual_backward(loss)
        with self.unconditional(x, z):
            g.step()
        g.zero_grad()
        self.untoggle_optimizer(g)
        self.toggle_optimizer(d)
        loss = self.discriminator_loss(x, self(z).detach())
        self.manual_backward(loss)
        d.step()
        d.zero_grad()
        self.untoggle_optimizer(d)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)


class SharedFake(GAN):
    """The discriminator first, and both losses of one fake."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        fake = self.generator(z)
        self.step(d, self.discriminator_loss(x, fake.detach()))
        with self.unconditional(x, z):
            self.step(g, self.generator_loss(fake))


class ToggledOptimizer(GAN):
    """Lightning's context manager."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        with toggled(self, d):
            self.step(d, self.discriminator_loss(x, self.generator(z).detach()))
        with toggled(self, g):
            loss = self.generator_loss(self.generator(z))
            with self.unconditional(x, z):
                self.step(g, loss)


class Closures(GAN):
    raw = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers(use_pl_optimizer=not self.raw)
        z = self.noise(x)

        def discriminator_closure() -> Tensor:
            loss = self.discriminator_loss(x, self.generator(z).detach())
            d.zero_grad()
            self.manual_backward(loss)
            return loss

        def generator_closure() -> Tensor:
            loss = self.generator_loss(self.generator(z))
            g.zero_grad()
            self.manual_backward(loss)
            return loss

        d.step(closure=discriminator_closure)
        with self.unconditional(x, z):
            g.step(closure=generator_closure)


class RawClosures(Closures):
    """Torch's own optimizers: no hook runs between the closure and the update."""

    raw = True


class RawOptimizers(GAN):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers(use_pl_optimizer=False)
        z = self.noise(x)
        self.step(d, self.discriminator_loss(x, self.generator(z).detach()))
        with self.unconditional(x, z):
            self.step(g, self.generator_loss(self.generator(z)))


class CriticStepsInside(GAN):
    """A Wasserstein critic with gradient penalty and several steps a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        for _ in range(3):
            fake = self.generator(self.noise(x)).detach()
            mixed = (x + torch.rand(len(x), 1, 1, 1) * (fake - x)).requires_grad_()
            (slope,) = torch.autograd.grad(self.discriminator(mixed).sum(), mixed, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            self.step(d, self.discriminator(fake).mean() - self.discriminator(x).mean() + 10 * penalty)
        z = self.noise(x)
        with self.unconditional(x, z):
            self.step(g, -self.discriminator(self.generator(z)).mean())


class CriticStepsAcross(GAN):
    every = 3

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        self.step(d, self.discriminator_loss(x, self.generator(self.noise(x)).detach()))
        if batch_idx % self.every == self.every - 1:
            z = self.noise(x)
            with self.unconditional(x, z):
                self.step(g, self.generator_loss(self.generator(z)))


class GeneratorEverySecondBatch(GAN):
    """One network a batch, the generator first."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        if batch_idx % 2 == 0:
            with self.unconditional(x, z):
                self.step(g, self.generator_loss(self.generator(z)))
        else:
            self.step(d, self.discriminator_loss(x, self.generator(z).detach()))


class Accumulation(GAN):
    """Gradients of two batches, by hand; what is measured is the second."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        self.manual_backward(self.discriminator_loss(x, self.generator(z).detach()) / 2)
        if batch_idx % 2:
            d.step()
            d.zero_grad()
        self.discriminator.requires_grad_(False)
        self.manual_backward(self.generator_loss(self.generator(z)) / 2)
        self.discriminator.requires_grad_(True)
        if batch_idx % 2:
            with self.unconditional(x, z):
                g.step()
            g.zero_grad()


class Conditional(GAN):
    """``G(z, labels)`` and ``D(x, labels)``, with other labels for fakes."""

    def make_networks(self) -> None:
        self.generator, self.discriminator = Generator(classes=CLASSES), Discriminator(classes=CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, labels), (g, d) = batch, self.optimizers()
        z, drawn = self.noise(x), torch.randint(CLASSES, (len(x),))
        fake = self.generator(z, drawn)
        real_loss = F.softplus(-self.discriminator(x, labels)).mean()
        self.step(d, real_loss + F.softplus(self.discriminator(fake.detach(), drawn)).mean())
        with self.worked_out(
            lambda: self.discriminator.forward(x, labels),
            lambda: self.discriminator.forward(self.generator.forward(z, drawn), drawn),
        ):
            self.step(g, F.softplus(-self.discriminator(fake, labels=drawn)).mean())


class ConditionalGeneratorFirst(Conditional):
    """Real images were not scored yet when the generator steps."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, labels), (g, d) = batch, self.optimizers()
        z, drawn = self.noise(x), torch.randint(CLASSES, (len(x),))
        with self.worked_out(
            lambda: self.discriminator.forward(x, labels),
            lambda: self.discriminator.forward(self.generator.forward(z, drawn), drawn),
        ):
            self.step(g, F.softplus(-self.discriminator(self.generator(z, drawn), drawn)).mean())
        fake = self.generator(z, drawn).detach()
        real_loss = F.softplus(-self.discriminator(x, labels)).mean()
        self.step(d, real_loss + F.softplus(self.discriminator(fake, drawn)).mean())


class Joined(GAN):
    """``D(cat(real, fake))`` in both steps."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        real, fake = self.discriminator(torch.cat([x, self.generator(z).detach()])).chunk(2)
        self.step(d, F.softplus(-real).mean() + F.softplus(fake).mean())
        _, fake = self.discriminator(torch.cat([x, self.generator(z)])).chunk(2)
        with self.unconditional(x, z):
            self.step(g, F.softplus(-fake).mean())


class Augmented(GAN):
    """The discriminator sees nothing as it is; scored are images as they are."""

    @staticmethod
    def augment(x: Tensor) -> Tensor:
        return x.roll(1, dims=3) + 0.1 * torch.randn(len(x), 1, 1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        self.step(d, self.discriminator_loss(self.augment(x), self.augment(self.generator(z).detach())))
        with self.unconditional(x, z):
            self.step(g, self.generator_loss(self.augment(self.generator(z))))


class Restoration(GAN):
    """Restores a degraded image, with an L1 and an adversarial loss; the batch has both images."""

    arguments: ClassVar = {"real": "clean"}

    def make_networks(self) -> None:
        self.generator, self.discriminator = Translator(), Discriminator()

    @staticmethod
    def item(x: Tensor, label: Tensor) -> Any:
        return {"degraded": x * (torch.arange(4) % 2), "clean": x, "label": label}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (g, d), degraded, clean = self.optimizers(), batch["degraded"], batch["clean"]
        fake = self.generator(degraded)
        self.step(d, self.discriminator_loss(clean, fake.detach()))
        with self.unconditional(clean, degraded):
            self.step(g, 0.1 * self.generator_loss(fake) + F.l1_loss(fake, clean))


class RestorationOfAPair(Restoration):
    arguments: ClassVar = {"real": 1}

    @staticmethod
    def item(x: Tensor, label: Tensor) -> Any:
        return (x * (torch.arange(4) % 2), x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step({"degraded": batch[0], "clean": batch[1]}, batch_idx)


class ConditionedOnTheInput(Restoration):
    """``D(image, degraded)``: the condition of a fake is that of its real image."""

    def make_networks(self) -> None:
        class OfPairs(Discriminator):
            def forward(self, x: Tensor, condition: Tensor) -> Tensor:
                return super().forward(torch.cat([x, condition], 1))

        self.generator, self.discriminator = Translator(), OfPairs((2, 4, 4))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (g, _), degraded, clean = self.optimizers(), batch["degraded"], batch["clean"]
        score = self.discriminator.forward
        with self.worked_out(lambda: score(clean, degraded), lambda: score(self.generator.forward(degraded), degraded)):
            self.step(g, F.softplus(-self.discriminator(self.generator(degraded), degraded)).mean())


class Autoencoder(GAN):
    """Reached through ``self(batch)``; the batch is a tensor, and the fakes are fakes of it."""

    def make_networks(self) -> None:
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, LATENT))
        self.generator, self.discriminator = Generator(), Discriminator()

    @staticmethod
    def item(x: Tensor, label: Tensor) -> Any:
        return x

    def configure_optimizers(self) -> Any:
        return [Adam(chain(self.encoder.parameters(), self.generator.parameters()), 0.01), adam(self.discriminator)]

    def forward(self, x: Tensor) -> Tensor:
        return self.generator(self.encoder(x))

    def training_step(self, x: Tensor, batch_idx: int) -> None:
        g, d = self.optimizers()
        self.step(d, self.discriminator_loss(x, self(x).detach()))
        fake = self(x)
        loss = self.generator_loss(fake) + F.mse_loss(fake, x)
        with torch.no_grad():
            z = self.encoder.forward(x)  # BR is the decoder's: it keeps the code that it was given
        with self.unconditional(x, z):
            self.step(g, loss)


class EncoderApart(Autoencoder):
    """The encoder has an optimizer of its own, which comes first."""

    def configure_optimizers(self) -> Any:
        return [adam(self.encoder), adam(self.generator), adam(self.discriminator)]

    def training_step(self, x: Tensor, batch_idx: int) -> None:
        e, g, d = self.optimizers()
        self.step(d, self.discriminator_loss(x, self(x).detach()))
        z = self.encoder(x)
        fake = self.generator(z)
        loss = self.generator_loss(fake) + F.mse_loss(fake, x)
        e.zero_grad()
        g.zero_grad()
        self.manual_backward(loss)
        e.step()
        with self.unconditional(x, z.detach()):
            g.step()


class ReturnsATuple(GAN):
    """The first tensor is the score."""

    arguments: ClassVar = {"discriminator_output": 0}

    def make_networks(self) -> None:
        class WithFeatures(Discriminator):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
                features = self.features(x)
                return self.returned(self.score(features), features)

            @staticmethod
            def returned(score: Tensor, features: Tensor) -> Any:
                return self.returned(score, features)

        self.generator, self.discriminator = Generator(), WithFeatures()

    @staticmethod
    def returned(score: Tensor, features: Tensor) -> Any:
        return score, features

    @staticmethod
    def score_in(returned: Any) -> Tensor:
        return returned[0]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)

        def score(x: Tensor) -> Tensor:
            return self.score_in(self.discriminator(x))

        self.step(d, F.softplus(-score(x)).mean() + F.softplus(score(self.generator(z).detach())).mean())
        with self.worked_out(
            lambda: self.score_in(self.discriminator.forward(x)),
            lambda: self.score_in(self.discriminator.forward(self.generator.forward(z))),
        ):
            self.step(g, F.softplus(-score(self.generator(z))).mean())


class ReturnsAList(ReturnsATuple):
    """Features first."""

    arguments: ClassVar = {"discriminator_output": 1}

    @staticmethod
    def returned(score: Tensor, features: Tensor) -> Any:
        return [[features, features], score]

    @staticmethod
    def score_in(returned: Any) -> Tensor:
        return returned[1]


class ReturnsADict(ReturnsATuple):
    arguments: ClassVar = {"discriminator_output": "score.adversarial"}

    @staticmethod
    def returned(score: Tensor, features: Tensor) -> Any:
        return {"features": features, "score": {"auxiliary": features, "adversarial": score}}

    @staticmethod
    def score_in(returned: Any) -> Tensor:
        return returned["score"]["adversarial"]


class SeveralDiscriminatorOptimizers(GAN):
    def configure_optimizers(self) -> Any:
        d = self.discriminator
        return [adam(d.features), adam(self.generator), SGD(d.score.parameters(), 0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (features, g, score) = batch, self.optimizers()
        z = self.noise(x)
        score.zero_grad()
        self.step(features, self.discriminator_loss(x, self.generator(z).detach()))
        score.step()
        with self.unconditional(x, z):
            self.step(g, self.generator_loss(self.generator(z)))


class OneOptimizer(GAN):
    """A parameter group a network; a step moves what has gradients."""

    def configure_optimizers(self) -> Any:
        return Adam([{"params": n.parameters(), "lr": 0.01} for n in (self.discriminator, self.generator)])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), optimizer = batch, self.optimizers()
        z = self.noise(x)
        self.step(optimizer, self.discriminator_loss(x, self.generator(z).detach()))
        self.discriminator.requires_grad_(False)
        with self.unconditional(x, z):
            self.step(optimizer, self.generator_loss(self.generator(z)))
        self.discriminator.requires_grad_(True)


class OneStepForBoth(OneOptimizer):
    """Both networks move in one step; BR's scores are those of the discriminator before it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), optimizer = batch, self.optimizers()
        z = self.noise(x)
        fake = self.generator(z)
        optimizer.zero_grad()
        self.manual_backward(self.discriminator_loss(x, fake.detach()))
        kept = {name: p.grad.clone() for name, p in self.discriminator.named_parameters()}
        self.manual_backward(self.generator_loss(fake))
        for name, p in self.discriminator.named_parameters():
            p.grad = kept[name]
        before = {name: p.detach().clone() for name, p in self.discriminator.named_parameters()}

        def score(image: Tensor) -> Tensor:  # past hooks, too
            hidden = F.linear(image.flatten(1), before["features.1.weight"], before["features.1.bias"])
            return F.linear(F.leaky_relu(hidden, 0.2), before["score.weight"], before["score.bias"])

        with self.worked_out(lambda: score(x), lambda: score(self.generator.forward(z))):
            optimizer.step()


class Shaped(SharedFake):
    shape: tuple[int, ...] = IMAGE

    def make_networks(self) -> None:
        self.generator, self.discriminator = Generator(self.shape), Discriminator(self.shape)


class Signals(Shaped):
    shape = (2, 10)


class Volumes(Shaped):
    shape = (1, 3, 3, 3)


class Vectors(Shaped):
    shape = (7,)


class Nested(GAN):
    """The networks are a part of the module, and are called something else."""

    arguments: ClassVar = {"generator": "model.painter", "discriminator": "model.judges.0"}

    def make_networks(self) -> None:
        self.model = nn.ModuleDict({"painter": Generator(), "judges": nn.ModuleList([Discriminator()])})
        self.perceptual = nn.Sequential(nn.Flatten(), nn.Linear(16, 8)).requires_grad_(False)
        self.encoder = nn.Linear(LATENT, LATENT)

    def configure_optimizers(self) -> Any:
        painter, judge = self.model["painter"], self.model["judges"][0]
        return [adam(judge), Adam(chain(self.encoder.parameters(), painter.parameters()), 0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (d, g), painter, judge = batch, self.optimizers(), self.model["painter"], self.model["judges"][0]
        z = self.noise(x)
        real_loss = F.softplus(-judge(x)).mean()
        self.step(d, real_loss + F.softplus(judge(painter(self.encoder(z)).detach())).mean())
        code = self.encoder(z)
        fake = painter(code)
        loss = F.softplus(-judge(fake)).mean() + F.mse_loss(self.perceptual(fake), self.perceptual(x))
        code = code.detach()
        with self.worked_out(lambda: judge.forward(x), lambda: judge.forward(painter.forward(code))):
            self.step(g, loss)


class StyleBased(GAN):
    """The generator is never called itself, so the module gives the scores."""

    def make_networks(self) -> None:
        self.G = nn.ModuleDict({"mapping": nn.Linear(LATENT, LATENT), "synthesis": Generator()})
        self.D = Discriminator()
        self.scored: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        return [adam(self.G), adam(self.D)]

    def generate(self, z: Tensor) -> Tensor:
        return self.G["synthesis"](self.G["mapping"](z))

    def balance_scores(self, batch: Any) -> tuple[Tensor, Tensor]:
        self.scored.append(self.noise(batch[0]))
        return self.D(batch[0]), self.D(self.generate(self.scored[-1]))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.train_discriminator(batch[0])
        self.train_generator(batch[0])

    def train_discriminator(self, x: Tensor) -> None:
        fake = self.generate(self.noise(x))
        loss = F.softplus(-self.D(x)).mean() + F.softplus(self.D(fake.detach())).mean()
        self.step(self.optimizers()[1], loss)

    def train_generator(self, x: Tensor) -> None:
        loss = F.softplus(-self.D(self.generate(self.noise(x)))).mean()
        state = torch.get_rng_state()
        z = self.noise(x)  # what will be drawn for the scores
        torch.set_rng_state(state)
        with self.worked_out(
            lambda: self.D.forward(x),
            lambda: self.D.forward(self.G["synthesis"].forward(self.G["mapping"].forward(z))),
        ):
            self.step(self.optimizers()[0], loss)
        if self.scored:
            assert all(torch.equal(z, drawn) for drawn in self.scored), "each time the same noise"
            self.scored.clear()


class StyleBasedGeneratorFirst(StyleBased):
    """Calls the discriminator before the first update, but neither steps it nor gives it a gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[0]
        self.toggle_optimizer(optimizer)
        self.train_generator(batch[0])
        self.untoggle_optimizer(optimizer)
        self.train_discriminator(batch[0])


PATTERNS: list[type[GAN]] = [
    LightningsExample,
    SharedFake,
    ToggledOptimizer,
    Closures,
    RawClosures,
    RawOptimizers,
    CriticStepsInside,
    CriticStepsAcross,
    GeneratorEverySecondBatch,
    Accumulation,
    Conditional,
    ConditionalGeneratorFirst,
    Joined,
    Augmented,
    Restoration,
    RestorationOfAPair,
    ConditionedOnTheInput,
    Autoencoder,
    EncoderApart,
    ReturnsATuple,
    ReturnsAList,
    ReturnsADict,
    SeveralDiscriminatorOptimizers,
    OneOptimizer,
    OneStepForBoth,
    Signals,
    Volumes,
    Vectors,
    Nested,
    StyleBased,
    StyleBasedGeneratorFirst,
]
UPDATES = {CriticStepsAcross: 2, GeneratorEverySecondBatch: 3, Accumulation: 3}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_update_is_measured_as_worked_out_by_hand(pattern: type[GAN]) -> None:
    callback = static(pattern)
    gan = fitted(pattern, callback)
    updates = UPDATES.get(pattern, BATCHES)
    assert callback.generator_updates == callback.measurements == len(gan.by_hand) == updates
    real, old, new = torch.tensor(gan.by_hand).double().mean(0).tolist()
    balance = callback.balance
    assert balance.samples == updates
    assert balance.real == pytest.approx(real, abs=1e-6)
    assert balance.fake == pytest.approx(old, abs=1e-6)
    assert abs(new - old) > 1e-4, "an update that moves nothing would hide mistakes"
    assert balance.beta == pytest.approx(new - old, abs=1e-6)
    assert balance.alpha == pytest.approx(real - old, abs=2e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_are_those_of_a_run_that_is_not_measured(pattern: type[GAN]) -> None:
    measured = fitted(pattern, static(pattern)).state_dict()
    plain = fitted(pattern, static(pattern, probe_interval=None)).state_dict()
    assert measured.keys() == plain.keys() == pattern().state_dict().keys()
    assert all(torch.equal(measured[name], value) for name, value in plain.items())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ddst_runs_and_a_checkpoint_of_it_loads_without_the_package(pattern: type[GAN], tmp_path: Path) -> None:
    arguments: ClassVar = {"interval": 2, "explore_interval": 1, "probe_interval": 1} | pattern.arguments
    if pattern is ConditionedOnTheInput:
        arguments |= {"bounds": (0.45, 0.55)}  # by which its discriminator, which gets no gradients, never grows
    callback = DynamicSparsityCallback(DENSITY, DENSITY, "ddst", **arguments)
    seed_everything(0, verbose=False)
    gan = pattern()
    data = Images(getattr(pattern, "item", lambda x, label: (x, label)), getattr(pattern, "shape", IMAGE))
    trainer = toy_trainer(callback, epochs=2, folder=tmp_path)
    trainer.fit(gan, DataLoader(data, batch_size=BATCH))
    assert len(callback.decisions) == callback.generator_updates // 2
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    plain = pattern()
    plain.load_state_dict(state)
    masks = callback.masks("generator")
    assert sum(int(mask.sum()) for mask in masks.values()) == round(DENSITY * sum(m.numel() for m in masks.values()))
    assert not any(plain.get_parameter(name)[~mask].any() for name, mask in masks.items())


# ---- what cannot be seen, said at the first update ------------------------------------------------------------


class ByForward(SharedFake):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        self.step(d, self.discriminator_loss(x, self.generator.forward(self.noise(x)).detach()))
        self.step(g, self.generator_loss(self.generator.forward(self.noise(x))))


class OfPairs(Restoration):
    """``D(cat(input, output))``, as in pix2pix."""

    def make_networks(self) -> None:
        self.generator, self.discriminator = Translator(), Discriminator((2, 4, 4))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (g, _), degraded = self.optimizers(), batch["degraded"]
        pair = torch.cat([degraded, self.generator(degraded)], 1)
        self.step(g, F.softplus(-self.discriminator(pair)).mean())


class ChangedInPlace(GAN):
    """Overwrites the generator's output before it is scored."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, _), (g, d) = batch, self.optimizers()
        z = self.noise(x)
        self.step(d, self.discriminator_loss(x, self.generator(z).detach()))
        fake = self.generator(z)
        fake.mul_(0.5)
        with self.unconditional(x, z):
            self.step(g, self.generator_loss(fake))


class Residual(Restoration):
    """The generator gives what is missing."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (g, d), degraded, clean = self.optimizers(), batch["degraded"], batch["clean"]
        fake = degraded + self.generator(degraded)
        self.step(d, self.discriminator_loss(clean, fake.detach()))
        self.step(g, self.generator_loss(fake))


class BidirectionalGeneratorFirst(Autoencoder):
    """BiGAN: the discriminator judges image and code."""

    def make_networks(self) -> None:
        class OfCodes(Discriminator):
            def forward(self, x: Tensor, code: Tensor) -> Tensor:
                return super().forward(x) + code.mean(1, keepdim=True)

        super().make_networks()
        self.discriminator = OfCodes()

    def training_step(self, x: Tensor, batch_idx: int) -> None:
        g, _ = self.optimizers()
        z = self.noise(x)
        self.step(g, F.softplus(-self.discriminator(self.generator(z), z)).mean())


class OtherShapes(SharedFake):
    """Real images are cut to size in the training step."""

    @staticmethod
    def item(x: Tensor, label: Tensor) -> Any:
        return F.pad(x, (1, 1, 1, 1)), label

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((batch[0][:, :, 1:-1, 1:-1], batch[1]), batch_idx)


class Rescaled(SharedFake):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((2 * batch[0] - 1, batch[1]), batch_idx)


class RescaledGeneratorFirst(LightningsExample):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((2 * batch[0] - 1, batch[1]), batch_idx)


class TwoTargets(Restoration):
    arguments: ClassVar = {}


class TwoLabels(ConditionalGeneratorFirst):
    @staticmethod
    def item(x: Tensor, label: Tensor) -> Any:
        return {"x": x, "class": label, "style": label + 1}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((batch["x"], batch["class"]), batch_idx)


class JoinedWithLabels(Conditional):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, labels), (g, _) = batch, self.optimizers()
        fake = self.generator(self.noise(x), labels)
        scores = self.discriminator(torch.cat([x, fake]), torch.cat([labels, labels]))
        self.step(g, F.softplus(-scores[len(x) :]).mean())


class NoSuchOutput(ReturnsATuple):
    arguments: ClassVar = {"discriminator_output": "logits"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (ByForward, r"generator \(Generator\) .*`generator\(z\)`.*balance_scores"),
        (
            OfPairs,
            r"\(Discriminator\) .*\(4, 1, 4, 4\); .*\(4, 2, 4, 4\).*balance_scores",
        ),
        (OtherShapes, r"shape \(batch, 1, 4, 4\).* 0 \(4, 1, 6, 6\).*balance_scores"),
        (ChangedInPlace, "changes what the generator returns"),
        (Residual, "changes what the generator returns"),
        (BidirectionalGeneratorFirst, "discriminator .* argument 1 .* none of the batch"),
        (Rescaled, "changes the values of the batch's images"),
        (RescaledGeneratorFirst, "changes the values of the batch's images"),
        (TwoTargets, r'degraded, clean\. .*real="degraded" or real="clean"'),
        (TwoLabels, "discriminator .* argument 1 .* class, style "),
        (JoinedWithLabels, "called on 8 images .* argument 1"),
        (NoSuchOutput, r"discriminator_output='logits' .* 0 \(4, 1\).*, 1 \(4, 24\)"),
    ],
)
@pytest.mark.parametrize("probe_interval", [1, 500])
def test_the_first_update_names_what_is_missing(pattern: type[GAN], message: str, probe_interval: int) -> None:
    callback = static(pattern, probe_interval=probe_interval)
    with pytest.raises(RuntimeError, match=f"the balance ratio cannot be measured: .*{message}"):
        fitted(pattern, callback)
    assert callback.generator_updates <= 1


def test_a_rare_measurement_is_not_made_early(recwarn: pytest.WarningsRecorder) -> None:
    callback = static(SharedFake, probe_interval=4)
    gan = fitted(SharedFake, callback)
    assert callback.measurements == 1
    assert callback.balance.real == pytest.approx(gan.by_hand[3][0], abs=1e-6)


# ---- several pairs -----------------------------------------------------------------------------------------------


class Cycle(GAN):
    """Two generators and two discriminators, one optimizer for each kind; all of the generators' calls first."""

    def make_networks(self) -> None:
        self.G_AB, self.G_BA = Translator(), Translator()
        self.D_A, self.D_B = Discriminator(), Discriminator()
        self.of_pair: dict[str, list[list[float]]] = {"B": [], "A": []}

    @staticmethod
    def item(x: Tensor, label: Tensor) -> Any:
        return {"a": x, "b": -x.flip(2)}

    def configure_optimizers(self) -> Any:
        return [
            Adam(chain(self.G_AB.parameters(), self.G_BA.parameters()), 0.01),
            Adam(chain(self.D_A.parameters(), self.D_B.parameters()), 0.01),
        ]

    @staticmethod
    def augment(x: Tensor) -> Tensor:
        return x

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (a, b), (g, d) = (batch["a"], batch["b"]), self.optimizers()
        fake_b, fake_a = self.G_AB(a), self.G_BA(b)
        loss = F.l1_loss(self.G_BA(fake_b), a) + F.l1_loss(self.G_AB(fake_a), b)
        loss = loss + F.l1_loss(self.G_AB(b), b) + F.l1_loss(self.G_BA(a), a)
        loss = loss + F.softplus(-self.D_B(self.augment(fake_b))).mean()
        loss = loss + F.softplus(-self.D_A(self.augment(fake_a))).mean()
        score_b = self.worked_out(lambda: self.D_B.forward(b), lambda: self.D_B.forward(self.G_AB.forward(a)))
        score_a = self.worked_out(lambda: self.D_A.forward(a), lambda: self.D_A.forward(self.G_BA.forward(b)))
        with score_b, score_a:
            self.step(g, loss)
        self.of_pair["A"].append(self.by_hand[-2])  # the inner of both ends first
        self.of_pair["B"].append(self.by_hand[-1])
        a, b, fake_a, fake_b = (self.augment(images) for images in (a, b, fake_a.detach(), fake_b.detach()))
        loss = F.softplus(-self.D_B(b)).mean() + F.softplus(self.D_B(fake_b)).mean()
        self.step(d, loss + F.softplus(-self.D_A(a)).mean() + F.softplus(self.D_A(fake_a)).mean())


class AugmentedCycle(Cycle):
    @staticmethod
    def augment(x: Tensor) -> Tensor:
        return x.flip(3) * 0.9


@pytest.mark.parametrize("pattern", [Cycle, AugmentedCycle])
def test_each_of_two_pairs_has_its_own_balance_masks_and_names(pattern: type[Cycle], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "static", "probe_interval": 1, "interval": 1000}
    pairs = {
        "B": DynamicSparsityCallback(0.3, generator="G_AB", discriminator="D_B", real="b", **settings),
        "A": DynamicSparsityCallback(0.5, generator="G_BA", discriminator="D_A", real="a", **settings),
    }
    seed_everything(0, verbose=False)
    gan = pattern()
    trainer = toy_trainer(*pairs.values(), folder=tmp_path, log_every_n_steps=1)
    trainer.fit(gan, DataLoader(Images(Cycle.item, IMAGE), batch_size=BATCH))
    for name, callback in pairs.items():
        real, old, new = torch.tensor(gan.of_pair[name]).double().mean(0).tolist()
        assert callback.measurements == BATCHES
        assert callback.balance.alpha == pytest.approx(real - old, abs=2e-6)
        assert callback.balance.beta == pytest.approx(new - old, abs=1e-6)
    assert set(pairs["A"].masks("generator")) == {"G_BA.layers.0.weight", "G_BA.layers.2.weight"}
    assert [callback.generator_density for callback in pairs.values()] == [43 / 144, 0.5]
    assert not any(
        gan.get_parameter(name)[~mask].any()
        for callback in pairs.values()
        for role in ("generator", "discriminator")
        for name, mask in callback.masks(role).items()
    )
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"G_AB/density/generator", "G_BA/density/generator", "G_AB/balance/alpha"} <= set(tags)
    assert "density/generator" not in tags
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert sum(key.startswith("DynamicSparsityCallback") for key in states) == 2


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            {"generator": "G_AB", "discriminator": "D_A", "real": "a"},
            r"discriminator \(Discriminator\) was not called",
        ),
        ({"generator": "G_AB", "discriminator": "D_B", "real": "a"}, r'should be real=\'a\', .* is shown "b"'),
    ],
)
def test_pairs_that_do_not_belong_together_are_rejected(pair: dict[str, str], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"the balance ratio cannot be measured: .*{message}"):
        fitted_without_looking(Cycle, static(Cycle, **pair))


def test_two_callbacks_do_not_mask_one_network() -> None:
    first, second = (
        static(Cycle, generator="G_AB", discriminator="D_B", real="b"),
        static(Cycle, generator="G_AB", discriminator="D_A", real="a"),
    )
    with pytest.raises(ValueError, match="two DynamicSparsityCallbacks mask the same generator"):
        toy_trainer(first, second).fit(Cycle(), DataLoader(Images(Cycle.item, IMAGE), batch_size=BATCH))


def test_scores_of_one_pair_are_not_taken_for_those_of_two() -> None:
    class WithScores(Cycle):
        def balance_scores(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self.D_A(batch["a"]), self.D_A(self.G_BA(batch["b"]))

    pairs = static(Cycle, generator="G_AB", discriminator="D_B"), static(Cycle, generator="G_BA", discriminator="D_A")
    with pytest.raises(ValueError, match=r"balance_scores gives the scores of one pair, and there are 2"):
        toy_trainer(*pairs).fit(WithScores(), DataLoader(Images(Cycle.item, IMAGE), batch_size=BATCH))


def test_masks_of_two_pairs_are_drawn_differently() -> None:
    gan = Cycle()
    first, second = (
        static(Cycle, generator="G_AB", discriminator="D_B"),
        static(Cycle, generator="G_BA", discriminator="D_A"),
    )
    for callback in (first, second):
        callback.attach(gan)
    for role in ("generator", "discriminator"):
        pairs = zip(first.masks(role).values(), second.masks(role).values(), strict=True)
        assert not all(torch.equal(one, other) for one, other in pairs)


# ---- the networks and the rest of the module ------------------------------------------------------------------------


def test_the_rest_of_the_module_stays_dense() -> None:
    callback = static(Nested)
    gan = fitted(Nested, callback)
    masked = callback.masks("generator") | callback.masks("discriminator")
    assert all(name.startswith("model.") for name in masked)
    assert gan.encoder.weight.all()
    assert gan.perceptual[1].weight.all()


def test_layers_are_left_dense_and_densities_given_by_pattern() -> None:
    patterns = {
        "dense_layers": ["model.painter.layers.0"],
        "layer_densities": {"*.score": 1.0},
    }
    callback = static(Nested, **patterns)
    gan = fitted_without_looking(Nested, callback)
    assert set(callback.masks("generator")) == {"model.painter.layers.2.weight"}
    assert callback.generator_density == pytest.approx(DENSITY, abs=1 / 384)
    assert callback.masks("discriminator")["model.judges.0.score.weight"].all()
    assert callback.discriminator_density == pytest.approx(DENSITY, abs=1 / 408)
    assert gan.get_parameter("model.painter.layers.0.weight").all()


@pytest.mark.parametrize("argument", ["dense_layers", "layer_densities"])
def test_a_pattern_that_matches_nothing_is_rejected_with_what_exists(argument: str) -> None:
    patterns = ["*.scroe"] if argument == "dense_layers" else {"*.scroe": 0.5}
    there = r"there are generator\.layers\.0, .*, discriminator\.score, and classes Linear"
    with pytest.raises(ValueError, match=rf"{argument}: '\*\.scroe' matches no layer; {there}"):
        fitted(SharedFake, static(SharedFake, **{argument: patterns}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense_layers": "*.score"}, r"dense_layers='\*\.score' must be a list of patterns"),
        ({"layer_densities": {"*": 1.5}}, r"layer_densities\['\*'\]=1\.5 must be in \(0, 1\]"),
        ({"initial_masks": "largest"}, "initial_masks='largest' .*random, magnitude"),
    ],
)
def test_impossible_arguments_are_rejected_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSparsityCallback(0.1, **arguments)


def test_masks_by_magnitude_are_those_of_the_weights_that_were_loaded() -> None:
    dense = SharedFake()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    gan = SharedFake()
    gan.load_state_dict(dense.state_dict())
    callback = static(SharedFake, initial_masks="magnitude", scope="layer")
    callback.attach(gan)
    for role in ("generator", "discriminator"):
        for name, mask in callback.masks(role).items():
            magnitudes = dense.get_parameter(name).abs()
            if not mask.all():
                assert magnitudes[mask].min() > magnitudes[~mask].max()
            assert torch.equal(gan.get_parameter(name)[mask], dense.get_parameter(name)[mask])


def fitted_without_looking(pattern: type[GAN], callback: Callback) -> GAN:
    seed_everything(0, verbose=False)
    gan = pattern()
    item = getattr(pattern, "item", lambda x, label: (x, label))
    toy_trainer(callback).fit(gan, DataLoader(Images(item, IMAGE), batch_size=BATCH))
    return gan


# ---- other averages ------------------------------------------------------------------------------------------------


class WithAverage(SharedFake):
    def make_networks(self) -> None:
        super().make_networks()
        self.average = AveragedModel(self.generator)


class WithAverageOfAnother(SharedFake):
    def make_networks(self) -> None:
        super().make_networks()
        self.average = AveragedModel(self.discriminator)


def test_lightnings_averages_are_rejected_with_changing_masks() -> None:
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("it came with Lightning 2.6")

    def fit(method: str) -> None:
        toy_trainer(DynamicSparsityCallback(0.3, method=method), callbacks.EMAWeightAveraging()).fit(
            SharedFake(), DataLoader(Images(lambda x, label: (x, label), IMAGE), batch_size=BATCH)
        )

    for method in ("ddst", "sdst"):
        with pytest.raises(ValueError, match=r"EMAWeightAveraging .*changing masks: .*`GeneratorEMA`"):
            fit(method)
    fit("static")
    fit("dense")


def test_torchs_average_of_the_generator_is_rejected_with_changing_masks() -> None:
    with pytest.raises(ValueError, match=r"average, .*AveragedModel .*GeneratorEMA"):
        fitted_without_looking(WithAverage, DynamicSparsityCallback(0.3))
    fitted_without_looking(WithAverage, DynamicSparsityCallback(0.3, method="dda"))
    fitted_without_looking(WithAverageOfAnother, DynamicSparsityCallback(0.3, method="sdst"))


@pytest.mark.parametrize("pattern", [OneOptimizer, OneStepForBoth, Accumulation, RawClosures, Nested])
def test_the_generators_average_counts_its_updates_only(pattern: type[GAN]) -> None:
    seed_everything(0, verbose=False)
    gan = pattern()
    sparsity = static(pattern)
    average = GeneratorEMA(decay=0.5, generator=pattern.arguments.get("generator"))
    data = Images(getattr(pattern, "item", lambda x, label: (x, label)), IMAGE)
    toy_trainer(sparsity, average).fit(gan, DataLoader(data, batch_size=BATCH))
    assert average.state_dict()["updates"] == sparsity.generator_updates == UPDATES.get(pattern, BATCHES)
