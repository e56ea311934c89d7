import warnings

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader
from toys import LATENT, PIXELS, toggled, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, GANModule
from lightning_ddst.data import ResumableLoader

LR = 0.5


def sgd(parameters) -> SGD:
    return SGD(parameters, lr=LR)


def gan_with(configured, cls: type[GANModule] = GANModule, **arguments) -> GANModule:
    """A GAN whose `configure_optimizers` returns what a function makes of its two optimizers."""

    class Scheduled(cls):
        def configure_optimizers(self):
            optimizers, schedulers = super().configure_optimizers()
            assert schedulers == []
            return configured(*optimizers)

    generator = nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), nn.Linear(8, PIXELS), nn.Tanh())
    discriminator = nn.Sequential(nn.Linear(PIXELS, 8), nn.Tanh(), nn.Linear(8, 1), nn.Tanh())
    named = {"latent_dim": LATENT, "generator_optimizer": sgd, "discriminator_optimizer": sgd}
    return Scheduled(generator, discriminator, **named | arguments)


class Rates(Callback):
    """Writes down both learning rates at the first loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self.batch = -1

    def on_before_backward(self, trainer, *_) -> None:
        if self.batch != trainer.fit_loop.total_batch_idx:
            self.batch = trainer.fit_loop.total_batch_idx
            self.add(trainer)

    def add(self, trainer) -> None:
        self.seen.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers))

    def of(self, index: int) -> list[float]:
        return [rates[index] for rates in self.seen]


def fit(gan: GANModule, *callbacks, epochs: int = 3, batches: int = 4, ckpt=None, data=None, **settings) -> Rates:
    seed_everything(0, verbose=False)
    rates = Rates()
    trainer = toy_trainer(*callbacks, epochs=epochs, **settings)
    trainer.callbacks.append(rates)
    loader = ResumableLoader(toy_data().dataset, 8, batches, seed=0) if data is None else data
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*lr scheduler dict contains")
        warnings.filterwarnings("error", ".*lr_scheduler.step")
        trainer.fit(gan, loader, DataLoader(torch.zeros(1, PIXELS)), ckpt_path=ckpt)
    rates.add(trainer)  # those at the end
    return rates


def halves(optimizer) -> StepLR:
    return StepLR(optimizer, 1, gamma=0.5)


def halved(times) -> list[float]:
    return [LR * 0.5**count for count in times]


# ---- when they step -----------------------------------------------------------------------------------


FORMS = {
    "two lists": lambda g, d: ([g, d], [halves(g), halves(d)]),
    "a list of dictionaries": lambda g, d: ([g, d], [{"scheduler": halves(g)}, {"scheduler": halves(d)}]),
    "mixed": lambda g, d: ([g, d], [halves(g), {"scheduler": halves(d), "interval": "epoch", "strict": False}]),
    "dictionaries": lambda g, d: [
        {"optimizer": g, "lr_scheduler": halves(g)},
        {"optimizer": d, "lr_scheduler": {"scheduler": halves(d), "frequency": 1, "name": "d", "monitor": "unused"}},
    ],
    "a tuple": lambda g, d: (
        {"optimizer": g, "lr_scheduler": {"scheduler": halves(g), "interval": "epoch"}},
        {"optimizer": d, "lr_scheduler": halves(d)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_schedulers_of_epochs_step_at_their_ends(form: str) -> None:
    rates = fit(gan_with(FORMS[form]))
    expected = halved([0] * 4 + [1] * 4 + [2] * 4 + [3])
    assert rates.of(0) == expected
    assert rates.of(1) == expected


def test_one_scheduler_leaves_the_other_optimizer_alone() -> None:
    rates = fit(gan_with(lambda g, d: [{"optimizer": g}, {"optimizer": d, "lr_scheduler": halves(d)}]))
    assert rates.of(0) == [LR] * 13
    assert rates.of(1)[-1] == LR / 8
    rates = fit(gan_with(lambda g, d: ([g, d], halves(g))))
    assert rates.of(0)[-1] == LR / 8
    assert rates.of(1) == [LR] * 13


def every_step(frequency: int = 1):
    def configured(g, d):
        return [g, d], [{"scheduler": halves(o), "interval": "step", "frequency": frequency} for o in (g, d)]

    return configured


@pytest.mark.parametrize(("frequency", "every"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_schedulers_of_steps_count_the_steps_of_their_own_optimizer(frequency: int, every: int) -> None:
    rates = fit(gan_with(every_step(frequency), discriminator_steps=every))
    batches = range(13)
    assert rates.of(0) == halved(batch // every // frequency for batch in batches)
    assert rates.of(1) == halved(batch // frequency for batch in batches)


@pytest.mark.parametrize("frequency", [2, 3])
def test_epochs_are_counted_by_their_frequency(frequency: int) -> None:
    def configured(g, d):
        return [g, d], [{"scheduler": halves(o), "frequency": frequency} for o in (g, d)]

    rates = fit(gan_with(configured), epochs=5, batches=2)
    assert rates.of(0) == halved(batch // 2 // frequency for batch in range(11))


def test_several_schedulers_of_one_optimizer() -> None:
    def configured(g, d):
        tenth = {"scheduler": LambdaLR(d, lambda step: 0.1**step), "interval": "epoch"}
        return [g, d], [{"scheduler": ExponentialLR(g, 0.5), "interval": "step"}, tenth]

    rates = fit(gan_with(configured), epochs=2, batches=3)
    assert rates.of(0) == halved(range(7))
    assert rates.of(1) == pytest.approx([LR] * 3 + [LR / 10] * 3 + [LR / 100])


def test_other_kinds_of_schedulers() -> None:
    def configured(g, d):
        sequential = SequentialLR(g, [ConstantLR(g, 0.1, 4), ExponentialLR(g, 0.5)], [4])
        chained = ChainedScheduler([LinearLR(d, 1.0, 0.5, 4), ExponentialLR(d, 0.5)])
        return [g, d], [{"scheduler": scheduler, "interval": "step"} for scheduler in (sequential, chained)]

    rates = fit(gan_with(configured), epochs=2)
    assert rates.of(0) == pytest.approx([LR / 10] * 4 + halved(range(5)))
    assert rates.of(1) == pytest.approx([LR * (1 - min(b, 4) / 8) * 0.5**b for b in range(9)])


def test_one_cycle_takes_the_whole_run() -> None:
    def configured(g, d):
        return [g, d], [{"scheduler": OneCycleLR(o, 1.0, 13, cycle_momentum=False), "interval": "step"} for o in (g, d)]

    rates = fit(gan_with(configured))
    assert rates.of(0)[0] == pytest.approx(1 / 25)
    assert max(rates.of(0)) == pytest.approx(1.0, rel=0.02)
    assert rates.of(0)[-1] < 1e-4


def test_a_training_step_of_its_own_steps_the_schedulers_too() -> None:
    class Reversed(GANModule):
        def training_step(self, batch, batch_idx) -> None:
            generator, discriminator = self.optimizers()
            for optimizer, compute in (
                (generator, self.generator_loss),
                (discriminator, lambda real: self.discriminator_loss(real, None)),
                (discriminator, lambda real: self.discriminator_loss(real, None)),
            ):
                with toggled(self, optimizer):
                    optimizer.zero_grad()
                    self.manual_backward(compute(batch[0]))
                    optimizer.step()

    rates = fit(gan_with(every_step(), Reversed))
    assert rates.of(0) == halved(range(13))
    assert rates.of(1) == halved(range(0, 26, 2))


def test_hooks_of_its_own_do_not_stop_them() -> None:
    class Hooked(GANModule):
        def setup(self, stage) -> None:
            pass

        def on_train_start(self) -> None:
            pass

        def on_train_epoch_end(self) -> None:
            pass

        def on_save_checkpoint(self, checkpoint) -> None:
            pass

    assert fit(gan_with(FORMS["two lists"], Hooked)).of(0)[-1] == LR / 8


def test_with_dynamic_sparsity_and_a_monitor_of_rates(tmp_path) -> None:
    rates = fit(gan_with(every_step()), DynamicSparsityCallback(0.5), LearningRateMonitor(), folder=tmp_path)
    assert rates.of(0) == halved(range(13))


def test_without_schedulers_no_callback_is_added() -> None:
    gan = GANModule(nn.Linear(LATENT, PIXELS), nn.Linear(PIXELS, 1), latent_dim=LATENT)
    trainer = toy_trainer()
    before = list(trainer.callbacks)
    trainer.fit(gan, toy_data())
    assert trainer.callbacks == before


def test_a_second_fit_counts_anew() -> None:
    gan = gan_with(every_step(3))
    trainer = toy_trainer()
    trainer.fit(gan, toy_data(4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == LR / 2
    rates = fit(gan, epochs=1)
    assert rates.of(0) == halved([0, 0, 0, 1, 1])


def test_another_module_of_the_same_trainer_is_left_alone() -> None:
    trainer = toy_trainer(max_epochs=1)
    trainer.fit(gan_with(every_step()), toy_data(2))

    class ByHand(GANModule):
        """Steps its scheduler itself, and returns no callbacks."""

        def configure_optimizers(self):
            optimizers, _ = super().configure_optimizers()
            return optimizers, [halves(optimizers[0])]

        def configure_callbacks(self):
            return []

        def training_step(self, batch, batch_idx) -> None:
            self.optimizers()[0].step()
            self.lr_schedulers().step()

    other = ByHand(
        nn.Linear(LATENT, PIXELS),
        nn.Linear(PIXELS, 1),
        latent_dim=LATENT,
        generator_optimizer=sgd,
        discriminator_optimizer=sgd,
    )
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, toy_data(2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == LR / 4


# ---- ReduceLROnPlateau --------------------------------------------------------------------------------


VALUES = [3.0, 2.0, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5]


def plateau(optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def after_plateaus(values) -> list[float]:
    """Learning rates after each value, with patience 0."""
    best, rate, rates = float("inf"), LR, []
    for value in values:
        rate = rate if value < best else rate / 2
        best = min(best, value)
        rates.append(rate)
    return rates


class Validating(GANModule):
    """Logs a number at every validation."""

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("quality", VALUES[self.trainer.current_epoch])


class AtTheEnd(GANModule):
    """Logs a number at the end of every training epoch, after validation."""

    def on_train_epoch_end(self) -> None:
        self.log("quality", VALUES[self.trainer.current_epoch])


PLATEAUS = {
    "dictionary": lambda g, d: ([g, d], [{"scheduler": plateau(g), "monitor": "quality"}]),
    "beside the optimizer": lambda g, d: [
        {"optimizer": g, "lr_scheduler": plateau(g), "monitor": "quality"},
        {"optimizer": d},
    ],
    "inside": lambda g, d: [
        {"optimizer": g, "lr_scheduler": {"scheduler": plateau(g), "monitor": "quality", "reduce_on_plateau": True}},
        {"optimizer": d},
    ],
}


@pytest.mark.parametrize("form", PLATEAUS)
@pytest.mark.parametrize("cls", [Validating, AtTheEnd])
def test_plateaus_follow_the_metric_of_their_epoch(form: str, cls: type[GANModule]) -> None:
    rates = fit(gan_with(PLATEAUS[form], cls), epochs=8, batches=1)
    assert rates.of(0) == [LR, *after_plateaus(VALUES)]
    assert rates.of(1) == [LR] * 9


def test_plateaus_of_every_second_epoch() -> None:
    def configured(g, d):
        return [g, d], [{"scheduler": plateau(g), "monitor": "quality", "frequency": 2}]

    rates = fit(gan_with(configured, Validating), epochs=8, batches=1, check_val_every_n_epoch=2)
    assert rates.of(0)[::2] == [LR, *after_plateaus(VALUES[1::2])]


def test_plateaus_of_steps_follow_the_last_batch() -> None:
    class Logging(GANModule):
        def training_step(self, batch, batch_idx) -> None:
            super().training_step(batch, batch_idx)
            self.log("quality", VALUES[batch_idx])

    def configured(g, d):
        return [g, d], [{"scheduler": plateau(g), "monitor": "quality", "interval": "step"}]

    rates = fit(gan_with(configured, Logging), epochs=1, batches=8)
    assert rates.of(0) == [LR, *after_plateaus(VALUES)]


def test_a_scheduler_of_ones_own_takes_the_metric() -> None:
    class Follow(StepLR):
        def step(self, metric=None) -> None:
            if metric is not None:
                self.optimizer.param_groups[0]["lr"] = float(metric)
            else:
                super().step()

    def configured(g, d):
        return [g, d], [{"scheduler": Follow(g, 1), "monitor": "quality", "reduce_on_plateau": True}]

    rates = fit(gan_with(configured, Validating), epochs=3, batches=1)
    assert rates.of(0) == [LR, *VALUES[:3]]


def test_a_plateau_without_its_metric_is_an_error() -> None:
    gan = gan_with(lambda g, d: ([g, d], [{"scheduler": plateau(g), "monitor": "fid"}]))
    with pytest.raises(
        ValueError, match=r"monitor='fid' of ReduceLROnPlateau must be one of the .*: loss/discriminator"
    ):
        fit(gan)


def test_a_plateau_that_may_miss_its_metric_warns() -> None:
    gan = gan_with(lambda g, d: ([g, d], [{"scheduler": plateau(g), "monitor": "fid", "strict": False}]))
    with pytest.warns(UserWarning, match="monitor='fid' of ReduceLROnPlateau is not among the metrics: .* does not"):
        assert fit(gan).of(0) == [LR] * 13


# ---- resuming -----------------------------------------------------------------------------------------


RESUMED = {
    "epochs": (FORMS["mixed"], GANModule),
    "steps": (every_step(3), GANModule),
    "a plateau": (PLATEAUS["dictionary"], Validating),
    "a plateau of the epoch's end": (PLATEAUS["dictionary"], AtTheEnd),
}


class SaveAt(ModelCheckpoint):
    """Saves a checkpoint in a hook; Lightning calls it after the other callbacks, as every ModelCheckpoint."""

    def __init__(self, path, hook: str, epoch: int, batch: int) -> None:
        super().__init__()
        self.path, self.place = path, (hook, epoch, batch)

    def save_at(self, hook: str, trainer) -> None:
        if (hook, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) == self.place:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *_) -> None:
        self.save_at("on_train_batch_end", trainer)

    def on_validation_end(self, trainer, *_) -> None:
        self.save_at("on_validation_end", trainer)

    def on_train_epoch_end(self, trainer, *_) -> None:
        self.save_at("on_train_epoch_end", trainer)


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize(
    ("hook", "epoch", "batch"),
    [("on_train_batch_end", 1, 1)]
    + [
        (hook, epoch, 3)
        for hook in ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")
        for epoch in (0, 2)
    ],
)
def test_a_resumed_run_has_the_same_learning_rates(tmp_path, kind: str, hook: str, epoch: int, batch: int) -> None:
    configured, cls = RESUMED[kind]
    whole = fit(gan_with(configured, cls), epochs=5)
    path = tmp_path / "a.ckpt"
    fit(gan_with(configured, cls), SaveAt(path, hook, epoch, batch), epochs=5, enable_checkpointing=True)
    torch.load(path, weights_only=True)
    if "plateau" in kind and hook == "on_train_batch_end" and batch == 3:
        # Lightning leaves out the epoch's validation when it resumes there.
        with pytest.warns(UserWarning, match="monitor='quality' of ReduceLROnPlateau was not known when"):
            fit(gan_with(configured, cls), epochs=5, ckpt=path)
        return
    resumed = fit(gan_with(configured, cls), epochs=5, ckpt=path)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert len(resumed.seen) == 21 - 4 * epoch - batch - 1


# ---- what is rejected ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"interval": "batch"}, "interval of StepLR='batch' is unknown; allowed are step, epoch"),
        ({"frequency": 0}, "frequency of StepLR=0 must be an integer, at least 1"),
        ({"reduce_on_plateau": True}, "monitor=None of StepLR must be the name of a logged metric"),
    ],
)
def test_bad_dictionaries_are_rejected(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(gan_with(lambda g, d: ([g, d], [{"scheduler": halves(g)} | keys])))


def test_a_plateau_without_a_monitor_is_rejected() -> None:
    with pytest.raises(ValueError, match="monitor=None of ReduceLROnPlateau must be the name of a logged metric"):
        fit(gan_with(lambda g, d: ([g, d], [plateau(g)])))


@pytest.mark.parametrize("hook", ["training_step", "on_train_epoch_end"])
def test_schedulers_that_the_module_steps_itself_are_rejected(hook: str) -> None:
    class Stepping(GANModule):
        def training_step(self, batch, batch_idx) -> None:
            super().training_step(batch, batch_idx)
            if hook == "training_step":
                self.lr_schedulers()[0].step()

        def on_train_epoch_end(self) -> None:
            if hook == "on_train_epoch_end":
                self.lr_schedulers()[0].step()

    configured = every_step() if hook == "training_step" else FORMS["two lists"]
    with pytest.raises(ValueError, match=r"StepLR is stepped elsewhere, too: .* remove the calls of their step"):
        fit(gan_with(configured, Stepping))


def test_a_module_without_the_callback_is_rejected() -> None:
    class Forgetful(GANModule):
        def configure_callbacks(self):
            return []

    with pytest.raises(ValueError, match=r"configure_callbacks must return \[\*super"):
        fit(gan_with(FORMS["two lists"], Forgetful))
