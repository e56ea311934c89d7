from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, GeneratorEMA, RunSummary, SampleQuality
from lightning_ddst.report.results import read_results
from lightning_ddst.utils.counts import describe_times

FRECHET = "frechet_distance"


class Features(nn.Module):
    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :3]


class Sampled(ToyGAN):
    """Can be sampled from, and counts its generator's updates."""

    generator_updates = 0

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        return self.generator(torch.randn(n, LATENT, generator=rng)).detach()

    def training_step(self, batch, batch_idx) -> None:
        super().training_step(batch, batch_idx)
        self.generator_updates += 1

    def validation_step(self, batch, batch_idx) -> None:
        pass


def output(capsys, *callbacks, gan: ToyGAN | None = None, epochs: int = 2, **settings) -> str:
    seed_everything(0, verbose=False)
    trainer = toy_trainer(*callbacks, epochs=epochs, **settings)
    capsys.readouterr()
    trainer.fit(gan or Sampled(), toy_data(), toy_data())
    return capsys.readouterr().out


def printed(capsys, *callbacks, **settings) -> list[tuple[str, str]]:
    """The table's rows but for the logs': the name of each and its value."""
    lines = [line for line in output(capsys, *callbacks, **settings).splitlines() if line.strip()]
    rows = [line.strip().split("  ", 1) for line in lines]
    named = [(row[0], row[1].strip() if len(row) > 1 else "") for row in rows]
    return [(name, value) for name, value in named if name not in ("logs", "to look at them")]


def test_the_rows_of_a_sparse_run_with_distances(capsys) -> None:
    sparsity = DynamicSparsityCallback(0.25, interval=5, bounds=(0.0, 1e-9), probe_interval=1)
    frechet = SampleQuality(Features(), "three")
    summary = RunSummary(reference=1.23456, reference_name="dense GAN")
    rows = printed(capsys, sparsity, frechet, summary, num_sanity_val_steps=-1)
    actions = [decision.action for _, decision in sparsity.decisions]
    counted = ", ".join(f"{action} {actions.count(action)}" for action in dict.fromkeys(actions))
    discriminator = sparsity.networks()["discriminator"]
    assert sparsity.balance_ratio is not None
    assert rows == [
        ("method", "ddst, 20 generator updates"),
        ("generator", "density 0.2500 (192 of 768 weights active)"),
        (
            "discriminator",
            f"density {discriminator.active / 544:.4f} ({discriminator.active} of 544 weights active)",
        ),
        ("balance ratio, last window", f"{sparsity.balance_ratio:.3f}"),
        ("discriminator resized", f"{describe_times(actions.count('grow'))} in 4 decisions ({counted})"),
        (
            "training FLOPs",
            f"{100 * sparsity.flops_ratio:.1f}% of dense training (dense kernels do the arithmetic all the same)",
        ),
        ("Frechet distance (three)", ""),
        ("after 0 generator updates", f"{frechet.history['frechet_distance'][0][1]:.4g}"),
        ("after 20 generator updates", f"{frechet.history['frechet_distance'][2][1]:.4g}"),
        ("dense GAN", "1.235"),
        ("between two halves of the real images", f"{frechet.real_halves:.4g}"),
    ]
    assert actions.count("grow") > 0


def test_the_values_stand_below_each_other(capsys, tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.25, method="static")
    lines = [line for line in output(capsys, sparsity, RunSummary(), folder=tmp_path).splitlines() if line.strip()]
    assert [line.split("  ")[0] for line in lines] == [
        "method",
        "generator",
        "discriminator",
        "balance ratio, last window",
        "training FLOPs",
        "logs",
        "to look at them",
    ]
    # Two spaces after the longest name.
    assert {line[:28][-2:] for line in lines} == {"  "}
    assert all(line[28] != " " for line in lines)


def test_the_logs_are_named_where_there_are_any(capsys, tmp_path) -> None:
    folder = tmp_path / "lightning_logs" / "version_0"
    lines = output(capsys, RunSummary(), folder=tmp_path).strip().splitlines()
    assert lines == [f"logs             {folder}", f"to look at them  tensorboard --logdir {folder}"]


def test_logs_below_the_working_directory_have_short_paths(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = output(capsys, RunSummary(), folder=tmp_path).strip().splitlines()
    assert lines[0] == f"logs             {Path('lightning_logs', 'version_0')}"


def test_an_undecided_balance_gives_the_reason(capsys) -> None:
    class Blind(Sampled):
        """Its discriminator gives everything the score 0."""

        def __init__(self) -> None:
            super().__init__()
            self.discriminator = nn.Sequential(nn.Linear(PIXELS, 32), nn.ReLU(), nn.Linear(32, 1))
            for parameter in self.discriminator[-1].parameters():
                nn.init.zeros_(parameter)

        def configure_optimizers(self):
            return [SGD(network.parameters(), lr=0.0) for network in self.networks()]

    sparsity = DynamicSparsityCallback(0.25, method="static")
    rows = dict(printed(capsys, sparsity, RunSummary(), gan=Blind()))
    expected = "the discriminator does not clearly tell real from fake: alpha = 0 +- 0"
    assert rows["balance ratio, last window"] == f"undecided: {expected}"


def test_what_was_not_measured_is_left_out(capsys) -> None:
    rows = printed(capsys, DynamicSparsityCallback(0.25, method="sdst", probe_interval=None), RunSummary())
    assert [name for name, _ in rows] == ["method", "generator", "discriminator", "training FLOPs"]
    assert rows[0] == ("method", "sdst, 20 generator updates")
    assert rows[2][1] == "density 0.2500 (136 of 544 weights active)"


def test_a_dense_run_is_called_so(capsys) -> None:
    # Measuring the balance would cost something on top.
    sparsity = DynamicSparsityCallback(0.25, method="dense", probe_interval=None)
    rows = dict(printed(capsys, sparsity, RunSummary()))
    assert rows["method"] == "dense, 20 generator updates"
    assert rows["generator"] == "density 1.0000 (768 of 768 weights active)"
    assert rows["training FLOPs"].startswith("100.0% of dense training")


def test_a_single_distance_is_printed_once(capsys) -> None:
    frechet = SampleQuality(Features(), "three")
    rows = printed(capsys, frechet, RunSummary(), epochs=1)
    assert len(frechet.history[FRECHET]) == 1
    assert rows == [
        ("Frechet distance (three)", ""),
        ("after 10 generator updates", f"{frechet.history['frechet_distance'][0][1]:.4g}"),
        ("between two halves of the real images", f"{frechet.real_halves:.4g}"),
    ]


def test_distances_on_several_features_have_their_own_rows(capsys) -> None:
    distances = [SampleQuality(Features(), name) for name in ("first", "second")]
    rows = printed(capsys, *distances, RunSummary(), num_sanity_val_steps=-1)
    assert [name for name, _ in rows if name.startswith("Frechet")] == [
        "Frechet distance (first)",
        "Frechet distance (second)",
    ]
    assert len(rows) == 8


def test_every_metric_has_its_own_rows(capsys) -> None:
    quality = SampleQuality(
        Features(), "three", ["precision", "kernel_distance", "frechet_distance"], ["average", "raw"]
    )
    rows = printed(capsys, GeneratorEMA(0.9), quality, RunSummary(reference=1.0), num_sanity_val_steps=-1)
    ends = ["after 0 generator updates", "after 20 generator updates"]
    halves = "between two halves of the real images"
    assert [name for name, _ in rows] == [
        *("Precision (three)", *ends),
        *("Kernel distance (three)", *ends),
        *("Frechet distance (three)", *ends, "reference", halves),
        *("Precision, raw weights (three)", *ends),
        *("Kernel distance, raw weights (three)", *ends),
        *("Frechet distance, raw weights (three)", *ends, halves),
    ]
    assert rows[2] == (ends[1], f"{quality.history['precision'][-1][1]:.4g}")
    assert rows[-2] == (ends[1], f"{quality.history['frechet_distance_raw'][-1][1]:.4g}")


def test_a_distance_that_was_never_measured_has_no_rows(capsys) -> None:
    rows = printed(capsys, SampleQuality(Features(), "three"), RunSummary(reference=1.0), check_val_every_n_epoch=3)
    assert rows == []


def test_nothing_is_printed_where_there_is_nothing_to_say(capsys) -> None:
    # Without a logger there are no logs to look at, either.
    assert output(capsys, RunSummary()) == ""


def test_logs_of_another_logger_are_named_only(capsys, tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    out = output(capsys, RunSummary(), logger=logger)
    assert logger.log_dir in out
    assert "tensorboard --logdir" not in out


def test_large_counts_are_easy_to_read(capsys) -> None:
    class Wide(Sampled):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(LATENT, 500), nn.ReLU(), nn.Linear(500, PIXELS))

    sparsity = DynamicSparsityCallback(0.5, method="static")
    rows = dict(printed(capsys, sparsity, RunSummary(), gan=Wide()))
    # 8*500 + 500*16 weights.
    assert rows["generator"] == "density 0.5000 (6,000 of 12,000 weights active)"


@pytest.mark.parametrize(
    ("method", "times", "number"), [("posthoc", "once in 1 decision", 1), ("imp", "7 times in 7 decisions", 7)]
)
def test_methods_that_resize_both_networks_are_named_so(capsys, method, times, number) -> None:
    rows = dict(printed(capsys, DynamicSparsityCallback(0.25, method=method), RunSummary(), epochs=4))
    assert rows["generator and discriminator resized"] == f"{times} (prune {number})"
    assert "discriminator resized" not in rows


# ---- a run as the reference ----------------------------------------------------------------------------


def fitted(folder, method: str, seed: int = 0, epochs: int = 2, **quality) -> str:
    """A run's folder; the seed is that of the networks and the training."""
    seed_everything(seed, verbose=False)
    sparsity = DynamicSparsityCallback(0.25, method=method)
    toy_trainer(sparsity, SampleQuality(Features(), "three", **quality), epochs=epochs, folder=folder).fit(
        Sampled(), toy_data(), toy_data()
    )
    return str(folder)


def compared(capsys, reference: str, method: str = "ddst", **settings) -> str | None:
    quality = SampleQuality(Features(), settings.pop("name", "three"))
    rows = printed(
        capsys, DynamicSparsityCallback(0.25, method=method), quality, RunSummary(reference, "dense"), **settings
    )
    return dict(rows).get("dense")


def test_a_run_as_the_reference_is_printed_only_where_it_belongs(capsys, tmp_path) -> None:
    dense = fitted(tmp_path / "dense", "dense")
    last = read_results(dense).last("frechet_distance")
    assert compared(capsys, dense) == compared(capsys, dense, method="static") == f"{last:.4g}"
    assert compared(capsys, dense, method="dense") is None  # it is the same run
    assert compared(capsys, dense, epochs=1) is None
    assert compared(capsys, dense, name="others") is None

    class Wider(Sampled):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Linear(LATENT, PIXELS)

    assert compared(capsys, dense, gan=Wider()) is None
    assert compared(capsys, fitted(tmp_path / "seed", "dense", seed=1)) is None


def test_a_reference_without_results_is_rejected(tmp_path) -> None:
    with pytest.raises(ValueError, match="reference='missing': there is no folder missing"):
        RunSummary(reference="missing")


def test_the_packaged_reference_is_known_by_its_name(capsys) -> None:
    assert compared(capsys, "digits_dense") is None  # of other networks
