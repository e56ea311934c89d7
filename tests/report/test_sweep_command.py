import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import TINY
from logged_runs import RESULTS

from lightning_ddst.report.results import read_results, write_results
from lightning_ddst.report.sweep_command import sweep

PROGRAM = """#!{python}
import json, os, shutil, signal, sys, time
from pathlib import Path

given = dict(arg.split("=", 1) for arg in sys.argv if "=" in arg)
folder = Path(given["--trainer.default_root_dir"])
density = next(value for name, value in given.items() if name.endswith("generator_density"))
version = folder / "lightning_logs" / f"version_{{len(list(folder.glob('lightning_logs/*')))}}"
version.mkdir(parents=True)
(version / "args.json").write_text(json.dumps(sys.argv[1:]))

def end(status):
    shutil.copy(Path("{results}") / status / "results.json", version)
    if status != "finished":
        (version / "last.ckpt").touch()
        print("the last batch\\n" + status)
        sys.exit(3)

if density == "0.2":
    sys.exit("no such file")
if density == "0.4":
    sys.exit()
if density == "0.7":
    os.kill(os.getpid(), signal.SIGKILL)
if density == "0.5":
    signal.signal(signal.SIGINT, lambda *_: end("interrupted"))
    (folder / "waiting").touch()
    time.sleep(60)
end("failed" if density == "0.3" and "--ckpt_path" not in given else "finished")
"""
"""Ends like ``fit``, as its density tells: finished, without results, failed until it resumes, or when interrupted."""


@pytest.fixture
def program(tmp_path, monkeypatch) -> Path:
    """The current folder, where ``fit`` is a program of milliseconds."""
    for status in ("finished", "failed", "interrupted"):
        write_results(tmp_path / "results" / status, replace(RESULTS, status=status))
    path = tmp_path / "python"
    path.write_text(PROGRAM.format(python=sys.executable, results=tmp_path / "results"))
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("seed_everything: 0")
    return tmp_path


def arguments_of(run: str) -> list[str]:
    return json.loads(Path("sweep", run, "args.json").read_text())


def test_every_density_is_run_in_its_own_folder_and_compared(program, capsys) -> None:
    sweep(["--densities", "0.1,0.05", "--trainer.max_epochs", "1", "--config", "a.yaml"])
    given = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs", "1", "--config", "a.yaml"]
    for density in ("0.1", "0.05"):
        own = [f"--sparsity.generator_density={density}", f"--trainer.default_root_dir=sweep/density_{density}"]
        assert arguments_of(f"density_{density}/lightning_logs/version_0") == [
            "-m",
            "lightning_ddst",
            "fit",
            *given,
            *own,
        ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" after")[0] for line in lines[:2]] == ["density 0.1: finished", "density 0.05: finished"]
    assert [line.split()[0] for line in lines if line.startswith("density_")] == ["density_0.1", "density_0.05"]
    assert lines[-1] == "sweep/comparison.svg"
    assert "density_0.05" in Path("sweep/comparison.svg").read_text()


@pytest.mark.parametrize("by", ["option", "class path", "mapping", "configuration"])
def test_the_density_of_a_method_that_is_an_object_is_set(by, program) -> None:
    Path("method.yaml").write_text("sparsity: {method: {class_path: lightning_ddst.methods.SDST}}")
    given = {
        "option": ["--sparsity.method", "my_module.GMP"],
        "class path": ["--sparsity.method.class_path=my_module.GMP"],
        "mapping": ["--sparsity={method: {class_path: my_module.GMP}}"],
        "configuration": ["--config", "method.yaml"],
    }[by]
    sweep(["--densities", "0.1234567", *given])
    arguments = arguments_of("density_0.123457/lightning_logs/version_0")
    assert "--sparsity.method.generator_density=0.1234567" in arguments


def test_finished_runs_are_skipped_and_failed_ones_resume(program, capsys) -> None:
    args = ["--densities", "0.3,0.1", "--folder", "sweep"]
    with pytest.raises(SystemExit) as end:
        sweep(args)
    assert end.value.code == 1
    output = capsys.readouterr()
    assert output.err == "density 0.3: failed: failed (status 3; see sweep/density_0.3/log.txt)\n"
    assert "density 0.1: finished after" in output.out
    assert [line.split()[:2] for line in output.out.splitlines() if line.startswith("density_")] == [
        ["density_0.3", "failed"],
        ["density_0.1", "finished"],
    ]
    sweep(args)
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.startswith("density 0.3: resumed and finished after")
    assert "density 0.1: is finished already\n" in output.out
    checkpoint = "sweep/density_0.3/lightning_logs/version_0/last.ckpt"
    assert arguments_of("density_0.3/lightning_logs/version_1")[-1] == f"--ckpt_path={checkpoint}"
    assert len(list(Path("sweep").glob("density_0.1/lightning_logs/*"))) == 1


def test_an_error_of_one_run_leaves_the_others(program, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        sweep(["--densities=0.2,0.4,0.7,0.1", "--jobs=2"])
    assert end.value.code == 1
    output = capsys.readouterr()
    assert sorted(output.err.splitlines()) == [
        "density 0.2: failed: no such file (status 1; see sweep/density_0.2/log.txt)",
        "density 0.4: failed: no results in sweep/density_0.4: the run needs a logger, and one without a save_dir.",
        "density 0.7: failed: killed by SIGKILL (see sweep/density_0.7/log.txt)",
    ]
    assert [line.split()[0] for line in output.out.splitlines() if line.startswith("density_")] == ["density_0.1"]
    assert "0.1: finished after" in output.out


def test_an_interruption_reaches_the_runs_and_starts_no_other(program, capsys) -> None:
    def interrupt() -> None:
        while not Path("sweep/density_0.5/waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as end:
        sweep(["--densities", "0.5,0.1"])
    thread.join()
    assert end.value.code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert capsys.readouterr().err.splitlines() == [
        "density 0.5: interrupted; the same command resumes it.",
        "density 0.1: not started.",
    ]
    assert read_results("sweep/density_0.5").status == "interrupted"
    assert not Path("sweep/density_0.1/lightning_logs").exists()


def test_a_folder_with_other_arguments_is_rejected(program, capsys) -> None:
    Path("own.yaml").write_text("a: 1")
    args = ["--densities", "0.1", "--config=own.yaml"]
    sweep(args)
    for changed, message in (
        ([*args, "--seed_everything=1"], "its arguments are --config=own.yaml"),
        (args, "a configuration has changed"),
    ):
        if changed == args:
            Path("own.yaml").write_text("a: 2")
        with pytest.raises(SystemExit) as end:
            sweep(changed)
        assert end.value.code == 2
        assert f"--folder=sweep holds runs of another sweep: {message}" in capsys.readouterr().err
    Path("own.yaml").write_text("a: 1")
    sweep(["--densities", "0.1,0.6", "--config=own.yaml"])  # more densities are no other sweep
    assert "density 0.1: is finished already" in capsys.readouterr().out


def test_arguments_with_which_no_run_began_can_be_corrected(program, capsys) -> None:
    with pytest.raises(SystemExit):
        sweep(["--densities=0.2", "--trainer.max_epoch=1"])  # its run ends before it has a folder
    shutil.rmtree("sweep/density_0.2/lightning_logs")
    sweep(["--densities=0.1", "--trainer.max_epochs=1"])
    assert "density 0.1: finished after" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sweep(["--densities=0.1"])
    assert "its arguments are --trainer.max_epochs=1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--densities"),
        (["--densities", "0.1,much"], "--densities=0.1,much must be numbers in (0, 1]"),
        (["--densities", "0.1,2"], "--densities=2.0 must be in (0, 1]"),
        (["--densities", "0.1,0.10"], "--densities=0.1,0.10 must be different numbers"),
        (["--densities", "0.1", "--jobs", "0"], "--jobs=0 must be an integer, at least 1"),
        (["--densities", "0.1", "--sparsity.generator_density=0.1"], "--sparsity.generator_density: a sweep sets it"),
        (["--densities", "0.1", "--ckpt_path", "last.ckpt"], "--ckpt_path: a sweep sets it"),
        (["--densities", "0.1", "--trainer.logger.save_dir=logs"], "--trainer.logger.save_dir: a sweep sets it"),
        (["--densities", "0.1", "--trainer.logger.init_args.save_dir", "logs"], "save_dir: a sweep sets it"),
        (["--densities", "0.1", "--trainer.logger", "false"], "--trainer.logger=false: a sweep"),
        (["--densities", "0.1", "--folder", "python/here"], "python"),
    ],
)
def test_bad_arguments_end_with_a_message(args: list[str], message: str, program, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        sweep(args)
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("sweep").exists()


def test_a_sweep_of_one_real_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    sweep(["--densities", "0.2", "--folder", "here", "--config", "tiny.yaml", "--trainer.logger", "CSVLogger"])
    (run,) = Path("here/density_0.2/lightning_logs").iterdir()
    assert {"metrics.csv", "config.yaml", "results.json"} <= {path.name for path in run.iterdir()}
    results = read_results(run)
    assert (results.status, results.pair.updates, results.pair.settings["generator_density"]) == ("finished", 20, 0.2)
    assert results.config["seed_everything"] == 0
    assert "sweep: no picture: there is nothing to draw" in capsys.readouterr().err  # no metric was measured
