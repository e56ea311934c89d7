import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import parsed
from logged_runs import NETWORK, RESULTS, log_csv, log_events, paired

from lightning_ddst.report.results import FlopsResults, RunResults, is_comparable, read_results, write_results
from lightning_ddst.utils.config_arguments import DEFAULT_CONFIG


def test_what_is_written_is_read(tmp_path) -> None:
    path = write_results(tmp_path / "run", RESULTS)
    assert path == tmp_path / "run" / "results.json"
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert read_results(path) == read_results(path.parent) == read_results(str(tmp_path)) == RESULTS


def test_the_file_has_the_documented_keys(tmp_path) -> None:
    content = json.loads(write_results(tmp_path, RESULTS).read_text())
    assert list(content) == [
        *("schema", "status", "error", "seed", "pairs", "quality", "versions", "command", "config", "resumed_from")
    ]
    assert content["schema"] == 1
    pair = content["pairs"][""]
    assert list(pair) == [
        *("method", "settings", "updates", "planned_updates", "networks", "balance_ratio", "decisions", "flops")
    ]
    assert pair["networks"]["generator"] == {
        "initial_density": 0.1,
        "final_density": 0.25,
        "mean_density": 0.2,
        "active_weights": 25,
        "maskable_weights": 100,
    }
    assert pair["decisions"] == [{"update": 10, "action": "grow", "density": 0.15, "reason": "BR 0.600 > 0.55"}]
    assert pair["flops"] == {"training": 30, "measuring": 5, "dense": 100, "ratio": 0.3}
    assert content["quality"][0] == {
        "metric": "frechet_distance",
        "features": "cnn",
        "weights": "average",
        "values": [[0, 9.0], [20, 2.5]],
        "real_halves": 0.5,
    }


def test_a_metric_that_is_not_finite_is_null_in_the_file(tmp_path) -> None:
    quality = replace(RESULTS.quality[0], values=[(0, math.nan), (20, math.inf)])
    path = write_results(tmp_path, replace(RESULTS, quality=[quality]))
    assert json.loads(path.read_text())["quality"][0]["values"] == [[0, None], [20, None]]
    (first, last) = read_results(path).quality[0].values
    assert (first[0], last[0]) == (0, 20)
    assert math.isnan(first[1])
    assert math.isnan(last[1])


def test_the_last_value_of_a_metric() -> None:
    assert RESULTS.last("frechet_distance") == RESULTS.last("frechet_distance", "cnn") == 2.5
    assert RESULTS.last("frechet_distance", weights="raw") == 3.5
    assert RESULTS.last("recall") is None
    assert RESULTS.last("frechet_distance", "inception") is None


def test_one_of_several_pairs_must_be_chosen() -> None:
    several = replace(RESULTS, pairs={"first": RESULTS.pair, "second": RESULTS.pair})
    with pytest.raises(ValueError, match="2 pairs; choose one of pairs: first, second"):
        _ = several.pair


def edited(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(schema=2), "its schema must be 1"),
        (lambda c: c.update(status="done"), "status=done must be one of finished, interrupted"),
        (lambda c: c.pop("pairs"), "pairs=None must be there"),
        (lambda c: c["pairs"][""].update(updates="20"), r"pairs\..updates=20 must be a int"),
        (lambda c: c["pairs"][""].update(updates=True), r"pairs\..updates=True must be a int"),
        (lambda c: c["quality"][0].update(values=[[0, "9"]]), r"quality\[0\].values\[0\]\[1\]=9 must be a number"),
        (lambda c: c["quality"][0].update(values=[[0]]), r"quality\[0\].values\[0\]=\[0\] must be a list of 2 values"),
    ],
)
def test_another_schema_is_rejected(edit: Any, message: str, tmp_path) -> None:
    path = write_results(tmp_path, RESULTS)
    edited(path, edit)
    with pytest.raises(ValueError, match=f"results.json does not hold the results of a run: .*{message}"):
        read_results(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "results", "[" * 100_000])
def test_a_file_of_something_else_is_rejected(content: str, tmp_path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="does not hold the results of a run"):
        read_results(tmp_path)


def test_a_key_of_a_later_version_is_ignored(tmp_path) -> None:
    path = write_results(tmp_path, RESULTS)
    edited(path, lambda content: content.update(more=1))
    assert read_results(path) == RESULTS


# ---- logs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [log_csv, log_events])
def test_a_run_without_the_file_is_read_from_its_logs(log, tmp_path) -> None:
    folder = log(tmp_path / "run")
    (folder / "config.yaml").write_text(
        "{seed_everything: 7, sparsity: {method: ddst, generator_density: 0.1, bounds: [0.2, 0.3], delta: null, "
        "interval: 20, explore_interval: null, probe_interval: auto, granularity: weight}}"
    )
    results = read_results(folder)
    assert (results.status, results.seed) == ("unknown", 7)
    pair = results.pair
    assert (pair.method, pair.updates, pair.planned_updates, pair.decisions) == ("ddst", 20, None, None)
    assert pair.settings == {"bounds": [0.2, 0.3], "interval": 20}  # what differs from the defaults
    assert pair.networks["discriminator"].final_density == pytest.approx(0.15)
    assert pair.balance_ratio == 0.5
    assert pair.flops == FlopsResults(ratio=0.25)
    assert results.last("frechet_distance") == 2.5
    assert results.last("frechet_distance", weights="raw") == 3.5


def test_the_logs_of_an_evaluation_are_no_run(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,frechet_distance/cnn,step\n0,2.5,0\n")
    with pytest.raises(ValueError, match=f"the logs in {tmp_path} are those of an evaluation"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("content", "method", "seed"),
    [
        ("{method: static, generator_density: 0.2, seed: 5}", "static", 5),
        ("{latent_dim: 64}", None, None),
        ("model: !!python/object:torch.nn.Linear {}", None, None),
        (None, None, None),
    ],
)
def test_settings_of_other_programs_come_from_logged_hyperparameters(content, method, seed, tmp_path) -> None:
    folder = log_csv(tmp_path)
    if content is not None:
        (folder / "hparams.yaml").write_text(content)
    results = read_results(folder)
    assert (results.pair.method, results.seed) == (method, seed)


def test_a_method_with_a_class_path_has_its_registered_name_and_what_differs_from_its_defaults(tmp_path) -> None:
    folder = log_csv(tmp_path)
    given = "generator_density: 0.1, delta: 0.02, schedule: cosine, signal: balance_ratio"
    method = f"{{class_path: lightning_ddst.methods.DDST, init_args: {{{given}}}}}"
    (folder / "config.yaml").write_text(f"sparsity: {{method: {method}, generator_density: null, delta: null}}")
    pair = read_results(folder).pair
    assert (pair.method, pair.settings) == ("ddst", {"delta": 0.02})
    method = "{class_path: mine.DDST, init_args: {generator_density: 0.1, schedule: linear}}"
    (folder / "config.yaml").write_text(f"sparsity: {{method: {method}, generator_density: null}}")
    pair = read_results(folder).pair
    assert (pair.method, pair.settings) == ("DDST", {"schedule": "linear"})


def test_the_results_come_before_the_logs(tmp_path) -> None:
    write_results(log_events(tmp_path), RESULTS)
    assert read_results(tmp_path) == RESULTS


# ---- comparable runs -----------------------------------------------------------------------------------

CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "GAN", "init_args": {"lr": 0.1}},
    "data": {"class_path": "Digits", "init_args": {"batch_size": 32}},
    "sparsity": {"method": "ddst"},
    "trainer": {
        "precision": None,
        "max_epochs": 5,
        "callbacks": [
            {"class_path": "lightning_ddst.GeneratorEMA", "init_args": {"decay": 0.9}},
            {"class_path": "lightning_ddst.RunSummary"},
        ],
    },
}


def configured(**changes: Any) -> RunResults:
    return replace(RESULTS, config=CONFIG | changes)


def test_runs_that_differ_in_sparsity_alone_are_comparable() -> None:
    assert is_comparable(RESULTS, paired(method="dense", settings={}, decisions=[]))
    trainer = CONFIG["trainer"] | {"default_root_dir": "here", "callbacks": CONFIG["trainer"]["callbacks"][:1]}
    assert is_comparable(configured(), configured(sparsity={"method": "dense"}, trainer=trainer))


@pytest.mark.parametrize(
    "other",
    [
        replace(RESULTS, seed=4),
        paired(updates=21),
        paired(networks={"generator": replace(NETWORK, maskable_weights=99), "discriminator": NETWORK}),
        replace(RESULTS, pairs={"first": RESULTS.pair, "second": RESULTS.pair}),
        replace(RESULTS, quality=[replace(RESULTS.quality[0], real_halves=0.6)]),  # other images
        replace(RESULTS, quality=[replace(RESULTS.quality[0], features="inception")]),
    ],
)
def test_other_runs_are_not_comparable(other: RunResults) -> None:
    assert is_comparable(RESULTS, RESULTS)
    assert not is_comparable(RESULTS, other)
    assert not is_comparable(other, RESULTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed_everything": 1},
        {"model": {"class_path": "GAN", "init_args": {"lr": 0.2}}},
        {"model": {"class_path": "Other", "init_args": {"lr": 0.1}}},
        {"data": {"class_path": "Digits", "init_args": {"batch_size": 16}}},
        {"trainer": {"precision": "16-mixed", "callbacks": CONFIG["trainer"]["callbacks"]}},
        {"trainer": {"precision": None, "callbacks": CONFIG["trainer"]["callbacks"][1:]}},
    ],
)
def test_configurations_with_other_training_are_not_comparable(changes: dict) -> None:
    assert not is_comparable(configured(), configured(**changes))
    assert not is_comparable(configured(**changes), configured())


def test_an_argument_that_another_version_does_not_know_is_ignored() -> None:
    newer = {"class_path": "GAN", "init_args": {"lr": 0.1, "fused": None}}
    assert is_comparable(configured(), configured(model=newer))


def default_run(monkeypatch, *args: str) -> RunResults:
    """The packaged reference's results with the configuration of a command."""
    cli = parsed(monkeypatch, *args)
    config = json.loads(json.dumps(cli.config.as_dict(), default=str))
    return replace(read_results(DEFAULT_CONFIG.parent / "digits_dense.json"), config=config)


@pytest.mark.parametrize(
    ("args", "comparable"),
    [
        ([], True),
        (["--sparsity.generator_density=0.05", "--trainer.enable_progress_bar=false"], True),
        (["--seed_everything=1"], False),
        (["--data.init_args.batch_size=16"], False),
        (["--trainer.devices=2"], False),
        (["--data=lightning_ddst.data.FashionMNISTDataModule", "--data.init_args.root=x"], False),
        (["--model.init_args.generator.init_args.width=8"], False),
        (["--model.init_args.generator_optimizer.init_args.lr=0.01"], False),
    ],
)
def test_the_packaged_dense_run_is_that_of_the_default_configuration(args, comparable, monkeypatch) -> None:
    reference = read_results(DEFAULT_CONFIG.parent / "digits_dense.json")
    assert reference.pair.method == "dense"
    assert is_comparable(default_run(monkeypatch, *args), reference) is comparable
