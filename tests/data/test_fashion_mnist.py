import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST
from toys import ToyGAN, toy_trainer

from lightning_ddst.data import FashionMNISTDataModule

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (6, 28, 28), np.uint8), "t10k": RNG.integers(0, 256, (3, 28, 28), np.uint8)}
LABELS = {"train": np.array([9, 0, 0, 3, 0, 2], np.uint8), "t10k": np.array([9, 2, 1], np.uint8)}
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "fashion_mnist"


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def write(folder, pack_bits=False):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        for name, array in (("images-idx3", IMAGES[split]), ("labels-idx1", LABELS[split])):
            path = folder / f"{split}-{name}-ubyte{'.gz' if pack_bits else ''}"
            path.write_bytes(gzip.compress(idx(array)) if pack_bits else idx(array))


def compared(root, **settings):
    images, labels = zip(*FashionMNISTDataModule(root, **settings).val_dataloader(), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("pack_bits", [False, True])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize(("reference", "split"), [("train", "train"), ("test", "t10k")])
def test_the_files(tmp_path, pack_bits, place, reference, split):
    write(tmp_path / place, pack_bits)
    images, labels = compared(tmp_path, image_size=28, reference=reference)
    assert images.shape == (len(IMAGES[split]), 1, 28, 28)
    assert torch.equal(images[:, 0], torch.tensor(IMAGES[split]) / 127.5 - 1)
    assert labels.tolist() == LABELS[split].tolist()


def test_images_are_read_as_torchvision_reads_them(tmp_path):
    write(tmp_path / "FashionMNIST" / "raw")
    dataset = FashionMNIST(tmp_path)
    images, labels = compared(tmp_path, image_size=28)
    assert torch.equal(images[:, 0], dataset.data / 127.5 - 1)
    assert torch.equal(labels, dataset.targets)


def test_a_black_margin_makes_32_pixels(tmp_path):
    write(tmp_path)
    images, _ = compared(tmp_path)
    assert images.shape == (6, 1, 32, 32)
    assert torch.equal(images[:, :, 2:30, 2:30], compared(tmp_path, image_size=28)[0])
    images[:, :, 2:30, 2:30] = -1
    assert (images == -1).all()


@pytest.mark.parametrize("size", [14, 16, 64])
def test_other_sizes_are_resized(tmp_path, size):
    write(tmp_path)
    images, _ = compared(tmp_path, image_size=size)
    assert images.shape == (6, 1, size, size)
    smooth = torch.tensor(IMAGES["train"]).float().mean() / 127.5 - 1
    assert images.mean() == pytest.approx(smooth.item(), abs=0.02)


def test_three_channels_are_identical(tmp_path):
    write(tmp_path)
    images, _ = compared(tmp_path, channels=3)
    assert images.shape == (6, 3, 32, 32)
    assert (images == images[:, :1]).all()


def test_missing_files_are_known_before_training(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        toy_trainer().fit(ToyGAN(), FashionMNISTDataModule(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/FashionMNIST/raw/train-images-idx3-ubyte is not there: FashionMNISTDataModule reads this file, "
        f"also as train-images-idx3-ubyte.gz, there or in {tmp_path}. "
        "Get it from https://github.com/zalandoresearch/fashion-mnist. "
        "Or let download=True download it, before training."
    )


@pytest.mark.parametrize("content", [b"", b"<html>", idx(IMAGES["train"])[:-1], idx(LABELS["train"])])
def test_files_that_are_not_idx_are_rejected(tmp_path, content):
    write(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte .*idx file of bytes in 3 dimensions"):
        FashionMNISTDataModule(tmp_path).setup("fit")


def test_only_what_is_asked_for_is_downloaded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(FashionMNIST, "download", lambda self: (asked.append(self.root), write(Path(self.raw_folder))))
    FashionMNISTDataModule(tmp_path).prepare_data()
    assert asked == []
    given = FashionMNISTDataModule(tmp_path, download=True, batch_size=2)
    given.prepare_data()
    given.setup("fit")
    assert asked == [tmp_path]
    assert len(given.train_dataloader()) == 3


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real data")
def test_the_real_images():
    images, labels = compared(REAL, image_size=28)
    assert images.shape == (60_000, 1, 28, 28)
    assert (images.mean() + 1) / 2 == pytest.approx(0.2860, abs=5e-5)
    assert images.std() / 2 == pytest.approx(0.3530, abs=5e-5)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert labels[:5].tolist() == [9, 0, 0, 3, 0]
