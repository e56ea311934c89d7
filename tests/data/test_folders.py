import os
import warnings

import pytest
import torch
from crashes import assert_resumed_alike
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from lightning_ddst import GANModule
from lightning_ddst.data import ImageFolderDataModule, TinyImageNetDataModule
from lightning_ddst.data.image_files import BadImageError
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.utils import distributed


def write(folder, **colours):
    """PNG files of one colour, 4x4."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in colours.items():
        mode = "L" if isinstance(colour, int) else "RGB"
        Image.new(mode, (4, 4), colour).save(folder / f"{name}.png")


def compared(root, image_size=4, **settings):
    given = ImageFolderDataModule(root, image_size, **settings)
    given.setup("validate")
    loader: DataLoader = given.val_dataloader()
    images, labels = zip(*loader, strict=True)
    images = torch.cat(images)
    assert (images == images[:, :, :1, :1]).all()
    return ((images[:, :, 0, 0] + 1) * 127.5).round().int().tolist(), torch.cat(labels).tolist()


def test_a_subfolder_a_class(tmp_path):
    write(tmp_path / "dogs", b=(1, 2, 3), a=7)
    write(tmp_path / "cats" / "wild", a=(255, 0, 9))
    (tmp_path / "cats" / "notes.txt").write_text("none")
    assert compared(tmp_path) == ([[255, 0, 9], [7, 7, 7], [1, 2, 3]], [0, 1, 1])
    assert compared(tmp_path, channels=1) == ([[77], [7], [2]], [0, 1, 1])


def test_images_without_classes(tmp_path):
    write(tmp_path, b=(1, 2, 3), a=7)
    (tmp_path / "notes.txt").write_text("none")
    assert compared(tmp_path) == ([[7, 7, 7], [1, 2, 3]], [0, 0])


def test_pixels_in_their_places_and_resized(tmp_path):
    image = Image.new("L", (3, 2))
    image.putdata([0, 10, 20, 30, 40, 50])
    image.save(tmp_path / "a.png")
    given = ImageFolderDataModule(tmp_path, 2, channels=1)
    ((images, _),) = given.val_dataloader()
    # Of three columns, the middle two are the first two.
    assert ((images + 1) * 127.5).round().tolist() == [[[[0, 10], [30, 40]]]]
    ((images, _),) = ImageFolderDataModule(tmp_path, 8, channels=3).val_dataloader()
    assert images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_training(tmp_path, workers):
    write(tmp_path / "a", **{f"i{i}": i for i in range(5)})
    write(tmp_path / "b", **{f"i{i}": 100 + i for i in range(5)})
    ((images, labels),) = ImageFolderDataModule(
        tmp_path, 4, channels=1, batch_size=10, num_workers=workers
    ).train_dataloader()
    values = ((images[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert sorted(values.tolist()) == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert torch.equal(labels, (values >= 100).long())


def test_a_folder_to_compare_with(tmp_path):
    write(tmp_path / "train" / "a", x=1)
    write(tmp_path / "train" / "b", x=2)
    write(tmp_path / "test" / "a", x=3)
    write(tmp_path / "test" / "b", x=4, y=5)
    settings = {"test_root": tmp_path / "test", "channels": 1}
    assert compared(tmp_path / "train", **settings) == ([[1], [2]], [0, 1])
    assert compared(tmp_path / "train", reference="test", **settings) == ([[3], [4], [5]], [0, 1, 1])
    write(tmp_path / "test" / "c", x=6)
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\], but root=.*train has \['a', 'b'\]"):
        compared(tmp_path / "train", reference="test", **settings)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        ImageFolderDataModule(tmp_path / "none", 4).setup("fit")
    assert str(caught.value) == (
        f"{tmp_path}/none is not there: ImageFolderDataModule reads a folder of images, or of one subfolder of images "
        "per class."
    )


def test_a_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images \(.jpg, .*\) and no subfolders"):
        ImageFolderDataModule(tmp_path, 4).setup("fit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no images \(.jpg, .*\) and no subfolders of images"):
        ImageFolderDataModule(tmp_path, 4).setup("fit")
    write(tmp_path, a=1)
    write(tmp_path / "cats", a=1)
    with pytest.raises(ValueError, match="images or subfolders of images; it holds both"):
        ImageFolderDataModule(tmp_path, 4).setup("fit")


def test_files_that_are_no_images_of_8_bits(tmp_path):
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png must have 8 bits per channel; its mode is I;16"):
        ImageFolderDataModule(tmp_path, 4).setup("fit")
    (tmp_path / "deep.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"deep.png"):
        ImageFolderDataModule(tmp_path, 4).setup("fit")


def test_a_test_folder_must_be_given():
    with pytest.raises(ValueError, match='test_root=None, but reference="test" needs a folder'):
        ImageFolderDataModule(".", 4, reference="test")


# ---- folders as they come ---------------------------------------------------------------------------


def noise(path, size=(8, 8), mode="L", seed=0):
    """A PNG file of noise, whose pixels do not compress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    channels = {"L": 1, "RGB": 3}[mode]
    values = torch.randint(256, (size[1], size[0], channels), dtype=torch.uint8, generator=rng).numpy()
    Image.fromarray(values.squeeze()).save(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:70])  # after the header


def names(given):
    """Values of all images that are compared with samples, one by one."""
    return [round((value.item() + 1) * 127.5) for images, _ in given.val_dataloader() for value in images[:, 0, 0, 0]]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write(tmp_path / "cats", a=1, **{"._a": 2})
    write(tmp_path / "cats" / ".thumbs", a=3)
    write(tmp_path / "dogs", a=4)
    write(tmp_path / ".ipynb_checkpoints", a=5)
    write(tmp_path, **{"._cats": 6})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compared(tmp_path, channels=1) == ([[1], [4]], [0, 1])


def test_empty_folders_and_loops_of_links_are_left_out_with_a_warning(tmp_path):
    write(tmp_path / "cats", a=1)
    (tmp_path / "cats" / "again").symlink_to(tmp_path / "cats")
    (tmp_path / "cats" / "up").symlink_to(tmp_path)
    (tmp_path / "cats" / "far_up").symlink_to(tmp_path.parent)
    (tmp_path / "bears" / "nothing").mkdir(parents=True)
    write(tmp_path / "dogs", a=4)
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match="without images are skipped: bears, loop") as warned:
        assert compared(tmp_path, channels=1) == ([[1], [4]], [0, 1])
    assert len(warned) == 1


def test_a_link_to_another_folder_is_followed(tmp_path):
    write(tmp_path / "elsewhere", a=3)
    write(tmp_path / "images" / "cats", a=1)
    (tmp_path / "images" / "dogs").symlink_to(tmp_path / "elsewhere")
    assert compared(tmp_path / "images", channels=1) == ([[1], [3]], [0, 1])


def test_images_are_in_torchvisions_order(tmp_path):
    for place, name in enumerate(("b/z", "b/a/y", "b/a b/x", "b/A", "a/b", "B/1", "b/a-/w")):
        write((tmp_path / name).parent, **{name.rpartition("/")[2]: place})
    expected = [(Image.open(path).getpixel((0, 0)), label) for path, label in ImageFolder(tmp_path).samples]
    assert compared(tmp_path, channels=1) == ([[value] for value, _ in expected], [label for _, label in expected])


def spoil(root):
    """Ten good images in two classes, and files that are no images or of 16 bits."""
    for i in range(10):
        noise(root / "ab"[i % 2] / f"{i}.png", seed=i)
    (root / "a" / "text.png").write_text("text")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    Image.new("I;16", (8, 8)).save(root / "a" / "deep.png")


def test_every_file_that_cannot_be_used_is_named_before_training(tmp_path):
    spoil(tmp_path)
    with pytest.raises(BadImageError) as caught:
        ImageFolderDataModule(tmp_path, 8).setup("fit")
    assert str(caught.value) == (
        f"3 of 13 images of {tmp_path} cannot be used: a/deep.png must have 8 bits per channel; its mode is I;16, "
        "a/text.png is no image of a known format, b/gone.png cannot be read (No such file or directory). "
        'Pass on_bad_image="skip" to leave them out.'
    )
    for number in range(10):
        (tmp_path / "b" / f"text{number}.png").write_text("text")
    with pytest.raises(BadImageError, match=r"^13 of 23 images .* b/text5.png [^,]*, b/text6.png [^,]*, and 3 more"):
        ImageFolderDataModule(tmp_path)


def test_files_that_cannot_be_used_are_skipped(tmp_path):
    spoil(tmp_path)
    given = ImageFolderDataModule(tmp_path, 8, 1, on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"3 of 13 images .*a/deep.png.*a/text.png.*b/gone.png.*; skipped"):
        given.setup("validate")
    ((images, labels),) = given.val_dataloader()
    assert (len(images), labels.tolist()) == (10, [0] * 5 + [1] * 5)


def test_a_folder_of_bad_images_is_rejected(tmp_path):
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(BadImageError, match="1 of 1 images"):
        ImageFolderDataModule(tmp_path, 8, on_bad_image="skip").setup("validate")
    noise(tmp_path / "cut" / "a.png")
    truncate(tmp_path / "cut" / "a.png")
    with pytest.raises(BadImageError, match="none of 1 images can be read"), pytest.warns(UserWarning, match="a.png"):
        ImageFolderDataModule(tmp_path / "cut", 8, on_bad_image="skip").setup("validate")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_file_is_named(tmp_path, workers):
    for i in range(4):
        noise(tmp_path / f"{i}.png", seed=i)
    truncate(tmp_path / "2.png")
    given = ImageFolderDataModule(tmp_path, 8, num_workers=workers)
    given.setup("validate")
    with pytest.raises(BadImageError) as caught:
        list(given.val_dataloader())
    reason = "image file is truncated"
    assert str(caught.value).startswith(f"{tmp_path}/2.png cannot be read ({reason}")
    assert str(caught.value).endswith('); on_bad_image="skip" leaves such files out.')
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_file_takes_the_place_of_a_truncated_one(tmp_path, workers):
    for i, value in enumerate((10, 20, 30, 40)):
        Image.new("L", (64, 64), value).save(tmp_path / f"{i}.bmp")
    for cut in (1, 3):
        path = tmp_path / f"{cut}.bmp"
        path.write_bytes(path.read_bytes()[:2000])
    given = ImageFolderDataModule(tmp_path, 64, 1, on_bad_image="skip", num_workers=workers)
    given.setup("validate")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert names(given) == names(given) == [10, 30, 30, 10]  # after the last comes the first
    said = [str(warning.message).partition(" cannot be read (image file is truncated")[0] for warning in warned]
    # A worker process warns by itself.
    assert [line.rpartition("/")[2] for line in said] == ([] if workers else ["1.bmp", "3.bmp"])


def test_what_the_operating_system_refuses_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path, a=1, b=2)
    given = ImageFolderDataModule(tmp_path, 4, on_bad_image="skip")
    given.setup("validate")
    os.remove(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match=r"b.png"):
        list(given.val_dataloader())


def test_all_processes_leave_out_what_one_of_them_cannot_read(tmp_path, monkeypatch):
    spoil(tmp_path)
    bad = {tmp_path / "b" / "1.png": "cannot be read"}
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value, bad if isinstance(value, dict) else value])
    given = ImageFolderDataModule(tmp_path, 8, on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"4 of 13 images .*b/1.png"):
        given.setup("validate")
    ((images, _),) = given.val_dataloader()
    assert len(images) == 9


def test_processes_with_other_files_are_rejected(tmp_path, monkeypatch):
    write(tmp_path, a=1, b=2)
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value, value if isinstance(value, dict) else (1, "")])
    with pytest.raises(RuntimeError, match=r"the images of .* must be the same in every process"):
        ImageFolderDataModule(tmp_path, 4).setup("fit")


def test_a_run_with_skipped_images_resumes_exactly(tmp_path):
    spoil(tmp_path / "images")
    truncate(tmp_path / "images" / "a" / "4.png")
    runs = []

    class Recording(GANModule):
        def __init__(self):
            super().__init__(SmallGenerator(8, 1, 4, latent_dim=4), SmallDiscriminator(8, 1, 4))
            runs.append({})

        def training_step(self, batch, batch_idx):
            runs[-1][self.trainer.fit_loop.total_batch_idx + 1] = batch
            super().training_step(batch, batch_idx)

    def given():
        return ImageFolderDataModule(
            tmp_path / "images", 8, 1, on_bad_image="skip", batch_size=4, batches_per_epoch=6, horizontal_flips=True
        )

    sparsity = {"generator_density": 0.3, "interval": 3, "explore_interval": 3, "probe_interval": 1, "seed": 1}
    with pytest.warns(UserWarning, match="4.png .*takes its place"):
        assert_resumed_alike(Recording, given, tmp_path, every=16, kill=10, epochs=2, bounds=(0.2, 0.3), **sparsity)
    whole, _, resumed = runs
    assert sorted(resumed) == [9, 10, 11, 12]
    assert all(torch.equal(images, whole[number][0]) for number, (images, _) in resumed.items())


def test_tiny_imagenet_skips_too(tmp_path):
    (tmp_path / "wnids.txt").write_text("n01")
    for name in "ab":
        path = tmp_path / "train" / "n01" / "images" / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (9, 9, 9)).save(path, quality=100)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.warns(UserWarning, match=r"b.JPEG"):
        assert set(names(TinyImageNetDataModule(tmp_path, on_bad_image="skip"))) == {9}
    with pytest.raises(BadImageError, match=r"b.JPEG"):
        names(TinyImageNetDataModule(tmp_path))


# ---- sizes and channels by the files ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(32, 32)], 32),
        ([(28, 28)], 32),
        ([(40, 60)], 32),
        ([(300, 200)], 64),
        ([(5, 100)], 8),
        ([(16, 16), (16, 99), (500, 500)], 16),
    ],
)
def test_the_size_is_the_power_of_2_nearest_to_the_images(tmp_path, sizes, expected):
    for i, size in enumerate(sizes):
        Image.new("L", size).save(tmp_path / f"{i}.png")
    assert ImageFolderDataModule(tmp_path).image_size == expected
    assert ImageFolderDataModule(tmp_path, 24).image_size == 24


@pytest.mark.parametrize(("modes", "expected"), [("LL", 1), (("1", "LA"), 1), (("L", "RGB"), 3), (("P",), 3)])
def test_channels_are_those_of_the_files(tmp_path, modes, expected):
    for i, mode in enumerate(modes):
        Image.new(mode, (8, 8)).save(tmp_path / f"{i}.png")
    given = ImageFolderDataModule(tmp_path)
    assert (given.channels, given.image_size) == (expected, 8)
    assert next(iter(given.val_dataloader()))[0].shape == (len(modes), expected, 8, 8)
    assert ImageFolderDataModule(tmp_path, channels=3).channels == 3


def test_at_most_so_many_reference_images(tmp_path):
    write(tmp_path, **{f"{i:02}": i for i in range(20)})
    few, more, every = (names(ImageFolderDataModule(tmp_path, 4, 1, reference_images=n)) for n in (5, 12, 99))
    assert (len(few), len(more), every) == (5, 12, list(range(20)))
    assert set(few) < set(more)
    assert few == sorted(few) != list(range(5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_bad_image": "warn"}, "on_bad_image='warn' is unknown; allowed are error, skip"),
        ({"reference_images": 0}, "reference_images=0 must be an integer, at least 1"),
        ({"image_size": 0}, "image_size=0 must be an integer, at least 1"),
    ],
)
def test_bad_arguments_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(".", **settings)
