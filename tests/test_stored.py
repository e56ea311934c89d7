from pathlib import Path

import pytest
import torch

from lightning_ddst import stored

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(0, 2, dtype=torch.bfloat16)}


def test_what_was_saved_is_loaded(tmp_path) -> None:
    path = tmp_path / "folder" / "file.pt"
    assert stored.load(path) is None
    stored.save(path, TENSORS)
    loaded = stored.load(path)
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
    stored.save(path, TENSORS)
    damage(path)
    with pytest.warns(UserWarning, match=r"file.pt is damaged \(.+\); what it held is computed again"):
        assert stored.load(path) is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file.pt"
    stored.save(path, TENSORS)

    def fails(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(stored.os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        stored.save(path, {"a": torch.zeros(1)})
    assert [file.name for file in tmp_path.iterdir()] == ["file.pt"]
    assert torch.equal(stored.load(path)["a"], TENSORS["a"])


def test_a_digest_tells_values_names_shapes_and_types_apart() -> None:
    values = torch.arange(6.0)
    made = [
        stored.digest(values),
        stored.digest(values + 1),
        stored.digest(values.reshape(2, 3)),
        stored.digest(values.int()),
        stored.digest({"a": values}),
        stored.digest({"b": values}),
        stored.digest(values, 1),
        stored.digest(values, "1"),
        stored.digest(),
    ]
    assert len(set(made)) == len(made)
    assert stored.digest(values.clone(), 1) == made[6]
    assert stored.digest(values.expand(2, 6)) == stored.digest(values.repeat(2, 1))
