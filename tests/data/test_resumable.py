import warnings
from itertools import chain

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset
from toys import LATENT, ToyGAN, toy_trainer

from lightning_ddst import DynamicSparsityCallback, GANModule
from lightning_ddst.data import DigitsDataModule, ResumableLoader
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.utils import distributed

IMAGES = 96


def numbered(images: int = IMAGES) -> TensorDataset:
    """Images that hold their own number."""
    return TensorDataset(torch.arange(float(images))[:, None].repeat(1, 16))


def numbers(batch) -> list[int]:
    return batch[0][:, 0].int().tolist()


class Seen(Callback):
    """Writes down the images of every batch, by epoch, and the ends of epochs."""

    def __init__(self, save=None, after: int = 6) -> None:
        self.epochs: dict[int, list[list[int]]] = {}
        self.indices: dict[int, list[int]] = {}
        self.validated: list[int] = []
        self.last: list[bool] = []
        self.save, self.after = save, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.epochs.setdefault(trainer.current_epoch, []).append(numbers(batch))
        self.indices.setdefault(trainer.current_epoch, []).append(batch_idx)
        self.last.append(trainer.is_last_batch)
        if self.save is not None and sum(map(len, self.epochs.values())) == self.after:
            trainer.save_checkpoint(self.save)

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.current_epoch)

    def images(self, epoch: int) -> list[int]:
        return [*chain.from_iterable(self.epochs[epoch])]


class Validated(ToyGAN):
    def validation_step(self, batch, batch_idx) -> None:
        pass


def gan_module() -> GANModule:
    gan = ToyGAN()
    return GANModule(gan.generator, gan.discriminator, latent_dim=LATENT)


def fit(loader, *callbacks, gan=None, ckpt=None, epochs: int = 1, **settings) -> Seen:
    seen = next((callback for callback in callbacks if isinstance(callback, Seen)), None) or Seen()
    callbacks = [callback for callback in callbacks if callback is not seen]
    trainer = toy_trainer(*callbacks, seen, epochs=epochs, **settings)
    trainer.fit(gan or Validated(), loader, DataLoader(numbered(8)), ckpt_path=ckpt)
    return seen


# ---- other loaders that Lightning makes of it -------------------------------------------------------


class Hooked(LightningDataModule):
    """Makes its loaders in hooks, where Lightning records their arguments."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__()
        self.arguments, self.named = arguments, named

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(numbered(), *self.arguments, **self.named)


@pytest.mark.parametrize(("settings", "batches"), [({"overfit_batches": 2}, 2), ({"overfit_batches": 0.25}, 3)])
@pytest.mark.parametrize("given", ["loader", "hook", "hook with names"])
def test_overfitting_repeats_the_first_images_in_order(settings, batches, given) -> None:
    seen = Seen()
    trainer = toy_trainer(seen, DynamicSparsityCallback(0.5), epochs=3, **settings)
    if given == "loader":
        trainer.fit(ToyGAN(), ResumableLoader(numbered(), 8, 12, seed=0))
    else:
        data = Hooked(8, 12) if given == "hook" else Hooked(batch_size=8, batches=12, seed=0, drop_last=True)
        trainer.fit(ToyGAN(), datamodule=data)
    expected = [list(range(8 * batch, 8 * batch + 8)) for batch in range(batches)]
    assert seen.epochs == dict.fromkeys(range(3), expected)


def test_overfitting_more_batches_than_a_pass_holds_starts_over() -> None:
    seen = fit(ResumableLoader(numbered(20), 8, 5, seed=0), overfit_batches=5)
    assert seen.images(0) == [*range(20), *range(20)]


def test_overfitting_keeps_the_other_arguments() -> None:
    def collate(samples):
        return (torch.stack([image for (image,) in samples]) + 100,)

    seen = fit(ResumableLoader(numbered(), 8, 12, collate_fn=collate, num_workers=1), overfit_batches=1)
    assert seen.epochs == {0: [list(range(100, 108))]}


def test_overfitting_the_digits() -> None:
    batches = []

    class Losses(GANModule):
        def training_step(self, batch, batch_idx) -> None:
            batches.append(batch[0].sum().item())
            super().training_step(batch, batch_idx)

    gan = Losses(SmallGenerator(8, 1, 4, latent_dim=4), SmallDiscriminator(8, 1, 4))
    toy_trainer(epochs=2, overfit_batches=2).fit(gan, datamodule=DigitsDataModule(batch_size=8))
    assert len(batches) == 4
    assert batches[:2] == batches[2:]


def test_an_overfitted_run_resumes(tmp_path) -> None:
    loader = ResumableLoader(numbered(), 8, 12, seed=0)
    path = tmp_path / "a.ckpt"
    fit(loader, Seen(path, after=2), overfit_batches=4)
    seen = fit(ResumableLoader(numbered(), 8, 12, seed=0), overfit_batches=4, ckpt=path, epochs=2)
    assert seen.images(0) == list(range(16, 32))
    assert seen.images(1) == list(range(32))


@pytest.mark.parametrize("limit", [3, 0.25])
def test_a_limit_ends_every_epoch_early(limit) -> None:
    whole = fit(ResumableLoader(numbered(), 8, 12, seed=0), epochs=3)
    seen = fit(ResumableLoader(numbered(), 8, 12, seed=0), epochs=3, limit_train_batches=limit)
    assert seen.epochs == {epoch: batches[:3] for epoch, batches in whole.epochs.items()}


def test_prediction_takes_the_epochs_batches() -> None:
    class Predicting(ToyGAN):
        def predict_step(self, batch, batch_idx):
            return numbers(batch)

    def loader() -> ResumableLoader:
        return ResumableLoader(numbered(), 8, 12, seed=0)

    made = toy_trainer().predict(Predicting(), loader())
    assert made == [numbers(batch) for batch in loader()]
    used = loader()
    gan = Predicting()
    toy_trainer().fit(gan, used)
    made = toy_trainer().predict(gan, used)
    assert sorted(chain.from_iterable(made)) == list(range(IMAGES))


def test_without_a_sampler_of_lightnings_own_it_is_the_same() -> None:
    plain = fit(ResumableLoader(numbered(), 8, 12, seed=0))
    assert fit(ResumableLoader(numbered(), 8, 12, seed=0), use_distributed_sampler=False).epochs == plain.epochs
    assert sorted(plain.images(0)) == list(range(IMAGES))


def test_a_sampler_gives_the_order_and_processes_share_it(monkeypatch) -> None:
    def batches() -> list[list[int]]:
        dataset = numbered(32)
        return [numbers(batch) for batch in ResumableLoader(dataset, 4, 4, sampler=SequentialSampler(dataset))]

    assert batches() == [list(range(first, first + 4)) for first in (0, 4, 8, 12)]
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        assert batches() == [list(range(first + rank, first + 8, 2)) for first in (0, 8, 16, 24)]


# ---- resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize(("size", "batches"), [(8, 12), (16, 6), (4, 24), (2, 48), (24, 4), (48, 2), (12, 8)])
def test_every_image_is_seen_once_with_another_batch_size(tmp_path, module: bool, size: int, batches: int) -> None:
    def run(loader, *callbacks, **settings) -> Seen:
        gan, sparsity = (gan_module(), []) if module else (Validated(), [DynamicSparsityCallback(0.5)])
        return fit(loader, *callbacks, *sparsity, gan=gan, epochs=2, **settings)

    path = tmp_path / "a.ckpt"
    before = run(ResumableLoader(numbered(), 8, 12, seed=0), Seen(path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*left out")
        after = run(ResumableLoader(numbered(), size, batches, seed=0), ckpt=path)
    assert after.images(0) == before.images(0)[48:]
    assert {len(batch) for epoch in after.epochs.values() for batch in epoch} == {size}
    assert sorted(after.images(1)) == list(range(IMAGES))
    # Lightning counts on in the new batches, and validates at the ends of epochs.
    assert after.indices == {0: list(range(batches // 2, batches)), 1: list(range(batches))}
    assert after.validated == [0, 1]
    assert [place for place, last in enumerate(after.last) if last] == [batches // 2 - 1, batches // 2 + batches - 1]


@pytest.mark.parametrize("module", [False, True])
def test_every_image_is_seen_once_with_another_number_of_processes(tmp_path, module: bool) -> None:
    def run(loader, *callbacks, **settings) -> Seen:
        gan = gan_module() if module else Validated()
        return fit(loader, *callbacks, DynamicSparsityCallback(0.5), gan=gan, epochs=2, **settings)

    # One process with batches of 16 saves what two with batches of 8 do, but for the random states.
    path = tmp_path / "a.ckpt"
    before = run(ResumableLoader(numbered(), 16, 6, seed=0), Seen(path, after=2))
    content = torch.load(path, weights_only=True)
    content["callbacks"]["DynamicSparsityCallback"]["random"] *= 2
    torch.save(content, path)
    with pytest.warns(UserWarning, match="random states of 2 processes, and there are 1"):
        after = run(ResumableLoader(numbered(), 8, 12, seed=0), ckpt=path)
    assert after.images(0) == before.images(0)[32:]
    assert after.indices == {0: list(range(4, 12)), 1: list(range(12))}
    assert after.validated == [0, 1]


@pytest.mark.parametrize(("size", "left"), [(8, 6), (16, 1), (4, 16)])
def test_another_loader_says_what_the_rest_of_the_epoch_sees(tmp_path, size: int, left: int) -> None:
    def run(size: int, *callbacks, **settings) -> Seen:
        return fit(DataLoader(numbered(80), size), *callbacks, DynamicSparsityCallback(0.5), epochs=2, **settings)

    path = tmp_path / "a.ckpt"
    run(8, Seen(path, after=4))
    with pytest.warns(UserWarning, match=f"after batch 4 .* first {left} batches of a new order.* twice") as warned:
        after = run(size, ckpt=path)
    assert after.images(0) == list(range(left * size))
    assert sum("another number of images" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize(("size", "batches", "rest"), [(20, 4, 1), (20, 5, 2), (10, 9, 4), (5, 19, 9)])
def test_images_that_fill_no_batch_are_left_out_with_a_warning(tmp_path, size, batches, rest) -> None:
    path = tmp_path / "a.ckpt"
    before = fit(ResumableLoader(numbered(), 8, 12, seed=0), Seen(path), DynamicSparsityCallback(0.5))
    left_out = size * batches - 48 - size * rest
    with pytest.warns(UserWarning, match=f"batch_size={size}: .* after 48 of {size * batches} samples, and {left_out}"):
        after = fit(ResumableLoader(numbered(), size, batches, seed=0), DynamicSparsityCallback(0.5), ckpt=path)
    assert len(after.epochs[0]) == rest
    in_order = before.images(0)[48:]
    assert after.images(0)[: len(in_order)] == in_order[: size * rest]
    assert after.validated == [0]


@pytest.mark.parametrize("batches", [7, 9, 20])
def test_an_epoch_of_another_length_is_resumed_at_the_same_image(tmp_path, batches: int) -> None:
    path = tmp_path / "a.ckpt"
    before = fit(ResumableLoader(numbered(), 8, 12, seed=0), Seen(path), DynamicSparsityCallback(0.5))
    after = fit(ResumableLoader(numbered(), 8, batches, seed=0), DynamicSparsityCallback(0.5), ckpt=path)
    whole = [image for batch in ResumableLoader(numbered(), 8, batches, seed=0) for image in numbers(batch)]
    assert whole[:96] == before.images(0)[: 8 * batches]
    assert after.images(0) == whole[48:]


@pytest.mark.parametrize(("size", "batches"), [(8, 5), (8, 6), (24, 2), (96, 1)])
def test_an_epoch_that_is_over_already_ends(tmp_path, size: int, batches: int) -> None:
    path = tmp_path / "a.ckpt"
    fit(ResumableLoader(numbered(), 8, 12, seed=0), Seen(path), DynamicSparsityCallback(0.5))
    after = fit(ResumableLoader(numbered(), size, batches, seed=0), DynamicSparsityCallback(0.5), ckpt=path, epochs=2)
    assert 0 not in after.epochs
    assert len(after.epochs[1]) == batches


def test_the_place_of_later_epochs(tmp_path) -> None:
    path = tmp_path / "a.ckpt"
    before = fit(ResumableLoader(numbered(), 8, 12, seed=0), Seen(path, after=15), gan=gan_module(), epochs=3)
    after = fit(ResumableLoader(numbered(), 24, 4, seed=0), gan=gan_module(), ckpt=path, epochs=3)
    assert after.images(1) == before.images(1)[24:]
    assert after.images(2) == before.images(2)
    assert 0 not in after.epochs


@pytest.mark.parametrize(("saved", "resumed"), [(1, 2), (2, 1), (4, 2)])
def test_another_number_of_processes_continues_at_the_same_image(monkeypatch, saved: int, resumed: int) -> None:
    def loaders(world: int):
        monkeypatch.setattr(distributed, "get_world_size", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
            yield ResumableLoader(numbered(), 4, 24 // world, seed=0)

    seen = []
    for loader in loaders(saved):
        iterator = iter(loader)
        for _ in range(12 // saved):
            seen += numbers(next(iterator))
        state = loader.state_dict()
    assert len(seen) == 48
    for loader in loaders(resumed):
        loader.load_state_dict(state)
        for batch in loader:
            seen += numbers(batch)
    assert sorted(seen) == list(range(IMAGES))


# ---- what is rejected -------------------------------------------------------------------------------


def test_a_state_that_counts_batches_is_rejected() -> None:
    loader = ResumableLoader(numbered(), 8, 12)
    with pytest.raises(ValueError, match=r"ResumableLoader: samples is missing: another version"):
        loader.load_state_dict({"epoch": 0, "batches": 6, "seed": 0})


def test_another_data_set_is_rejected_in_the_middle_of_an_epoch_only(tmp_path) -> None:
    path = tmp_path / "a.ckpt"
    fit(ResumableLoader(numbered(), 8, 12, seed=0), Seen(path))
    with pytest.raises(ValueError, match="dataset has 100 samples, but 96 when the checkpoint was saved in the middle"):
        fit(ResumableLoader(numbered(100), 8, 12, seed=0), ckpt=path)
    fit(ResumableLoader(numbered(), 8, 12, seed=0), Seen(path, after=12))
    after = fit(ResumableLoader(numbered(100), 8, 12, seed=0), ckpt=path, epochs=2)
    assert len(after.images(1)) == 96


def test_several_loaders_with_other_batch_sizes_are_rejected(tmp_path) -> None:
    class First(ToyGAN):
        def training_step(self, batch, batch_idx) -> None:
            super().training_step(batch["a"], batch_idx)

    def pair(*sizes: int) -> dict[str, ResumableLoader]:
        return {
            name: ResumableLoader(numbered(), size, 96 // size, seed=0) for name, size in zip("ab", sizes, strict=True)
        }

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    toy_trainer(DynamicSparsityCallback(0.5, real="a"), Save()).fit(First(), pair(8, 8))
    with pytest.raises(ValueError, match="batch_size: the train loaders resume after different numbers of batches"):
        toy_trainer(DynamicSparsityCallback(0.5, real="a")).fit(First(), pair(4, 16), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an integer, at least 1"),
        ({"batches": 1.5}, "batches=1.5 must be an integer, at least 1"),
        ({"shuffle": False}, "shuffle=False: ResumableLoader shuffles"),
        ({"sampler": DistributedSampler(numbered(), 2, 0)}, "sampler=DistributedSampler must not share its indices"),
    ],
)
def test_bad_arguments_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableLoader(numbered(), **{"batch_size": 8, "batches": 12} | arguments)


def test_an_empty_data_set_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"dataset=TensorDataset\(\.\.\.\) must hold at least one image"):
        ResumableLoader(TensorDataset(torch.ones(0, 1)), 8, 12)
