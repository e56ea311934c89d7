import signal
from collections import namedtuple

import pytest
import torch
from crashes import History, Signal
from lightning.pytorch import seed_everything
from toys import WEIGHTS_ONLY, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, InterruptCheckpoint, RunSummary
from lightning_ddst.data import ResumableLoader


@pytest.fixture(autouse=True)
def _handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # As in a new process: another test's run may have left them ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)  # Lightning leaves Ctrl-C ignored


def fit(folder, *callbacks, resume=None, epochs=3):
    seed_everything(0, verbose=False)
    gan, history = ToyGAN(), History()
    sparsity = DynamicSparsityCallback(0.3, interval=5, explore_interval=4, seed=0)
    interrupt = InterruptCheckpoint()
    trainer = toy_trainer(
        sparsity, history, RunSummary(), *callbacks, interrupt, epochs=epochs, folder=folder, enable_checkpointing=False
    )
    loader = ResumableLoader(toy_data().dataset, 8, 10)
    try:
        trainer.fit(gan, loader, ckpt_path=resume, **WEIGHTS_ONLY)
    except SystemExit as ending:
        return gan, history.batches, interrupt.path, ending.code
    return gan, history.batches, interrupt.path, None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
@pytest.mark.parametrize("batch", [7, 10])
def test_an_interrupted_run_is_saved_after_its_batch_and_resumes_as_if_uninterrupted(
    tmp_path, capsys, number, code, batch
):
    whole, expected, path, ending = fit(tmp_path / "whole")
    assert (path, ending) == (None, None)
    capsys.readouterr()

    _, seen, path, ending = fit(tmp_path / "interrupted", Signal(number, batch))
    assert ending == code
    assert max(seen) == batch
    assert path is not None
    assert path.name == "interrupted.ckpt"
    printed = capsys.readouterr().out
    assert f"ddst, {batch} generator updates" in printed
    assert "balance ratio, last window" in printed

    resumed, rest, *_ = fit(tmp_path / "resumed", resume=path)
    assert rest == {number: expected[number] for number in range(batch + 1, 31)}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    _, seen, path, ending = fit(tmp_path, Signal(signal.SIGINT, 7, times=2))
    assert ending == 1
    assert max(seen) == 6
    assert path is None


def test_a_run_interrupted_in_its_last_batch_ends_as_always(tmp_path):
    _, seen, path, ending = fit(tmp_path, Signal(signal.SIGINT, 10), epochs=1)
    assert (max(seen), path, ending) == (10, None, None)


def test_signals_are_handled_as_before_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit(tmp_path, epochs=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- folders that cannot be written to --------------------------------------------------------------


def updates_of(folder, **settings):
    sparsity = DynamicSparsityCallback(0.3)
    toy_trainer(sparsity, folder=folder, **settings).fit(ToyGAN(), toy_data())
    return sparsity.generator_updates


def test_a_folder_that_cannot_be_made_ends_the_run_before_it_starts(tmp_path):
    (tmp_path / "lightning_logs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="lightning_logs"):
        updates_of(tmp_path)


def test_a_folder_of_checkpoints_that_cannot_be_made_ends_the_run_before_it_starts(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write to .*checkpoints: .*Trainer\("):
        updates_of(tmp_path, logger=False)


def test_a_full_disk_ends_the_run_before_it_starts(tmp_path, monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(2**40, 2**40 - 2**20, 2**20 + 1000))
    with pytest.raises(OSError, match=r"checkpoints has 1 MiB left, .* 1 MiB"):
        updates_of(tmp_path)
    monkeypatch.undo()
    assert updates_of(tmp_path) == 10
