import copy
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset
from toys import LATENT, PIXELS, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, GANModule, SampleGrid
from lightning_ddst.gan.losses import LOSSES
from lightning_ddst.models import SmallDiscriminator, SmallGenerator

CLASSES = 3


class Conditioned(nn.Module):
    """Adds an embedding of the label to the input of a network, and remembers its calls."""

    def __init__(self, network: nn.Module, inputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, inputs)
        self.network = network
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((x.detach().clone(), labels.clone()))
        return self.network(x + self.embedding(labels))


def generator_network() -> nn.Module:
    return nn.Sequential(nn.Linear(LATENT, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, PIXELS), nn.Tanh())


def discriminator_network() -> nn.Module:
    return nn.Sequential(nn.Linear(PIXELS, 16), nn.LeakyReLU(), nn.Linear(16, 1))


def fast_adam(parameters) -> Adam:
    return Adam(parameters, lr=1e-2, betas=(0.0, 0.9))


def vector_gan(cls: type[GANModule] = GANModule, **arguments) -> GANModule:
    return cls(generator_network(), discriminator_network(), **{"latent_dim": LATENT} | arguments)


def conditional_gan(cls: type[GANModule] = GANModule, **arguments) -> GANModule:
    generator = Conditioned(generator_network(), LATENT)
    discriminator = Conditioned(discriminator_network(), PIXELS)
    return cls(generator, discriminator, latent_dim=LATENT, num_classes=CLASSES, **arguments)


def labelled_data(batches: int = 10) -> DataLoader:
    (images,) = toy_data(batches).dataset.tensors
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % CLASSES), batch_size=8)


def fitted(gan: GANModule, *callbacks: Callback, data: DataLoader | None = None, **settings) -> GANModule:
    seed_everything(0, verbose=False)
    toy_trainer(*callbacks, **settings).fit(gan, data or toy_data())
    return gan


class Updates(Callback):
    """Writes down the networks in the order in which they are updated, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[str] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        for optimizer, letter in zip(trainer.optimizers, "GD", strict=True):
            optimizer.register_step_post_hook(lambda *_, letter=letter: self.add(letter))

    def on_train_batch_start(self, *_) -> None:
        self.batches.append("")

    def add(self, letter: str) -> None:
        self.batches[-1] += letter


# ---- training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_both_networks(loss: str, conditional: bool) -> None:
    make = conditional_gan if conditional else vector_gan
    gan = make(loss=loss, generator_optimizer=fast_adam, discriminator_optimizer=fast_adam)
    before = copy.deepcopy(gan.state_dict())
    fitted(gan, data=labelled_data())
    after = gan.state_dict()
    weights = [name for name, parameter in gan.named_parameters() if parameter.dim() > 1]
    assert len(weights) == (6 if conditional else 4)
    for name in weights:
        assert after[name].isfinite().all()
        assert not torch.equal(after[name], before[name]), name
    assert gan.generator_updates == 10


def test_a_trained_generator_comes_closer_to_the_data() -> None:
    (real,) = toy_data().dataset.tensors
    data = DataLoader(TensorDataset(torch.tanh(real)), batch_size=8)
    gan = vector_gan(generator_optimizer=fast_adam, discriminator_optimizer=fast_adam)

    def error() -> float:
        made = gan.sample(200, rng=torch.Generator().manual_seed(0))
        return (made.mean(0) - torch.tanh(real).mean(0)).norm().item()

    before = error()
    fitted(gan, data=data, epochs=10)
    assert error() < 0.5 * before


def test_a_batch_updates_the_discriminator_and_then_the_generator_by_gradient_descent() -> None:
    gan = vector_gan(
        loss="least-squares",
        generator_optimizer=lambda parameters: SGD(parameters, lr=0.1),
        discriminator_optimizer=lambda parameters: SGD(parameters, lr=0.2),
    )
    generator, discriminator = copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator)

    class SameNoise(Callback):
        def on_train_batch_start(self, *_) -> None:
            torch.manual_seed(1)

    fitted(gan, SameNoise(), data=toy_data(batches=1))

    def descend(network: nn.Module, loss: Tensor, lr: float) -> None:
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.sub_(lr * gradient)

    ((real,),) = toy_data(batches=1)
    torch.manual_seed(1)
    fake = generator(torch.randn(8, LATENT))
    loss = 0.5 * ((discriminator(real) - 1).square().mean() + discriminator(fake).square().mean())
    descend(discriminator, loss, 0.2)
    fake = generator(torch.randn(8, LATENT))
    descend(generator, 0.5 * (discriminator(fake) - 1).square().mean(), 0.1)
    for trained, expected in ((gan.generator, generator), (gan.discriminator, discriminator)):
        expected = expected.state_dict()
        for name, value in trained.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("steps", "updates"), [(1, 20), (2, 10), (3, 6), (7, 2), (21, 0)])
def test_the_generator_is_updated_every_so_many_batches_across_epochs(steps: int, updates: int) -> None:
    order = Updates()
    gan = fitted(vector_gan(discriminator_steps=steps), order, epochs=2)
    # Epochs have 10 batches.
    assert order.batches == ["DG" if (i + 1) % steps == 0 else "D" for i in range(20)]
    assert gan.generator_updates == updates


def test_counts_are_saved_and_training_resumes_where_it_was(tmp_path) -> None:
    gan = fitted(vector_gan(discriminator_steps=3), folder=tmp_path)
    assert gan.generator_updates == 3
    (path,) = tmp_path.rglob("*.ckpt")
    order = Updates()
    resumed = vector_gan(discriminator_steps=3)
    toy_trainer(order, epochs=2).fit(resumed, toy_data(), ckpt_path=path)
    # 10 batches were made; updates follow the 12th, 15th and 18th.
    assert order.batches == ["D", "DG", "D", "D", "DG", "D", "D", "DG", "D", "D"]
    assert resumed.generator_updates == 6


def test_a_checkpoint_without_counts_is_one_of_no_updates() -> None:
    gan = vector_gan()
    gan.on_load_checkpoint({})
    assert gan.generator_updates == 0


def test_neither_networks_step_gives_the_other_a_gradient() -> None:
    gan = vector_gan(discriminator_steps=2)
    checked = []

    class Gradients(Callback):
        """Compares what the other network has before and after each backward pass."""

        def on_before_backward(self, trainer, pl_module, loss) -> None:
            self.before = [(p, None if p.grad is None else p.grad.clone()) for p in pl_module.parameters()]

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            others = [(p, grad) for p, grad in self.before if id(p) not in own]
            for parameter, grad in others:
                assert (parameter.grad is None) == (grad is None)
                assert grad is None or torch.equal(parameter.grad, grad)
            assert all(p.grad is not None for p, _ in self.before if id(p) in own)
            checked.append(len(others))

    fitted(gan, Gradients(), data=toy_data(batches=4))
    # The generator has 2 Linear layers and a BatchNorm, the discriminator 2 Linear layers.
    assert checked == [6, 6, 4, 6, 6, 4]
    assert all(parameter.requires_grad for parameter in gan.parameters())


def test_the_discriminator_learns_from_images_that_do_not_lead_to_the_generator() -> None:
    class Checked(GANModule):
        seen = 0

        def discriminator_loss(self, real: Tensor, labels: Tensor | None) -> Tensor:
            loss = super().discriminator_loss(real, labels)
            leads = torch.autograd.grad(
                loss, list(self.discriminator.parameters()), retain_graph=True, allow_unused=True
            )
            assert all(gradient is not None for gradient in leads)
            assert not any(parameter.requires_grad for parameter in self.generator.parameters())
            self.seen += 1
            return loss

    assert fitted(vector_gan(Checked)).seen == 10


@pytest.mark.parametrize(
    ("arguments", "penalty"),
    [
        # Of D(x) = w . x with |w| = 5.
        ({"loss": "wasserstein"}, 10 * 16.0),
        ({"loss": "wasserstein", "gradient_penalty": 0.5}, 0.5 * 16.0),
        ({"loss": "wasserstein", "gradient_penalty": 0.0}, 0.0),
        ({"loss": "wasserstein", "r1": 2.0}, 10 * 16.0 + 2 * 12.5),
        ({"loss": "hinge"}, 0.0),
        ({"loss": "hinge", "gradient_penalty": 3.0}, 3 * 16.0),
        ({"loss": "non-saturating", "r1": 0.1}, 0.1 * 12.5),
    ],
)
def test_the_discriminators_loss_has_its_penalties(arguments: dict, penalty: float) -> None:
    discriminator = nn.Linear(2, 1, bias=False)
    generator = nn.Linear(1, 2)
    with torch.no_grad():
        discriminator.weight.copy_(torch.tensor([[3.0, 4.0]]))
        generator.weight.zero_()  # makes (0.1, 0) of everything, which scores 0.3
        generator.bias.copy_(torch.tensor([0.1, 0.0]))
    gan = GANModule(generator, discriminator, latent_dim=1, **arguments)
    real = torch.tensor([[0.1, 0.1], [0.0, 0.1]])  # score 0.7 and 0.4
    adversarial = LOSSES[arguments["loss"]].discriminator(torch.tensor([0.7, 0.4]), torch.tensor([0.3, 0.3])).item()
    assert gan.discriminator_loss(real, None).item() == pytest.approx(adversarial + penalty)
    assert gan.generator_loss(real).item() == pytest.approx(
        LOSSES[arguments["loss"]].generator(torch.tensor(0.3)).item()
    )


@pytest.mark.parametrize("conditional", [False, True])
def test_penalties_train(conditional: bool) -> None:
    make = conditional_gan if conditional else vector_gan
    gan = fitted(make(loss="wasserstein", r1=0.1), data=labelled_data())
    assert gan.generator_updates == 10
    assert all(parameter.isfinite().all() for parameter in gan.parameters())


# ---- batches and labels --------------------------------------------------------------------------------


def as_tensor(samples: list) -> Tensor:
    return torch.stack([images for images, _ in samples])


def as_tuple(samples: list) -> tuple[Tensor, ...]:
    return (as_tensor(samples),)


def as_labelled_tuple(samples: list) -> tuple[Tensor, ...]:
    return as_tensor(samples), torch.stack([label for _, label in samples])


def as_list(samples: list) -> list[Tensor]:
    return list(as_tuple(samples))


def as_labelled_list(samples: list) -> list[Tensor]:
    return list(as_labelled_tuple(samples))


@pytest.mark.parametrize("collate", [as_tuple, as_labelled_tuple, as_list, as_labelled_list])
def test_an_unconditional_gan_is_the_same_whatever_holds_the_images(collate) -> None:
    def run(collate) -> dict[str, Tensor]:
        seed_everything(0, verbose=False)
        return fitted(
            vector_gan(), data=DataLoader(labelled_data().dataset, batch_size=8, collate_fn=collate)
        ).state_dict()

    expected = run(as_tensor)
    assert all(torch.equal(value, expected[name]) for name, value in run(collate).items())


@pytest.mark.parametrize("collate", [as_labelled_tuple, as_labelled_list])
@pytest.mark.parametrize("arguments", [{}, {"gradient_penalty": 1.0, "r1": 1.0}])
def test_a_conditional_gan_gets_the_labels_of_the_batch(collate, arguments) -> None:
    gan = conditional_gan(discriminator_steps=2, **arguments)
    data = DataLoader(labelled_data(batches=4).dataset, batch_size=8, collate_fn=collate)
    fitted(gan, data=data)
    judged, made = iter(gan.discriminator.calls), iter(gan.generator.calls)
    for batch_idx, (images, labels) in enumerate(data):
        real, real_labels = next(judged)
        assert torch.equal(real, images)
        assert torch.equal(real_labels, labels)
        fake, fake_labels = next(judged)
        assert not torch.equal(fake, images)
        assert torch.equal(fake_labels, next(made)[1])
        if arguments:
            between, between_labels = next(judged)
            assert not torch.equal(between, images)
            assert torch.equal(between_labels, labels)
            real, real_labels = next(judged)
            assert torch.equal(real, images)
            assert torch.equal(real_labels, labels)
        if batch_idx % 2 == 1:
            assert torch.equal(next(judged)[1], next(made)[1])
    assert not list(judged)
    assert not list(made)


def test_labels_are_drawn_uniformly_from_all_classes_in_training() -> None:
    gan = fitted(conditional_gan(), data=labelled_data(batches=40))
    labels = torch.cat([labels for _, labels in gan.generator.calls])
    assert labels.dtype == torch.int64
    counts = torch.bincount(labels)
    assert int(counts.sum()) == 2 * 40 * 8
    assert len(counts) == CLASSES
    # 640 / 3 each, within 4 standard deviations of sqrt(640 * 2) / 3 = 11.9.
    assert (counts - 640 / 3).abs().max() < 48


# ---- generating ----------------------------------------------------------------------------------------


def test_forward_generates() -> None:
    gan, z = vector_gan(), torch.randn(4, LATENT)
    assert torch.equal(gan(z), gan.generator(z))
    assert gan(z).requires_grad
    gan, labels = conditional_gan(), torch.tensor([0, 2, 1, 1])
    assert torch.equal(gan(z, labels), gan.generator(z, labels))


def test_sample_is_what_the_generator_makes_in_evaluation_mode() -> None:
    gan = fitted(vector_gan())
    statistics = gan.generator[1].running_mean.clone()
    made = gan.sample(5, rng=torch.Generator().manual_seed(3))
    z = torch.randn(5, LATENT, generator=torch.Generator().manual_seed(3))
    assert torch.equal(made, gan.generator.eval()(z))
    assert not torch.allclose(made, gan.generator.train()(z))
    assert made.shape == (5, PIXELS)
    assert not made.requires_grad
    gan.generator.train()
    gan.generator[1].running_mean.copy_(statistics)
    gan.sample(5)
    assert torch.equal(gan.generator[1].running_mean, statistics)


@pytest.mark.parametrize("training", [False, True])
def test_sample_restores_the_mode(training: bool) -> None:
    gan = vector_gan()
    gan.train(training)
    gan.sample(3)
    assert all(module.training == training for module in gan.modules())
    gan.latent_dim += 1
    with pytest.raises(RuntimeError):
        gan.sample(3)
    assert all(module.training == training for module in gan.modules())


def test_sample_leaves_a_frozen_part_of_a_training_generator_in_evaluation_mode() -> None:
    gan = vector_gan()
    gan.generator.train()
    gan.generator[1].eval()  # statistics that are not to be trained any more
    gan.sample(3)
    assert [module.training for module in gan.generator] == [True, False, True, True, True]


@pytest.mark.parametrize("make", [vector_gan, conditional_gan])
def test_sample_follows_its_random_generator_and_leaves_torchs_alone(make) -> None:
    gan = make().eval()
    state = torch.get_rng_state()
    first, again, other = (gan.sample(4, rng=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rng = torch.Generator().manual_seed(0)
    assert torch.equal(gan.sample(4, rng=rng), first)
    assert not torch.equal(gan.sample(4, rng=rng), first)  # the generator keeps drawing


@pytest.mark.parametrize("make", [vector_gan, conditional_gan])
def test_sample_draws_from_torch_by_default(make) -> None:
    gan = make().eval()
    torch.manual_seed(0)
    first, other = gan.sample(4), gan.sample(4)
    torch.manual_seed(0)
    assert torch.equal(gan.sample(4), first)
    assert not torch.equal(first, other)


def test_sample_takes_labels_or_draws_them() -> None:
    gan = conditional_gan()
    labels = torch.tensor([2, 2, 0])
    gan.sample(3, labels=labels)
    assert torch.equal(gan.generator.calls[-1][1], labels)
    gan.sample(600, rng=torch.Generator().manual_seed(0))
    drawn = gan.generator.calls[-1][1]
    assert drawn.dtype == torch.int64
    # 200 each, within 4 standard deviations of sqrt(600 * 2) / 3 = 11.5.
    assert (torch.bincount(drawn, minlength=CLASSES) - 200).abs().max() < 47


def test_sample_of_a_double_precision_module() -> None:
    gan = vector_gan().double()
    assert gan.sample(3).dtype == torch.float64


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_training_and_samples_in_other_precisions(precision: str, tmp_path) -> None:
    gan = vector_gan()
    seed_everything(0, verbose=False)
    trainer = toy_trainer(SampleGrid(), folder=tmp_path, precision=precision)
    trainer.fit(gan, toy_data(), DataLoader(torch.zeros(1, PIXELS)))
    assert gan.generator_updates == 10


@pytest.mark.parametrize("make", [vector_gan, conditional_gan])
def test_prediction_makes_as_many_images_as_the_batch_holds(make) -> None:
    gan = make()
    made = toy_trainer().predict(gan, DataLoader(labelled_data(batches=3).dataset, batch_size=10))
    assert [images.shape for images in made] == [(10, PIXELS), (10, PIXELS), (4, PIXELS)]
    made = toy_trainer().predict(gan, DataLoader(torch.zeros(3, PIXELS), batch_size=2))
    assert [images.shape for images in made] == [(2, PIXELS), (1, PIXELS)]


# ---- augmentation --------------------------------------------------------------------------------------


class Shown(SmallDiscriminator):
    """Remembers the images it was called on."""

    def __init__(self) -> None:
        super().__init__(8, 1, 4)
        self.images: list[Tensor] = []

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        self.images.append(images.detach().clone())
        return super().forward(images, labels)


def bright_images() -> DataLoader:
    return DataLoader(torch.ones(40, 1, 8, 8), batch_size=8)


@pytest.mark.parametrize("augment", [[], ["cutout"], ["color", "translation", "cutout"]])
def test_all_images_the_discriminator_is_trained_on_are_augmented(augment: list) -> None:
    gan = GANModule(SmallGenerator(8, 1, 4, latent_dim=4), Shown(), augment=augment)
    fitted(gan, data=bright_images())
    shown = gan.discriminator.images
    assert len(shown) == 5 * 3  # real, fake; fake
    for real, fake, again in zip(shown[::3], shown[1::3], shown[2::3], strict=True):
        for images in (real, fake, again):
            black = (images == 0).flatten(1).any(1)
            assert black.all() == bool(augment)  # a part of every image is cut out
        assert (real == 1).all() == (not augment)


def test_the_balance_is_measured_without_augmentation() -> None:
    gan = GANModule(SmallGenerator(8, 1, 4, latent_dim=4), Shown(), augment=["color", "translation", "cutout"])
    sparsity = DynamicSparsityCallback(0.5, interval=5, explore_interval=2, probe_interval=1)
    fitted(gan, sparsity, data=bright_images())
    assert sparsity.measurements == 5
    of_probe = [images for images in gan.discriminator.images if (images == 1).all()]
    assert len(of_probe) == 5  # the real images, as they are in the batch


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "best"}, "loss='best' .*hinge, non-saturating, wasserstein, least-squares"),
        ({"discriminator_steps": 0}, "discriminator_steps=0 must be an integer, at least 1"),
        ({"discriminator_steps": 1.5}, "discriminator_steps=1.5 must be an integer, at least 1"),
        ({"gradient_penalty": -1.0}, "gradient_penalty=-1.0 must not be negative"),
        ({"gradient_penalty": float("nan")}, "gradient_penalty=nan must not be negative"),
        ({"r1": -0.1}, "r1=-0.1 must not be negative"),
        ({"latent_dim": None}, "latent_dim=None: Sequential has no latent_dim"),
        ({"latent_dim": 0}, "latent_dim=0 must be an integer, at least 1"),
        ({"augment": "color"}, r"augment='color' must be a list of names"),
        ({"augment": ["colour"]}, "augment='colour' .*color, translation, cutout"),
        ({"num_classes": 0}, "num_classes=0 must be an integer, at least 1"),
    ],
)
def test_bad_arguments_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vector_gan(**arguments)


def test_the_noise_is_of_the_generators_own_size_unless_another_is_given() -> None:
    generator = generator_network()
    generator.latent_dim = LATENT
    assert GANModule(generator, discriminator_network()).latent_dim == LATENT
    assert GANModule(generator, discriminator_network(), latent_dim=3).latent_dim == 3


@pytest.mark.parametrize("data", [toy_data(), DataLoader(torch.zeros(8, PIXELS), batch_size=4)])
def test_a_conditional_gan_without_labels_is_rejected(data: DataLoader) -> None:
    with pytest.raises(ValueError, match=f"num_classes={CLASSES}, but the batch holds no labels"):
        fitted(conditional_gan(), data=data)


# ---- logging -------------------------------------------------------------------------------------------


class Remembering(GANModule):
    """Writes its losses down."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.generator_losses: list[float] = []
        self.discriminator_losses: list[float] = []

    def discriminator_loss(self, real: Tensor, labels: Tensor | None) -> Tensor:
        loss = super().discriminator_loss(real, labels)
        self.discriminator_losses.append(loss.item())
        return loss

    def generator_loss(self, real: Tensor) -> Tensor:
        loss = super().generator_loss(real)
        self.generator_losses.append(loss.item())
        return loss


def test_losses_are_logged_at_generator_updates(tmp_path) -> None:
    gan = fitted(vector_gan(Remembering, discriminator_steps=2), epochs=2, folder=tmp_path, log_every_n_steps=3)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    for name, losses in (
        ("loss/generator", gan.generator_losses),
        ("loss/discriminator", gan.discriminator_losses[1::2]),  # of the batches with a generator update
    ):
        assert len(losses) == 10
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [3, 6, 9]
        assert [event.value for event in logged] == pytest.approx([losses[2], losses[5], losses[8]])


@pytest.mark.parametrize("shown", [True, False])
def test_losses_can_be_read_from_the_trainer(shown: bool) -> None:
    gan = vector_gan(Remembering, discriminator_steps=2)
    trainer = toy_trainer(enable_progress_bar=shown)
    trainer.fit(gan, toy_data(batches=5))
    assert gan.generator_updates == 2
    assert trainer.callback_metrics["loss/discriminator"].item() == pytest.approx(gan.discriminator_losses[-1])
    assert trainer.callback_metrics["loss/generator"].item() == pytest.approx(gan.generator_losses[-1])
    assert trainer.progress_bar_metrics.keys() == ({"loss/generator", "loss/discriminator"} if shown else set())


def test_the_default_optimizers_are_the_papers() -> None:
    gan = vector_gan()
    optimizers, schedulers = gan.configure_optimizers()
    assert schedulers == []
    for optimizer, network in zip(optimizers, (gan.generator, gan.discriminator), strict=True):
        assert isinstance(optimizer, Adam)
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.0, 0.9), 0)
        assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]


# ---- with dynamic sparsity -----------------------------------------------------------------------------


class ByHand(GANModule):
    """Repeats the measurement of the balance ratio in the words of the paper."""

    def generator_loss(self, real: Tensor) -> Tensor:
        self.z = torch.randn(len(real), LATENT, dtype=real.dtype)
        self.labels = torch.randint(CLASSES, (len(real),))
        self.networks = [copy.deepcopy(self.generator), copy.deepcopy(self.discriminator)]
        return -self.discriminator(self.generator(self.z, self.labels), self.labels).mean()

    def training_step(self, batch, batch_idx) -> None:
        updates = self.generator_updates
        super().training_step(batch, batch_idx)
        if self.generator_updates > updates:
            with torch.no_grad():
                self.measure(*batch)

    def measure(self, images: Tensor, labels: Tensor) -> None:
        old_generator, score = self.networks
        new_generator = copy.deepcopy(self.generator)
        self.real = score(images, labels).mean().item()
        self.fake = score(old_generator(self.z, self.labels), self.labels).mean().item()
        self.beta = score(new_generator(self.z, self.labels), self.labels).mean().item() - self.fake
        # The labels of the generated images would be noticed, and so would an old generator for the new one.
        assert abs(score(images, self.labels).mean().item() - self.real) > 1e-4
        assert abs(self.beta) > 1e-4


@pytest.mark.parametrize("arguments", [{}, {"gradient_penalty": 1.0}])
def test_the_balance_ratio_of_a_conditional_gan_is_measured_with_the_right_labels(arguments: dict) -> None:
    sparsity = DynamicSparsityCallback(0.5, method="static", interval=1)  # a window of one measurement
    gan = conditional_gan(
        ByHand, generator_optimizer=fast_adam, discriminator_optimizer=fast_adam, discriminator_steps=2, **arguments
    )
    compared = []

    class Compare(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx % 2 == 1:
                balance = sparsity.balance
                assert balance.samples == 1
                # Scores are kept as float32.
                assert [balance.real, balance.fake] == pytest.approx([gan.real, gan.fake], rel=1e-6)
                assert balance.alpha == pytest.approx(gan.real - gan.fake, abs=1e-6)
                assert balance.beta == pytest.approx(gan.beta, abs=1e-6)
                compared.append(balance)

    fitted(gan, sparsity, Compare(), data=labelled_data(), precision="64-true")
    assert len(compared) == sparsity.measurements == 5


@pytest.mark.parametrize("make", [vector_gan, conditional_gan])
@pytest.mark.parametrize("arguments", [{"loss": "wasserstein"}, {"loss": "hinge", "r1": 1.0}])
def test_sparse_training_works_with_penalties(make, arguments: dict) -> None:
    sparsity = DynamicSparsityCallback(0.25, interval=4, explore_interval=3, bounds=(0.0, 1e-9))
    gan = fitted(make(**arguments), sparsity, data=labelled_data(), epochs=2)
    assert sparsity.generator_updates == gan.generator_updates == sparsity.measurements == 20
    parameters = dict(gan.named_parameters())
    for role in ("generator", "discriminator"):
        for name, mask in sparsity.masks(role).items():
            assert torch.all(parameters[name][~mask] == 0)


def test_overridden_losses_are_used() -> None:
    class Relativistic(GANModule):
        """Scores of generated images relative to those of real ones."""

        def discriminator_loss(self, real: Tensor, labels: Tensor | None) -> Tensor:
            fake = self.sample(len(real))
            return F.softplus(self.discriminator(fake) - self.discriminator(real)).mean()

        def generator_loss(self, real: Tensor) -> Tensor:
            self.used = True
            fake = self(torch.randn(len(real), self.latent_dim))
            return F.softplus(self.discriminator(real) - self.discriminator(fake)).mean()

    gan = vector_gan(Relativistic)
    before = copy.deepcopy(gan.state_dict())
    fitted(gan)
    assert gan.used
    after = gan.state_dict()
    for name in ("generator.0.weight", "discriminator.0.weight"):
        assert not torch.equal(after[name], before[name])


# ---- batches of other forms ----------------------------------------------------------------------------


def seeded_gan(make=vector_gan, *args, **arguments) -> GANModule:
    torch.manual_seed(0)
    return make(*args, **arguments)


@dataclass
class Batch:
    labels: Tensor
    images: Tensor


class Named(NamedTuple):
    paths: list
    image: Tensor
    label: Tensor


def loader_of(*batches) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def others(images: Tensor) -> Tensor:
    """Other floats that come with the images, such as attributes."""
    return torch.zeros(len(images), 3)


FORMS = {
    "dict": (lambda x, y: {"path": ["a"] * len(x), "image": x, "label": y}, {}),
    "labels first": (lambda x, y: (y, x), {}),
    "paths first": (lambda x, y: (["a"] * len(x), x, y), {}),
    "list": (lambda x, y: [x, ["a"] * len(x), y], {}),
    "nested": (lambda x, y: {"views": {"a": x}, "info": [y, y.bool()]}, {}),
    "dataclass": (lambda x, y: Batch(y, x), {}),
    "named tuple": (lambda x, y: Named(["a"] * len(x), x, y), {}),
    "attributes": (lambda x, y: {"attributes": others(x), "image": x, "label": y}, {}),
    "attributes second": (lambda x, y: (x, others(x), y), {}),
    "two images": (lambda x, y: {"a": x.flip(0), "b": x, "label": y}, {"real": "b"}),
    "two images in a tuple": (lambda x, y: (x.flip(0), x, y), {"real": 1}),
    "a path": (lambda x, y: {"in": [x.flip(0), x], "label": y}, {"real": "in.1"}),
    "a name": (lambda x, y: Named(x.flip(0), x, y), {"real": "image"}),
    "two labels": (lambda x, y: {"image": x, "index": y.flip(0), "label": y}, {"labels": "label"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_and_labels_are_found_in_any_batch(form: str) -> None:
    class Reformed(GANModule):
        def training_step(self, batch, batch_idx) -> None:
            super().training_step(FORMS[form][0](*batch), batch_idx)

    arguments = FORMS[form][1]
    plain = fitted(seeded_gan(conditional_gan), data=labelled_data()).state_dict()
    reformed = fitted(seeded_gan(conditional_gan, Reformed, **arguments), data=labelled_data()).state_dict()
    assert all(torch.equal(value, reformed[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("batch", "arguments", "message"),
    [
        (
            {"a": torch.zeros(8, PIXELS), "b": torch.zeros(8, PIXELS)},
            {},
            r'2 floating-point tensors of shape \(batch, 16\), .* GANModule\(..., real="a"\). It holds a \(8, 16\)',
        ),
        ((torch.zeros(8, PIXELS), torch.zeros(8, PIXELS)), {}, r'real="0"\). It holds 0 \(8, 16\) torch.float32, 1'),
        ({"a": torch.zeros(8, 3), "b": torch.zeros(8, 4)}, {}, "no floating-point tensor of shape .*real=.* holds a"),
        (
            {"image": torch.zeros(8, PIXELS).byte()},
            {},
            r"no floating-point tensor that .*real=.*image \(8, 16\) torch.u",
        ),
        (["a", "b"], {}, "real=None: .* holds no tensor"),
        ({"a": torch.zeros(8, PIXELS)}, {"real": "b"}, "real='b' is no tensor in the batch; it holds a "),
        ({"a": ["x"], "b": torch.zeros(8, PIXELS)}, {"real": "a"}, "real='a' is no tensor in the batch; it holds b "),
    ],
)
def test_batches_without_clear_images_are_rejected(batch, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(vector_gan(**arguments), data=loader_of(batch))


@pytest.mark.parametrize(
    ("batch", "arguments", "message"),
    [
        (
            {"image": torch.zeros(8, PIXELS), "a": torch.zeros(8).long(), "b": torch.zeros(8).long()},
            {},
            r'labels=None: any of the batch\'s a, b could be the labels; .* GANModule\(..., labels="a"\).*real=',
        ),
        ({"image": torch.zeros(8, PIXELS)}, {}, "num_classes=3, but the batch holds no labels.*real="),
        ({"image": torch.zeros(8, PIXELS)}, {"labels": "label"}, "labels='label' is no tensor in the batch"),
    ],
)
def test_batches_without_clear_labels_are_rejected(batch, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(conditional_gan(**arguments), data=loader_of(batch))


def test_finding_images_among_floats_leaves_no_trace() -> None:
    data = loader_of(*((images, others(images)) for (images,) in toy_data()))
    plain, other = (fitted(seeded_gan(), DynamicSparsityCallback(0.5), data=each) for each in (toy_data(), data))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())


def test_prediction_counts_the_images_of_any_batch() -> None:
    data = [{"path": ["a"] * 5, "image": torch.zeros(5, PIXELS)}, (torch.zeros(3).long(), ["a"] * 3)]
    assert [len(images) for images in toy_trainer().predict(vector_gan(), loader_of(*data))] == [5, 3]
    data = [{"image": torch.zeros(5, PIXELS), "latents": torch.zeros(2, 4)}]
    assert [len(images) for images in toy_trainer().predict(vector_gan(real="latents"), loader_of(*data))] == [2]
