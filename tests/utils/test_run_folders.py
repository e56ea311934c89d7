import os
import socket

import pytest
from commands import TINY
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_ddst.cli import make_cli
from lightning_ddst.utils.run_folders import NewRunFolders

EVENTS = f"events.out.tfevents.1.{socket.gethostname()}.{os.getpid()}.0"


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fit(folder, *args):
    (folder.parent / "tiny.yaml").write_text(TINY)
    root = f"--trainer.default_root_dir={folder}"
    return make_cli(["fit", f"--config={folder.parent / 'tiny.yaml'}", root, *args])


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--sparsity.generator_density=0.0001"], "density=0.0001"),
        (["--sparsity.generator=nowhere"], "generator='nowhere'"),
        (["--sparsity.dense_layers=[nowhere]"], "'nowhere' matches no layer"),
        (["--sparsity.dense_layers=[nowhere]", "--trainer.logger=CSVLogger"], "'nowhere' matches no layer"),
    ],
)
def test_an_error_before_the_first_batch_leaves_no_folder(args, reason, tmp_path) -> None:
    with pytest.raises(ValueError, match=reason):
        fit(tmp_path / "runs", *args)
    assert not (tmp_path / "runs").exists()


def test_an_error_in_the_sanity_check_leaves_no_folder(tmp_path, monkeypatch) -> None:
    def fails(self, batch, batch_index):
        raise ValueError("in the first validation")

    monkeypatch.setattr("lightning_ddst.GANModule.validation_step", fails)
    with pytest.raises(ValueError, match="in the first validation"):
        fit(tmp_path / "runs", "--trainer.num_sanity_val_steps=1")
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_that_does_not_fit_leaves_earlier_runs_as_they_are(tmp_path) -> None:
    runs = tmp_path / "runs"
    fit(runs)
    before = written(runs)
    (checkpoint,) = runs.rglob("*.ckpt")
    wider = "--model.generator.width=8"
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(runs, wider, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2")
    assert written(runs) == before


def test_an_error_in_training_keeps_the_folder(tmp_path, monkeypatch) -> None:
    def fails(self, batch, batch_index):
        raise ValueError("in the first batch")

    monkeypatch.setattr("lightning_ddst.GANModule.training_step", fails)
    with pytest.raises(ValueError, match="in the first batch"):
        fit(tmp_path / "runs")
    assert "lightning_logs/version_0/config.yaml" in written(tmp_path / "runs")


def made(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_only_files_of_the_start_are_removed(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path / "new")
    folders = NewRunFolders([logger])
    made(tmp_path / "new/lightning_logs/version_0", "config.yaml", "hparams.yaml", "results.json", EVENTS)
    made(tmp_path / "new/lightning_logs/version_0/checkpoints")
    folders.remove_untrained()
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [
        *("notes.txt", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/config.yaml"),
        f"events.out.tfevents.1.{socket.gethostname()}.{os.getpid() + 1}.0",
    ],
    ids=["text", "metrics", "checkpoint", "in a folder", "another process"],
)
def test_a_folder_with_any_other_file_is_kept(other, tmp_path) -> None:
    folders = NewRunFolders([CSVLogger(tmp_path)])
    made(tmp_path / "lightning_logs/version_0", "config.yaml", EVENTS, other)
    before = written(tmp_path)
    folders.remove_untrained()
    assert written(tmp_path) == before


def test_a_folder_that_existed_is_kept(tmp_path) -> None:
    made(tmp_path / "lightning_logs/version_3", "config.yaml")
    folders = NewRunFolders([TensorBoardLogger(tmp_path, version=3), TensorBoardLogger(tmp_path)])
    made(tmp_path / "lightning_logs/version_3", EVENTS)
    made(tmp_path / "lightning_logs/version_4", "config.yaml", EVENTS)
    folders.remove_untrained()
    assert written(tmp_path / "lightning_logs") == ["version_3", "version_3/config.yaml", f"version_3/{EVENTS}"]
