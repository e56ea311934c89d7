import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from logged_runs import RESULTS, log_csv, paired
from matplotlib.text import Text
from PIL import Image

from lightning_ddst.methods import METHODS
from lightning_ddst.report import tradeoff
from lightning_ddst.report.compare import as_csv, as_json, as_markdown, as_text, collect_runs, make_rows, short_names
from lightning_ddst.report.compare_command import compare
from lightning_ddst.report.results import FlopsResults, RunResults, write_results

DENSE = replace(
    paired(method="dense", settings={"growth": "random"}, balance_ratio=None, flops=FlopsResults(ratio=1.05)),
    quality=[replace(RESULTS.quality[0], values=[(20, 1.25)])],
)
RUNS = {"sparse": RESULTS, "dense": DENSE}


def test_rows_have_the_settings_that_differ_and_the_last_values() -> None:
    rows = make_rows(RUNS)
    assert rows[0] == {
        "run": "sparse",
        "status": "finished",
        "method": "ddst",
        "seed": 3,
        "updates": 20,
        "planned_updates": 20,
        "bounds": [0.2, 0.3],
        "generator_density": 0.25,
        "discriminator_density": 0.25,
        "balance_ratio": 0.5,
        "flops_ratio": 0.3,
        "frechet_distance/cnn": 2.5,
        "frechet_distance_raw/cnn": 3.5,
        "measured_updates": 20,
    }
    assert list(rows[1]) == list(rows[0])
    differing = {name: value for name, value in rows[1].items() if value != rows[0][name]}
    assert differing == {
        "run": "dense",
        "method": "dense",
        "bounds": None,
        "balance_ratio": None,
        "flops_ratio": 1.05,
        "frechet_distance/cnn": 1.25,
        "frechet_distance_raw/cnn": None,
    }


def test_settings_that_change_no_result_have_no_column() -> None:
    loud = replace(RESULTS, pairs={"": replace(RESULTS.pair, settings={**RESULTS.pair.settings, "verbose": True})})
    assert "verbose" not in make_rows({"quiet": RESULTS, "loud": loud})[0]


def test_every_pair_of_a_run_has_a_row() -> None:
    several = replace(RESULTS, pairs={"first": RESULTS.pair, "second": RESULTS.pair})
    assert [row["run"] for row in make_rows({"run": several})] == ["run: first", "run: second"]


def test_the_table_for_the_terminal() -> None:
    runs = {"sparse": paired(planned_updates=25), "dense": replace(DENSE, status="interrupted")}
    lines = as_text(make_rows(runs)).splitlines()
    header, rule, first, second, empty, same = lines
    assert header.split() == [
        *("run", "status", "method", "updates", "bounds", "generator_density", "discriminator_density"),
        *("balance_ratio", "flops_ratio", "frechet_distance/cnn", "frechet_distance_raw/cnn"),
    ]
    assert set(rule) == {"-", " "}
    sparse = ["sparse", "finished", "ddst", "20", "of", "25", "0.2", "to", "0.3", "0.25", "0.25", "0.5", "30.0%"]
    assert first.split() == [*sparse, "2.5", "3.5"]
    assert second.split() == ["dense", "interrupted", "dense", "20", *("-", "0.25", "0.25", "-", "105.0%", "1.25", "-")]
    assert (empty, same) == ("", "All runs: seed 3")
    assert len({len(line) for line in (header, rule, first)}) == 1  # columns are flush


def test_values_that_were_measured_earlier_are_marked() -> None:
    early = replace(RESULTS, status="interrupted", quality=[replace(RESULTS.quality[0], values=[(0, 9.0)])])
    header, _, first, second, *_ = as_text(make_rows({"early": early, "whole": RESULTS})).splitlines()
    assert header.split()[-1] == "measured_updates"
    assert first.split()[-3:] == ["9", "-", "0"]
    assert second.split()[-3:] == ["2.5", "3.5", "20"]
    (ax,) = tradeoff.tradeoff({"early": early, "whole": RESULTS}).axes
    assert [text.get_text() for text in ax.texts] == ["whole"]


def test_the_table_in_markdown() -> None:
    rows = make_rows({"a|b": RESULTS, "c": RESULTS})
    lines = as_markdown(rows).splitlines()
    assert lines[0].startswith("| run | generator_density | ")
    assert lines[1].startswith("| --- | ---: | ")
    assert lines[2].startswith(r"| a\|b | 0.25 | ")
    assert lines[-1] == "All runs: status finished, method ddst, seed 3, updates 20"


def test_the_table_in_csv_and_json_has_all_digits() -> None:
    flops = replace(RESULTS.pair.flops, ratio=1 / 3)
    rows = make_rows(
        {"a": paired(flops=flops), "b": replace(DENSE, quality=[replace(DENSE.quality[0], values=[(20, math.nan)])])}
    )
    first, second = csv.DictReader(io.StringIO(as_csv(rows)))
    assert (first["flops_ratio"], second["balance_ratio"]) == (str(1 / 3), "")
    first, second = json.loads(as_json(rows))
    assert first == rows[0]
    assert (second["balance_ratio"], second["frechet_distance/cnn"]) == (None, None)
    assert json.loads(as_json([{"run": "infinite", "seconds": float("inf")}])) == [{"run": "infinite", "seconds": None}]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["logs/version_0"], ["version_0"]),
        (["logs/version_0", "logs/version_1"], ["version_0", "version_1"]),
        (["s/d_0.1/lightning_logs/version_0", "s/d_0.3/lightning_logs/version_1"], ["d_0.1", "d_0.3"]),
        (["s/a/version_0", "s/a/version_1", "s/b/version_0"], ["a/version_0", "a/version_1", "b"]),
        (["a/lightning_logs", "a/b"], ["lightning_logs", "b"]),
        (["a", "b/../b/c"], ["a", "b/c"]),
    ],
)
def test_names_are_as_short_as_they_can_be(folders: list[str], names: list[str]) -> None:
    assert short_names([Path(folder) for folder in folders]) == names


# ---- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path) -> Path:
    """A folder with a sparse run, a dense run that resumed an interrupted one, and a CSV run without results."""
    write_results(tmp_path / "version_0", RESULTS)
    write_results(tmp_path / "version_1", replace(DENSE, status="interrupted"))
    checkpoint = str(tmp_path / "version_1" / "checkpoints" / "interrupted.ckpt")
    write_results(tmp_path / "version_2", replace(DENSE, resumed_from=checkpoint))
    log_csv(tmp_path / "csv").rename(tmp_path / "version_3")
    return tmp_path


def names_of(runs: dict[Path, RunResults]) -> list[str]:
    return [folder.name for folder in runs]


def unexpected(line: str) -> None:
    pytest.fail(line)


def test_a_run_that_resumed_in_its_own_folder_is_kept(tmp_path) -> None:
    write_results(tmp_path / "run", replace(RESULTS, resumed_from=str(tmp_path / "run" / "checkpoints" / "last.ckpt")))
    assert list(collect_runs([tmp_path], print)) == [tmp_path / "run"]


def test_of_the_runs_below_a_folder_those_that_were_resumed_are_left_out(logs) -> None:
    assert names_of(collect_runs([logs], unexpected)) == ["version_0", "version_2", "version_3"]
    assert names_of(collect_runs([logs / "version_1"], unexpected)) == ["version_1"]


def test_patterns_files_and_folders_name_runs(logs) -> None:
    assert names_of(collect_runs([f"{logs}/version_[03]"], unexpected)) == ["version_0", "version_3"]
    assert names_of(collect_runs([logs / "version_0" / "results.json"], unexpected)) == ["version_0"]
    twice = collect_runs([logs / "version_2", logs / "version_0", logs / "version_2"], unexpected)
    assert names_of(twice) == ["version_2", "version_0"]


def test_a_place_without_a_run_is_left_out_with_a_line(logs) -> None:
    (logs / "empty").mkdir()
    lines: list[str] = []
    assert names_of(collect_runs([logs / "empty", logs / "version_0"], lines.append)) == ["version_0"]
    assert len(lines) == 1
    assert str(logs / "empty") in lines[0]
    with pytest.raises(FileNotFoundError):
        collect_runs([logs / "version_0", logs / "none"], lines.append)


def test_a_run_that_cannot_be_read_is_left_out_with_a_line(logs, capsys) -> None:
    (logs / "version_0" / "results.json").write_text("{}")
    table = compare([str(logs), "--format", "csv"])
    assert [line.split(",")[0] for line in table.splitlines()] == ["run", "version_2", "version_3"]
    output = capsys.readouterr()
    assert output.out == f"{table}\n"
    (line,) = output.err.splitlines()
    assert line.startswith(f"lightning-ddst compare: {logs / 'version_0'} is left out: ")


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_picture_shows_each_run_and_metric(form: str, logs) -> None:
    path = logs / "pictures" / f"comparison.{form}"
    compare([str(logs / "version_*"), "--plot", str(path)])
    if form == "png":
        with Image.open(path) as image:
            assert image.mode == "RGBA"
            assert image.size[0] == 1800
            assert image.getpixel((0, 0))[3] == 0  # transparent
    else:
        assert "version_2" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_points_are_the_last_values_over_operations() -> None:
    figure = tradeoff.tradeoff(RUNS | {"again": paired(flops=FlopsResults(ratio=0.5))})
    (ax,) = figure.axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.lines}
    assert drawn["ddst"] == [(0.3, 2.5), (0.5, 2.5)]
    assert drawn["dense"] == [(1.05, 1.25)]
    assert drawn["two halves of the real images"] == [(0, 0.5), (1, 0.5)]
    assert ax.get_xlabel() == "training FLOPs relative to dense training"
    assert ax.get_ylabel() == "cnn (lower is better)"
    assert {text.get_text(): text.xy for text in ax.texts} == {
        "sparse": (0.3, 2.5),
        "dense": (1.05, 1.25),
        "again": (0.5, 2.5),
    }


def test_the_legend_of_many_methods_covers_no_title_and_names_the_methods_shown() -> None:
    runs = {name: replace(RESULTS, pairs={"": replace(RESULTS.pair, method=name)}) for name in METHODS}
    other = paired(method="another")
    quality = [replace(each, features="other") for each in other.quality]
    figure = tradeoff.tradeoff(runs | {"another": replace(other, quality=quality)})
    figure.draw_without_rendering()
    legends = [ax.get_legend() for ax in figure.axes]
    for ax, legend in zip(figure.axes, legends, strict=True):
        assert not ax.get_window_extent().overlaps(legend.get_window_extent())
        titles = [each for each in ax.get_children() if isinstance(each, Text) and "after training" in each.get_text()]
        assert not titles[0].get_window_extent().overlaps(legend.get_window_extent())
    last = "two halves of the real images"
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == [
        [*METHODS, last],
        ["another", last],
    ]


def test_runs_of_other_lengths_are_compared_by_absolute_operations() -> None:
    longer = paired(flops=FlopsResults(training=90, measuring=5, dense=300, ratio=0.3))
    (ax,) = tradeoff.tradeoff({"short": RESULTS, "long": longer}).axes
    assert ax.get_xlabel() == "training FLOPs"
    assert [x for x, _ in zip(*ax.lines[0].get_data(), strict=True)] == [30, 90]


def test_names_of_near_points_do_not_overlap() -> None:
    runs = {f"a_run_with_a_name_{i}": paired(flops=FlopsResults(ratio=0.3 + 0.001 * i)) for i in range(6)}
    figure = tradeoff.tradeoff(runs)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the lines to points
    assert len(boxes) == 6
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing"], "there is no folder missing"),
        ([], "runs is missing"),
        (["RUN", "--format", "html"], "html"),
        (["RUN", "--plot", "picture.bmp"], "picture.bmp must end in .png or .svg"),
        (["EMPTY", "--plot", "picture.svg"], "no run has training FLOPs"),
    ],
)
def test_bad_arguments_end_with_a_message(args: list[str], message: str, logs, monkeypatch, capsys) -> None:
    monkeypatch.chdir(logs)
    write_results(logs / "empty", replace(RESULTS, quality=[]))
    places: dict[str, Any] = {"RUN": logs / "version_0", "EMPTY": logs / "empty"}
    with pytest.raises(SystemExit) as end:
        compare([str(places.get(arg, arg)) for arg in args])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(logs.glob("picture.*"))
