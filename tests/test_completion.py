"""Completion of the command's arguments in a shell, by the script of ``lightning-ddst completion``."""

import subprocess
import sys

import pytest

from lightning_ddst.cli import SUBCOMMANDS, completion
from lightning_ddst.utils.config_arguments import CONFIGS


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", printed.append)
        completion(["bash"])
    path = tmp_path_factory.mktemp("completion") / "script"
    path.write_text("\n".join(printed))
    return path


def completed(script, folder, *words):
    """The words that bash offers for the last of some words after ``lightning-ddst``."""
    lines = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_lightning_ddst; printf "%s\\n" "${COMPREPLY[@]}"'
    bash = ["bash", "-c", f"source {script}; {lines}", "bash", "lightning-ddst", *words]
    return {*subprocess.run(bash, cwd=folder, capture_output=True, text=True, check=True).stdout.split()}


def test_subcommands_are_completed(script, tmp_path) -> None:
    assert completed(script, tmp_path, "") == {"fit", "validate", "test", "predict", *SUBCOMMANDS}
    assert completed(script, tmp_path, "co") == {"compare", "completion"}


@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_options_are_completed(subcommand, script, tmp_path) -> None:
    assert completed(script, tmp_path, subcommand, "--sparsity.generator_d") == {"--sparsity.generator_density"}
    given = (subcommand, "--sparsity.generator_density", "0.1")
    assert completed(script, tmp_path, *given, "--trainer.max_") == {
        *("--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"),
    }


def test_options_and_choices_of_other_subcommands_are_completed(script, tmp_path) -> None:
    assert completed(script, tmp_path, "export", "run.ckpt", "--gen") == {"--generator", "--generator_output"}
    assert completed(script, tmp_path, "compare", "--format", "m") == {"md"}
    assert completed(script, tmp_path, "completion", "") == {"bash", "zsh"}


def test_configurations_are_completed_by_name_and_by_path(script, tmp_path) -> None:
    (tmp_path / "own.yaml").touch()
    assert completed(script, tmp_path, "fit", "--config", "") == {*CONFIGS, "own.yaml"}
    assert completed(script, tmp_path, "fit", "--config", "paper", "--config", "cifar10_sn") == {"cifar10_sngan"}


def test_paths_are_completed(script, tmp_path) -> None:
    (tmp_path / "run.ckpt").touch()
    for words in (["validate", "--ckpt_path"], ["export"], ["plot"], ["export", "run.ckpt", "--config"]):
        assert completed(script, tmp_path, *words, "r") == {"run.ckpt"}


def test_zsh_gets_the_same_names(capsys) -> None:
    completion(["zsh"])
    script = capsys.readouterr().out
    assert script.startswith("#compdef lightning-ddst\n")
    assert all(f"{name}:" in script for name in SUBCOMMANDS)
    assert f"compadd {' '.join(CONFIGS)}\n" in script


def test_without_shtab_one_line_names_the_extra(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as end:
        completion(["bash"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lightning-ddst[completion]" in line
