import pytest
import torch
from PIL import Image

from lightning_ddst.data import TinyImageNetDataModule

WNIDS = ["n03", "n01", "n02"]  # not in order, as in the original


def write_jpeg(path, gray):
    path.parent.mkdir(parents=True, exist_ok=True)
    # One gray, at the best quality: its pixels are exact.
    Image.new("RGB", (64, 64), (gray, gray, gray)).save(path, quality=100)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    for place, wnid in enumerate(WNIDS):
        for i in range(2):
            write_jpeg(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 10 * place + i)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    for i in range(3):
        write_jpeg(folder / "val" / "images" / f"val_{i}.JPEG", 100 + i)
    write_jpeg(folder / "test" / "images" / "test_0.JPEG", 200)
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in ((2, "n01"), (0, "n03"), (1, "n01"))]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def compared(root, **settings):
    given = TinyImageNetDataModule(root, **settings)
    given.setup("validate")
    ((images, labels),) = given.val_dataloader()
    assert (images == images[:, :1, :1, :1]).all()
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist(), labels.tolist()


@pytest.mark.parametrize("nested", [False, True])
def test_labels_are_places_in_the_sorted_names(folder, nested):
    root = folder.parent if nested else folder
    assert compared(root) == ([10, 11, 20, 21, 0, 1], [0, 0, 1, 1, 2, 2])
    assert compared(root, reference="test") == ([102, 100, 101], [0, 2, 0])


@pytest.mark.parametrize("workers", [0, 1])
def test_training(folder, workers):
    ((images, labels),) = TinyImageNetDataModule(folder, batch_size=6, num_workers=workers).train_dataloader()
    assert images.shape == (6, 3, 64, 64)
    values = ((images[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert torch.equal(labels, torch.tensor([2, 0, 1])[values // 10])


def test_smaller_and_gray(folder):
    ((images, _),) = TinyImageNetDataModule(folder, image_size=32, channels=1).val_dataloader()
    assert images.shape == (6, 1, 32, 32)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("wnids.txt", "train"),
        ("train/n02/images", "train"),
        ("val/val_annotations.txt", "test"),
        ("val/images/val_2.JPEG", "test"),
    ],
)
def test_missing_files_are_known_before_training(folder, name, reference):
    (folder / name).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError) as caught:
        TinyImageNetDataModule(folder.parent, reference=reference, batch_size=2).setup("fit")
    assert str(caught.value) == (
        f"{folder}/{name} is not there: TinyImageNetDataModule reads the files of tiny-imagenet-200.zip as they are "
        f"unpacked, in {folder}. Get it from http://cs231n.stanford.edu/tiny-imagenet-200.zip."
    )


def test_unknown_classes_are_rejected(folder):
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn07\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt .*not in wnids\.txt: n07"):
        TinyImageNetDataModule(folder, reference="test").setup("validate")


def test_nothing_can_be_downloaded(folder):
    with pytest.raises(ValueError, match=r"download=True: TinyImageNetDataModule .*http"):
        TinyImageNetDataModule(folder, download=True)
