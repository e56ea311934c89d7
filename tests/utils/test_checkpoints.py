import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from commands import TINY
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from toys import ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import AtomicCheckpointIO, cli
from lightning_ddst.utils import checkpoints
from lightning_ddst.utils.checkpoints import CheckpointError

OLD, NEW = {"weight": torch.zeros(50_000)}, {"weight": torch.ones(50_000)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded(path: Path) -> torch.Tensor:
    return AtomicCheckpointIO().load_checkpoint(path)["weight"]


# ---- writing -------------------------------------------------------------------------------------------


def test_a_checkpoint_is_what_lightning_writes(tmp_path) -> None:
    path = tmp_path / "folder" / "last.ckpt"
    for content in (OLD, NEW):
        AtomicCheckpointIO().save_checkpoint(content, path)
        assert torch.equal(torch.load(path, weights_only=True)["weight"], content["weight"])
    TorchCheckpointIO().save_checkpoint(NEW, tmp_path / "other.ckpt")
    assert path.stat().st_mode == (tmp_path / "other.ckpt").stat().st_mode
    assert names(path.parent) == ["last.ckpt"]


def test_a_run_saves_and_resumes_with_it(tmp_path) -> None:
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trained(saving, folder=tmp_path, plugins=[AtomicCheckpointIO()])
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=20.ckpt", "last.ckpt"]
    gan = ToyGAN()
    trainer = toy_trainer(epochs=2, folder=tmp_path, plugins=[AtomicCheckpointIO()])
    trainer.fit(gan, toy_data(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert trainer.global_step == 40


def test_urls_are_left_to_lightning(monkeypatch) -> None:
    AtomicCheckpointIO().save_checkpoint(NEW, "memory://folder/last.ckpt")
    assert torch.equal(loaded("memory://folder/last.ckpt"), NEW["weight"])
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint("memory://folder/none.ckpt")


def test_options_of_a_storage_are_rejected_as_by_lightning(tmp_path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "last.ckpt", storage_options={})


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_the_temporary_folder_may_be_on_another_file_system(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert tempfile.gettempdir() == "/dev/shm"
    assert os.stat("/dev/shm").st_dev != tmp_path.stat().st_dev
    AtomicCheckpointIO().save_checkpoint(OLD, tmp_path / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "last.ckpt")
    assert torch.equal(loaded(tmp_path / "last.ckpt"), NEW["weight"])


def full(*_) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(CheckpointError) as error:
        AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert str(error.value) == (
        f"the checkpoint {path} cannot be written: No space left on device; an earlier file of this name is "
        "unchanged. Free some space, or choose another folder."
    )
    assert names(tmp_path) == ["last.ckpt"]
    assert torch.equal(loaded(path), OLD["weight"])


def test_a_file_system_without_fsync_and_a_long_name_are_written(tmp_path, monkeypatch) -> None:
    def cannot(*_) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(checkpoints.os, "fsync", cannot)
    path = tmp_path / f"{'x' * 250}.ckpt"
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert torch.equal(loaded(path), NEW["weight"])
    assert names(tmp_path) == [path.name]


def test_a_file_system_that_is_full_leaves_the_earlier_checkpoint(tmp_path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted")
    try:
        path = tmp_path / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint(OLD, path)  # 200 kB; a second one has no room
        with pytest.raises(CheckpointError, match=r"last.ckpt cannot be written: No space left on device"):
            AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(80_000)}, path)
        assert names(tmp_path) == ["last.ckpt"]
        assert torch.equal(loaded(path), OLD["weight"])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_cannot_be_created(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/last.ckpt cannot be written: (Not a directory|File exists)"):
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "file" / "last.ckpt")


def test_what_killed_processes_left_is_removed_after_an_hour(tmp_path) -> None:
    old, young, other = (tmp_path / f"{name}.ckpt.{'0a' * 16}" for name in ("old", "young", "other"))
    for path in (old, young, other):
        path.touch()
    os.utime(old, (time.time() - 3700,) * 2)
    other = other.rename(tmp_path / "other.ckpt.mine")
    os.utime(other, (0, 0))
    AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "last.ckpt")
    assert names(tmp_path) == sorted(["last.ckpt", young.name, other.name])


KILLED = """
import os, random, resource, signal, sys, time
import torch
from lightning_ddst.utils.checkpoints import AtomicCheckpointIO

path, saving = sys.argv[1], AtomicCheckpointIO()
size = 500_000
saving.save_checkpoint({"weight": torch.zeros(size)}, path)


def check():
    weight = saving.load_checkpoint(path)["weight"]
    assert weight.shape == (size,) and (weight == weight[0]).all()
    return int(weight[0])


# At a byte of the new file: the system kills a process whose file becomes too large.
for byte in (0, 1, 4096, 1_000_000, 1_999_999):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
        saving.save_checkpoint({"weight": torch.ones(size)}, path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ, status
    assert check() == 0

# At any moment.
random.seed(0)
seen = set()
for _ in range(30):
    child = os.fork()
    if not child:
        for count in range(1000):
            saving.save_checkpoint({"weight": torch.full((size,), float(count))}, path)
        os._exit(0)
    time.sleep(random.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.add(check())
assert len(seen) > 1
"""


def test_a_kill_at_any_byte_leaves_a_checkpoint_that_loads(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "last.ckpt"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


# ---- reading -------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed(tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    content = {"weight": torch.randn(300), "updates": 7, "name": "generator"}
    AtomicCheckpointIO().save_checkpoint(content, path)
    whole = path.read_bytes()
    rng, rejected = random.Random(0), 0
    for _ in range(300):
        damaged, bit = bytearray(whole), rng.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
        except Exception:
            rejected += 1
        else:  # a bit of the zip that holds nothing
            assert torch.equal(read["weight"], content["weight"])
            assert {**read, "weight": 0} == {**content, "weight": 0}
    assert rejected > 150
    start = whole.index(content["weight"].numpy().tobytes())
    path.write_bytes(whole[: start + 8] + b"\0\0\0\0" + whole[start + 12 :])
    torch.load(path)  # notices nothing
    with pytest.raises(CheckpointError, match=r"last.ckpt is damaged: .*/data/0 does not match its checksum\."):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_checkpoint_of_the_old_format_without_checksums_is_loaded(tmp_path) -> None:
    torch.save(NEW, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(loaded(tmp_path / "old.ckpt"), NEW["weight"])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_executes_nothing_unless_it_is_trusted(zipped: bool, tmp_path) -> None:
    path, called = tmp_path / "evil.ckpt", tmp_path / "called"
    torch.save({"state_dict": {}, "hyper_parameters": Payload(called)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        toy_trainer(folder=tmp_path, plugins=[AtomicCheckpointIO()]).fit(ToyGAN(), toy_data(), ckpt_path=path)
    said = str(error.value)
    assert said.startswith(f"the checkpoint {path} is damaged or holds other objects than tensors")
    assert "_io.open" in said or "io.open" in said
    assert "\n" not in said
    assert not called.exists()
    AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert called.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"garbage", b"\x80\x02.", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_rejected_by_one_line(content: bytes, tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^the checkpoint {path} is damaged") as error:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_a_truncated_checkpoint_is_rejected_at_any_byte(tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.randn(30)}, path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is damaged"):
            AtomicCheckpointIO().load_checkpoint(path)


# ---- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", ["", "  plugins: [{class_path: lightning.pytorch.plugins.AsyncCheckpointIO}]"])
def test_the_command_uses_it_unless_the_user_chose_another(plugins: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY + plugins)
    made = cli.make_cli(["--config", "tiny.yaml"], run=False)
    kind = "AsyncCheckpointIO" if plugins else "AtomicCheckpointIO"
    assert type(made.trainer.strategy.checkpoint_io).__name__ == kind


def test_the_command_ends_with_one_line_on_a_full_disk(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    folder = ["--trainer.default_root_dir", str(tmp_path), "--data.init_args.batches_per_epoch", "2"]
    monkeypatch.setattr(sys, "argv", ["lightning-ddst", "fit", "--config", str(tmp_path / "tiny.yaml"), *folder])
    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("lightning-ddst: error: the checkpoint ")
    assert "cannot be written: No space left on device; an earlier file of this name is unchanged." in line
    assert not list(tmp_path.rglob("*.ckpt*"))


def test_the_command_ends_with_one_line_for_a_damaged_state(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--trainer.default_root_dir", str(tmp_path), "--data.init_args.batches_per_epoch", "2"]
    command = ["lightning-ddst", "fit", "--config", str(tmp_path / "tiny.yaml"), *options]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    path = next(tmp_path.rglob("*.ckpt"))
    content = torch.load(path, weights_only=True)
    content["callbacks"]["DynamicSparsityCallback"]["training"]["updates"] = -1
    torch.save(content, tmp_path / "damaged.ckpt")
    torch.save(content | {"hyper_parameters": Payload(tmp_path / "called")}, tmp_path / "evil.ckpt")
    for name, message in (
        ("damaged", "training.updates=-1 must be an integer, at least 0."),
        ("evil", "Unsupported global: GLOBAL io.open"),
    ):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [*command, "--ckpt_path", str(tmp_path / f"{name}.ckpt")])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert message in line
    assert not (tmp_path / "called").exists()
