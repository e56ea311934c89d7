import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_ddst.data import ImageFolderDataModule


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
    with pytest.raises(FileNotFoundError, match="empty"):
        ImageFolderDataModule(tmp_path, 4).setup("fit")
    write(tmp_path, a=1)
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
