import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from lightning_ddst.data import CIFAR10DataModule

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (10, 32, 32, 3), np.uint8),
    "test": RNG.integers(0, 256, (4, 32, 32, 3), np.uint8),
}
LABELS = {"train": np.arange(10), "test": np.array([3, 1, 0, 9])}
LOSSLESS = {"train": np.arange(10) != 4, "test": np.array([True, False, False, True])}
REAL = Path(os.environ.get("LIGHTNING_DDST_DATA", "."), "cifar10")


def expected(split):
    return torch.tensor(IMAGES[split]).permute(0, 3, 1, 2) / 127.5 - 1


def write_arrays(folder, lossless=True):
    for split in ("train", "test"):
        flags = {"lossless": LOSSLESS[split]} if lossless else {}
        np.savez(folder / f"{split}.npz", images=IMAGES[split], labels=LABELS[split], **flags)


@pytest.fixture
def original(tmp_path, monkeypatch):
    """Files like the original ones, of two images each, and their sums as what torchvision expects."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name, split, places):
        rows = IMAGES[split].transpose(0, 3, 1, 2).reshape(-1, 3072)  # all red, then all green, then all blue
        return [name, write(name, {"data": rows[places], "labels": LABELS[split][places].tolist()})]

    train = [batch(f"data_batch_{i + 1}", "train", slice(2 * i, 2 * i + 2)) for i in range(5)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", "test", slice(4))])
    names = {"label_names": [str(i) for i in range(10)]}
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": write("batches.meta", names)})
    return tmp_path


def compared(root, **settings):
    given = CIFAR10DataModule(root, **settings)
    given.setup("validate")
    images, labels = zip(*given.val_dataloader(), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_original_files(original, split):
    images, labels = compared(original, reference=split)
    assert torch.equal(images, expected(split))
    assert (labels.dtype, labels.tolist()) == (torch.int64, LABELS[split].tolist())


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("flags", [False, True])
def test_arrays(tmp_path, split, flags):
    write_arrays(tmp_path, flags)
    kept = LOSSLESS[split] if flags else np.ones(len(LABELS[split]), bool)
    images, labels = compared(tmp_path, reference=split)
    assert torch.equal(images, expected(split)[kept])
    assert labels.tolist() == LABELS[split][kept].tolist()
    images, labels = compared(tmp_path, reference=split, lossless_reference=False)
    assert torch.equal(images, expected(split))


def test_all_images_are_trained_on(tmp_path):
    write_arrays(tmp_path)
    given = CIFAR10DataModule(tmp_path, batch_size=10)
    ((images, labels),) = given.train_dataloader()
    assert sorted(labels.tolist()) == list(range(10))
    assert torch.equal(images, expected("train")[labels])
    assert sum(len(labels) for _, labels in given.val_dataloader()) == 9


def test_gray_and_smaller(tmp_path):
    write_arrays(tmp_path)
    assert compared(tmp_path, image_size=16, channels=1)[0].shape == (9, 1, 16, 16)


def test_the_original_files_come_first(original):
    np.savez(original / "train.npz", images=IMAGES["train"][:1], labels=LABELS["train"][:1])
    assert len(compared(original)[0]) == 10


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"changed")])
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_files_that_are_not_the_original_ones_are_rejected(original, harm, name):
    harm(original / "cifar-10-batches-py" / name)
    with pytest.raises(ValueError, match=r"cifar-10-batches-py lacks a file"):
        CIFAR10DataModule(original).setup("fit")


def test_missing_files_are_known_before_training(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        CIFAR10DataModule(tmp_path).setup("fit")
    assert str(caught.value) == (
        f"{tmp_path}/cifar-10-batches-py is not there: CIFAR10DataModule reads the original files there, or this "
        f"split's images from {tmp_path}/train.npz. Get it from https://www.cs.toronto.edu/~kriz/cifar.html. "
        "Or let download=True download it, before training."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "train.npz .*images and labels.* holds images, lossless"),
        ({"images": IMAGES["train"] / 255}, r"float64\(10, 32, 32, 3\) must be uint8 \(n, 32, 32, 3\)"),
        ({"images": IMAGES["train"].transpose(0, 3, 1, 2)}, r"images uint8\(10, 3, 32, 32\) must be"),
        ({"labels": LABELS["train"][:9]}, "10 images, 9 labels and 10 flags must be equally many"),
    ],
)
def test_arrays_of_something_else_are_rejected(tmp_path, change, message):
    arrays = {"images": IMAGES["train"], "labels": LABELS["train"], "lossless": LOSSLESS["train"]} | change
    np.savez(tmp_path / "train.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(tmp_path).setup("fit")


def test_only_what_is_asked_for_is_downloaded(tmp_path, monkeypatch):
    class AskedError(Exception):
        pass

    def download(self):
        raise AskedError

    monkeypatch.setattr(CIFAR10, "download", download)
    CIFAR10DataModule(tmp_path).prepare_data()
    with pytest.raises(AskedError):
        CIFAR10DataModule(tmp_path, download=True).prepare_data()


@pytest.mark.skipif(not (REAL / "train.npz").is_file(), reason="needs LIGHTNING_DDST_DATA")
def test_the_real_images():
    images, labels = compared(REAL, lossless_reference=False)
    assert ((images.mean((0, 2, 3)) + 1) / 2).tolist() == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-5)
    assert torch.bincount(labels).tolist() == [5000] * 10
    assert len(compared(REAL)[0]) == 49_918
    assert len(compared(REAL, reference="test")[0]) == 9_979
