"""Texts and values that a run shows while it trains: tables, the progress bar, decisions, monitored values."""

import math
import re

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Toy, ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, RunSummary

SETTINGS = {"interval": 5, "explore_interval": 5, "probe_interval": 1}
CONTROL = ["control/signal", "control/lower", "control/upper"]


class Kept(Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.settings: dict = {}

    def log_metrics(self, metrics, step=None) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, params) -> None:
        self.settings |= dict(params)


class CallableGAN(ToyGAN):
    """Has a forward function, which Lightning's model summary needs for its example input."""

    def forward(self, z):
        return self.generator(z)


# ---- texts ---------------------------------------------------------------------------------------------


def said(caplog, capsys, *callbacks, epochs: int = 1, **settings) -> tuple[str, str]:
    """The log messages, and the printed lines."""
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    trained(*callbacks, epochs=epochs, gan=CallableGAN(), **settings)
    return "\n".join(record.getMessage() for record in caplog.records), capsys.readouterr().out


def test_a_run_shows_its_networks_its_plan_and_its_results(caplog, capsys):
    sparsity = DynamicSparsityCallback(0.25, **SETTINGS)
    messages, printed = said(caplog, capsys, sparsity, enable_model_summary=True)
    start, _, end = messages.partition("Sparse training of a GAN: results\n")
    assert "\nSparse training of a GAN\nmethod          ddst\n" in start
    assert "\nweights         768 maskable (100.0%)  544 maskable (100.0%)\n" in start
    assert "plan" not in start  # the run's length is not known yet
    assert [line.split()[:2] for line in printed.splitlines()] == [
        *(["plan", "10"], ["balance", "ratio"], ["decision", "on"], ["exploration", "of"])
    ]
    assert end.startswith("method                      ddst, 10 generator updates\n")
    assert f"{sparsity.balance_ratio:.3f}" in end


def test_results_are_left_to_a_run_summary(caplog, capsys):
    messages, printed = said(
        caplog, capsys, DynamicSparsityCallback(0.25, **SETTINGS), RunSummary(), enable_model_summary=True
    )
    assert "results" not in messages
    assert printed.count("balance ratio, last window") == 1


def test_without_a_model_summary_only_requested_decisions_are_printed(caplog, capsys):
    messages, printed = said(caplog, capsys, DynamicSparsityCallback(0.25, **SETTINGS))
    assert "Sparse training" not in messages
    assert printed == ""
    sparsity = DynamicSparsityCallback(0.25, **SETTINGS, verbose=True)
    _, printed = said(caplog, capsys, sparsity)
    for line, (update, decision) in zip(printed.splitlines(), sparsity.decisions, strict=True):
        assert line.startswith(f"update {update}: {decision.action} ")
        assert line.endswith(f" {decision.density:.1%}, since {decision.reason}")


def test_an_interrupted_run_shows_its_results(caplog):
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 5:
                raise KeyboardInterrupt

    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    callbacks = [DynamicSparsityCallback(0.25, **SETTINGS), Interrupt()]
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        toy_trainer(*callbacks, enable_model_summary=True).fit(CallableGAN(), toy_data())
    assert any("ddst, 6 generator updates" in record.getMessage() for record in caplog.records)


def test_loggers_of_scalars_only_are_named_once(caplog, tmp_path):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    loggers = [Kept(), CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    trained(DynamicSparsityCallback(0.25, **SETTINGS), logger=loggers)
    lines = [record.getMessage() for record in caplog.records if "scalars only" in record.getMessage()]
    assert lines == ["lightning_ddst: scalars only for Kept; texts and images are left out."]


def test_a_run_without_verbose_rejects_other_values():
    with pytest.raises(ValueError, match="verbose='loud' must be True or False"):
        DynamicSparsityCallback(0.25, verbose="loud")


# ---- the progress bar ----------------------------------------------------------------------------------


def test_the_progress_bar_begins_with_balance_and_densities():
    class Bars(Callback):
        def __init__(self) -> None:
            self.shown: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.shown.append(dict(trainer.progress_bar_metrics))

    class Logged(ToyGAN):
        def training_step(self, batch, batch_idx) -> None:
            self.log("loss", 1.0, prog_bar=True)
            super().training_step(batch, batch_idx)

    sparsity, bars = DynamicSparsityCallback(0.25, **SETTINGS), Bars()
    trained(sparsity, bars, gan=Logged(), log_every_n_steps=2)
    assert bars.shown[0] == {"loss": 1.0}  # the first logged update is the second
    assert list(bars.shown[-1]) == ["BR", "D_density", "G_density", "loss"]
    expected = [sparsity.balance_ratio, sparsity.discriminator_density, sparsity.generator_density, 1.0]
    assert list(bars.shown[-1].values()) == pytest.approx(expected)


# ---- values to monitor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_checkpoints_and_early_stopping_find_what_they_monitor(package, tmp_path):
    callbacks = package.callbacks
    checkpoint = callbacks.ModelCheckpoint(
        tmp_path, monitor="balance/ratio", mode="max", save_top_k=-1, filename="{epoch}-{balance/ratio:.6f}"
    )
    stopping = callbacks.EarlyStopping("density/generator", patience=2, check_on_train_epoch_end=True)
    sparsity = DynamicSparsityCallback(0.25, **SETTINGS)
    trainer = package.Trainer(
        callbacks=[stopping, sparsity, checkpoint],
        max_epochs=9,
        logger=False,
        accelerator="cpu",
        log_every_n_steps=0,  # decisions alone are logged
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(type("GAN", (Toy, package.LightningModule), {})(), toy_data())
    assert trainer.current_epoch == 3  # the generator's density stays the same
    assert stopping.best_score.item() == 0.25
    assert checkpoint.best_model_score is not None
    last = re.search(r"ratio=(-?[\d.]+)\.ckpt", sorted(map(str, tmp_path.rglob("*.ckpt")))[-1])
    assert float(last[1]) == pytest.approx(sparsity.balance_ratio, abs=1e-6)


class Seen(Callback):
    """Values in callback_metrics at the end of epochs, before or after the sparsity's own hooks."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.values.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_monitored_values_are_current_and_logged_ones_stay_the_same():
    logger, plain, seen = Kept(), Kept(), Seen()
    sparsity = DynamicSparsityCallback(0.25, **SETTINGS | {"interval": 4})
    trained(seen, sparsity, logger=logger, log_every_n_steps=3, epochs=2)
    trained(DynamicSparsityCallback(0.25, **SETTINGS | {"interval": 4}), logger=plain, log_every_n_steps=3, epochs=2)
    assert logger.lines == plain.lines
    assert [step for step, _ in logger.lines] == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20]
    assert seen.values[-1]["balance/ratio"] == pytest.approx(sparsity.balance_ratio)
    assert seen.values[-1]["flops/training_ratio"] == pytest.approx(sparsity.flops_ratio)
    assert seen.values[0].keys() >= logger.lines[-1][1].keys()


def test_a_balance_ratio_that_was_never_decided_is_nan_to_those_who_monitor_it():
    class Blind(ToyGAN):
        """Its discriminator gives everything the same score."""

        def __init__(self) -> None:
            super().__init__()
            self.discriminator = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
            for parameter in self.discriminator[-1].parameters():
                torch.nn.init.zeros_(parameter)

        def configure_optimizers(self):
            return [torch.optim.SGD(network.parameters(), lr=0.0) for network in self.networks()]

    seen, logger = Seen(), Kept()
    trained(seen, DynamicSparsityCallback(0.25, **SETTINGS), gan=Blind(), logger=logger)
    assert math.isnan(seen.values[-1]["balance/ratio"])
    assert all("balance/ratio" not in values for _, values in logger.lines)


# ---- the chart of the band -----------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", ["auto", (0.45, 0.55)])
def test_signal_and_bounds_are_logged_at_the_same_updates(bounds, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    sparsity = DynamicSparsityCallback(0.25, interval=3, probe_interval=1, bounds=bounds)
    trained(sparsity, logger=logger, log_every_n_steps=1, epochs=2)
    events = EventAccumulator(logger.log_dir, {"scalars": 0}).Reload()
    signal, lower, upper = ([event.step for event in events.Scalars(name)] for name in CONTROL)
    assert signal == lower == upper
    measured = [event.step for event in events.Scalars("balance/ratio")]
    assert signal == [step for step in measured if bounds != "auto" or step >= 9]  # a level takes three windows


# ---- hyperparameters -----------------------------------------------------------------------------------


def test_every_logger_gets_the_hyperparameters():
    logger = Kept()
    trained(DynamicSparsityCallback(0.25, **SETTINGS), logger=logger)
    assert logger.settings["method"] == "ddst"
    assert logger.settings["generator_density"] == 0.25
