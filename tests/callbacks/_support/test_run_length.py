import re
import warnings

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from torch.utils.data import DataLoader, IterableDataset
from toys import ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst.callbacks._support.run_length import RunLength, explain_unknown


class SlowGAN(ToyGAN):
    """Updates its generator in every so many batches, from some batch on."""

    def __init__(self, every: int = 1, first: int = 0) -> None:
        super().__init__()
        self.every, self.first = every, first
        self.batches = 0

    def training_step(self, batch, batch_idx) -> None:
        generator_optimizer = self.optimizers()[0]
        step = generator_optimizer.step
        self.batches += 1
        if self.batches <= self.first or (self.batches - self.first) % self.every:
            generator_optimizer.step = lambda: None
        super().training_step(batch, batch_idx)
        generator_optimizer.step = step


class Observer(Callback):
    """Counts generator updates, and works out after each batch how many there will be."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.updates = 0
        self.length = RunLength()
        self.known: list[bool] = []
        self.lengths: list[int | None] = []
        self.unknown = ""
        self.stop_at = stop_at

    def on_fit_start(self, trainer, pl_module) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.count())

    def count(self) -> None:
        self.updates += 1

    def on_train_batch_end(self, trainer, *_) -> None:
        self.length.observe(trainer, self.updates)
        self.known.append(self.length.known)
        self.lengths.append(self.length.updates)
        self.unknown = explain_unknown(trainer)
        trainer.should_stop = self.stop_at is not None and self.updates >= self.stop_at


def observed(gan: ToyGAN | None = None, stop_at: int | None = None, **settings) -> Observer:
    observer = Observer(stop_at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(observer, gan=gan, **settings)
    return observer


def test_it_is_known_after_two_batches_with_updates() -> None:
    length = RunLength()
    assert not length.known
    assert length.updates is None
    assert observed().known == [False] + [True] * 9
    assert observed(SlowGAN(every=3)).known == [False] * 5 + [True] * 5
    assert observed(SlowGAN(every=7)).known == [False] * 10


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("epochs", "limit"), [(1, 10), (2, 10), (2, 9), (3, 7)])
def test_the_planned_length_in_epochs_is_the_runs_length(every: int, epochs: int, limit: int) -> None:
    observer = observed(SlowGAN(every), epochs=epochs, limit_train_batches=limit)
    assert observer.updates == epochs * limit // every
    if observer.updates >= 2:
        assert observer.length.updates == observer.updates


@pytest.mark.parametrize(
    ("batches", "lengths"),
    [
        ((9, 2, 2), [None] + [27] * 8 + [13] * 4),  # 9 of 3 * 9 batches; then 9 + 2 * 2
        ((2, 9, 9), [None, 6] + [20] * 18),  # 2 of 3 * 2 batches; then 2 + 2 * 9
    ],
)
def test_batches_of_earlier_epochs_do_not_count(batches: tuple[int, ...], lengths: list[int | None]) -> None:
    class Growing(ToyGAN):
        def train_dataloader(self):
            return toy_data(batches[self.current_epoch])

    observer = Observer()
    toy_trainer(observer, epochs=3, reload_dataloaders_every_n_epochs=1).fit(Growing())
    assert observer.lengths == lengths


def test_a_start_without_generator_updates_does_not_count() -> None:
    # 20 batches, the first 6 for the discriminator alone, then every other one: 14 / 2.
    observer = observed(SlowGAN(every=2, first=6), epochs=2)
    assert observer.updates == observer.length.updates == 7


@pytest.mark.parametrize("max_steps", [6, 7, 9, 11, 16])
def test_the_planned_length_in_optimizer_steps_is_the_runs_length(max_steps: int) -> None:
    observer = observed(epochs=-1, max_steps=max_steps)
    assert observer.updates == -(-max_steps // 2)  # two steps a batch, and a batch is not cut off
    assert observer.length.updates == observer.updates


@pytest.mark.parametrize(("max_steps", "updates"), [(12, 2), (13, 2), (15, 2), (16, 2), (17, 3), (18, 3), (22, 3)])
def test_the_length_of_optimizer_steps_where_the_generator_has_few_of_them(max_steps: int, updates: int) -> None:
    # Six steps in five batches, the last two of them in the fifth.
    observer = observed(SlowGAN(every=5), epochs=-1, max_steps=max_steps)
    assert observer.updates == updates
    assert observer.length.updates == updates


def test_the_nearer_of_two_ends_counts() -> None:
    assert observed(epochs=2, max_steps=12).length.updates == 6
    assert observed(epochs=1, max_steps=1000).length.updates == 10


def test_several_updates_a_batch() -> None:
    class Eager(ToyGAN):
        def training_step(self, batch, batch_idx) -> None:
            super().training_step(batch, batch_idx)
            self.optimizers()[0].step()

    observer = observed(Eager(), epochs=2)
    assert observer.updates == observer.length.updates == 40


def test_the_length_of_a_resumed_run_counts_from_its_beginning(tmp_path) -> None:
    trained(folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    observer = Observer()
    observer.updates = 10
    toy_trainer(observer, epochs=3).fit(ToyGAN(), toy_data(), ckpt_path=path)
    assert observer.updates == observer.length.updates == 30


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from toy_data().dataset


@pytest.mark.parametrize(
    ("epochs", "reason"), [(-1, "none of max_epochs, "), (2, r"max_epochs=2 .*Trainer\(limit_train_batches=")]
)
def test_where_nothing_limits_the_run_its_length_is_unknown(epochs: int, reason: str) -> None:
    data = DataLoader(Endless(), batch_size=8) if epochs > 0 else toy_data()
    observer = Observer(stop_at=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        toy_trainer(observer, epochs=epochs).fit(ToyGAN(), data)
    assert observer.length.known
    assert observer.length.updates is None
    assert re.match(reason, observer.unknown)


def test_a_run_that_time_limits_is_as_long_as_its_rate_says() -> None:
    class Paced(Timer):
        """A second for every batch."""

        def time_elapsed(self, stage="train"):
            return float(observer.updates)

    observer = Observer()
    toy_trainer(observer, Paced({"seconds": 30}), epochs=2).fit(ToyGAN(), toy_data())
    assert observer.length.updates == 20  # epochs end before the time does
    observer = Observer(stop_at=8)
    toy_trainer(observer, Paced({"seconds": 30}), epochs=-1).fit(ToyGAN(), toy_data())
    assert observer.length.updates == 30


class Warming(SlowGAN):
    """Updates its generator in every tenth batch for 100 batches, and in every batch after these, or the reverse."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before)
        self.after = after

    def training_step(self, batch, batch_idx) -> None:
        if self.batches == 100:
            self.every = self.after
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("before", "after", "updates"), [(10, 1, 110), (1, 10, 110)])
def test_a_changing_rate_is_followed_to_the_end(before, after, updates) -> None:
    observer = Observer()
    toy_trainer(observer, epochs=1).fit(Warming(before, after), toy_data(200))
    assert observer.updates == updates
    assert observer.length.updates == updates
