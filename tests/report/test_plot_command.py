import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lightning_ddst import callbacks, cli
from lightning_ddst.report import plot_command, plots, runs
from lightning_ddst.report.plot_command import plot


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "version_0"
    with SummaryWriter(str(folder)) as writer:
        for step in (10, 20, 30):
            writer.add_scalar("flops/training_ratio", 0.01 * step, step)
            writer.add_scalar("b/flops/training_ratio", 0.02 * step, step)
    return folder


def test_every_figure_is_written_in_both_formats(run: Path, capsys) -> None:
    paths = plot([str(run)])
    names = ["flops.png", "flops.svg", "b-flops.png", "b-flops.svg"]
    assert paths == [run / "plots" / name for name in names]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in paths]
    assert sorted(path.name for path in (run / "plots").iterdir()) == sorted(names)
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert image.size[0] == 900
        else:
            texts = [text.strip() for text in ElementTree.parse(path).getroot().itertext()]
            assert "Training FLOPs so far" in texts
            assert "generator updates" in texts


def test_folder_and_formats_can_be_chosen(run: Path, tmp_path) -> None:
    folder = tmp_path / "some" / "where"
    assert plot([str(run.parent), "--output", str(folder), "--formats", "svg"]) == [
        folder / "flops.svg",
        folder / "b-flops.svg",
    ]
    assert not (run / "plots").exists()


def test_files_are_replaced_and_the_same_every_time(run: Path) -> None:
    first = {path: path.read_bytes() for path in plot([str(run), "--formats", "svg"])}
    assert {path: path.read_bytes() for path in plot([str(run), "--formats", "svg"])} == first


def test_half_a_file_is_never_left(run: Path, monkeypatch) -> None:
    (path, *_) = plot([str(run), "--formats", "png"])
    before = path.read_bytes()

    def full(self: Path, contents: bytes) -> int:
        with self.open("wb") as file:
            file.write(contents[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit):
        plot([str(run), "--formats", "png"])
    assert path.read_bytes() == before
    assert [file.suffix for file in path.parent.iterdir()] == [".png", ".png"]


def test_a_folder_that_cannot_be_written_to_is_rejected_before_drawing(
    run: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(plots, "figures", lambda series: pytest.fail("was drawn"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        plot([str(run), "--output", str(tmp_path / "file" / "plots")])
    assert end.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"figures cannot be written to {tmp_path / 'file' / 'plots'}" in error
    assert "Choose another folder, --output." in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing"], "there is no folder missing"),
        ([], "run"),
        (["RUN", "--formats", "bmp"], "bmp"),
        (["RUN", "--no_such_option"], "no_such_option"),
    ],
)
def test_bad_arguments_end_with_a_message(args: list[str], message: str, run: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        plot([arg.replace("RUN", str(run)) for arg in args])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_goes_to_it(monkeypatch, capsys) -> None:
    given = []
    monkeypatch.setitem(cli.SUBCOMMANDS, "plot", given.append)
    monkeypatch.setattr(sys, "argv", ["lightning-ddst", "plot", "RUN", "--formats", "png"])
    cli.main()
    assert given == [["RUN", "--formats", "png"]]


@pytest.mark.parametrize("module", [plot_command, callbacks.plots, runs])
def test_training_does_without_matplotlib(module, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "lightning_ddst.report.plots")
    runpy.run_path(module.__file__)
    with pytest.raises(ImportError):
        runpy.run_path(plots.__file__)
