import hashlib

import numpy as np
import pytest
import torch
from torchvision.datasets import STL10

from lightning_ddst.data import STL10DataModule
from lightning_ddst.data.images import fit_to_size

RNG = np.random.default_rng(0)
IMAGES = {
    name: RNG.integers(0, 256, (n, 3, 96, 96), np.uint8) for name, n in (("train", 3), ("test", 2), ("unlabeled", 5))
}
LABELS = {"train": [2, 0, 9], "test": [5, 1], "unlabeled": [-1] * 5}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Files like the original ones, and their sums as what torchvision expects."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def split(name):
        # Columns come first in the files, and labels count from 1.
        files = [write(f"{name}_X.bin", IMAGES[name].transpose(0, 1, 3, 2).tobytes())]
        if name != "unlabeled":
            files.append(write(f"{name}_y.bin", (np.array(LABELS[name]) + 1).astype(np.uint8).tobytes()))
        return files

    monkeypatch.setattr(STL10, "train_list", split("train") + split("unlabeled"))
    monkeypatch.setattr(STL10, "test_list", split("test"))
    return tmp_path


def compared(root, **settings):
    given = STL10DataModule(root, **settings)
    given.setup("validate")
    images, labels = zip(*given.val_dataloader(), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize(
    ("settings", "splits"),
    [
        ({}, ["unlabeled"]),
        ({"split": "train+unlabeled"}, ["train", "unlabeled"]),
        ({"split": "train"}, ["train"]),
        ({"reference": "test"}, ["test"]),
    ],
)
def test_the_splits(root, settings, splits):
    images, labels = compared(root, image_size=96, **settings)
    assert torch.equal(images, torch.cat([torch.tensor(IMAGES[split]) for split in splits]) / 127.5 - 1)
    assert labels.tolist() == [label for split in splits for label in LABELS[split]]


def test_images_are_halved(root):
    images, _ = compared(root)
    assert torch.equal(images, fit_to_size(torch.tensor(IMAGES["unlabeled"]), 48, 3) / 127.5 - 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_images_without_labels(root, workers):
    loader = STL10DataModule(root, batch_size=2, num_workers=workers).train_dataloader()
    assert [images.shape for images, _ in loader] == [(2, 3, 48, 48)] * 2
    assert all(labels.tolist() == [-1, -1] for _, labels in loader)


def test_the_images_are_read_once_for_training_and_comparing(root, monkeypatch):
    read, make = [], STL10.__init__
    monkeypatch.setattr(STL10, "__init__", lambda self, *args: (read.append(args), make(self, *args))[1])
    given = STL10DataModule(root, batch_size=2)
    given.setup("fit")
    given.train_dataloader(), given.val_dataloader()
    assert len(read) == 1


def test_files_that_are_not_the_original_ones_are_rejected(root):
    (root / "stl10_binary" / "unlabeled_X.bin").write_bytes(b"less")
    with pytest.raises(ValueError, match=r"stl10_binary lacks a file"):
        STL10DataModule(root).setup("fit")


def test_missing_files_are_known_before_training(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        STL10DataModule(tmp_path).setup("fit")
    assert str(caught.value) == (
        f"{tmp_path}/stl10_binary is not there: STL10DataModule reads the original binary files there. Get it from "
        "https://cs.stanford.edu/~acoates/stl10. Or let download=True download it, before training."
    )


def test_only_what_is_asked_for_is_downloaded(tmp_path, monkeypatch):
    class AskedError(Exception):
        pass

    def download(self):
        raise AskedError

    monkeypatch.setattr(STL10, "download", download)
    STL10DataModule(tmp_path).prepare_data()
    with pytest.raises(AskedError):
        STL10DataModule(tmp_path, download=True).prepare_data()


def test_unknown_splits_are_rejected():
    with pytest.raises(ValueError, match=r"split='test' .*unlabeled, train\+unlabeled, train"):
        STL10DataModule(".", split="test")
