import pytest
import torch
from sklearn.datasets import load_digits

from lightning_ddst.data import DigitsDataModule, digits


def test_the_images_and_labels() -> None:
    images, labels = digits().tensors
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.shape == (1797,)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))
    bunch = load_digits()
    # scikit-learn's pixels are the integers 0 to 16.
    assert torch.equal((images[:, 0] + 1) * 8, torch.tensor(bunch.images, dtype=torch.float32))
    assert labels.tolist() == bunch.target.tolist()


def how_often(batches: list) -> dict[int, int]:
    """Returns how often each digit was seen, by its index; identical images count together."""
    images, _ = digits().tensors
    places = {image.numpy().tobytes(): place for place, image in enumerate(images)}
    counts = dict.fromkeys(places.values(), 0)
    for seen, _ in batches:
        for image in seen:
            counts[places[image.numpy().tobytes()]] += 1
    return counts


def test_an_epoch_is_one_shuffled_pass_without_the_smaller_last_batch() -> None:
    loader = DigitsDataModule(batch_size=64).train_dataloader()
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 28  # 28 * 64 = 1792 of 1797
    assert all(images.shape == (64, 1, 8, 8) and labels.shape == (64,) for images, labels in first)
    counts = how_often(first)
    assert len(counts) == 1797  # no two look alike
    assert sorted(counts.values()) == [0] * 5 + [1] * 1792
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], digits().tensors[0][:64])


def test_images_keep_their_labels_when_shuffled() -> None:
    images, labels = digits().tensors
    own = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for batch, shown in DigitsDataModule(batch_size=100).train_dataloader():
        assert [own[image.numpy().tobytes()] for image in batch] == shown.tolist()


def test_an_epoch_shorter_than_one_pass() -> None:
    loader = DigitsDataModule(batch_size=32, batches_per_epoch=12).train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 12
    assert sorted(how_often(batches).values()) == [0] * (1797 - 384) + [1] * 384


def test_an_epoch_of_several_passes_shows_every_image_equally_often() -> None:
    loader = DigitsDataModule(batch_size=64, batches_per_epoch=60).train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 60
    # 60 * 64 = 3840 = 2 * 1797 + 246.
    assert sorted(how_often(batches).values()) == [2] * (1797 - 246) + [3] * 246


def test_the_whole_data_as_one_batch() -> None:
    assert [len(images) for images, _ in DigitsDataModule(batch_size=1797).train_dataloader()] == [1797]
    loader = DigitsDataModule(batch_size=2000, batches_per_epoch=2).train_dataloader()
    assert [len(images) for images, _ in loader] == [2000, 2000]


@pytest.mark.parametrize("name", ["val_dataloader", "test_dataloader", "predict_dataloader"])
def test_evaluation_sees_every_image_once_in_order(name: str) -> None:
    loader = getattr(DigitsDataModule(batch_size=32, batches_per_epoch=2), name)()
    for _ in range(2):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(images, digits().tensors[0])
        assert torch.equal(labels, digits().tensors[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an integer, at least 1"),
        ({"batch_size": -4}, "batch_size=-4 must be an integer, at least 1"),
        ({"batch_size": 6.4}, "batch_size=6.4 must be an integer, at least 1"),
        ({"batches_per_epoch": 0}, "batches_per_epoch=0 must be an integer, at least 1"),
        ({"batches_per_epoch": True}, "batches_per_epoch=True must be an integer, at least 1"),
        # Of one pass over 1,797 images no batch of this size would be left.
        ({"batch_size": 1798}, "batch_size=1798 must"),
    ],
)
def test_bad_arguments_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)
