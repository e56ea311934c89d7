import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, SparsityPlots
from lightning_ddst.report import plots
from lightning_ddst.report.runs import read_run

FIGURES = ["balance", "layer_densities", "exploration", "flops"]


class ValidatedGAN(ToyGAN):
    """Validated on nothing in particular."""

    def validation_step(self, *_) -> None:
        pass


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[int, dict]]:
    """Records what would be drawn, and draws single pixels to save time."""
    calls = []

    def figures(series) -> dict:
        calls.append({name: list(points) for name, points in series.items()})
        return dict.fromkeys(FIGURES)

    monkeypatch.setattr(plots, "figures", figures)
    monkeypatch.setattr(plots, "pixels", lambda figure: np.zeros((1, 1, 3), dtype=np.uint8))
    return calls


def fit(folder: Path | None, callback: SparsityPlots, *more, epochs: int = 2, ckpt_path=None, **settings) -> Trainer:
    """10 generator updates an epoch, with a validation after each."""
    seed_everything(0, verbose=False)
    sparsity = DynamicSparsityCallback(0.4, 0.4, interval=4, explore_interval=3, probe_interval=1)
    settings = {"log_every_n_steps": 2, "num_sanity_val_steps": 1} | settings
    trainer = toy_trainer(sparsity, callback, *more, folder=folder, epochs=epochs, **settings)
    trainer.fit(ValidatedGAN(), toy_data(), toy_data(1), ckpt_path=ckpt_path)
    return trainer


def images(trainer: Trainer) -> dict[str, list[tuple[int, np.ndarray]]]:
    events = EventAccumulator(trainer.log_dir, size_guidance={"images": 0})
    events.Reload()
    return {
        tag: [(e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))) for e in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


def test_figures_of_the_logged_values_are_written_to_tensorboard(tmp_path) -> None:
    trainer, plain = fit(tmp_path, SparsityPlots(), epochs=1), fit(None, SparsityPlots(), epochs=1)
    shown = images(trainer)
    expected = plots.figures(read_run(trainer.log_dir))
    assert list(shown) == [f"plots/{name}" for name in FIGURES] == [f"plots/{name}" for name in expected]
    for name in FIGURES:
        ((step, image),) = shown[f"plots/{name}"]
        assert step == 10
        # Event files hold single precision.
        if name in ("balance", "flops"):
            assert np.mean(image != plots.pixels(expected[name])) < 0.01
    # Drawing leaves training as it is.
    weights, expected = trainer.lightning_module.state_dict(), plain.lightning_module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("every", "epochs", "settings", "steps"),
    [
        (1, 2, {}, [10, 20]),
        (2, 3, {}, [20, 30]),  # and at the end
        (5, 1, {}, [10]),
        (1, 1, {"val_check_interval": 5}, [5, 10]),
        (1, 2, {"limit_val_batches": 0}, [20]),
    ],
)
def test_they_are_drawn_after_every_so_many_validations(
    every: int, epochs: int, settings: dict, steps: list[int], drawn, tmp_path
) -> None:
    shown = images(fit(tmp_path, SparsityPlots(every), epochs=epochs, **settings))
    assert list(shown) == [f"plots/{name}" for name in FIGURES]
    assert [step for step, _ in shown["plots/balance"]] == steps
    # Lines are logged every 2 updates.
    logged = [max(step for points in each.values() for step, _ in points) for each in drawn]
    assert logged == [step // 2 * 2 for step in steps]


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(drawn, tmp_path) -> None:
    # Every update has two optimizers' steps.
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    whole = images(fit(tmp_path / "whole", SparsityPlots(2), checkpoints, epochs=3))
    state = torch.load(tmp_path / "step=20.ckpt", weights_only=True)["callbacks"]["SparsityPlots"]
    assert [step for step, _ in state["series"]["density/generator"]] == [2, 4, 6, 8, 10]
    expected = list(drawn)
    drawn.clear()
    again = fit(tmp_path / "again", SparsityPlots(2), epochs=3, ckpt_path=tmp_path / "step=20.ckpt")
    assert len(drawn) == 2
    assert drawn == expected[-2:]
    steps = [step for step, _ in whole["plots/flops"] if step > 10]
    assert [step for step, _ in images(again)["plots/flops"]] == steps == [20, 30]


def test_a_run_from_the_beginning_starts_over(drawn, tmp_path) -> None:
    callback = SparsityPlots()
    fit(tmp_path / "first", callback, epochs=2)
    drawn.clear()
    fit(tmp_path / "second", callback, epochs=1)
    assert [step for step, _ in drawn[-1]["density/generator"]] == [2, 4, 6, 8, 10]


def test_an_evaluated_checkpoint_leaves_the_series_of_a_fit(tmp_path) -> None:
    fit(tmp_path / "first", SparsityPlots(), ModelCheckpoint(tmp_path, filename="first"), epochs=1)
    callback = SparsityPlots()
    trainer = fit(tmp_path / "second", callback, epochs=2)
    before = callback.state_dict()
    assert [step for step, _ in before["series"]["density/generator"]] == list(range(2, 21, 2))
    evaluated = toy_trainer(callback, DynamicSparsityCallback(0.25))
    evaluated.validate(trainer.lightning_module, toy_data(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    assert callback.state_dict() == before


def test_another_modules_run_of_as_many_updates_is_drawn_at_its_end(drawn, tmp_path) -> None:
    callback = SparsityPlots(5)
    for name in ("first", "second"):
        fit(tmp_path / name, callback, epochs=1)
    assert len(drawn) == 2
    assert callback.state_dict()["validations"] == 1


def test_without_a_logger_nothing_is_drawn(drawn) -> None:
    fit(None, SparsityPlots())
    assert drawn == []


def test_a_csv_logger_gets_files(tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    fit(None, SparsityPlots(), epochs=1, logger=logger)
    for name in FIGURES:
        (path,) = (Path(logger.log_dir) / "plots" / name).iterdir()
        assert path.name == "00000010.png"
        assert Image.open(path).width == 900


def test_only_the_first_process_draws(drawn, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda trainer: False))
    fit(tmp_path, SparsityPlots(), epochs=1, enable_checkpointing=False)
    assert drawn == []


def test_unknown_names_are_not_kept() -> None:
    callback = SparsityPlots()
    callback.record_scalars({"loss/generator": 1.0, "density/generator": 0.5, "decision/grow": 1.0}, 4)
    callback.record_scalars({"density/generator": 0.25}, 4)
    assert callback.state_dict()["series"] == {"density/generator": [(4, 0.25)]}


def test_long_series_are_thinned_out_evenly_and_at_the_same_updates() -> None:
    def record(callback: SparsityPlots, updates: range) -> None:
        for update in updates:
            values = {"density/discriminator": update / 1e6, "flops/training_ratio": 0.5}
            if not 40_000 < update < 60_000:
                values["balance/ratio"] = 0.5
            callback.record_scalars(values, update)
            if update % 7_000 == 0:
                callback.record_scalars({"frechet_distance/cnn": 1.0}, update)

    whole, cut, resumed = SparsityPlots(), SparsityPlots(), SparsityPlots()
    record(whole, range(10, 100_001, 10))
    record(cut, range(10, 43_210, 10))
    resumed.load_state_dict(cut.state_dict())
    record(resumed, range(43_210, 100_001, 10))
    series = whole.state_dict()["series"]
    assert resumed.state_dict() == whole.state_dict()
    densities = series["density/discriminator"]
    assert 1000 <= len(densities) <= 2000  # as documented
    assert densities[0][0] == 10
    assert densities[-1] == (100_000, 0.1)
    assert max(b[0] - a[0] for a, b in pairwise(densities)) < 3 * 100_000 / 1000
    # All at the same updates, so that gaps are where there were gaps.
    steps = [step for step, _ in densities]
    assert [step for step, _ in series["flops/training_ratio"]] == steps
    assert [step for step, _ in series["balance/ratio"]] == [step for step in steps if not 40_000 < step < 60_000]
    # Rare ones are kept.
    assert [step for step, _ in series["frechet_distance/cnn"]] == list(range(7_000, 100_001, 7_000))


@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_bad_arguments_are_rejected(value: float) -> None:
    with pytest.raises(ValueError, match=f"every_n_validations={value} must be an integer, at least 1"):
        SparsityPlots(value)
