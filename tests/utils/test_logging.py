import csv

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import ToyGAN, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.utils.logging import generator_updates, log_scalars, logs_at, tensorboards


class AtTheEnd(Callback):
    """Does something in a running Trainer."""

    def __init__(self, act) -> None:
        self.act = act

    def on_train_end(self, trainer, pl_module) -> None:
        self.result = self.act(trainer)


def test_scalars_go_to_every_logger_at_generator_updates(tmp_path) -> None:
    def log(trainer) -> None:
        log_scalars(trainer, {"one": 1.0, "two": 2.5}, updates=7)
        log_scalars(trainer, {"one": 3.0}, updates=9)

    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")]
    trained(AtTheEnd(log), folder=tmp_path, logger=loggers)
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("one")] == [(7, 1), (9, 3)]
    assert [(event.step, event.value) for event in events.Scalars("two")] == [(7, 2.5)]
    with open(f"{loggers[1].log_dir}/metrics.csv") as file:
        rows = [(row["step"], row["one"], row["two"]) for row in csv.DictReader(file)]
    assert rows == [("7", "1.0", "2.5"), ("9", "3.0", "")]


def test_without_a_logger_nothing_is_logged() -> None:
    trained(end := AtTheEnd(lambda trainer: (log_scalars(trainer, {"one": 1.0}, 7), tensorboards(trainer))))
    assert end.result == (None, [])


@pytest.mark.parametrize(("every", "due"), [(1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (6, [6]), (50, []), (0, [])])
def test_lines_are_due_every_so_many_generator_updates(every: int, due: list[int]) -> None:
    trainer = toy_trainer(log_every_n_steps=every)
    assert [updates for updates in range(1, 7) if logs_at(trainer, updates)] == due


def test_only_tensorboards_writers_are_found(tmp_path) -> None:
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    assert tensorboards(toy_trainer(logger=[table, board])) == [board.experiment]
    assert tensorboards(toy_trainer(logger=table)) == []


class CountingGAN(ToyGAN):
    """Counts by itself, wrongly."""

    generator_updates = 3


@pytest.mark.parametrize(
    ("gan", "callbacks", "updates"),
    [
        (ToyGAN(), [], 0),
        (CountingGAN(), [], 3),
        (CountingGAN(), [DynamicSparsityCallback(0.5)], 10),  # which sees what the optimizer does
        (ToyGAN(), [Callback(), DynamicSparsityCallback(0.5)], 10),
    ],
)
def test_generator_updates_are_counted_by_the_sparsity_or_else_by_the_module(gan, callbacks, updates: int) -> None:
    trained(*callbacks, end := AtTheEnd(generator_updates), gan=gan)
    assert end.result == updates
