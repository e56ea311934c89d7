"""The package's description is the same in all places."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import lightning_ddst
from lightning_ddst import cli

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_version_is_semantic_and_the_same_everywhere() -> None:
    version = lightning_ddst.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f'\nversion = "{version}"\n' in PYPROJECT
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert re.findall(r"^## (\d\S+\d)\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


def test_the_command_prints_its_version(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-ddst", "--version"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"lightning-ddst {lightning_ddst.__version__}\n"


def test_types_are_shipped() -> None:
    assert (Path(lightning_ddst.__file__).parent / "py.typed").read_text() == ""


def test_every_dependency_has_a_floor_and_a_reason() -> None:
    dependencies = PYPROJECT[PYPROJECT.index("dependencies = [") : PYPROJECT.index("[project.scripts]")]
    lines = [line for line in dependencies.splitlines() if line.startswith(" ") and "lightning-ddst[" not in line]
    names = {re.split(r"[>\[]", line.strip(' "'))[0] for line in lines}
    assert {"torch", "lightning", "torchmetrics", "jsonargparse", "onnx", "sphinx", "pytest", "uv"} <= names
    for line in lines:
        assert re.fullmatch(r' {4}"[\w-]+(\[\w+\])?>=\d[\d.]*",  # .+', line), line
