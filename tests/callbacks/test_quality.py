import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import two_processes_quality
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from toy_features import ToyFeatures, by_hand, real_images
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA, SampleQuality
from lightning_ddst.metrics.sources import sampled
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.utils import distributed, progress
from lightning_ddst.utils.cache import load_tensors

METRICS = two_processes_quality.METRICS
FRECHET = "frechet_distance"
NAME = f"{FRECHET}/toy"


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


def distance(**arguments) -> SampleQuality:
    return SampleQuality(ToyFeatures(), "toy", **arguments)


def fitted(*callbacks, gan: GANModule | None = None, epochs: int = 2, **settings) -> GANModule:
    seed_everything(0, verbose=False)
    gan = gan or vector_gan()
    toy_trainer(*callbacks, epochs=epochs, **settings).fit(gan, toy_data(), toy_data())
    return gan


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_rng(seed: int, batch: int = 0) -> torch.Generator:
    """Returns the source of one batch's noise."""
    return rng(torch.randint(2**32, (batch + 1,), generator=rng(seed))[batch].item())


# ---- the number ----------------------------------------------------------------------------------------


def test_the_distance_is_the_frechet_distance_of_the_features() -> None:
    frechet = distance(seed=3)
    gan = fitted(frechet)
    (_, _), (updates, measured) = frechet.history[FRECHET]
    assert updates == 20
    made = gan.sample(80, rng=batch_rng(3))
    assert measured == pytest.approx(by_hand(real_images(), made), rel=1e-3)
    metric = FrechetInceptionDistance(feature=ToyFeatures().eval())
    metric.update(real_images(), real=True)
    metric.update(made, real=False)
    assert measured == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize(("samples", "batch_size"), [(30, 256), (30, 7), (200, 64), (None, 33)])
def test_the_number_of_samples_and_of_those_made_at_once(samples: int | None, batch_size: int) -> None:
    features = ToyFeatures()
    frechet = SampleQuality(features, "toy", samples=samples, batch_size=batch_size)
    gan = vector_gan()
    toy_trainer(frechet).validate(gan, toy_data(), verbose=False)
    ((_, measured),) = frechet.history[FRECHET]
    total = samples or 80  # as many as there are real images
    sizes = [batch_size] * (total // batch_size) + [total % batch_size] * (total % batch_size > 0)
    made = torch.cat([gan.sample(size, rng=batch_rng(0, batch)) for batch, size in enumerate(sizes)])
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
    made = gan.sample(80, rng=batch_rng(0))
    assert frechet.history[FRECHET][0][1] == pytest.approx(by_hand(real_images(), made), rel=1e-3)
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
    values = [value for _, value in frechet.history[FRECHET]]
    assert len(values) == 3
    assert values == [values[0]] * 3
    other = distance(seed=1)
    fitted(other, gan=still(vector_gan(Fixed)), num_sanity_val_steps=-1)
    assert other.history[FRECHET][0][1] != values[0]


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
            self.expected = by_hand(real_images(), self.sample(80, rng=batch_rng(0)))

    frechet = distance()
    gan = fitted(frechet, gan=vector_gan(Start), num_sanity_val_steps=-1)
    assert [updates for updates, _ in frechet.history[FRECHET]] == [0, 10, 20]
    assert frechet.history[FRECHET][0][1] == pytest.approx(gan.expected, rel=1e-3)


def test_a_sanity_check_of_some_images_measures_nothing() -> None:
    frechet = distance()
    fitted(frechet)
    assert [updates for updates, _ in frechet.history[FRECHET]] == [10, 20]
    # The sanity check's images are not counted twice.
    assert frechet.real_halves == pytest.approx(by_hand(real_images()[::2], real_images()[1::2]), rel=1e-3)


def test_it_goes_down_in_training() -> None:
    frechet = distance()
    fitted(frechet, epochs=8, num_sanity_val_steps=-1)
    assert frechet.history[FRECHET][-1][1] < 0.5 * frechet.history[FRECHET][0][1]


def test_testing_measures_too() -> None:
    frechet = distance()
    gan, trainer = vector_gan(), toy_trainer(frechet)
    trainer.test(gan, toy_data(), verbose=False)
    made = gan.sample(80, rng=batch_rng(0))
    assert frechet.history[FRECHET] == [(0, pytest.approx(by_hand(real_images(), made), rel=1e-3))]
    assert trainer.callback_metrics[NAME].item() == pytest.approx(frechet.history[FRECHET][0][1])


@pytest.mark.parametrize("evaluation", ["validate", "test"])
def test_evaluation_by_itself_returns_the_distance_and_prints_it(evaluation: str, capsys) -> None:
    frechet = distance()
    (result,) = getattr(toy_trainer(frechet), evaluation)(vector_gan(), toy_data())
    assert result == {NAME: pytest.approx(frechet.history[FRECHET][0][1])}
    assert NAME in capsys.readouterr().out


def test_testing_compares_with_the_test_images() -> None:
    frechet = distance()
    seed_everything(0, verbose=False)
    gan, trainer = vector_gan(), toy_trainer(frechet)
    trainer.fit(gan, toy_data(), toy_data())
    shifted = real_images().flip(1) - 3
    trainer.test(gan, DataLoader(TensorDataset(shifted), batch_size=8), verbose=False)
    made = gan.sample(80, rng=batch_rng(0))
    assert abs(by_hand(shifted, made) - by_hand(real_images(), made)) > 0.1
    assert frechet.history[FRECHET][-1][1] == pytest.approx(by_hand(shifted, made), rel=1e-3)


def test_the_average_is_measured_where_there_is_one() -> None:
    frechet, ema = distance(), GeneratorEMA(0.9)
    gan = fitted(frechet, ema)
    own = gan.sample(80, rng=batch_rng(0))
    gan.generator.load_state_dict(ema.averages(), strict=False)
    averaged = gan.sample(80, rng=batch_rng(0))
    assert frechet.history[FRECHET][-1][1] == pytest.approx(by_hand(real_images(), averaged), rel=1e-3)
    assert frechet.history[FRECHET][-1][1] != pytest.approx(by_hand(real_images(), own), rel=1e-2)


def test_updates_are_counted_by_the_sparsity_where_the_module_does_not() -> None:
    class Sampled(ToyGAN):
        def sample(self, n: int, rng: torch.Generator) -> Tensor:
            return self.generator(torch.randn(n, LATENT, generator=rng)).detach()

        def validation_step(self, batch, batch_idx) -> None:
            pass

    frechet = distance()
    fitted(DynamicSparsityCallback(0.5), frechet, gan=Sampled(), num_sanity_val_steps=-1)
    assert [updates for updates, _ in frechet.history[FRECHET]] == [0, 10, 20]


def test_a_module_that_ignores_the_number_of_samples_is_rejected() -> None:
    class Fixed(ToyGAN):
        def sample(self, n: int, rng: torch.Generator) -> Tensor:
            return self.generator(torch.randn(5, LATENT, generator=rng)).detach()

        def validation_step(self, batch, batch_idx) -> None:
            pass

    with pytest.raises(ValueError, match=r"Fixed\.sample\(80, .* 80 images, and returned one of shape \(5, 16\)"):
        fitted(distance(), gan=Fixed())


@pytest.mark.parametrize("sparse", [False, True])
def test_a_checkpoint_is_measured_at_its_own_number_of_updates(sparse: bool, tmp_path) -> None:
    callbacks = [DynamicSparsityCallback(0.5)] if sparse else []
    trained = distance()
    fitted(*callbacks, trained, folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    callbacks = [DynamicSparsityCallback(0.5)] if sparse else []
    frechet = distance()
    toy_trainer(*callbacks, frechet).validate(vector_gan(), toy_data(), ckpt_path=path, verbose=False)
    assert frechet.history[FRECHET][-1] == (20, pytest.approx(trained.history[FRECHET][-1][1]))


def test_a_resumed_run_remembers_what_was_measured(tmp_path) -> None:
    first = distance()
    fitted(first, epochs=1, num_sanity_val_steps=-1, folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    frechet = distance()
    toy_trainer(frechet, epochs=2).fit(vector_gan(), toy_data(), toy_data(), ckpt_path=path)
    assert [updates for updates, _ in frechet.history[FRECHET]] == [0, 10, 20]
    assert frechet.history[FRECHET][:2] == first.history[FRECHET]


def updates_of(frechet: SampleQuality) -> list[int]:
    return [updates for updates, _ in frechet.history[FRECHET]]


def test_the_history_is_of_one_module() -> None:
    frechet = distance()
    gan = fitted(frechet)
    fitted(frechet, gan=gan, epochs=1)
    assert updates_of(frechet) == [10, 20, 30]
    other = fitted(frechet, epochs=1)
    assert updates_of(frechet) == [10]
    toy_trainer(frechet).validate(gan, toy_data(), verbose=False)
    assert updates_of(frechet) == [10]
    toy_trainer(frechet).validate(other, toy_data(), verbose=False)
    assert updates_of(frechet) == [10, 10]


def test_an_evaluated_checkpoint_leaves_the_history_of_a_fit(tmp_path) -> None:
    first = distance()
    fitted(first, epochs=1, folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    frechet, gan = distance(), vector_gan()
    fitted(frechet, gan=gan)
    before = frechet.history[FRECHET]
    toy_trainer(frechet).test(gan, toy_data(), ckpt_path=path, verbose=False)
    assert frechet.history[FRECHET] == before
    assert [updates for updates, _ in before] == [10, 20]
    fresh = distance()
    toy_trainer(fresh).test(gan, toy_data(), ckpt_path=path, verbose=False)
    assert updates_of(fresh) == [10, 10]
    fitted(fresh, epochs=1)
    assert updates_of(fresh) == [10]


def test_evaluations_of_several_modules_are_not_mixed() -> None:
    frechet = distance()
    for _ in range(2):
        toy_trainer(frechet).validate(vector_gan(), toy_data(), verbose=False)
        assert updates_of(frechet) == [0]


# ---- where it is shown ---------------------------------------------------------------------------------


def test_it_is_logged_at_generator_updates(tmp_path) -> None:
    frechet = distance()
    fitted(frechet, gan=vector_gan(discriminator_steps=2), folder=tmp_path, num_sanity_val_steps=-1)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    # A generator update every other of 10 batches.
    assert (
        [event.step for event in events.Scalars(NAME)]
        == [updates for updates, _ in frechet.history[FRECHET]]
        == [0, 5, 10]
    )
    assert [event.value for event in events.Scalars(NAME)] == pytest.approx(
        [value for _, value in frechet.history[FRECHET]]
    )


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
    assert frechet.history[FRECHET][1][1] == pytest.approx(0, abs=1e-4)
    assert Path(saving.best_model_path).name == "epoch=1.ckpt"
    assert saving.best_model_score.item() == pytest.approx(frechet.history[FRECHET][1][1])
    assert trainer.callback_metrics[NAME].item() == pytest.approx(frechet.history[FRECHET][2][1])


# ---- the features --------------------------------------------------------------------------------------


def test_the_features_stay_frozen_and_in_evaluation_mode() -> None:
    features = ToyFeatures().train()
    frechet = SampleQuality(features, "toy")

    class Modes(GANModule):
        def training_step(self, batch, batch_idx) -> None:
            assert self.training
            assert not any(module.training for module in features.modules())
            super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            assert not any(module.training for module in features.modules())

    before = features.weight.clone()
    gan = fitted(frechet, gan=vector_gan(Modes))
    assert len(frechet.history[FRECHET]) == 2
    assert not features.weight.requires_grad
    assert torch.equal(features.weight, before)
    assert not any("weight" in name and "features" in name for name in gan.state_dict())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_features_keep_their_precision_whatever_the_trainers(precision: str) -> None:
    frechet = distance()
    gan = vector_gan()
    seed_everything(0, verbose=False)
    toy_trainer(frechet, precision=precision).validate(gan, toy_data(), verbose=False)
    made = gan.sample(80, rng=batch_rng(0)).float()
    # bfloat16 has 3 digits.
    assert frechet.history[FRECHET][0][1] == pytest.approx(
        by_hand(real_images(), made), rel=1e-3 if "64" in precision else 0.1
    )


@pytest.mark.parametrize("evaluation", ["validate", "test"])
def test_a_module_that_cannot_be_sampled_from_is_rejected(evaluation: str) -> None:
    class Foreign(ToyGAN):
        def validation_step(self, batch, batch_idx) -> None:
            pass

        test_step = validation_step

    with pytest.raises(TypeError, match=r"SampleQuality needs Foreign\.sample\(n, rng=\.\.\.\)"):
        getattr(toy_trainer(distance()), evaluation)(Foreign(), toy_data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples=0 must be an integer, at least 1"),
        ({"samples": 2.5}, "samples=2.5 must be an integer, at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be an integer, at least 1"),
    ],
)
def test_bad_arguments_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance(**arguments)


# ---- other metrics -------------------------------------------------------------------------------------


class Logits(ToyFeatures):
    def logits(self, features: Tensor) -> Tensor:
        return 3 * features


def test_every_metric_is_computed_on_the_same_features() -> None:
    features = Logits()
    quality = SampleQuality(features, "toy", METRICS, seed=3)
    gan, trainer = vector_gan(), toy_trainer(quality)
    (result,) = trainer.validate(gan, toy_data(), verbose=False)
    assert sum(features.sizes) == 80 + 80  # each image once
    with torch.no_grad():
        made = features(gan.sample(80, rng=batch_rng(3)))
        reals = features(real_images())
    expected = {
        "frechet_distance": pytest.approx(by_hand(real_images(), gan.sample(80, rng=batch_rng(3))), rel=1e-3),
        "kernel_distance": pytest.approx(
            kid_features_to_metric(made, reals, kid_subset_size=80, verbose=False)["kernel_inception_distance_mean"]
        ),
        "inception_score": pytest.approx(
            isc_features_to_metric(3 * made, splits=10, shuffle=False)["inception_score_mean"]
        ),
        "precision": prc_features_to_metric(made, reals, verbose=False)["precision"],
        "recall": prc_features_to_metric(made, reals, verbose=False)["recall"],
    }
    assert {metric: values for metric, ((_, values),) in quality.history.items()} == expected
    assert result == pytest.approx({f"{name}/toy": history[0][1] for name, history in quality.history.items()})


def test_only_what_was_asked_for_is_computed() -> None:
    quality = SampleQuality(ToyFeatures(), "toy", ["recall"])
    toy_trainer(quality).validate(vector_gan(), toy_data(), verbose=False)
    assert list(quality.history) == ["recall"]
    assert quality.real_halves is None


def test_both_weights_are_measured_with_the_same_noise() -> None:
    quality, ema = SampleQuality(ToyFeatures(), "toy", generators=["raw", "average"]), GeneratorEMA(0.9)
    gan = fitted(quality, ema)
    own = gan.sample(80, rng=batch_rng(0))
    gan.generator.load_state_dict(ema.averages(), strict=False)
    averaged = gan.sample(80, rng=batch_rng(0))
    assert quality.history["frechet_distance_raw"][-1] == (20, pytest.approx(by_hand(real_images(), own), rel=1e-3))
    assert quality.history[FRECHET][-1] == (20, pytest.approx(by_hand(real_images(), averaged), rel=1e-3))
    assert by_hand(real_images(), own) != pytest.approx(by_hand(real_images(), averaged), rel=1e-2)


def test_measuring_the_own_weights_leaves_training_as_it_is() -> None:
    plain = fitted(GeneratorEMA(0.9), num_sanity_val_steps=0).state_dict()
    both = SampleQuality(Logits(), "toy", METRICS, ["average", "raw"])
    measured = fitted(GeneratorEMA(0.9), both, num_sanity_val_steps=-1).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in measured.items())
    assert len(both.history) == 2 * len(METRICS)


def test_samples_that_are_not_finite_give_nan() -> None:
    quality = SampleQuality(Logits(), "toy", METRICS)
    gan = vector_gan()
    nn.init.constant_(gan.generator[-1].bias, float("nan"))
    toy_trainer(quality).validate(gan, toy_data(), verbose=False)
    assert all(np.isnan(value) for ((_, value),) in quality.history.values())
    toy_trainer(quality).validate(vector_gan(), toy_data(), verbose=False)
    assert all(np.isfinite(history[-1][1]) for history in quality.history.values())


class Bytes(ToyFeatures):
    """Features of images as bytes, in which nothing is left of NaN."""

    def forward(self, images):
        return super().forward((images * 127.5 + 127.5).nan_to_num(0.0).clamp(0, 255).to(torch.uint8).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_give_nan_whatever_features_make_of_them(value) -> None:
    quality = SampleQuality(Bytes(), "bytes")
    gan = vector_gan()
    nn.init.constant_(gan.generator[-1].bias, value)
    toy_trainer(quality).validate(gan, toy_data(), verbose=False)
    assert np.isnan(quality.history[FRECHET][-1][1])


class Half(ToyFeatures):
    def forward(self, images):
        return super().forward(images).half()


def test_features_in_half_precision_are_compared_in_single() -> None:
    gan, distances = vector_gan(), []
    for features in (ToyFeatures(), Half()):
        quality = SampleQuality(features, "toy")
        toy_trainer(quality).validate(gan, toy_data(), verbose=False)
        distances.append(quality.history[FRECHET][-1][1])
    assert distances[1] == pytest.approx(distances[0], rel=1e-2)


def test_kept_features_bound_what_is_compared(tmp_path) -> None:
    quality = SampleQuality(ToyFeatures(), "toy", ["precision"], kept_features=30, cache=tmp_path)
    toy_trainer(quality).validate(vector_gan(), toy_data(), verbose=False)
    (file,) = tmp_path.iterdir()
    assert load_tensors(file)["kept"].shape == (30, 6)


# ---- the real images -----------------------------------------------------------------------------------


def test_the_real_images_go_through_the_network_once_a_run() -> None:
    features = ToyFeatures()
    fitted(SampleQuality(features, "toy"), num_sanity_val_steps=-1)
    assert sum(features.sizes) == 80 + 3 * 80


def test_other_real_images_are_not_taken_for_the_first() -> None:
    frechet = distance()
    gan, trainer = vector_gan(), toy_trainer(frechet)
    for shift in (0, 3, 0):
        data = DataLoader(TensorDataset(real_images() - shift), batch_size=8)
        trainer.validate(gan, data, verbose=False)
    first, second, third = (value for _, value in frechet.history[FRECHET])
    assert first == third != second


def test_limited_batches_limit_the_real_images() -> None:
    frechet = distance()
    gan = vector_gan()
    toy_trainer(frechet, limit_val_batches=4).validate(gan, toy_data(), verbose=False)
    made = gan.sample(32, rng=batch_rng(0))
    assert frechet.history[FRECHET][0][1] == pytest.approx(by_hand(real_images()[:32], made), rel=1e-3)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(real_images())


class Chosen(Sampler):
    def __iter__(self):
        return iter(range(40))

    def __len__(self) -> int:
        return 40


@pytest.mark.parametrize(
    ("data", "images"),
    [
        (lambda: DataLoader(Streamed(), batch_size=9), slice(None)),
        (lambda: DataLoader(real_images(), batch_size=9, sampler=Chosen()), slice(40)),
        (lambda: DataLoader(real_images(), batch_sampler=[range(10), range(30, 60)]), [*range(10), *range(30, 60)]),
        (lambda: DataLoader(real_images(), batch_size=9, shuffle=True), slice(None)),
        (lambda: [DataLoader(real_images()[:20], 9), DataLoader(real_images()[20:], 9)], slice(None)),
    ],
    ids=["stream", "sampler", "batch sampler", "shuffled", "two loaders"],
)
def test_loaders_of_every_kind(data, images) -> None:
    class Several(GANModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0) -> None:
            pass

    frechet = distance()
    gan = vector_gan(Several)
    toy_trainer(frechet).validate(gan, data(), verbose=False)
    reals = real_images()[images]
    made = gan.sample(len(reals), rng=batch_rng(0))
    assert frechet.history[FRECHET][0][1] == pytest.approx(by_hand(reals, made), rel=1e-3)


def test_images_go_through_the_hooks_around_their_transfer() -> None:
    class Hooked(GANModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 2]

    frechet = distance()
    toy_trainer(frechet).validate(vector_gan(Hooked), toy_data(), verbose=False)
    reals = (real_images() + 1) * 2
    assert frechet.real_halves == pytest.approx(by_hand(reals[::2], reals[1::2]), rel=1e-3)


def image_gan(factor: float = 1.0) -> GANModule:
    class Scaled(SmallGenerator):
        def forward(self, *inputs: Tensor) -> Tensor:
            return factor * super().forward(*inputs) + 2 * (factor > 1)

    return GANModule(Scaled(8, 1, 4, latent_dim=4), SmallDiscriminator(8, 1, 4))


def small_images(low: float = -1, high: float = 1) -> DataLoader:
    return DataLoader(torch.rand(20, 1, 8, 8, generator=rng()) * (high - low) + low, batch_size=5)


@pytest.mark.parametrize(
    ("factor", "low", "high", "message"),
    [
        (1.0, 0, 255, r"real images .* to 25.*\[-1, 1\]"),
        (1.0, -1.2, 1, "real images have pixels from -1.1.* to"),
        (5.0, -1, 1, r"samples have pixels .*\[-1, 1\]"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_images_outside_their_range_are_rejected(factor, low, high, message, cached, tmp_path) -> None:
    quality = SampleQuality(flat(), "pixels", cache=tmp_path if cached else None)
    with pytest.raises(ValueError, match=message):
        toy_trainer(quality).validate(image_gan(factor), small_images(low, high), verbose=False)


def flat() -> nn.Module:
    features = nn.Sequential(nn.Flatten())
    features.num_features = 64
    return features


# ---- the cache -----------------------------------------------------------------------------------------


def cached(folder: Path, features: nn.Module | None = None, data: DataLoader | None = None, **arguments) -> tuple:
    """Returns the measured values, and the number of images that features were computed for."""
    features = features or Logits()
    quality = SampleQuality(features, "toy", **({"metrics": METRICS, "cache": folder} | arguments))
    seed_everything(0, verbose=False)
    toy_trainer(quality).validate(vector_gan(), data or toy_data(), verbose=False)
    return (quality.history, quality.real_halves), sum(features.sizes)


def test_cached_statistics_are_used_without_the_network(tmp_path) -> None:
    first, images = cached(tmp_path / "new")
    assert images == 160
    again, images = cached(tmp_path / "new")
    assert images == 80
    assert again == first == cached(tmp_path, cache=None)[0]
    # Neither the loader's batches nor those of samples' decide on the reals' statistics.
    assert cached(tmp_path / "new", data=DataLoader(toy_data().dataset, batch_size=33), batch_size=9)[1] == 80
    assert len(list((tmp_path / "new").iterdir())) == 1


def other_weights() -> nn.Module:
    features = Logits()
    nn.init.normal_(features.weight)
    return features


def other_settings() -> nn.Module:
    features = Logits()
    features.dropout.p = 0.25
    return features


class OtherClass(Logits):
    pass


@pytest.mark.parametrize(
    "changed",
    [
        lambda: {"data": DataLoader(TensorDataset(real_images() + 1e-6), batch_size=8)},
        lambda: {"data": DataLoader(TensorDataset(real_images()[:-1]), batch_size=8)},
        lambda: {"features": other_weights()},
        lambda: {"features": other_settings()},
        lambda: {"features": OtherClass()},
        lambda: {"kept_features": 50},
        lambda: {"seed": 1},
        lambda: {"metrics": ("frechet_distance",)},
        lambda: {"metrics": ("recall",)},
    ],
    ids=["images", "fewer images", "weights", "settings", "class", "kept", "seed", "without kept", "kept alone"],
)
def test_statistics_of_something_else_are_not_used(changed, tmp_path) -> None:
    cached(tmp_path)
    arguments = changed()
    number = 79 if "data" in arguments and len(arguments["data"].dataset) == 79 else 80
    assert cached(tmp_path, **arguments)[1] == 2 * number
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_statistics_are_computed_again_with_a_warning(tmp_path) -> None:
    first, _ = cached(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="is damaged"):
        again, images = cached(tmp_path)
    assert (again, images) == (first, 160)
    assert cached(tmp_path)[1] == 80


def test_a_folder_that_cannot_be_written_to_stops_the_run_before_training(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    quality = SampleQuality(ToyFeatures(), "toy", cache=tmp_path / "file")
    gan = vector_gan()
    with pytest.raises(OSError, match="file"):
        toy_trainer(quality).fit(gan, toy_data(), toy_data())
    assert gan.generator_updates == 0


# ---- what is refused before training -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["fid"]}, "metrics='fid' .*frechet_distance, kernel_distance"),
        ({"metrics": "recall"}, "metrics='recall' must be a list .*frechet_distance, kernel"),
        ({"metrics": []}, r"metrics=\[\] must be a list of different names"),
        ({"metrics": ["recall", "recall"]}, r"metrics=\['recall', 'recall'\] .*different names"),
        ({"metrics": ["inception_score"]}, 'metrics: "inception_score" .* logits; ToyFeatures'),
        ({"generators": ["ema"]}, "generators='ema' is unknown; allowed are average, raw"),
        ({"samples": 3, "metrics": ["precision"]}, "samples=3 must be at least 4 for precision"),
        ({"kept_features": 3, "metrics": ["recall"]}, "kept_features=3 must be at least 4 for recall"),
        ({"kept_features": 0}, "kept_features=0 must be an integer, at least 1"),
        ({"features": nn.Flatten()}, "features: Flatten .*num_features, an integer"),
    ],
)
def test_more_bad_arguments_are_rejected(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SampleQuality(**({"features": ToyFeatures(), "name": "toy"} | arguments))


def test_both_weights_without_an_average_are_rejected_before_training() -> None:
    gan = vector_gan()
    with pytest.raises(ValueError, match=r"generators: average and raw .*GeneratorEMA"):
        fitted(SampleQuality(ToyFeatures(), "toy", generators=["average", "raw"]), gan=gan)
    assert gan.generator_updates == 0


# ---- progress ------------------------------------------------------------------------------------------


class AtOnce(progress.tqdm):
    """A progress bar without a delay."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings | {"delay": 0.0})


@pytest.mark.parametrize(("enabled", "terminal"), [(True, True), (True, False), (False, True)])
def test_progress_is_shown_on_a_terminal_where_the_trainer_shows_its_own(enabled, terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "tqdm", AtOnce)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    toy_trainer(distance(), enable_progress_bar=enabled).validate(vector_gan(), toy_data(), verbose=False)
    shown = capsys.readouterr().err
    assert ("toy: samples" in shown) == ("toy: real images" in shown) == (enabled and terminal)


# ---- several processes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(here / "two_processes_quality.py"), str(folder)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    threads, folder, bar = torch.get_num_threads(), tmp_path_factory.mktemp("one"), progress.tqdm
    torch.set_num_threads(1)
    try:
        return two_processes_quality.cases(1, folder)
    finally:
        torch.set_num_threads(threads)
        progress.tqdm = bar


@pytest.mark.parametrize("case", ["plain", "shuffled", "first of cache", "second of cache"])
def test_two_processes_measure_exactly_what_one_does(one, two, case) -> None:
    for process in two:
        assert process[case]["history"] == one[case]["history"]
        assert process[case]["halves"] == one[case]["halves"]
    assert len(one[case]["history"]) == len(METRICS)


def test_two_processes_share_the_recorded_inputs(two) -> None:
    first, second = (process["recorded"] for process in two)
    assert str(first) == str(second)
    for history in first["resumed"].values():
        assert [updates for updates, _ in history] == [2, 4]
    assert all(values == first["resumed"][metric][:1] for metric, values in first["first"].items())
    assert first["halves"] > 0


def test_two_processes_share_out_the_images(one, two) -> None:
    # 31 real images in batches of 4, and 45 samples in batches of 7.
    assert one["plain"]["sizes"] == [7] * 6 + [4] * 7 + [3] * 2
    first, second = (process["plain"]["sizes"] for process in two)
    assert first == [7] * 3 + [4] * 4 + [3]
    assert second == [7] * 3 + [4] * 3 + [3]
    assert [process["second of cache"]["sizes"] for process in two] == [[7] * 3 + [3], [7] * 3]


def test_only_the_first_process_shows_its_progress(two) -> None:
    for case in two[0].keys() - {"recorded"}:
        assert set(two[0][case]["bars"]) == {None}  # where there is a terminal
        assert set(two[1][case]["bars"]) == {True}


@pytest.mark.parametrize("total", [1, 7, 40, 45, 50])
def test_each_process_samples_its_own_batches_in_as_many_calls(total, monkeypatch) -> None:
    gan = image_gan()
    calls = []
    gan.generator.register_forward_hook(lambda *_: calls.append(1))
    alone = list(sampled(gan, total, 10, seed=5))
    assert [len(images) for images in alone] == [10] * (total // 10) + [total % 10] * (total % 10 > 0)
    for rank in range(3):
        calls.clear()
        with monkeypatch.context() as patched:
            for name, value in (("is_distributed", True), ("get_rank", rank), ("get_world_size", 3)):
                patched.setattr(distributed, name, lambda value=value: value)
            own = list(sampled(gan, total, 10, seed=5))
        assert all(torch.equal(a, b) for a, b in zip(own, alone[rank::3], strict=True))
        assert len(calls) == -(-len(alone) // 3)  # FSDP needs as many in every process


def test_seeds_share_no_noise_and_batches_of_one_neither() -> None:
    gan = image_gan()
    images = [batch for seed in range(4) for batch in sampled(gan, 50, 10, seed)]
    assert len({batch.numpy().tobytes() for batch in images}) == 20


# ---- several modules and checkpoints -------------------------------------------------------------------


def test_evaluating_a_checkpoint_keeps_the_history_of_the_fit(tmp_path):
    frechet, sparsity = distance(), DynamicSparsityCallback(0.5)
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    gan = fitted(sparsity, frechet, saving, epochs=2, enable_checkpointing=True)
    before = {metric: list(values) for metric, values in frechet.history.items()}
    assert [updates for updates, _ in before[FRECHET]] == [10, 20]
    trainer = toy_trainer(sparsity, frechet)
    (result,) = trainer.validate(gan, toy_data(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert result == {NAME: pytest.approx(before[FRECHET][0][1])}
    trainer.validate(gan, toy_data(), verbose=False)  # the checkpoint's weights again
    assert frechet.history == before
