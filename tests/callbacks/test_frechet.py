from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.linalg import sqrtm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image.fid import FrechetInceptionDistance
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, FrechetDistance, GANModule, GeneratorEMA

NAME = "frechet_distance/toy"


class ToyFeatures(nn.Module):
    """Six fixed features of a vector; those of training mode would be others."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(PIXELS, 6, generator=torch.Generator().manual_seed(0)) / 4
        self.weight = nn.Parameter(weight)
        self.dropout = nn.Dropout(0.5)
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return self.dropout(torch.tanh(images.flatten(1) @ self.weight))


def vector_gan(cls: type[GANModule] = GANModule, lr: float = 1e-2, **arguments) -> GANModule:
    generator = nn.Sequential(nn.Linear(LATENT, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, PIXELS))
    discriminator = nn.Sequential(nn.Linear(PIXELS, 32), nn.LeakyReLU(), nn.Linear(32, 1))

    def optimizer(parameters) -> Adam:
        return Adam(parameters, lr=lr, betas=(0.0, 0.9))

    return cls(
        generator,
        discriminator,
        latent_dim=LATENT,
        generator_optimizer=optimizer,
        discriminator_optimizer=optimizer,
        **arguments,
    )


def distance(**arguments) -> FrechetDistance:
    return FrechetDistance(ToyFeatures(), "toy", **arguments)


def fitted(*callbacks, gan: GANModule | None = None, epochs: int = 2, **settings) -> GANModule:
    seed_everything(0, verbose=False)
    gan = gan or vector_gan()
    toy_trainer(*callbacks, epochs=epochs, **settings).fit(gan, toy_data(), toy_data())
    return gan


def by_hand(first: Tensor, second: Tensor) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of images."""
    extract = ToyFeatures().eval()
    first, second = (extract(images).detach().double().numpy() for images in (first, second))
    squared = np.square(first.mean(0) - second.mean(0)).sum()
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    return squared + np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)


def real_images() -> Tensor:
    return toy_data().dataset.tensors[0]  # 80 of them


# ---- the number ----------------------------------------------------------------------------------------


def test_the_distance_is_the_frechet_distance_of_the_features() -> None:
    frechet = distance(seed=3)
    gan = fitted(frechet)
    (_, _), (updates, measured) = frechet.history
    assert updates == 20
    made = gan.sample(80, rng=torch.Generator().manual_seed(3))
    assert measured == pytest.approx(by_hand(real_images(), made), rel=1e-3)
    metric = FrechetInceptionDistance(feature=ToyFeatures().eval())
    metric.update(real_images(), real=True)
    metric.update(made, real=False)
    assert measured == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize(("samples", "batch_size"), [(30, 256), (30, 7), (200, 64), (None, 33)])
def test_the_number_of_samples_and_of_those_made_at_once(samples: int | None, batch_size: int) -> None:
    features = ToyFeatures()
    frechet = FrechetDistance(features, "toy", samples=samples, batch_size=batch_size)
    gan = vector_gan()
    toy_trainer(frechet).validate(gan, toy_data(), verbose=False)
    ((_, measured),) = frechet.history
    rng = torch.Generator().manual_seed(0)
    total = samples or 80  # as many as there are real images
    sizes = [batch_size] * (total // batch_size) + [total % batch_size] * (total % batch_size > 0)
    made = torch.cat([gan.sample(size, rng=rng) for size in sizes])
    assert features.sizes[-len(sizes) :] == sizes
    assert measured == pytest.approx(by_hand(real_images(), made), rel=1e-3)


def test_real_halves_are_the_two_halves_of_the_real_images() -> None:
    frechet = distance()
    assert frechet.real_halves is None
    fitted(frechet)
    expected = by_hand(real_images()[::2], real_images()[1::2])  # batches are of even size
    assert frechet.real_halves == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 80])
def test_neither_number_depends_on_the_real_images_batch_size(batch_size: int) -> None:
    frechet = distance()
    gan = vector_gan()
    data = DataLoader(toy_data().dataset, batch_size=batch_size)
    toy_trainer(frechet).validate(gan, data, verbose=False)
    made = gan.sample(80, rng=torch.Generator().manual_seed(0))
    assert frechet.history[0][1] == pytest.approx(by_hand(real_images(), made), rel=1e-3)
    assert frechet.real_halves == pytest.approx(by_hand(real_images()[::2], real_images()[1::2]), rel=1e-3)


@pytest.mark.parametrize("form", ["tensor", "list", "labelled"])
def test_images_come_as_a_tensor_or_first_in_a_batch(form: str) -> None:
    images = real_images()
    data = {
        "tensor": DataLoader(images, batch_size=16),
        "list": DataLoader(TensorDataset(images), batch_size=16),
        "labelled": DataLoader(TensorDataset(images, torch.zeros(80, dtype=torch.int64)), batch_size=16),
    }[form]
    frechet = distance()
    toy_trainer(frechet).validate(vector_gan(), data, verbose=False)
    assert frechet.real_halves == pytest.approx(by_hand(images[::2], images[1::2]), rel=1e-3)


def test_the_noise_is_the_same_every_time() -> None:
    class Fixed(GANModule):
        """Has a generator that does not learn."""

        def configure_optimizers(self):
            return [SGD(self.generator.parameters(), lr=0.0), Adam(self.discriminator.parameters())]

    def still(gan: GANModule) -> GANModule:
        gan.generator[1].momentum = 0.0  # nor its statistics
        return gan

    frechet = distance()
    fitted(frechet, gan=still(vector_gan(Fixed)), num_sanity_val_steps=-1)
    values = [value for _, value in frechet.history]
    assert len(values) == 3
    assert values == [values[0]] * 3
    other = distance(seed=1)
    fitted(other, gan=still(vector_gan(Fixed)), num_sanity_val_steps=-1)
    assert other.history[0][1] != values[0]


def test_measuring_leaves_training_as_it_is() -> None:
    plain = fitted(num_sanity_val_steps=0).state_dict()
    measured = fitted(distance(), num_sanity_val_steps=-1).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in measured.items())
    assert measured.keys() == plain.keys()


def test_samples_are_no_operations_of_training() -> None:
    def flops_ratio(*callbacks) -> float:
        sparsity = DynamicSparsityCallback(0.25, 1.0, method="static", probe_interval=None)
        # Validated after every update, so also between those whose operations are counted.
        fitted(sparsity, *callbacks, epochs=4, limit_train_batches=1)
        return sparsity.flops_ratio

    assert flops_ratio(distance()) == flops_ratio()


# ---- when it is measured -------------------------------------------------------------------------------


def test_a_sanity_check_of_all_images_measures_before_training() -> None:
    class Start(GANModule):
        def on_fit_start(self) -> None:
            self.expected = by_hand(real_images(), self.sample(80, rng=torch.Generator().manual_seed(0)))

    frechet = distance()
    gan = fitted(frechet, gan=vector_gan(Start), num_sanity_val_steps=-1)
    assert [updates for updates, _ in frechet.history] == [0, 10, 20]
    assert frechet.history[0][1] == pytest.approx(gan.expected, rel=1e-3)


def test_a_sanity_check_of_some_images_measures_nothing() -> None:
    frechet = distance()
    fitted(frechet)
    assert [updates for updates, _ in frechet.history] == [10, 20]
    # The sanity check's images are not counted twice.
    assert frechet.real_halves == pytest.approx(by_hand(real_images()[::2], real_images()[1::2]), rel=1e-3)


def test_it_goes_down_in_training() -> None:
    frechet = distance()
    fitted(frechet, epochs=8, num_sanity_val_steps=-1)
    assert frechet.history[-1][1] < 0.5 * frechet.history[0][1]


def test_testing_measures_too() -> None:
    frechet = distance()
    gan, trainer = vector_gan(), toy_trainer(frechet)
    trainer.test(gan, toy_data(), verbose=False)
    made = gan.sample(80, rng=torch.Generator().manual_seed(0))
    assert frechet.history == [(0, pytest.approx(by_hand(real_images(), made), rel=1e-3))]
    assert trainer.callback_metrics[NAME].item() == pytest.approx(frechet.history[0][1])


@pytest.mark.parametrize("evaluation", ["validate", "test"])
def test_evaluation_by_itself_returns_the_distance_and_prints_it(evaluation: str, capsys) -> None:
    frechet = distance()
    (result,) = getattr(toy_trainer(frechet), evaluation)(vector_gan(), toy_data())
    assert result == {NAME: pytest.approx(frechet.history[0][1])}
    assert NAME in capsys.readouterr().out


def test_testing_compares_with_the_test_images() -> None:
    frechet = distance()
    seed_everything(0, verbose=False)
    gan, trainer = vector_gan(), toy_trainer(frechet)
    trainer.fit(gan, toy_data(), toy_data())
    shifted = real_images().flip(1) - 3
    trainer.test(gan, DataLoader(TensorDataset(shifted), batch_size=8), verbose=False)
    made = gan.sample(80, rng=torch.Generator().manual_seed(0))
    assert abs(by_hand(shifted, made) - by_hand(real_images(), made)) > 0.1
    assert frechet.history[-1][1] == pytest.approx(by_hand(shifted, made), rel=1e-3)


def test_the_average_is_measured_where_there_is_one() -> None:
    frechet, ema = distance(), GeneratorEMA(0.9)
    gan = fitted(frechet, ema)
    own = gan.sample(80, rng=torch.Generator().manual_seed(0))
    gan.generator.load_state_dict(ema.averages(), strict=False)
    averaged = gan.sample(80, rng=torch.Generator().manual_seed(0))
    assert frechet.history[-1][1] == pytest.approx(by_hand(real_images(), averaged), rel=1e-3)
    assert frechet.history[-1][1] != pytest.approx(by_hand(real_images(), own), rel=1e-2)


def test_updates_are_counted_by_the_sparsity_where_the_module_does_not() -> None:
    class Sampled(ToyGAN):
        def sample(self, n: int, rng: torch.Generator) -> Tensor:
            return self.generator(torch.randn(n, LATENT, generator=rng)).detach()

        def validation_step(self, batch, batch_idx) -> None:
            pass

    frechet = distance()
    fitted(DynamicSparsityCallback(0.5), frechet, gan=Sampled(), num_sanity_val_steps=-1)
    assert [updates for updates, _ in frechet.history] == [0, 10, 20]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_checkpoint_is_measured_at_its_own_number_of_updates(sparse: bool, tmp_path) -> None:
    callbacks = [DynamicSparsityCallback(0.5)] if sparse else []
    trained = distance()
    fitted(*callbacks, trained, folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    callbacks = [DynamicSparsityCallback(0.5)] if sparse else []
    frechet = distance()
    toy_trainer(*callbacks, frechet).validate(vector_gan(), toy_data(), ckpt_path=path, verbose=False)
    assert frechet.history[-1] == (20, pytest.approx(trained.history[-1][1]))


def test_a_resumed_run_remembers_what_was_measured(tmp_path) -> None:
    first = distance()
    fitted(first, epochs=1, num_sanity_val_steps=-1, folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    frechet = distance()
    toy_trainer(frechet, epochs=2).fit(vector_gan(), toy_data(), toy_data(), ckpt_path=path)
    assert [updates for updates, _ in frechet.history] == [0, 10, 20]
    assert frechet.history[:2] == first.history


# ---- where it is shown ---------------------------------------------------------------------------------


def test_it_is_logged_at_generator_updates(tmp_path) -> None:
    frechet = distance()
    fitted(frechet, gan=vector_gan(discriminator_steps=2), folder=tmp_path, num_sanity_val_steps=-1)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    # A generator update every other of 10 batches.
    assert [event.step for event in events.Scalars(NAME)] == [updates for updates, _ in frechet.history] == [0, 5, 10]
    assert [event.value for event in events.Scalars(NAME)] == pytest.approx([value for _, value in frechet.history])


def test_a_checkpoint_can_be_chosen_by_it(tmp_path) -> None:
    class Worse(GANModule):
        """Is best in the second epoch."""

        offsets = count()

        def sample(self, n: int, labels: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
            offset = [2.0, 0.0, 4.0][next(self.offsets)]
            return real_images()[:n] + offset

    frechet = distance()
    saving = ModelCheckpoint(monitor=NAME, dirpath=tmp_path, filename="{epoch}")
    gan = vector_gan(Worse)
    trainer = toy_trainer(frechet, saving, epochs=3, folder=tmp_path)
    trainer.fit(gan, toy_data(), toy_data())
    assert frechet.history[1][1] == pytest.approx(0, abs=1e-4)
    assert Path(saving.best_model_path).name == "epoch=1.ckpt"
    assert saving.best_model_score.item() == pytest.approx(frechet.history[1][1])
    assert trainer.callback_metrics[NAME].item() == pytest.approx(frechet.history[2][1])


# ---- the features --------------------------------------------------------------------------------------


def test_the_features_stay_frozen_and_in_evaluation_mode() -> None:
    features = ToyFeatures().train()
    frechet = FrechetDistance(features, "toy")

    class Modes(GANModule):
        def training_step(self, batch, batch_idx) -> None:
            assert self.training
            assert not any(module.training for module in features.modules())
            super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            assert not any(module.training for module in features.modules())

    before = features.weight.clone()
    gan = fitted(frechet, gan=vector_gan(Modes))
    assert len(frechet.history) == 2
    assert not features.weight.requires_grad
    assert torch.equal(features.weight, before)
    assert not any("weight" in name and "features" in name for name in gan.state_dict())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_features_keep_their_precision_whatever_the_trainers(precision: str) -> None:
    frechet = distance()
    gan = vector_gan()
    seed_everything(0, verbose=False)
    toy_trainer(frechet, precision=precision).validate(gan, toy_data(), verbose=False)
    made = gan.sample(80, rng=torch.Generator().manual_seed(0)).float()
    # bfloat16 has 3 digits.
    assert frechet.history[0][1] == pytest.approx(by_hand(real_images(), made), rel=1e-3 if "64" in precision else 0.1)


@pytest.mark.parametrize("evaluation", ["fit", "validate", "test"])
def test_a_module_that_cannot_be_sampled_from_is_refused(evaluation: str) -> None:
    class Foreign(ToyGAN):
        def validation_step(self, batch, batch_idx) -> None:
            pass

        test_step = validation_step

    with pytest.raises(TypeError, match=r"FrechetDistance needs Foreign.sample\(n, rng=...\), as GANModule has it"):
        getattr(toy_trainer(distance()), evaluation)(Foreign(), toy_data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples=0 must be an integer, at least 1"),
        ({"samples": 2.5}, "samples=2.5 must be an integer, at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be an integer, at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance(**arguments)
