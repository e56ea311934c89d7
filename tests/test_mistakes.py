"""Mistakes on the command line: each ends with one line on stderr, status 2 and no new file."""

import sys
import warnings

import pytest
import torch
from commands import TINY

from lightning_ddst import cli
from lightning_ddst.models import SmallGenerator

MISTAKES = [
    # ---- names of arguments ----------------------------------------------------------------------------
    ("fit --sparsity.generatr_density 0.1", "--sparsity.generatr_density=0.1", "--sparsity.generator_density"),
    ("validate --trainer.max_epoch 3", "--trainer.max_epoch=3", "--trainer.max_epochs"),
    ("test --sparsty.generator_density=0.1", "--sparsty.generator_density=0.1", "--sparsity.generator_density"),
    ("predict --ckpt_pat run.ckpt", "--ckpt_pat=run.ckpt", "--ckpt_path"),
    ("fit --generator_density 0.1", "--generator_density=0.1", "--sparsity.generator_density"),
    ("fit --density 0.1", "--density=0.1", "--sparsity.generator_density"),
    ("fit --trainer.epochs 3", "--trainer.epochs=3", "--trainer.max_epochs"),
    ("fit --dat.root folder", "--dat.root=folder", "--data.root"),
    ("fit --model.init_args.los hinge", "--model.los=hinge", "'loss'"),
    ("fit --model.generator.widht 4", "--model.generator.widht=4", "'width'"),
    ("fit --model.generator_optimizer.lrr 0.1", "--model.generator_optimizer.lrr=0.1", "'lr'"),
    ("fit --data.batchsize 4", "--data.batchsize=4", "'batch_size'"),
    ("fit 0.1", "'0.1'", None),
    ("fti", "'fti'", "'fit'"),
    ("", "subcommand is missing", None),
    ("plot RUN --outptu folder", "--outptu=folder", "--output"),
    ("export run.ckpt --fromats onnx", "--fromats=onnx", "--formats"),
    # ---- types and choices -----------------------------------------------------------------------------
    ("fit --sparsity.generator_density", "--sparsity.generator_density", None),
    ("fit --sparsity.generator_density much", "--sparsity.generator_density=much must be a number or null.", None),
    ("fit --sparsity.interval 2.5", "--sparsity.interval=2.5 must be an integer or null.", None),
    ("fit --sparsity.bounds automatic", "--sparsity.bounds=automatic must be [a number, a number], 'auto'", "'auto'"),
    (
        "fit --trainer.enable_progress_bar maybe",
        "--trainer.enable_progress_bar=maybe must be true, false or null.",
        None,
    ),
    ("fit --data.batch_size big", "--data.batch_size=big must be an integer.", None),
    ("fit --model.generator_optimizer.lr fast", "--model.generator_optimizer.lr=fast must be a number", None),
    ("fit --sparsity.estimator ratio_of_mean", "must be 'ratio_of_means' or 'mean_of_ratios'.", "'ratio_of_means'"),
    ("export run.ckpt --formats onx", "--formats=onx is unknown; allowed are dense, compressed, onnx,", "'onnx'"),
    # ---- classes ---------------------------------------------------------------------------------------
    ("fit --model GANModul", "--model=GANModul", "'GANModule'"),
    (
        "fit --data lightning_ddst.data.DigitDataModule",
        "lightning_ddst.data has no",
        "lightning_ddst.data.DigitsDataModule",
    ),
    ("fit --model nowhere.GAN", "No module named 'nowhere'", None),
    (
        "fit --sparsity.method nowhere.GMP --sparsity.method.generator_density 0.3",
        "--sparsity.method: No module named 'nowhere'.",
        None,
    ),
    ("fit --data lightning_ddst.GANModule", "--data=lightning_ddst.GANModule is not a subclass of", None),
    ("fit --model.generator_optimizer torch.optim.Adm", "torch.optim has no Adm", "torch.optim.Adam"),
    (
        "fit --data lightning_ddst.data.CIFAR10DataModule",
        "--data.root must be given: CIFAR10DataModule needs it.",
        None,
    ),
    # ---- values, of which the package says what is allowed ---------------------------------------------
    ("fit --sparsity.method dst", "method='dst' is unknown; allowed are ", "'sdst'"),
    ("fit --sparsity.granularity chanel", "granularity='chanel' is unknown; allowed are ", "'channel'"),
    ("fit --sparsity.scope globl", "scope='globl' is unknown; allowed are global, layer.", "'global'"),
    ("fit --model.loss hing", "loss='hing' is unknown; allowed are ", "'hinge'"),
    ("fit --sparsity.generator_density 2", "generator_density=2.0 must be in (0, 1].", None),
    ("fit --trainer.max_epochs -5 --trainer.callbacks null", "`max_epochs` must be", None),
    # ---- files -----------------------------------------------------------------------------------------
    ("fit --config none.yaml", "--config=none.yaml: no such file.", None),
    ("fit --config cifar10_sngam", "--config=cifar10_sngam is neither a file nor one of digits, ", "'cifar10_sngan'"),
    ("fit --config ramp", "data and model are missing; --help shows all arguments. Configurations of a method", None),
    ("fit --config list.yaml", "list.yaml: it must hold arguments by name", None),
    ("fit --config key.yaml", "--sparsity.intervall", "--sparsity.interval"),
    ("fit --config empty.yaml", "--sparsity=None must hold arguments by name", None),
    ("fit --config ratio.yaml", "--sparsity.granularity=124 must be text. YAML read it as a number", None),
    (
        "fit --config class.yaml",
        "--model.generator: lightning_ddst.models has no",
        "lightning_ddst.models.SmallGenerator",
    ),
    ("fit --config metric.yaml", "--trainer.callbacks.metrics=frechet_distnace must be", "'frechet_distance'"),
    ("fit --ckpt_path none.ckpt", "--ckpt_path=none.ckpt: no such file.", None),
    ("fit --ckpt_path .", "--ckpt_path=.: it is a folder without checkpoints.", None),
    ("fit --config images --data.root list.yaml", "root=list.yaml is a file; it must be a folder of images", None),
    ("fit --data lightning_ddst.data.CIFAR10DataModule --data.root none", "--data.root=none: neither ", None),
    ("plot none", "none", None),
    ("export none.ckpt", "CKPT=none.ckpt: no such file.", None),
]
"""Arguments, text of the error, and the name that it proposes."""

METRIC = """
  callbacks:
    - class_path: lightning_ddst.SampleQuality
      init_args: {features: {class_path: torch.nn.Flatten}, name: pixels, metrics: [frechet_distnace]}
"""
FILES = {
    "list.yaml": "- 1",
    "key.yaml": TINY.replace("interval: 10", "intervall: 10"),
    "empty.yaml": TINY.replace("{generator_density: 0.1, interval: 10}", ""),
    "ratio.yaml": TINY.replace("interval: 10", "granularity: 2:4"),
    "class.yaml": TINY.replace("SmallGenerator", "SmalGenerator"),
    "metric.yaml": TINY + METRIC,
}


def run(monkeypatch, capsys, line: str) -> tuple[int, str]:
    """Runs the command; returns its status and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["lightning-ddst", *line.split()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit) as end:
            cli.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("line", "text", "nearest"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_ends_with_one_line(line, text, nearest, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    status, error = run(monkeypatch, capsys, line)
    assert status == 2
    (told,) = error.splitlines()
    assert told.startswith("lightning-ddst: error: ")
    assert text in told
    assert (told.partition("Did you mean ")[2] or None) == (nearest and f"{nearest}?")
    assert {path.name for path in tmp_path.iterdir()} == {*FILES}


def test_debug_adds_the_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, error = run(monkeypatch, capsys, "fit --debug --sparsity.generator_density 2")
    assert status == 2
    assert error.startswith("lightning-ddst: error: generator_density=2.0 must be in (0, 1].\nTraceback")
    assert "check_density" in error


def test_an_interruption_before_training_is_one_line(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_cli", interrupted)
    assert run(monkeypatch, capsys, "fit") == (130, "lightning-ddst: error: interrupted.\n")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The line of a run, in an empty folder with its configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return "fit --config tiny.yaml --data.batches_per_epoch 2"


def test_the_packages_own_errors_of_a_run_are_one_line_with_status_1(tiny, monkeypatch, capsys):
    status, error = run(monkeypatch, capsys, f"{tiny} --sparsity.generator maker")
    (told,) = [line for line in error.splitlines() if "error" in line]
    assert status == 1
    assert told.startswith("lightning-ddst: error: generator='maker' is not a submodule of GANModule")
    assert "Traceback" not in error


@pytest.mark.parametrize(("logger", "folder"), [("CSVLogger", "file/lightning_logs"), ("false", "file")])
def test_a_folder_that_cannot_be_written_to_is_one_line_with_status_1(
    logger, folder, tiny, monkeypatch, capsys, tmp_path
):
    (tmp_path / "file").touch()
    status, error = run(monkeypatch, capsys, f"{tiny} --trainer.default_root_dir file --trainer.logger {logger}")
    (told,) = [line for line in error.splitlines() if "error" in line]
    assert status == 1
    assert f"the run cannot write to {folder}: " in told
    assert "--trainer.default_root_dir" in told


def test_a_checkpoint_of_another_model_is_one_line_with_status_1(tiny, monkeypatch, capsys, tmp_path):
    model = cli.make_cli(["--config", "tiny.yaml"], run=False).model
    state = {name: value for name, value in model.state_dict().items() if "generator.layers.0" not in name}
    others = {"epoch": 0, "global_step": 0, "callbacks": {}, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5.3"} | others, tmp_path / "other.ckpt")
    status, error = run(monkeypatch, capsys, f"{tiny} --ckpt_path other.ckpt")
    (told,) = [line for line in error.splitlines() if "error" in line]
    assert status == 1
    assert told.startswith("lightning-ddst: error: the checkpoint does not fit the model: ")
    assert '"generator.layers.0.weight"' in told


def broken(*_):
    raise RuntimeError("of other code")


def test_an_error_of_other_code_keeps_its_traceback(tiny, monkeypatch):
    monkeypatch.setattr(SmallGenerator, "forward", broken)
    monkeypatch.setattr(sys, "argv", ["lightning-ddst", *tiny.split()])
    with pytest.raises(RuntimeError, match="of other code"):
        cli.main()
