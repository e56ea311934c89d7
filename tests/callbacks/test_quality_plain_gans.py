"""SampleQuality of modules without a method `sample`, a validation loader or a `validation_step`."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toy_features import ToyFeatures, by_hand, real_images
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA, SampleQuality
from lightning_ddst.data import ResumableLoader
from lightning_ddst.utils.modules import eval_mode

FRECHET = "frechet_distance"


def distance(**arguments) -> SampleQuality:
    return SampleQuality(ToyFeatures(), "toy", **arguments)


def fit(*callbacks: Callback, gan: ToyGAN | None = None, data=None, epochs: int = 2, **settings) -> ToyGAN:
    seed_everything(0, verbose=False)
    gan = gan or ToyGAN()
    toy_trainer(*callbacks, epochs=epochs, **settings).fit(gan, toy_data() if data is None else data)
    return gan


def updates_of(quality: SampleQuality) -> list[int]:
    return [updates for updates, _ in quality.history[FRECHET]]


class Noise(Callback):
    """Remembers the inputs of the generator's calls in training steps."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.generator.register_forward_pre_hook(self.before)

    def before(self, generator: nn.Module, args: tuple[Tensor]) -> None:
        if generator.training:
            self.seen.append(args[0].detach().clone())

    def sample(self, gan: ToyGAN, images: int) -> Tensor:
        with torch.no_grad(), eval_mode(gan.generator):
            return torch.cat([gan.generator(noise) for noise in self.seen])[:images]


# ---- the number ----------------------------------------------------------------------------------------


def test_a_plain_gan_is_measured_at_the_ends_of_epochs_with_the_noise_of_training() -> None:
    quality, noise = distance(), Noise()
    gan = fit(noise, quality, epochs=3)
    assert updates_of(quality) == [10, 20, 30]
    # 80 images, by the first ten calls of 8; each batch has two.
    assert quality.history[FRECHET][-1][1] == pytest.approx(by_hand(real_images(), noise.sample(gan, 80)), rel=1e-3)
    assert quality.real_halves == pytest.approx(by_hand(real_images()[::2], real_images()[1::2]), rel=1e-3)


def test_the_average_is_measured_where_there_is_one() -> None:
    quality, noise, ema = distance(generators=["average", "raw"]), Noise(), GeneratorEMA(0.9)
    gan = fit(noise, quality, ema)
    own = noise.sample(gan, 80)
    gan.generator.load_state_dict(ema.averages(), strict=False)
    averaged = noise.sample(gan, 80)
    assert quality.history[FRECHET][-1] == (20, pytest.approx(by_hand(real_images(), averaged), rel=1e-3))
    assert quality.history[f"{FRECHET}_raw"][-1] == (20, pytest.approx(by_hand(real_images(), own), rel=1e-3))


def test_the_same_noise_for_both_networks_counts_once() -> None:
    class Shared(ToyGAN):
        def training_step(self, batch, batch_idx) -> None:
            torch.manual_seed(1000 + self.trainer.global_step)  # the second draw repeats the first
            real_randn, drawn = torch.randn, []

            def randn(*size):
                drawn.append(real_randn(*size))
                return drawn[0]

            torch.randn = randn
            try:
                super().training_step(batch, batch_idx)
            finally:
                torch.randn = real_randn

    quality, noise = distance(), Noise()
    gan = fit(noise, quality, gan=Shared(), epochs=1)
    assert len(noise.seen) == 20
    noise.seen = noise.seen[::2]
    assert quality.history[FRECHET][-1][1] == pytest.approx(by_hand(real_images(), noise.sample(gan, 80)), rel=1e-3)


def test_a_validation_is_measured_too_but_not_before_training() -> None:
    class Validated(ToyGAN):
        def validation_step(self, batch, batch_idx) -> None:
            pass

    quality, noise, gan = distance(), Noise(), Validated()
    seed_everything(0, verbose=False)
    reals = real_images().flip(1)
    toy_trainer(noise, quality, num_sanity_val_steps=-1).fit(gan, toy_data(), DataLoader(TensorDataset(reals), 8))
    assert updates_of(quality) == [10]
    assert quality.history[FRECHET][0][1] == pytest.approx(by_hand(reals, noise.sample(gan, 80)), rel=1e-3)
    # After the fit, too.
    toy_trainer(quality).validate(gan, toy_data(), verbose=False)
    assert quality.history[FRECHET][1][1] == pytest.approx(by_hand(real_images(), noise.sample(gan, 80)), rel=1e-3)


def test_a_module_that_can_be_sampled_needs_no_validation_either() -> None:
    quality = distance()
    toy = ToyGAN()
    seed_everything(0, verbose=False)
    gan = GANModule(toy.generator, toy.discriminator, latent_dim=LATENT)
    toy_trainer(quality, epochs=2).fit(gan, toy_data())
    assert updates_of(quality) == [10, 20]


def test_images_may_be_made_without_tensors_from_outside() -> None:
    class Own(nn.Module):
        """Draws its noise itself."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(LATENT, PIXELS)

        def forward(self, n: int, *, scale: float) -> dict[str, Tensor]:
            return {"images": self.layer(torch.randn(n, LATENT)) * scale}

    class Drawing(ToyGAN):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()
            self.generator = self.own

        def training_step(self, batch, batch_idx) -> None:
            own, self.generator = self.own, lambda noise: self.own(len(noise), scale=2.0)["images"]
            super().training_step(batch, batch_idx)
            self.generator = own

        def __setattr__(self, name, value) -> None:
            if name == "generator" and not isinstance(value, nn.Module):
                self.__dict__["drawing"] = value
            else:
                super().__setattr__(name, value)

        def networks(self):
            return self.__dict__.get("drawing", self.own), self.discriminator

        def configure_optimizers(self):
            return [torch.optim.SGD(network.parameters(), lr=0.0) for network in (self.own, self.discriminator)]

    quality = distance()
    fit(quality, gan=Drawing())
    (_, first), (_, second) = quality.history[FRECHET]
    assert first == second  # seeded, and the generator does not learn


# ---- training stays what it is -------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("often", [False, True])
def test_measuring_changes_nothing_in_training(first: bool, often: bool) -> None:
    def run(*measuring: SampleQuality) -> tuple:
        # The length of a run is known after two updates.
        sparsity, ema = (
            DynamicSparsityCallback(0.3, interval=6, explore_interval=4, probe_interval=2),
            GeneratorEMA(0.9),
        )
        callbacks = [*measuring, sparsity, ema] if first else [sparsity, ema, *measuring]
        gan = trained(*callbacks, epochs=3)
        return gan.state_dict(), ema.averages(), sparsity.masks("generator"), (sparsity.flops_ratio, sparsity.decisions)

    quality = distance(every_n_updates=1 if often else None, generators=["average", "raw"], samples=16)
    *plain, counted = run()
    *measured, counted_as_well = run(quality)
    assert updates_of(quality) == (list(range(1, 31)) if often else [10, 20, 30])
    assert counted == counted_as_well
    for one, other in zip(plain, measured, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


class Save(Callback):
    def __init__(self, path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("after", [4, 14])
@pytest.mark.parametrize("every", [None, 6])
def test_a_resumed_run_measures_the_same(after: int, every: int | None, tmp_path) -> None:
    def run(*callbacks: Callback, ckpt=None) -> tuple[SampleQuality, ToyGAN]:
        quality, gan = distance(every_n_updates=every, samples=40), ToyGAN()
        seed_everything(0 if ckpt is None else 1, verbose=False)
        loader = ResumableLoader(toy_data().dataset, 8, 10, seed=0)
        toy_trainer(DynamicSparsityCallback(0.3), quality, *callbacks, epochs=2).fit(gan, loader, ckpt_path=ckpt)
        return quality, gan

    path = tmp_path / "a.ckpt"
    whole, gan = run(Save(path, after))
    assert updates_of(whole) == ([10, 20] if every is None else [6, 12, 18])
    resumed, again = run(ckpt=path)
    assert resumed.history == whole.history
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in gan.state_dict().items())


def test_a_checkpoint_of_a_plain_gan_is_measured_without_training(tmp_path) -> None:
    class Tested(ToyGAN):
        def test_step(self, batch, batch_idx) -> None:
            pass

    first = distance()
    fit(first, Save(tmp_path / "a.ckpt", 20), gan=Tested())
    quality = distance()
    toy_trainer(quality).test(Tested(), toy_data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert quality.history[FRECHET][-1] == (20, pytest.approx(first.history[FRECHET][-1][1]))


# ---- when ----------------------------------------------------------------------------------------------


def test_every_few_epochs_or_updates() -> None:
    quality = distance(every_n_epochs=2)
    fit(quality, epochs=5)
    assert updates_of(quality) == [20, 40]
    quality = distance(every_n_updates=8)
    fit(quality, epochs=3)
    assert updates_of(quality) == [8, 16, 24]


def test_updates_are_counted_where_nothing_else_counts_them() -> None:
    class Often(ToyGAN):
        """Updates the generator twice a batch, and the discriminator once."""

        def training_step(self, batch, batch_idx) -> None:
            super().training_step(batch, batch_idx)
            generator, _ = self.optimizers()
            generator.zero_grad()
            self.manual_backward(-self.discriminator(self.generator(torch.randn(4, LATENT))).mean())
            generator.step()

    one, other = distance(), SampleQuality(ToyFeatures(), "other")
    fit(one, other, gan=Often())
    assert updates_of(one) == updates_of(other) == [20, 40]
    sparse = distance()
    fit(sparse, DynamicSparsityCallback(0.5))
    assert updates_of(sparse) == [10, 20]
    assert sparse.generator_updates is None  # the other callback counts


def test_a_checkpoint_can_be_chosen_by_it(tmp_path) -> None:
    saving = ModelCheckpoint(monitor=f"{FRECHET}/toy", dirpath=tmp_path, save_top_k=1, filename="{epoch}")
    quality = distance()
    fit(quality, saving, epochs=3, enable_checkpointing=True)
    best = min(range(3), key=lambda epoch: quality.history[FRECHET][epoch][1])
    assert saving.best_model_path.endswith(f"epoch={best}.ckpt")


# ---- the real images -----------------------------------------------------------------------------------


def test_a_given_loader_holds_the_real_images() -> None:
    reals = real_images().flip(1)[:60]
    quality, noise = distance(loader=DataLoader(TensorDataset(reals), 7)), Noise()
    gan = fit(noise, quality)
    assert quality.history[FRECHET][-1][1] == pytest.approx(by_hand(reals, noise.sample(gan, 60)), rel=1e-3)


def test_every_training_image_counts_once_in_any_order_of_training() -> None:
    quality = distance()
    fit(quality, data=DataLoader(TensorDataset(real_images()), 8, shuffle=True, drop_last=True), limit_train_batches=10)
    assert quality.real_halves == pytest.approx(by_hand(real_images()[::2], real_images()[1::2]), rel=1e-3)


def test_the_transfers_hooks_see_a_validation() -> None:
    stages = []

    class Hooked(ToyGAN):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            stages.append(self.trainer.training)
            return batch

    fit(distance(), gan=Hooked(), epochs=1)
    assert stages == [True] * 10 + [False] * 10


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(real_images()))


@pytest.mark.parametrize(
    "data",
    [lambda: DataLoader(Streamed(), 8), lambda: DataLoader(TensorDataset(real_images()), batch_sampler=[range(8)])],
    ids=["stream", "batch sampler"],
)
def test_training_data_without_an_order_need_a_loader(data) -> None:
    with pytest.raises(
        ValueError, match=r"loader=None: .*\((Streamed|TensorDataset)\).*SampleQuality\(..., loader=...\)"
    ):
        fit(distance(samples=8), data=data())
    quality = distance(samples=8, loader=toy_data())
    fit(quality, data=data())
    assert len(quality.history[FRECHET]) == 2


# ---- what is rejected ----------------------------------------------------------------------------------


class Logits(ToyFeatures):
    def logits(self, features: Tensor) -> Tensor:
        return features


def test_more_samples_than_were_recorded_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"samples=500, but the generator made only 160 different images"):
        fit(distance(samples=500), epochs=1)
    few = SampleQuality(Logits(), "toy", ["inception_score"])
    with pytest.raises(ValueError, match=r"only 8 different images .*; inception_score needs 10"):
        fit(few, data=DataLoader(TensorDataset(real_images()), 4), limit_train_batches=1)


def test_fewer_samples_than_real_images_are_compared_with_one_warning() -> None:
    quality = distance(every_n_updates=2)
    with pytest.warns(UserWarning, match="toy: 32 samples are compared with 80 real images") as warned:
        fit(quality, epochs=1)
    assert sum("samples are compared" in str(warning.message) for warning in warned) == 1
    assert updates_of(quality) == [2, 4, 6, 8, 10]


def test_a_generator_that_is_not_found_is_named_before_training() -> None:
    class Painter(ToyGAN):
        def __init__(self) -> None:
            super().__init__(("painter", "critic"))

    message = r'no generator was found in Painter .*generator="...".* a method sample\(n, rng=...\)'
    with pytest.raises(ValueError, match=message):
        fit(distance(), gan=Painter())
    quality = distance(generator="painter")
    fit(quality, gan=Painter())
    assert updates_of(quality) == [10, 20]


def test_inputs_that_no_checkpoint_can_hold_are_rejected() -> None:
    class Keyed(nn.Linear):
        def forward(self, noise, key=None):
            return super().forward(noise)

    class Odd(ToyGAN):
        def __init__(self) -> None:
            super().__init__()
            self.generator = Keyed(LATENT, PIXELS)
            self.generator.register_forward_pre_hook(lambda module, args: (*args, {1, 2}))

    with pytest.raises(TypeError, match=r"cannot repeat a call of the generator with a set: .*sample\(n, rng=...\)"):
        fit(distance(), gan=Odd())


@pytest.mark.parametrize("argument", ["every_n_epochs", "every_n_updates"])
def test_bad_intervals_are_rejected(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0 must be an integer, at least 1"):
        distance(**{argument: 0})
