"""Runs every block of code on every page; a block that cannot run is marked in the page, in a comment before it."""

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import parsed
from pages import PAGES, ROOT, Block, blocks, commands
from PIL import Image
from toys import LATENT, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, cli
from lightning_ddst.balance import SIGNALS
from lightning_ddst.gan.augmentation import DIFF_AUGMENTS
from lightning_ddst.gan.losses import LOSSES
from lightning_ddst.methods import METHODS
from lightning_ddst.methods.masked_pair import density_of, saved_masks
from lightning_ddst.sparsity import DISTRIBUTIONS, GROWTH_RULES, SCHEDULES
from lightning_ddst.utils import config_arguments
from lightning_ddst.utils.config_arguments import DEFAULT_CONFIG

pytest.importorskip("onnxruntime", reason="the pages' commands write ONNX files, with the extra onnx")

LANGUAGES = {"bash", "python", "diff", "yaml"}
NOT_CODE = {"text", "{include}", "{toctree}", "{eval-rst}"}
NOTES = {"main job", "test command"}
PARSED = "parsed only: "
REGISTRIES: list[dict[str, Any]] = [METHODS, SIGNALS, GROWTH_RULES, DISTRIBUTIONS, SCHEDULES, LOSSES, DIFF_AUGMENTS]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


@pytest.fixture(autouse=True)
def registries_as_before() -> Iterator[None]:
    """Forgets what a page registers, and the modules that define it."""
    before = [(registry, dict(registry)) for registry in REGISTRIES]
    yield
    for registry, known in before:
        for name in registry.keys() - known.keys():
            del registry[name]
    for module in ("my_module", "my_rules"):
        sys.modules.pop(module, None)


def on(page: str, *languages: str) -> list[Block]:
    return [block for block in blocks(*languages) if block.page == page]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    every = re.findall(r"^```(\S+)$", "\n".join(path.read_text() for path in PAGES), re.MULTILINE)
    assert set(every) <= LANGUAGES | NOT_CODE
    assert len(every) == len(blocks(*LANGUAGES, *NOT_CODE))
    noted = {block.note for block in blocks(*LANGUAGES) if block.note}
    assert {note for note in noted if not note.startswith(PARSED)} == NOTES


# ---- commands ------------------------------------------------------------------------------------------


def small_default(folder: Path) -> Path:
    """The default configuration with a run of a second."""
    config = yaml.safe_load(DEFAULT_CONFIG.read_text())
    config["data"]["init_args"]["batches_per_epoch"] = 24
    config["trainer"] |= {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    config["sparsity"] |= {"interval": 8, "explore_interval": 8}
    for network in ("generator", "discriminator"):
        config["model"]["init_args"][network]["init_args"]["width"] = 4
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("SampleQuality"):
            callback["init_args"] |= {"samples": 100}
            callback["init_args"]["features"] |= {"init_args": {"epochs": 0}}
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``lightning-ddst fit`` leaves there."""
    folder = tmp_path_factory.mktemp("first_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command(patch, f"lightning-ddst fit --config {small_default(folder)}")
    return folder


@pytest.fixture
def beside_a_run(first_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: with a run, and with a default that takes a second."""
    folder = tmp_path / "here"
    shutil.copytree(first_run, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(config_arguments, "DEFAULT_CONFIG", folder / "my.yaml")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Runs the command with the arguments of a line."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    cli.main()


def runs(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Runs a line of a page, or sees to it that what it names is there where something else runs it."""
    words = shlex.split(line)
    if words[:2] == ["lightning-ddst", "sweep"]:  # tests/report/test_sweep_command.py runs one
        assert words[2] == "--densities"
        with monkeypatch.context() as patch:
            assert parsed(patch, *words[4:]).config
    elif words[0] == "lightning-ddst":
        before = len(list(Path("lightning_logs").iterdir()))
        command(monkeypatch, line)
        assert len(list(Path("lightning_logs").iterdir())) == before + (words[1] in ("fit", "validate"))
    elif words[:2] == ["python", "my_ddst.py"]:
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.syspath_prepend(Path.cwd())
        runpy.run_path(words[1], run_name="__main__")
    elif words[0] == "tensorboard":  # .ci/newcomer starts it
        assert list(Path(words[2]).rglob("events.out.tfevents.*"))
    elif "pytest" in words:
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
    else:
        assert line == "sphinx-build -W docs site"  # test_build.py


@pytest.mark.parametrize("page", [name for name in NAMES if on(name, "bash")])
def test_commands(page: str, beside_a_run: Path, monkeypatch, capsys) -> None:
    if page == "docs/extending.md":
        method, *_, script = on(page, "python")
        (rule,) = (block for block in on(page, "python") if "growing =" in block.text)
        Path("my_module.py").write_text(method.text)
        Path("my_rules.py").write_text(rule.text)
        Path("my_ddst.py").write_text(script.text)
    for block in on(page, "bash"):
        for line in commands(block):
            if block.note.startswith(PARSED):
                with monkeypatch.context() as patch:
                    assert parsed(patch, *shlex.split(line)[2:]).config
            elif block.note in NOTES:
                assert f"<!-- {block.note} -->" in (ROOT / ".ci/run").read_text() or block.note == "main job"
            else:
                runs(monkeypatch, line)


def test_the_exported_generator_loads(beside_a_run: Path, monkeypatch) -> None:
    (line,) = (line for line in commands(on("docs/export.md", "bash")[0]) if " export " in line)
    command(monkeypatch, line)
    written = {path.name for path in Path("lightning_logs/version_0/export").iterdir()}
    assert written == {"generator.safetensors", "generator.compressed.safetensors", "generator.onnx"}


# ---- Python --------------------------------------------------------------------------------------------


def quiet_trainer(**settings: Any) -> Any:
    return toy_trainer(*settings.pop("callbacks", ()), **({"max_epochs": 1} | settings))


@pytest.fixture
def names(beside_a_run: Path) -> dict[str, Any]:
    """Returns the names that pages assume: the reader's GAN, its data, and files of earlier runs."""
    gan, data = ToyGAN(), toy_data(2)
    quiet_trainer().fit(gan, data)
    torch.save({"state_dict": gan.state_dict(), "pytorch-lightning_version": "2.6.0"}, "dense.ckpt")
    sparse = quiet_trainer(callbacks=[DynamicSparsityCallback(0.2)])
    sparse.fit(gan, data)
    sparse.save_checkpoint("last.ckpt")
    Path("my_images").mkdir()
    for number in range(40):
        Image.effect_noise((8, 8), 50).save(f"my_images/{number}.png")
    return of_a_loop() | {
        "torch": torch,
        "Trainer": quiet_trainer,
        "DynamicSparsityCallback": DynamicSparsityCallback,
        "MyGAN": ToyGAN,
        "gan": gan,
        "my_gan": gan,
        "noise": torch.randn(4, LATENT),
        "data": data,
        "my_data": data,
        "trainer": quiet_trainer(max_epochs=2, callbacks=[DynamicSparsityCallback(0.2)]),
    }


def of_a_loop() -> dict[str, Any]:
    """Networks, optimizers, data and steps of a plain loop."""
    gan = ToyGAN()
    generator, discriminator = gan.networks()
    optimizers = dict(zip(("opt_g", "opt_d"), gan.configure_optimizers(), strict=True))

    def train_discriminator(real: torch.Tensor) -> None:
        optimizers["opt_d"].zero_grad()
        fake = generator(torch.randn(len(real), LATENT)).detach()
        (discriminator(fake) - discriminator(real)).tanh().mean().backward()
        optimizers["opt_d"].step()

    def train_generator(real: torch.Tensor) -> None:
        optimizers["opt_g"].zero_grad()
        (-discriminator(generator(torch.randn(len(real), LATENT)))).mean().backward()
        optimizers["opt_g"].step()

    steps = {"train_discriminator": train_discriminator, "train_generator": train_generator}
    networks = {"generator": generator, "discriminator": discriminator}
    return networks | optimizers | steps | {"loader": [real for (real,) in toy_data(20)], "epochs": 1}


def executed(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names after all Python on a page, and after what its changes of a program come to."""
    for block in on(page, "python", "diff"):
        code = block.text
        if block.language == "diff":
            kept = [line for line in code.splitlines() if not line.startswith("-")]
            code = "\n".join(line[1:] for line in kept)
        if "my_ddst.py" not in code:  # run as a command
            exec(compile("\n" * block.line + code, str(ROOT / page), "exec"), names)
    return names


def check_readme(names: dict[str, Any]) -> None:
    (callback,) = (c for c in names["trainer"].callbacks if isinstance(c, DynamicSparsityCallback))
    assert callback.generator_updates == 200
    assert callback.generator_density == pytest.approx(0.1, abs=1e-3)


def check_attach(names: dict[str, Any]) -> None:
    assert names["sparsity"].generator_density == pytest.approx(0.1, abs=1e-3)

    class Painter:
        device = "cpu"
        D = torch.nn.Linear(16, 1)

        class G:
            mapping = torch.nn.Linear(64, 8)
            synthesis = torch.nn.Linear(8, 16)

    real, fake = names["balance_scores"](Painter, {"image": torch.randn(5, 16)})
    assert (real.shape, fake.shape) == ((5, 1), (5, 1))
    painting = ToyGAN()  # of images of 4x4 pixels
    painting.generator.extend([torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 4, 4))])
    painting.discriminator.insert(0, torch.nn.Flatten())
    images = torch.utils.data.TensorDataset(torch.rand(16, 1, 4, 4) * 2 - 1)
    quiet_trainer(callbacks=[names["quality"]]).fit(painting, torch.utils.data.DataLoader(images, batch_size=8))
    history = names["quality"].history
    assert list(history) == ["frechet_distance", "precision", "recall"]
    assert all([at for at, _ in values] == [2] for values in history.values())
    assert names["SampledGAN"]().sample(3).shape == (3, 16)


def check_own_images(names: dict[str, Any]) -> None:
    assert (names["size"], names["channels"], names["gan"].generator_updates) == (8, 1, 20)


def check_loops(names: dict[str, Any]) -> None:
    assert names["logged"].keys() >= {5, 10, 15, 20}
    loaded = torch.load("last.ckpt", weights_only=True)["sparse"]
    assert density_of(saved_masks(loaded["networks"], "generator")) == pytest.approx(0.1, abs=1e-2)


def check_extending(names: dict[str, Any]) -> None:
    for sparsity in (names["as_object"], names["by_name"]):
        assert sparsity.settings == names["GMP"](generator_density=0.3)
        quiet_trainer(callbacks=[sparsity], max_epochs=30).fit(ToyGAN(), toy_data(2))
        assert sparsity.generator_density == pytest.approx(0.3, abs=1e-3)
    sparsity = names["steered"]
    quiet_trainer(callbacks=[sparsity], max_epochs=30).fit(ToyGAN(), toy_data(2))
    assert {decision.action for _, decision in sparsity.decisions} <= {"grow", "hold"}
    assert sparsity.decisions
    sparsity = names["growing"]
    quiet_trainer(callbacks=[sparsity], max_epochs=10).fit(ToyGAN(), toy_data(2))
    assert sparsity.networks()["generator"].coverage > sparsity.generator_density
    sparsity = names["controlled"]
    quiet_trainer(callbacks=[sparsity], max_epochs=10).fit(ToyGAN(), toy_data(2))
    assert sparsity.decisions
    assert all("margin" in decision.reason or "alpha" in decision.reason for _, decision in sparsity.decisions)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": check_readme,
    "docs/attach.md": check_attach,
    "docs/extending.md": check_extending,
    "docs/loops.md": check_loops,
    "docs/own_images.md": check_own_images,
}


@pytest.mark.parametrize("page", [name for name in NAMES if on(name, "python", "diff")])
def test_python(page: str, names: dict[str, Any], capsys) -> None:
    capsys.readouterr()
    done = executed(page, names)
    told = re.findall(r"^print\(.*\)  # ([^,\n]+)", "\n".join(b.text for b in on(page, "python")), re.MULTILINE)
    assert capsys.readouterr().out.split() == told
    if check := CHECKS.get(page):
        check(done)


def test_yaml(monkeypatch) -> None:
    (block,) = on("docs/experiments.md", "yaml")
    given = yaml.safe_load(block.text)
    made = parsed(monkeypatch, f"--trainer.callbacks={json.dumps(given)}").config.trainer.callbacks
    assert made[0].class_path == "lightning_ddst.SampleQuality"
    assert made[0].init_args.metrics == given[0]["init_args"]["metrics"]


def test_a_method_of_a_users_own(monkeypatch, tmp_path) -> None:
    method, *_ = on("docs/extending.md", "python")
    assert len(method.text.splitlines()) <= 45
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_module.py").write_text(method.text)
    (block,) = on("docs/extending.md", "yaml")
    Path("mine.yaml").write_text(block.text)
    config = parsed(monkeypatch, "--config", str(DEFAULT_CONFIG), "--config", "mine.yaml").config
    assert config.sparsity.method.class_path == "my_module.GMP"
    assert config.sparsity.method.init_args.as_dict() == {
        "generator_density": 0.3,
        "discriminator_density": None,
        "end": 0.5,
    }


@pytest.mark.parametrize("name", ["growing", "controlled"])
def test_ten_lines_are_enough(name: str) -> None:
    (block,) = (block for block in on("docs/extending.md", "python") if f"{name} =" in block.text)
    assert sum(bool(line.strip()) for line in block.text.splitlines()) <= 10
