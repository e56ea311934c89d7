import pickle

import numpy as np
import pytest
import torch

from lightning_ddst.data import ArrayDataModule

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 4, 4, 3), np.uint8)  # NHWC
EXPECTED = torch.tensor(BYTES).permute(0, 3, 1, 2) / 127.5 - 1
LABELS = np.array([3, 1, 0, 2, 5, 7])


def save(folder, images, pack_bits=True, name="images", **arrays):
    path = folder / (f"{name}.npz" if pack_bits else f"{name}.npy")
    np.savez(path, images=images, **arrays) if pack_bits else np.save(path, images)
    return path


def compared(path, image_size=4, **settings):
    given = ArrayDataModule(path, image_size, **settings)
    given.setup("validate")
    images, labels = zip(*given.val_dataloader(), strict=True)
    assert images[0].dtype == torch.float32
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("pack_bits", [True, False])
@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (BYTES, EXPECTED),
        (BYTES.transpose(0, 3, 1, 2), EXPECTED),
        (BYTES[..., 0], EXPECTED[:, :1]),
        (BYTES[..., :1], EXPECTED[:, :1]),
        (BYTES[:, None, ..., 1], EXPECTED[:, 1:2]),
        (np.asfortranarray(BYTES), EXPECTED),
    ],
    ids=["NHWC", "NCHW", "NHW", "NHWC gray", "NCHW gray", "Fortran"],
)
def test_layouts(tmp_path, pack_bits, images, expected):
    found, labels = compared(save(tmp_path, images, pack_bits), channels=expected.shape[1])
    assert torch.equal(found, expected)
    assert labels.tolist() == [0] * 6


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("pack_bits", [True, False])
@pytest.mark.parametrize(
    ("images", "settings"),
    [
        (BYTES / 255, {}),
        (BYTES / 127.5 - 1, {}),
        (BYTES / 1, {"value_range": (0, 255)}),
        (BYTES / 255 - 0.5, {"value_range": (-0.5, 0.5)}),
    ],
    ids=["0 to 1", "-1 to 1", "0 to 255", "-0.5 to 0.5"],
)
def test_floats(tmp_path, dtype, pack_bits, images, settings):
    found, _ = compared(save(tmp_path, images.astype(dtype), pack_bits), **settings)
    assert torch.allclose(found, EXPECTED, atol=2e-3 if dtype == np.float16 else 1e-6)
    assert found.min() >= -1
    assert found.max() <= 1


def test_floats_are_not_rounded_to_bytes(tmp_path):
    images = np.array([[[0.0, 0.3]], [[0.50001, 1.0]]]).repeat(2, 1)
    found, _ = compared(save(tmp_path, images), image_size=2, channels=1)
    assert found[:, 0, 0].flatten().tolist() == pytest.approx([-1, -0.4, 0.00002, 1], abs=1e-6)


@pytest.mark.parametrize("images", [BYTES.astype(np.int64), BYTES.astype(np.uint16)])
def test_other_integers_need_a_range(tmp_path, images):
    path = save(tmp_path, images)
    with pytest.raises(ValueError, match="set value_range to the values of black and white"):
        compared(path)
    assert torch.allclose(compared(path, value_range=(0, 255))[0], EXPECTED, atol=1e-6)


def test_bytes_of_a_smaller_range(tmp_path):
    found, _ = compared(save(tmp_path, BYTES // 16), value_range=(0, 15))
    assert torch.allclose(found, torch.tensor(BYTES // 16).permute(0, 3, 1, 2) / 7.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (BYTES / 1, {}, r"floats from 0.0 to 255.0 .*\[0, 1\], .*\[-1, 1\].*value_range"),
        (BYTES / 255 - 0.1, {}, r"floats from -0.1 to 0.9 are neither.*value_range"),
        (np.full((2, 4, 4), np.nan), {}, "floats from nan to nan are neither"),
        (BYTES, {"value_range": (0, 100)}, r"values from .* are outside value_range=\(0, 100\)"),
        (np.full((2, 4, 4), np.nan), {"value_range": (0, 1)}, "values from nan to nan are outside"),
        (BYTES.astype(complex), {}, "images of complex128 must be numbers"),
        (np.zeros((5, 3, 3, 3), np.uint8), {}, r"images of shape \(5, 3, 3, 3\) .*NHWC or NCHW.*layout"),
        (np.zeros((5, 1, 4, 1), np.uint8), {}, "may be NHWC or NCHW"),
        (np.zeros((5, 4, 4, 2), np.uint8), {}, r"images of shape \(5, 4, 4, 2\) .*NHW, NHWC or NCHW"),
        (np.zeros((5, 4), np.uint8), {}, "must be NHW, NHWC or NCHW"),
        (BYTES, {"layout": "NCHW"}, r"images of shape \(6, 4, 4, 3\) must be NCHW"),
    ],
)
@pytest.mark.parametrize("pack_bits", [True, False])
def test_ambiguous_arrays_are_rejected(tmp_path, images, settings, message, pack_bits):
    path = save(tmp_path, images, pack_bits)
    with pytest.raises(ValueError, match=message) as caught:
        ArrayDataModule(path, 4, **settings).setup("fit")
    assert str(path) in str(caught.value)


def test_the_layout_tells_which_dimension_is_which(tmp_path):
    cubes = RNG.integers(0, 256, (2, 3, 3, 3), np.uint8)
    path = save(tmp_path, cubes)
    first, last = compared(path, 3, layout="NCHW")[0], compared(path, 3, layout="NHWC")[0]
    assert torch.equal(first, torch.tensor(cubes) / 127.5 - 1)
    assert torch.equal(last, first.permute(0, 3, 1, 2))


def test_labels_and_a_test_file(tmp_path):
    train = save(tmp_path, BYTES, labels=LABELS.astype(np.uint8))
    test = save(tmp_path, BYTES[:2], name="test", labels=LABELS[:2])
    assert compared(train, test_path=test)[1].tolist() == LABELS.tolist()
    images, labels = compared(train, test_path=test, reference="test")
    assert torch.equal(images, EXPECTED[:2])
    assert (labels.dtype, labels.tolist()) == (torch.int64, [3, 1])
    for images, labels in ArrayDataModule(train, 4, batch_size=3).train_dataloader():
        assert torch.equal(images, EXPECTED[[LABELS.tolist().index(label) for label in labels]])


@pytest.mark.parametrize("labels", [LABELS[:5], LABELS / 1, LABELS[:, None]])
def test_labels_that_do_not_fit_are_rejected(tmp_path, labels):
    with pytest.raises(ValueError, match=r"labels .* must be integers, one per image: \(6,\)"):
        ArrayDataModule(save(tmp_path, BYTES, labels=labels), 4).setup("fit")


def test_a_mapped_file_is_read_by_workers_and_not_copied_to_them(tmp_path):
    path = save(tmp_path, np.concatenate([BYTES] * 1000), pack_bits=False)
    given = ArrayDataModule(path, 4, batch_size=50, num_workers=2)
    given.setup("fit")
    loader = given.train_dataloader()
    assert len(pickle.dumps(loader.dataset)) < 1000
    known = {image.numpy().tobytes() for image in EXPECTED}
    assert {image.numpy().tobytes() for images, _ in loader for image in images} == known


def test_resized_in_both_files(tmp_path):
    pack_bits, mapped = (compared(save(tmp_path, BYTES, kind), 2, channels=1)[0] for kind in (True, False))
    assert pack_bits.shape == (6, 1, 2, 2)
    assert torch.equal(pack_bits, mapped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "HWC"}, "layout='HWC' is unknown; allowed are NHW, NHWC, NCHW"),
        ({"value_range": (1, 0)}, r"value_range=\(1, 0\) must be two numbers.*lower"),
        ({"reference": "test"}, 'test_path=None, but reference="test" needs a file'),
    ],
)
def test_bad_arguments_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataModule("images.npz", 4, **settings)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_an_array_of_objects_executes_nothing(suffix, tmp_path):
    path, objects = tmp_path / f"images{suffix}", np.array([Payload(tmp_path / "called")], dtype=object)
    save = np.save if suffix == ".npy" else lambda path, images: np.savez(path, images=images)
    save(path, objects)
    with pytest.raises(ValueError, match=f"images{suffix} is damaged, or holds no plain arrays: ") as error:
        ArrayDataModule(path, 4).setup("fit")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_a_truncated_array_is_rejected_by_one_line(suffix, tmp_path):
    path = tmp_path / f"images{suffix}"
    save = np.save if suffix == ".npy" else lambda path, images: np.savez(path, images=images)
    save(path, BYTES)
    whole = path.read_bytes()
    for size in range(0, len(whole), 13):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"images{suffix} is damaged, or holds no plain arrays: ") as error:
            ArrayDataModule(path, 4).setup("fit")
        assert "\n" not in str(error.value)


def test_a_flipped_bit_of_a_zipped_array_is_noticed(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=BYTES)
    whole = path.read_bytes()
    start = whole.index(BYTES.tobytes())
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    with pytest.raises(ValueError, match=r"images\.npz is damaged, or holds no plain arrays: Bad CRC-32"):
        ArrayDataModule(path, 4).setup("fit")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", [{}, {"value_range": (0, 1)}])
def test_values_that_are_not_finite_are_rejected(value, settings, tmp_path):
    images = np.random.default_rng(0).random((5, 4, 4))
    images[3, 2, 1] = value
    for suffix in (".npz", ".npy"):
        path = tmp_path / f"images{suffix}"
        np.save(path, images) if suffix == ".npy" else np.savez(path, images=images)
        with pytest.raises(ValueError, match=f"images{suffix}: .*{value}"):
            ArrayDataModule(path, 4, channels=1, **settings).setup("fit")


@pytest.mark.parametrize("images", [np.array(1.0), np.zeros((4,)), np.zeros((0, 4, 4)), np.zeros((2, 4, 4), "M8[s]")])
def test_other_shapes_and_types_are_rejected_by_one_line(images, tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=images)
    with pytest.raises(ValueError, match="images") as error:
        ArrayDataModule(path, 4, channels=1).setup("fit")
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_hold_something_else(tmp_path):
    missing = tmp_path / "images.npz"
    with pytest.raises(FileNotFoundError) as caught:
        ArrayDataModule(missing, 4).setup("fit")
    assert str(caught.value) == f"{missing} is not there: ArrayDataModule reads images of a .npz or .npy file."
    np.savez(missing, x=BYTES, y=LABELS)
    with pytest.raises(ValueError, match=r"images.npz must hold images; it holds x, y\."):
        ArrayDataModule(missing, 4).setup("fit")
    other = tmp_path / "images.pt"
    other.touch()
    with pytest.raises(ValueError, match=r"images.pt must be a .npz or .npy file"):
        ArrayDataModule(other, 4).setup("fit")
