from pathlib import Path

import pytest
import torch

from lightning_ddst.utils import cache

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(0, 2, dtype=torch.bfloat16)}


def test_what_was_saved_is_loaded(tmp_path) -> None:
    path = tmp_path / "folder" / "file.pt"
    assert cache.load_tensors(path) is None
    cache.save_tensors(path, TENSORS)
    loaded = cache.load_tensors(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())
    assert [file.name for file in path.parent.iterdir()] == ["file.pt"]


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def overwritten(path: Path) -> None:
    path.write_bytes(b"something else")


def flipped(path: Path) -> None:
    content = path.read_bytes()
    place = content.index(torch.tensor([4.0, 5.0]).numpy().tobytes())  # which torch.load does not notice
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])


def of_another_kind(path: Path) -> None:
    torch.save([1, 2], path)


@pytest.mark.parametrize("damage", [emptied, cut, overwritten, flipped, of_another_kind])
def test_a_damaged_file_is_none_with_a_warning(damage, tmp_path) -> None:
    path = tmp_path / "file.pt"
    cache.save_tensors(path, TENSORS)
    damage(path)
    with pytest.warns(UserWarning, match=r"file.pt is damaged \(.+\); what it held is computed again"):
        assert cache.load_tensors(path) is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file.pt"
    cache.save_tensors(path, TENSORS)

    def fails(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(cache.os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        cache.save_tensors(path, {"a": torch.zeros(1)})
    assert [file.name for file in tmp_path.iterdir()] == ["file.pt"]
    assert torch.equal(cache.load_tensors(path)["a"], TENSORS["a"])


def test_a_digest_tells_values_names_shapes_and_types_apart() -> None:
    values = torch.arange(6.0)
    made = [
        cache.digest(values),
        cache.digest(values + 1),
        cache.digest(values.reshape(2, 3)),
        cache.digest(values.int()),
        cache.digest({"a": values}),
        cache.digest({"b": values}),
        cache.digest(values, 1),
        cache.digest(values, "1"),
        cache.digest(),
    ]
    assert len(set(made)) == len(made)
    assert cache.digest(values.clone(), 1) == made[6]
    assert cache.digest(values.expand(2, 6)) == cache.digest(values.repeat(2, 1))
