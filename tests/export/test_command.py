"""The command ``lightning-ddst export``."""

import re
import sys

import pytest
import torch
import yaml
from commands import TINY
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from safetensors.torch import load_file
from torch.optim import Adam

from lightning_ddst import cli, export
from lightning_ddst.export.command import export as export_run
from lightning_ddst.models import SmallGenerator

AVERAGED = "  callbacks: [{class_path: lightning_ddst.GeneratorEMA, init_args: {decay: 0.9}}]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, with its config.yaml and checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(TINY + AVERAGED)
    cli.make_cli(["fit", "--config", str(folder / "tiny.yaml"), "--trainer.default_root_dir", str(folder)])
    return folder / "lightning_logs" / "version_0"


@pytest.fixture
def checkpoint(run):
    (path,) = (run / "checkpoints").glob("*.ckpt")
    return path


def test_a_runs_generator_is_written_next_to_its_config(run, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ddst", "export", str(checkpoint)])
    cli.main()
    dense, small = run / "export" / "generator.safetensors", run / "export" / "generator.compressed.safetensors"
    assert sorted((run / "export").iterdir()) == sorted([dense, small])
    *lines, smaller, speed = capsys.readouterr().out.splitlines()
    assert smaller.startswith("no channel could be removed: all 28 are in use.")
    assert re.search(r"nothing else is faster|take this share of their dense time: layers.0 0", speed)
    size = sum(value.nbytes for value in load_file(dense).values())
    for path, line in zip((dense, small), lines, strict=True):
        held = path.stat().st_size
        assert line == f"{path}  {held / 1e6:.3f} MB, {held / size:.1%} of the dense weights"
    averages = next(
        state for key, state in torch.load(checkpoint)["callbacks"].items() if key.startswith("GeneratorEMA")
    )
    for state in (load_file(dense), export.load_compressed(small)):
        assert all(torch.equal(state[name], value) for name, value in averages["averages"].items())


def test_own_weights_to_another_folder_and_onnx(checkpoint, tmp_path):
    pytest.importorskip("onnxruntime")
    paths = export_run(
        [str(checkpoint), "--weights", "raw", "--output", str(tmp_path / "new"), "--formats", "dense", "onnx"]
    )
    assert [path.name for path in paths] == ["generator.safetensors", "generator.onnx"]
    assert all(path.parent == tmp_path / "new" and path.is_file() for path in paths)
    weights = torch.load(checkpoint)["state_dict"]
    assert all(torch.equal(value, weights[f"generator.{name}"]) for name, value in load_file(paths[0]).items())


def test_a_run_with_masks_of_channels_has_smaller_layers_and_prints_the_gain(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    tiny = TINY.replace("generator_density: 0.1", "generator_density: 0.3, granularity: channel")
    (tmp_path / "tiny.yaml").write_text(tiny + AVERAGED)
    cli.make_cli(["fit", "--config", str(tmp_path / "tiny.yaml"), "--trainer.default_root_dir", str(tmp_path)])
    (checkpoint,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    capsys.readouterr()
    formats = ["dense", "compressed", "onnx", "program"]
    dense, small, onnx, program = export_run([str(checkpoint), "--formats", *formats])
    *files, smaller, by_onnx, _ = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in files if "MB" in line] == list(map(str, (dense, small, onnx, program)))
    assert re.fullmatch(
        r".* its layers are smaller, 11 of 28 channels: at 16 images it takes \d\.\d\d of the time",
        smaller,
    )
    assert re.fullmatch(r"onnxruntime takes \d\.\d\d of torch's time for it", by_onnx)
    generator = SmallGenerator(width=4).eval()
    generator.load_state_dict(load_file(dense))
    noise = torch.randn(3, 64)
    images = generator(noise).detach()
    torch.testing.assert_close(torch.export.load(program).module()(noise), images, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(onnx)
    (by_onnx,) = session.run(None, {session.get_inputs()[0].name: noise.numpy()})
    torch.testing.assert_close(torch.from_numpy(by_onnx), images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.ckpt"], "CKPT=none.ckpt: no such file."),
        (["none.ckpt", "--config", "run.yaml"], "CKPT=none.ckpt: no such file."),
        (["run.yaml"], "there is no config.yaml in "),
        (["run.yaml", "--config", "run.yaml"], "run.yaml is damaged, or not a checkpoint"),
        (
            ["CKPT", "--config", "bad.yaml"],
            "bad.yaml is not the configuration of a run: it is not a YAML file: while scanning",
        ),
        (["CKPT", "--config", "none.yaml"], "--config=none.yaml: no such file."),
        (["CKPT", "--config", "unknown.yaml"], "unknown.yaml describes no module: --model"),
        (["CKPT", "--config", "empty.yaml"], "empty.yaml is not the configuration of a run: it has no model"),
        (["CKPT", "--config", "wider.yaml"], "is of another generator than this SmallGenerator"),
        (["CKPT", "--generator", "maker"], "generator='maker' is not a submodule of GANModule"),
        (["CKPT", "--output", "file/folder"], "nothing can be written to file/folder"),
        (["CKPT", "--formats", "gguf"], "gguf"),
    ],
)
def test_bad_arguments_end_the_process_and_leave_no_file(
    run, checkpoint, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(TINY)
    (tmp_path / "wider.yaml").write_text(TINY.replace("width: 4", "width: 5"))
    (tmp_path / "empty.yaml").write_text("trainer: {}")
    (tmp_path / "bad.yaml").write_text("model: {'")
    (tmp_path / "unknown.yaml").write_text(TINY.replace("GANModule", "NoSuchModule"))
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as error:
        export_run([str(checkpoint) if argument == "CKPT" else argument for argument in arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


class InDict(SmallGenerator):
    """A generator that returns images, and the noise that they are of."""

    def forward(self, z, labels=None):
        return {"image": super().forward(z, labels), "z": z}


def test_the_images_of_a_dict_are_named(run, checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "users", sys.modules[__name__])
    monkeypatch.setattr(InDict, "__module__", "users")
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["model"]["init_args"]["generator"]["class_path"] = "users.InDict"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    arguments = [str(checkpoint), "--config", str(tmp_path / "config.yaml"), "--formats", "dense", "program", "onnx"]
    with pytest.raises(SystemExit):
        export_run(arguments)
    assert "output=None: InDict returns 2 tensors, and one is written; name it, such as" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    dense, program, _ = export_run([*arguments, "--generator_output", "image"])
    generator = SmallGenerator(width=4).eval()
    generator.load_state_dict(load_file(dense))
    noise = torch.randn(3, 64)
    torch.testing.assert_close(torch.export.load(program).module()(noise), generator(noise).detach())


@pytest.mark.parametrize("place", ["sparsity", "callbacks"])
def test_a_generator_of_several_parts_is_exported_part_by_part(place, checkpoint, tmp_path, capsys):
    content = yaml.safe_load(TINY)
    content.setdefault("sparsity", {})["generator"] = ["encoder", "decoder"] if place == "sparsity" else None
    if place == "callbacks":
        callback = {
            "class_path": "lightning_ddst.DynamicSparsityCallback",
            "init_args": {"generator": ["encoder", "decoder"]},
        }
        content["trainer"]["callbacks"] = [callback]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        export_run([str(checkpoint), "--config", str(tmp_path / "config.yaml")])
    message = "generator has several parts, encoder, decoder: export one after the other, with --generator encoder and"
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


class Optimized(LightningModule):
    """A user's own module, which needs an optimizer and a schedule."""

    def __init__(
        self, size: int, optimizer: OptimizerCallable, schedule: LRSchedulerCallable, other: OptimizerCallable = Adam
    ) -> None:
        super().__init__()
        self.generator = torch.nn.Linear(size, 2)
        self.made = (optimizer, schedule, other)


def test_a_generator_is_exported_without_optimizers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "users", sys.modules[__name__])
    monkeypatch.setattr(Optimized, "__module__", "users")
    touches = {"class_path": "torch.optim.no_such_optimizer"}
    arguments = {"size": 3, "optimizer": touches, "schedule": touches, "other": touches}
    config = {"model": {"class_path": "users.Optimized", "init_args": arguments}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    weight = torch.arange(6.0).view(2, 3)
    torch.save({"state_dict": {"generator.weight": weight, "generator.bias": torch.zeros(2)}}, tmp_path / "run.ckpt")
    path, _ = export_run([str(tmp_path / "run.ckpt"), "--weights", "raw"])
    assert torch.equal(load_file(path)["weight"], weight)


@pytest.mark.parametrize("place", ["generator_optimizer", "discriminator_optimizer", "generator", "loss"])
def test_no_function_that_a_configuration_names_is_called(place, checkpoint, tmp_path, capsys):
    content = yaml.safe_load(TINY)
    command = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path / 'called'}"}}
    content["model"]["init_args"][place] = command
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as end:
        export_run([str(checkpoint), "--config", str(tmp_path / "config.yaml")])
    assert end.value.code == 2
    message = f"error: model.init_args.{place}='os.system' must be a "
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
