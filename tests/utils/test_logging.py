import csv
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import ToyGAN, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.utils.logging import (
    generator_updates,
    log_hyperparameters,
    log_image,
    log_scalars,
    log_text,
    logs_at,
    scalars_only,
    show_progress,
    shows_images,
    tensorboards,
)


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


# ---- texts, images and hyperparameters -----------------------------------------------------------------


class FakeWandb(WandbLogger):
    """Records calls by the arguments of the real methods; W&B itself need not be installed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def record(self, method: str, *args, **kwargs) -> None:
        bound = inspect.signature(getattr(WandbLogger, method)).bind(self, *args, **kwargs)
        self.calls.append((method, {name: value for name, value in bound.arguments.items() if name != "self"}))

    def log_text(self, *args, **kwargs) -> None:
        self.record("log_text", *args, **kwargs)

    def log_image(self, *args, **kwargs) -> None:
        self.record("log_image", *args, **kwargs)

    def log_hyperparams(self, *args, **kwargs) -> None:
        self.record("log_hyperparams", *args, **kwargs)


class FakeClient:
    """The methods of MlflowClient with their signatures."""

    def __init__(self) -> None:
        self.artifacts: dict[str, object] = {}

    def log_text(self, run_id, text, artifact_file) -> None:
        assert run_id == "run 1"
        self.artifacts[artifact_file] = text

    def log_image(
        self, run_id, image, artifact_file=None, key=None, step=None, timestamp=None, synchronous=None
    ) -> None:
        assert run_id == "run 1"
        self.artifacts[artifact_file] = image

    def get_run(self, run_id) -> SimpleNamespace:
        return SimpleNamespace(data=SimpleNamespace(params={"method": "ddst"}))


class FakeMLFlow(MLFlowLogger):
    """Records what its client gets; MLflow itself need not be installed."""

    def __init__(self) -> None:
        self.client, self.params = FakeClient(), {}

    @property
    def experiment(self) -> FakeClient:
        return self.client

    @property
    def run_id(self) -> str:
        return "run 1"

    def log_hyperparams(self, params) -> None:
        self.params |= params


PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def log_all(*loggers):
    trainer = toy_trainer(logger=list(loggers))
    for updates in (10, 20):
        log_text(trainer, "about/run", f"**text** {updates}", updates)
        log_image(trainer, "plots/balance", PIXELS, updates)
    log_hyperparameters(trainer, {"method": "ddst", "generator_density": 0.1})
    return trainer


def test_weights_and_biases_gets_tables_and_images() -> None:
    logger = FakeWandb()
    log_all(logger)
    assert [name for name, _ in logger.calls] == ["log_text", "log_image"] * 2 + ["log_hyperparams"]
    data = {"columns": ["generator updates", "text"], "data": [[20, "**text** 20"]], "step": 20}
    assert logger.calls[2] == ("log_text", {"key": "about/run"} | data)
    image = logger.calls[3][1]
    assert (image["key"], image["step"]) == ("plots/balance", 20)
    assert [each is PIXELS for each in image["images"]] == [True]
    assert logger.calls[4][1] == {"params": {"method": "ddst", "generator_density": 0.1}}


def test_mlflow_gets_artifacts_and_no_parameter_twice() -> None:
    logger = FakeMLFlow()
    log_all(logger)
    artifacts = logger.client.artifacts
    assert [name for name in artifacts if name.endswith(".md")] == ["about/run/00000010.md", "about/run/00000020.md"]
    assert artifacts["about/run/00000020.md"] == "**text** 20"
    assert artifacts["plots/balance/00000010.png"] is PIXELS
    assert logger.params == {"generator_density": 0.1}


def test_a_csv_logger_gets_files(tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    log_all(logger)
    logger.save()
    folder = tmp_path / "lightning_logs" / "version_0"
    text = "<!-- generator update {0} -->\n**text** {0}\n\n"
    assert (folder / "about" / "run.md").read_text() == text.format(10) + text.format(20)
    assert np.array_equal(np.asarray(Image.open(folder / "plots" / "balance" / "00000020.png")), PIXELS)
    assert (folder / "hparams.yaml").read_text() == "generator_density: 0.1\nmethod: ddst\n"


def test_tensorboard_gets_texts_and_images(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path)
    log_all(logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, {"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("about/run/text_summary")] == [10, 20]
    assert [(event.step, event.height, event.width) for event in events.Images("plots/balance")] == [
        (10, 2, 3),
        (20, 2, 3),
    ]


def test_other_loggers_get_scalars_only(tmp_path) -> None:
    remote = CSVLogger("memory://logs")
    assert scalars_only(toy_trainer(logger=[FakeWandb(), remote, TensorBoardLogger(tmp_path)])) == ["CSVLogger"]
    assert not shows_images(toy_trainer(logger=[remote]))
    assert shows_images(toy_trainer(logger=[FakeMLFlow()]))
    assert not shows_images(toy_trainer(logger=False))


# ---- in the Trainer ------------------------------------------------------------------------------------


def test_scalars_are_in_callback_metrics() -> None:
    def log(trainer) -> dict:
        log_scalars(trainer, {"one": 1.0, "two": 2.5}, 7)
        log_scalars(trainer, {"one": 3.0}, 9)
        return {name: value.item() for name, value in trainer.callback_metrics.items()}

    trained(end := AtTheEnd(log))
    assert end.result == {"one": 3.0, "two": 2.5}


def test_the_progress_bar_begins_with_shown_values() -> None:
    def show(trainer) -> list:
        trainer.progress_bar_metrics["loss"] = 1.0
        show_progress(trainer, {"BR": 0.5, "density": 0.1})
        first = list(trainer.progress_bar_metrics.items())
        show_progress(trainer, {"BR": float("nan"), "density": 0.2})
        return [first, list(trainer.progress_bar_metrics.items())]

    trained(end := AtTheEnd(show))
    assert end.result == [[("BR", 0.5), ("density", 0.1), ("loss", 1.0)], [("density", 0.2), ("loss", 1.0)]]
