"""The runner of studies: real runs of the command, skipped where there is a row."""

import shlex

import grid
import pytest
import rows
import studies
from commands import TINY, parsed
from studies import STUDIES, Cell

TRAINER = """
  logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: run, name: "", version: ""}}
  callbacks:
    - class_path: lightning_ddst.SampleQuality
      init_args:
        features: {class_path: lightning_ddst.models.trained_digits_cnn, init_args: {epochs: 1}}
        name: digits_cnn
        samples: 100
"""


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Two short runs and one that fails, with results in a folder of their own."""
    (tmp_path / "tiny.yaml").write_text(TINY + TRAINER)
    tiny = f"--config {tmp_path / 'tiny.yaml'}"
    cells = [
        Cell("digits", "DDST", 0.5, 0, tiny),
        Cell("digits", "wrong", 0.5, 0, f"{tiny} --sparsity.generator_density 7"),
        Cell("digits", "ramp", 0.5, 0, f"{tiny} --config ramp"),
    ]
    monkeypatch.setitem(STUDIES, "tiny", lambda: cells)
    monkeypatch.setattr(rows, "HERE", tmp_path)
    return cells


def call(monkeypatch, tmp_path, *options):
    arguments = ["grid.py", "tiny", "--data", str(tmp_path), "--work", str(tmp_path / "work"), *options]
    monkeypatch.setattr("sys.argv", arguments)
    grid.main()


def test_runs_are_trained_once_and_one_that_fails_is_reported(study, monkeypatch, tmp_path, capsys):
    call(monkeypatch, tmp_path, "--runs", "DDST", "wrong")
    said = capsys.readouterr().out
    assert "tiny: 0 of 2 runs are done" in said
    assert "('digits', 'wrong', 0.5, 0) failed: ended with code 2" in said
    (row,) = rows.rows("tiny")
    assert grid.key(row) == study[0].key
    assert row["command"] == f"lightning-ddst fit --config {tmp_path / 'tiny.yaml'} --seed_everything 0"
    assert [update for update, _ in row["distance"]] == [20]
    assert [update for update, _ in row["flops"]] == [5, 10, 15, 20]
    assert {"discriminator_density", "measuring", "alpha", "beta"} <= row.keys()
    assert {"commit", "machine", "versions", "seconds"} <= row.keys()
    # What was trained but has no row yet is not trained again.
    rows.path("tiny").unlink()
    call(monkeypatch, tmp_path, "--runs", "DDST")
    (again,) = rows.rows("tiny")
    assert again["distance"] == row["distance"]
    call(monkeypatch, tmp_path, "--runs", "DDST")
    assert rows.rows("tiny") == [again]
    assert "tiny: 1 of 1 runs are done" in capsys.readouterr().out


def test_no_run_starts_after_the_time_limit(study, monkeypatch, tmp_path):
    call(monkeypatch, tmp_path, "--minutes", "0")
    assert not rows.rows("tiny")


@pytest.mark.parametrize(
    "name",
    ["fashion", "ablations", "rules", "cifar10", "digits", "scaling", "wide_ablations", "controllers", "cifar10_small"],
)
def test_every_command_of_a_study_parses(name, monkeypatch):
    monkeypatch.chdir(rows.HERE.parent)
    seen = set()
    for cell in STUDIES[name]():
        if cell.run not in seen:
            seen.add(cell.run)
            command, subcommand, *options = shlex.split(cell.command)
            assert (command, subcommand) == ("lightning-ddst", "fit")
            config = parsed(monkeypatch, *options).config
            assert config.seed_everything == cell.seed
            if cell.density < 1:
                method = config.sparsity.method
                arguments = config.sparsity if isinstance(method, str) else method.init_args
                assert arguments.generator_density == cell.density


def test_what_matters_most_comes_first():
    cells = studies.fashion()
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.run for cell in cells[:6]] == list(studies.CLAIMS)
    assert {cell.density for cell in cells} == {0.05, 0.1, 0.2, 0.3, 0.5, 1.0}
    claims = [cell for cell in cells if cell.run in studies.CLAIMS[:5] and cell.density in (0.1, 0.3)]
    assert {cell.seed for cell in claims} == set(range(5))


def test_a_fixed_density_is_no_method_that_resizes():
    assert set(studies.METHODS) - set(studies.FIXED) == {
        "DDST relaxed",
        "DDST strict",
        "DDST auto",
        "ramp",
        "ramp to 0.5",
    }
