import io
import json
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from commands import TINY, parsed
from crashes import Signal
from torch import Tensor

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA, SampleQuality
from lightning_ddst.cli import SUBCOMMANDS, SparseGANCLI, make_cli
from lightning_ddst.data import DigitsDataModule
from lightning_ddst.models import SmallDiscriminator, SmallGenerator, trained_digits_cnn
from lightning_ddst.report.results import read_results
from lightning_ddst.utils.config_arguments import CONFIGS, DEFAULT_CONFIG

# Callbacks like the default ones; the features are not trained.
CALLBACKS = [
    {
        "class_path": "lightning_ddst.SampleQuality",
        "init_args": {
            "features": {"class_path": "lightning_ddst.models.trained_digits_cnn", "init_args": {"epochs": 0}},
            "name": "random_cnn",
            "samples": 100,
        },
    },
    {"class_path": "lightning_ddst.RunSummary"},
]


def tiny(folder: Path, callbacks: list | None = None, epochs: int = 1) -> list[str]:
    """Arguments that make the default experiment one of seconds: 12 generator updates an epoch."""
    return [
        f"--trainer.default_root_dir={folder}",
        f"--trainer.max_epochs={epochs}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.callbacks={json.dumps(callbacks or [])}",
        "--model.init_args.generator.init_args.width=4",
        "--model.init_args.discriminator.init_args.width=4",
        "--data.init_args.batches_per_epoch=12",
        "--sparsity.interval=6",
        "--sparsity.probe_interval=1",
        "--sparsity.explore_interval=4",
    ]


def sparsity_of(cli: SparseGANCLI) -> DynamicSparsityCallback:
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, DynamicSparsityCallback))
    return callback


def weights(cli: SparseGANCLI) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in cli.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# ---- what is made --------------------------------------------------------------------------------------


DEFAULT = yaml.safe_load(DEFAULT_CONFIG.read_text())


def test_without_arguments_the_digits_experiment_is_made(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trained_digits_cnn, "__defaults__", (0, 0))  # no epochs: only what is made counts here
    cli = make_cli([], run=False)
    assert isinstance(cli.model, GANModule)
    assert isinstance(cli.model.generator, SmallGenerator)
    assert isinstance(cli.model.discriminator, SmallDiscriminator)
    assert cli.model.sample(1).shape == (1, 1, 8, 8)
    optimizers, _ = cli.model.configure_optimizers()
    for optimizer, role in zip(optimizers, ("generator", "discriminator"), strict=True):
        assert isinstance(optimizer, torch.optim.Adam)
        expected = DEFAULT["model"]["init_args"][f"{role}_optimizer"]["init_args"]
        assert optimizer.param_groups[0]["lr"] == expected["lr"]
        assert list(optimizer.param_groups[0]["betas"]) == expected["betas"]
    assert isinstance(cli.datamodule, DigitsDataModule)
    expected = DEFAULT["data"]["init_args"]
    assert (cli.datamodule.batch_size, cli.datamodule.batches_per_epoch) == tuple(expected.values())
    sparsity = sparsity_of(cli)
    assert (sparsity.method, sparsity.generator_density) == ("ddst", 0.1)
    assert cli.trainer.max_epochs == DEFAULT["trainer"]["max_epochs"]
    assert cli.trainer.num_sanity_val_steps == float("inf")
    assert torch.initial_seed() == 0
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
    named = [callback["class_path"].split(".")[-1] for callback in DEFAULT["trainer"]["callbacks"]]
    assert [kind for kind in kinds if kind in named] == named
    assert {"SampleQuality", "SampleGrid", "RunSummary"} <= set(named)
    (frechet,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, SampleQuality))
    assert frechet.name == "digits_cnn"
    (features,) = (c["init_args"]["features"] for c in DEFAULT["trainer"]["callbacks"] if "Quality" in c["class_path"])
    assert features == {"class_path": "lightning_ddst.models.trained_digits_cnn"}


def test_options_override_the_default(tmp_path) -> None:
    options = [
        "--sparsity.generator_density=0.3",
        "--sparsity.discriminator_density=0.7",
        "--sparsity.method=sdst",
        "--sparsity.bounds=[0.3,0.4]",
        "--model.init_args.loss=wasserstein",
        "--model.init_args.discriminator_steps=5",
        "--data.init_args.batch_size=16",
        "--seed_everything=7",
    ]
    cli = make_cli([*tiny(tmp_path), *options], run=False)
    sparsity = sparsity_of(cli)
    assert (sparsity.method, sparsity.generator_density, sparsity.discriminator_density) == ("sdst", 0.3, 0.7)
    assert tuple(cli.config["sparsity"]["bounds"]) == (0.3, 0.4)
    assert cli.datamodule.batch_size == 16
    assert cli.datamodule.batches_per_epoch == 12
    assert torch.initial_seed() == 7
    init_args = cli.config["model"]["init_args"]
    assert (init_args["loss"], init_args["discriminator_steps"]) == ("wasserstein", 5)
    # What was not named stays.
    assert cli.model.latent_dim == 64


@pytest.mark.parametrize("form", [["--config", "FILE"], ["-c", "FILE"], ["--config=FILE"]])
def test_options_override_a_configuration_that_follows_them(form: list[str], tmp_path) -> None:
    (tmp_path / "own.yaml").write_text("{sparsity: {generator_density: 0.2, method: sdst}, seed_everything: 3}")
    own = [arg.replace("FILE", str(tmp_path / "own.yaml")) for arg in form]
    cli = make_cli(["--sparsity.generator_density", "0.3", *tiny(tmp_path), "--config=digits", *own], run=False)
    assert (sparsity_of(cli).method, sparsity_of(cli).generator_density) == ("sdst", 0.3)
    assert torch.initial_seed() == 3


@pytest.mark.parametrize("form", [["--config", "FILE"], ["-c", "FILE"]])
def test_with_a_configuration_of_ones_own_the_default_is_not_read(form: list[str], tmp_path) -> None:
    own = {
        "model": {
            "class_path": "lightning_ddst.GANModule",
            "init_args": {
                "generator": {"class_path": "lightning_ddst.models.SmallGenerator", "init_args": {"width": 4}},
                "discriminator": {"class_path": "lightning_ddst.models.SmallDiscriminator", "init_args": {"width": 4}},
            },
        },
        "data": {"class_path": "lightning_ddst.data.DigitsDataModule"},
        "sparsity": {"generator_density": 0.4},
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path)},
    }
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(own))
    cli = make_cli([arg.replace("FILE", str(file)) for arg in form], run=False)
    assert sparsity_of(cli).generator_density == 0.4
    assert cli.datamodule.batches_per_epoch is None
    assert cli.datamodule.batch_size == 64
    assert cli.trainer.max_epochs != DEFAULT["trainer"]["max_epochs"]
    assert not any(isinstance(callback, SampleQuality) for callback in cli.trainer.callbacks)
    (group,) = cli.model.configure_optimizers()[0][0].param_groups
    assert group["lr"] == 2e-4  # GANModule's own


# ---- what is run ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run of the command."""

    cli: SparseGANCLI
    folder: Path
    printed: str

    @property
    def checkpoint(self) -> Path:
        (path,) = self.folder.rglob("*.ckpt")
        return path

    @property
    def config(self) -> Path:
        (path,) = self.folder.rglob("config.yaml")
        return path

    @property
    def distance(self) -> SampleQuality:
        (callback,) = (each for each in self.cli.trainer.callbacks if isinstance(each, SampleQuality))
        return callback


def ran(folder: Path, *args: str) -> Run:
    printed = io.StringIO()
    with redirect_stdout(printed):
        cli = make_cli(args)
    return Run(cli, folder, printed.getvalue())


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("fit")
    return ran(folder, "fit", *tiny(folder, CALLBACKS))


def test_fit_trains_and_prints_the_table(fit: Run) -> None:
    sparsity = sparsity_of(fit.cli)
    assert sparsity.generator_updates == fit.cli.model.generator_updates == 12
    assert [update for update, _ in sparsity.decisions] == [6, 12]
    # 64*64 + 16*8*16 + 8*4*16 + 4*9 = 6692 weights of the generator.
    assert sparsity.generator_density == 669 / 6692
    rows = [line.strip() for line in fit.printed.splitlines()]
    assert any(row.startswith("method ") and row.endswith("ddst, 12 generator updates") for row in rows)
    assert any("density 0.1000 (669 of 6,692 weights active)" in row for row in rows)
    (_, first), (_, last) = fit.distance.history["frechet_distance"]
    for updates, value in ((0, first), (12, last)):
        assert any(re.fullmatch(rf"after {updates} generator updates +{value:.4g}", row) for row in rows)
    assert rows[-1].endswith(f"tensorboard --logdir {fit.folder / 'lightning_logs' / 'version_0'}")


def test_fit_saves_a_configuration_that_reproduces_the_run(fit: Run, tmp_path) -> None:
    again = ran(tmp_path, "fit", f"--config={fit.config}", f"--trainer.default_root_dir={tmp_path}")
    assert same(weights(again.cli), weights(fit.cli))
    assert again.distance.history["frechet_distance"] == fit.distance.history["frechet_distance"]


def test_a_run_can_be_resumed(fit: Run, tmp_path) -> None:
    resumed = ran(tmp_path, "fit", *tiny(tmp_path, CALLBACKS, epochs=2), f"--ckpt_path={fit.checkpoint}")
    sparsity = sparsity_of(resumed.cli)
    assert sparsity.generator_updates == resumed.cli.model.generator_updates == 24
    assert [update for update, _ in sparsity.decisions] == [6, 12, 18, 24]
    assert sparsity.decisions[:2] == sparsity_of(fit.cli).decisions
    assert resumed.distance.history["frechet_distance"][-1][0] == 24
    assert "ddst, 24 generator updates" in resumed.printed


def test_an_interrupted_run_resumes_as_if_uninterrupted(tmp_path) -> None:
    whole = ran(tmp_path / "whole", "fit", *tiny(tmp_path / "whole", CALLBACKS, epochs=2))
    cli = make_cli(tiny(tmp_path / "cut", CALLBACKS, epochs=2), run=False)
    cli.trainer.callbacks.insert(0, Signal(signal.SIGINT, batch=7))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        cli.trainer.fit(cli.model, cli.datamodule)
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    (checkpoint,) = (tmp_path / "cut").rglob("interrupted.ckpt")
    arguments = [*tiny(tmp_path / "resumed", CALLBACKS, epochs=2), f"--ckpt_path={checkpoint}"]
    resumed = ran(tmp_path / "resumed", "fit", *arguments)
    assert same(weights(resumed.cli), weights(whole.cli))
    assert sparsity_of(resumed.cli).decisions == sparsity_of(whole.cli).decisions
    assert resumed.distance.history["frechet_distance"] == whole.distance.history["frechet_distance"]


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_a_checkpoint_can_be_evaluated(subcommand: str, fit: Run, tmp_path) -> None:
    # With the run's options, or with the configuration it saved.
    options = tiny(tmp_path, CALLBACKS) if subcommand == "validate" else [f"--config={fit.config}"]
    place = [f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={fit.checkpoint}"]
    evaluated = ran(tmp_path, subcommand, *options, *place)
    assert same(weights(evaluated.cli), weights(fit.cli))
    updates, distance = evaluated.distance.history["frechet_distance"][-1]
    assert distance == pytest.approx(fit.distance.history["frechet_distance"][-1][1])
    assert updates == 12
    assert "frechet_distance/random_cnn" in evaluated.printed


def test_a_checkpoint_predicts_images(fit: Run, tmp_path) -> None:
    predicted = ran(tmp_path, "predict", *tiny(tmp_path), f"--ckpt_path={fit.checkpoint}")
    images = torch.cat(predicted.cli.trainer.predict_loop.predictions)
    assert images.shape == (1797, 1, 8, 8)
    assert images.std() > 0.01
    assert same(weights(predicted.cli), weights(fit.cli))


def test_the_checkpoint_of_a_run_loads_without_the_command(fit: Run) -> None:
    state = torch.load(fit.checkpoint, weights_only=True)["state_dict"]
    gan = GANModule(SmallGenerator(width=4), SmallDiscriminator(width=4))
    gan.load_state_dict(state)
    assert gan.generator.layers[0].weight.count_nonzero() < gan.generator.layers[0].weight.numel() / 2


@pytest.mark.parametrize(
    "option", [["--trainer.logger=CSVLogger"], ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]]
)
def test_a_logger_that_is_named_alone_logs_to_the_root_folder(option: list[str], tmp_path) -> None:
    run = ran(tmp_path, "fit", *tiny(tmp_path), *option)
    folder = tmp_path / "lightning_logs" / "version_0"
    assert {"metrics.csv", "config.yaml", "results.json"} <= {path.name for path in folder.iterdir()}
    results = read_results(folder)
    assert (results.status, results.seed, results.pair.updates) == ("finished", 0, 12)
    assert results.config["sparsity"]["interval"] == 6
    assert results.config["trainer"]["logger"]["init_args"]["save_dir"] == str(tmp_path)
    assert run.cli.trainer.logger.save_dir == str(tmp_path)


def test_a_logger_with_a_folder_keeps_it(monkeypatch) -> None:
    config = parsed(monkeypatch, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=there").config
    assert config.trainer.logger.init_args.save_dir == "there"


def test_the_dense_pair_is_one_option_away(tmp_path) -> None:
    run = ran(tmp_path, "fit", *tiny(tmp_path, CALLBACKS[1:]), "--sparsity.method=dense")
    assert "dense, 12 generator updates" in run.printed
    assert "density 1.0000 (6,692 of 6,692 weights active)" in run.printed


def test_an_average_can_be_added(tmp_path) -> None:
    run = ran(tmp_path, "fit", *tiny(tmp_path, [{"class_path": "lightning_ddst.GeneratorEMA"}]))
    (ema,) = (callback for callback in run.cli.trainer.callbacks if isinstance(callback, GeneratorEMA))
    assert ema.averages()
    assert "GeneratorEMA" in torch.load(run.checkpoint, weights_only=True)["callbacks"]


# ---- what is refused, and help -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        # Of a wrong kind.
        ("--sparsity.generator_density=much", "generator_density"),
        ("--sparsity.method=rigl", "method"),
        ("--model.init_args.loss=best", "loss"),
        # Out of range.
        ("--sparsity.generator_density=2", "generator_density=2.0 must be in (0, 1]"),
        ("--sparsity.growth=best", "growth='best' is unknown; allowed are random, gradient, momentum"),
        ("--model.init_args.generator.init_args.image_size=12", "image_size=12 must be a power of 2, at least 8"),
        ("--data.init_args.batch_size=0", "batch_size=0 must be an integer, at least 1"),
    ],
)
def test_bad_values_end_with_a_message(option: str, message: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        make_cli(["fit", *tiny(tmp_path), option])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: \xff", "not a YAML file"),
        (b"model: &a [*a]", "more than 100,000 values"),
        (b"model: !!python/object/apply:os.system [touch called]", "not a YAML file"),
    ],
)
def test_a_file_that_is_no_configuration_ends_with_one_line(content, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        make_cli(["fit", "--config", "own.yaml"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-ddst: error: own.yaml: it ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


def test_an_unknown_key_of_a_configuration_is_rejected(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(TINY + "\nnothing_known: 1\n")
    with pytest.raises(SystemExit) as end:
        make_cli(["fit", "--config", "own.yaml"])
    assert end.value.code == 2
    assert "nothing_known" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


EVIL = {"class_path": "os.system", "init_args": {"command": "touch called"}}
BAD_OPTIMIZER = "must be a subclass of torch.optim.Optimizer, such as torch.optim.Adam."


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("generator_optimizer", EVIL, f"generator_optimizer='os.system' {BAD_OPTIMIZER}"),
        ("discriminator_optimizer", "os.system", f"discriminator_optimizer='os.system' {BAD_OPTIMIZER}"),
        (
            "generator_optimizer",
            {"class_path": "torch.nn.Linear"},
            f"generator_optimizer='torch.nn.Linear' {BAD_OPTIMIZER}",
        ),
        ("generator", EVIL, "generator='os.system' must be a class, or a function that is annotated"),
    ],
)
@pytest.mark.parametrize("by", ["file", "option"])
def test_a_function_in_the_place_of_a_class_is_never_called(
    place: str, value: dict | str, message: str, by: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(DEFAULT_CONFIG.read_text())
    if by == "file":
        content["model"]["init_args"][place] = value
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    option = [f"--model.init_args.{place}={json.dumps(value)}"] if by == "option" else []
    with pytest.raises(SystemExit) as end:
        make_cli(["fit", "--config=own.yaml", *option])
    assert end.value.code == 2
    error = capsys.readouterr().err
    if by == "file":
        (line,) = error.splitlines()
        assert line.startswith("lightning-ddst: error: own.yaml: model.init_args.")
        assert message in line
    else:
        assert "os.system" in error or "Linear" in error
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


@pytest.mark.parametrize("optimizer", ["lightning_ddst.gan.module.paper_adam", "torch.optim.AdamW"])
def test_functions_that_return_optimizers_and_classes_by_name_are_allowed(optimizer: str, tmp_path) -> None:
    content = yaml.safe_load(DEFAULT_CONFIG.read_text())
    del content["trainer"]["callbacks"]
    content["model"]["init_args"]["generator_optimizer"] = optimizer
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    cli = make_cli(["--config", str(tmp_path / "own.yaml"), *tiny(tmp_path)], run=False)
    (first, _), _ = cli.model.configure_optimizers()
    assert type(first) is (torch.optim.Adam if "paper" in optimizer else torch.optim.AdamW)


def helped(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        make_cli(args)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_a_subcommand_begins_with_sparsity(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = helped(capsys, "fit", "--help").partition("options:")[2]
    places = [text.index(f"--{name} ") for name in ("sparsity.generator_density", "model", "data", "ckpt_path")]
    assert places[0] == min(places)
    assert text.index("--trainer.max_epochs") > places[0]
    # The callback's own documentation.
    assert "active over maskable weights" in " ".join(text.split())
    assert set(re.findall(r"^  (\w+)  +", text.partition("Configurations for --config")[2], re.MULTILINE)) == {*CONFIGS}
    assert "lightning-ddst fit --config paper --config cifar10_sngan" in text
    own = text.partition("\nExamples:\n")[2].splitlines()
    # A command is not wrapped.
    assert [line for line in own if len(line) > 80] == [
        line for line in own if line.startswith("    lightning-ddst val")
    ]
    # The Trainer's other arguments are in a help of their own.
    assert 5 < text.count("\n  --trainer.") < 20
    assert "limit_test_batches" not in text
    assert "--trainer.limit_test_batches" in helped(capsys, "fit", "--trainer.help")


def test_the_help_lists_all_subcommands(capsys) -> None:
    text = helped(capsys, "--help")
    listed = re.findall(r"^    (\w+)  +\w", text, re.MULTILINE)
    assert listed == ["fit", "validate", "test", "predict", *SUBCOMMANDS]


def test_the_configuration_can_be_printed(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        make_cli(["fit", "--sparsity.delta=0.02", "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["sparsity"]["delta"] == 0.02
    assert config["sparsity"]["generator_density"] == 0.1
    assert config["data"] == DEFAULT["data"]


def test_the_command_is_installed_and_shows_its_help() -> None:
    command = Path(sys.executable).with_name("lightning-ddst")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith("usage: lightning-ddst")
    assert all(subcommand in done.stdout for subcommand in ("fit", "validate", "test", "predict", *SUBCOMMANDS))
