import pytest
import torch
from crashes import assert_resumed_alike
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from toys import toy_trainer

from lightning_ddst import GANModule, data
from lightning_ddst.data import ImageDataModule
from lightning_ddst.data.images import batch_of, fit_to_size
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.utils import distributed

N, N_TEST = 30, 7
MODULES = [getattr(data, name) for name in data.__all__ if name.endswith("DataModule")]


def pixels(n=N, seed=0, size=8, channels=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=rng)


class Numbered(ImageDataModule):
    """Random images; an image's label is its place."""

    def __init__(self, root=".", image_size=8, channels=1, **settings):
        super().__init__(root, image_size, channels, **settings)

    def make_dataset(self, train):
        images = pixels() if train else pixels(N_TEST, seed=1)
        return TensorDataset(images, torch.arange(len(images)))


class Files(Dataset):
    """PIL's images of any mode, one by one."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


class OneByOne(Numbered):
    def make_dataset(self, train):
        return Files([Image.fromarray(image[0].numpy()) for image in super().make_dataset(train).tensors[0]])


def seen(loader):
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return images, labels


# ---- pixels -----------------------------------------------------------------------------------------


def test_bytes_become_floats_between_black_and_white():
    images, labels = batch_of(
        (torch.tensor([0, 51, 255], dtype=torch.uint8), torch.tensor([1, 2, 3], dtype=torch.uint8))
    )
    assert images.dtype == torch.float32
    assert images.tolist() == [-1, pytest.approx(-0.6), 1]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 2, 3]


def test_floats_are_taken_as_they_are():
    images, labels = batch_of([(torch.tensor([0.5], dtype=torch.float64), 4)])
    assert (images.dtype, images.tolist(), labels.tolist()) == (torch.float32, [[0.5]], [4])


def test_gray_is_luma():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [10, 20, 30]], dtype=torch.uint8)
    gray = fit_to_size(colours[:, :, None, None], 1, 1)
    assert gray.dtype == torch.uint8
    # 76.245, 149.685, 29.07, 255, 18.15
    assert gray.flatten().tolist() == [76, 150, 29, 255, 18]


@pytest.mark.parametrize("size", [2, 1])
def test_the_colours_of_gray_images_are_identical(size):
    colours = fit_to_size(torch.tensor([[[[7, 7], [7, 7]]]], dtype=torch.uint8), size, 3)
    assert colours.tolist() == [[[[7] * size] * size] * 3]


def test_halving_is_antialiased():
    rows = torch.tensor([0, 70, 140, 210], dtype=torch.uint8).expand(1, 1, 4, 4)
    # A triangle of the new pixels' width: weights 3/7, 3/7 and 1/7 of what is in the image.
    assert fit_to_size(rows, 2, 1).tolist() == [[[[50, 160], [50, 160]]]]
    assert fit_to_size(rows.float() / 210, 2, 1).flatten()[:2].tolist() == pytest.approx([50 / 210, 160 / 210])


def test_doubling_is_bilinear():
    rows = torch.tensor([0, 100], dtype=torch.uint8).expand(1, 1, 2, 2)
    assert fit_to_size(rows, 4, 1)[0, 0].tolist() == [[0, 25, 75, 100]] * 4


def test_the_middle_square_is_taken():
    wide = torch.arange(8, dtype=torch.uint8).reshape(1, 1, 2, 4)
    assert fit_to_size(wide, 2, 1).tolist() == [[[[1, 2], [5, 6]]]]
    assert fit_to_size(wide.mT, 2, 1).tolist() == [[[[1, 5], [2, 6]]]]


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (1, 4, 4, 4), (3, 4, 4)])
def test_other_channels_are_rejected(shape):
    with pytest.raises(ValueError, match=r"images of shape \(.*\) .*\(n, 1 or 3, height, width\)"):
        fit_to_size(torch.zeros(shape), 4, 3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (1, 1), 51), [51, 51, 51]),
        (Image.new("1", (1, 1), 1), [255, 255, 255]),
        (Image.new("RGB", (1, 1), (1, 2, 3)), [1, 2, 3]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), [1, 2, 3]),
        (Image.new("RGB", (1, 1), (0, 0, 255)).convert("P"), [0, 0, 255]),
        (torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None], [1, 2, 3]),
    ],
)
def test_images_of_any_mode(image, expected):
    class Module(Numbered):
        def make_dataset(self, train):
            return Files([image])

    images, _ = seen(Module(image_size=1, channels=3).val_dataloader())
    assert images.flatten().tolist() == pytest.approx([value / 127.5 - 1 for value in expected])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_rejected(mode):
    class Module(Numbered):
        def make_dataset(self, train):
            return Files([Image.new(mode, (8, 8))])

    with pytest.raises(ValueError, match=f"image 0 must have 8 bits per channel; its mode is {mode}"):
        Module().setup("fit")


# ---- loaders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Numbered, OneByOne])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_one_shuffled_pass(module, workers):
    loader = module(batch_size=8, num_workers=workers).train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert {images.shape for images, _ in batches} == {(8, 1, 8, 8)}
    images, labels = seen(batches)
    assert len(set(labels.tolist())) == 24
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(images, pixels()[labels] / 127.5 - 1)
    assert not torch.equal(seen(loader)[1], labels)


@pytest.mark.parametrize("module", [Numbered, OneByOne])
@pytest.mark.parametrize(("reference", "expected"), [("train", pixels()), ("test", pixels(N_TEST, seed=1))])
def test_samples_are_compared_with_a_whole_split_in_order(module, reference, expected):
    given = module(batch_size=2, images=3, horizontal_flips=True, reference=reference, num_workers=1)
    for loader in (given.val_dataloader(), given.test_dataloader(), given.predict_dataloader()):
        images, labels = seen(loader)
        assert torch.equal(images, expected / 127.5 - 1)
        assert labels.tolist() == list(range(len(expected)))


def test_the_length_of_an_epoch():
    loader = Numbered(batch_size=8, batches_per_epoch=9).train_dataloader()
    assert len(list(loader)) == 9
    # 72 = 2 * 30 + 12
    assert sorted(torch.bincount(seen(loader)[1]).tolist()) == [2] * 18 + [3] * 12


def test_processes_share_an_epoch(monkeypatch):
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        loader = Numbered(batch_size=7).train_dataloader()
        assert len(loader) == 2
        shares.append(set(seen(loader)[1].tolist()))
    assert len(shares[0] | shares[1]) == 28


@pytest.mark.parametrize("module", [Numbered, OneByOne])
def test_fewer_images_are_always_the_same_ones(module):
    def chosen(images, seed):
        seed_everything(seed, verbose=False)
        return set(seen(module(batch_size=images, images=images, batches_per_epoch=3).train_dataloader())[1].tolist())

    few, more = chosen(5, 0), chosen(12, 0)
    assert (len(few), len(more)) == (5, 12)
    assert few < more
    assert chosen(5, 1) == few
    assert few != set(range(5))


def test_nothing_is_drawn_from_the_global_random_state():
    given = Numbered(batch_size=8, images=20, num_workers=1)
    before = torch.get_rng_state()
    given.setup("fit")
    list(given.train_dataloader()), list(given.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


# ---- mirrored images, in a Trainer ------------------------------------------------------------------


def small_gan():
    generator = SmallGenerator(image_size=8, channels=1, width=4, latent_dim=4)
    return GANModule(generator, SmallDiscriminator(image_size=8, channels=1, width=4))


class Seen(Callback):
    def __init__(self):
        self.training, self.comparing = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append(batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.comparing.append(batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start


def fit(given, epochs=8):
    seed_everything(3, verbose=False)
    callback = Seen()
    trainer = toy_trainer(callback, epochs=epochs, log_every_n_steps=1)
    trainer.fit(small_gan(), given)
    return callback, trainer


def test_each_image_is_mirrored_at_random_each_time():
    callback, trainer = fit(Numbered(batch_size=15, horizontal_flips=True))
    assert len(callback.training) == 16
    mirrored = {place: [] for place in range(N)}
    for images, labels in callback.training:
        assert images.dtype == torch.float32
        for image, place in zip(images, labels.tolist(), strict=True):
            own = pixels()[place] / 127.5 - 1
            assert torch.equal(image, own) != torch.equal(image, own.flip(2))
            mirrored[place].append(torch.equal(image, own.flip(2)))
    times = [sum(flags) for flags in mirrored.values()]
    assert 90 <= sum(times) <= 150  # of 240; four standard deviations are 31
    assert len(set(times)) > 3
    assert len({tuple(flags) for flags in mirrored.values()}) > 20
    trainer.test(small_gan(), trainer.datamodule)
    trainer.predict(small_gan(), trainer.datamodule)
    # A sanity check, eight validations, a test and a prediction.
    assert len(callback.comparing) == 11
    assert all(torch.equal(images, pixels() / 127.5 - 1) for images, _ in callback.comparing)


def test_images_stay_as_they_are_by_default():
    callback, _ = fit(Numbered(batch_size=15), epochs=1)
    for images, labels in callback.training:
        assert torch.equal(images, pixels()[labels] / 127.5 - 1)


def test_loaders_outside_a_trainer_mirror_nothing():
    images, labels = seen(Numbered(batch_size=15, horizontal_flips=True).train_dataloader())
    assert torch.equal(images, pixels()[labels] / 127.5 - 1)


@pytest.mark.parametrize(("module", "workers"), [(Numbered, 0), (OneByOne, 2)])
def test_the_middle_of_an_epoch_is_resumed_with_the_same_batches(tmp_path, module, workers):
    runs = []

    class Recording(GANModule):
        def __init__(self):
            gan = small_gan()
            super().__init__(gan.generator, gan.discriminator)
            runs.append({})

        def training_step(self, batch, batch_idx):
            runs[-1][self.trainer.fit_loop.total_batch_idx + 1] = batch
            super().training_step(batch, batch_idx)

    def given():
        return module(batch_size=4, batches_per_epoch=12, images=25, horizontal_flips=True, num_workers=workers)

    sparsity = {"generator_density": 0.3, "interval": 7, "explore_interval": 5, "probe_interval": 1, "seed": 1}
    # A checkpoint after batch 14, which is the second one of the second epoch.
    assert_resumed_alike(Recording, given, tmp_path, every=28, kill=18, epochs=2, bounds=(0.2, 0.3), **sparsity)
    whole, _, resumed = runs
    assert sorted(resumed) == list(range(15, 25))
    for number, (images, labels) in resumed.items():
        assert torch.equal(images, whole[number][0])
        assert torch.equal(labels, whole[number][1])
    assert any(not torch.equal(images, pixels()[labels] / 127.5 - 1) for images, labels in resumed.values())


# ---- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0 must be an integer, at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be an integer, at least 1"),
        ({"batches_per_epoch": 0}, "batches_per_epoch=0 must be an integer, at least 1"),
        ({"images": 0}, "images=0 must be an integer, at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be an integer, at least 1"),
        ({"channels": 2}, "channels=2 must be 1 or 3"),
        ({"reference": "val"}, "reference='val' is unknown; allowed are train, test"),
        ({"download": True}, "download=True: Numbered downloads nothing"),
    ],
)
def test_bad_arguments_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        Numbered(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 31}, "images=31 must not be above the number of images, 30"),
        ({"batch_size": 31}, "batch_size=31 must not be above the number of images, 30"),
        ({"batch_size": 6, "images": 5}, "batch_size=6 must not be above the number of images, 5"),
    ],
)
def test_too_few_images_are_known_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(Numbered(**settings))
    Numbered(**settings).setup("validate")


def test_no_images_are_rejected():
    class Empty(ImageDataModule):
        def make_dataset(self, train):
            return TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0))

    with pytest.raises(ValueError, match="nowhere holds no images to train on"):
        Empty("nowhere", 8).setup("fit")


def test_a_subclass_without_a_data_set_is_rejected():
    with pytest.raises(NotImplementedError, match="ImageDataModule must override make_dataset"):
        ImageDataModule(".", 8).setup("fit")


@pytest.mark.parametrize("module", [module for module in MODULES if issubclass(module, ImageDataModule)])
def test_the_command_line_knows_all_arguments(module, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    place = "path" if module is data.ArrayDataModule else "root"
    settings = {place: str(tmp_path), "image_size": 16, "channels": 1, "batch_size": 9, "batches_per_epoch": 3}
    settings |= {"horizontal_flips": True, "images": 5, "reference": "train", "num_workers": 2}
    config = {"class_path": f"lightning_ddst.data.{module.__name__}", "init_args": settings}
    parsed = parser.parse_object({"data": config}).data.init_args.as_dict()
    assert {name: parsed[name] for name in settings} == settings
    made = module(**parsed)
    assert (made.root, made.batch_size, made.images) == (tmp_path, 9, 5)
    with pytest.raises(Exception, match="batch_size"):
        parser.parse_object({"data": {**config, "init_args": {**settings, "batch_size": "many"}}})


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (data.FashionMNISTDataModule, (32, 1, False)),
        (data.CIFAR10DataModule, (32, 3, True)),
        (data.STL10DataModule, (48, 3, True)),
        (data.TinyImageNetDataModule, (64, 3, True)),
    ],
)
def test_defaults(module, expected):
    made = module(".")
    assert (made.image_size, made.channels, made.horizontal_flips) == expected
    assert (made.reference, made.download) == ("train", False)
