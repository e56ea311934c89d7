import math
import random
from contextlib import suppress
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_ddst.report.runs import by_pair, find_runs, find_source, of_samples, read_run


def write(folder: Path, scalars: dict[str, list[tuple[int, float]]]) -> None:
    """Adds an event file to a folder."""
    with SummaryWriter(str(folder)) as writer:
        for name, points in scalars.items():
            for step, value in points:
                writer.add_scalar(name, value, step)


def test_every_scalar_is_read_in_the_order_it_was_logged_in(tmp_path) -> None:
    many = [(step, step / 2) for step in range(10_100)]
    logged = {"balance/ratio": many, "loss/generator": [(3, 1.0)], "flops/training_ratio": [(5, 0.5), (7, math.nan)]}
    write(tmp_path, logged)
    series = read_run(tmp_path)
    assert list(series) == list(logged)
    assert series["balance/ratio"] == many
    assert series["loss/generator"] == [(3, 1.0)]
    assert series["flops/training_ratio"][0] == (5, 0.5)
    assert math.isnan(series["flops/training_ratio"][1][1])


def test_a_resumed_run_is_one_run_and_what_was_written_last_counts(tmp_path) -> None:
    write(tmp_path, {"density/generator": [(10, 0.5), (20, 0.5), (30, 0.5)], "balance/ratio": [(10, 0.125)]})
    write(tmp_path, {"density/generator": [(20, 0.25), (30, 0.25), (40, 0.25)], "control/upper": [(20, 0.75)]})
    assert read_run(str(tmp_path)) == {
        "density/generator": [(10, 0.5), (20, 0.25), (30, 0.25), (40, 0.25)],
        "balance/ratio": [(10, 0.125)],
        "control/upper": [(20, 0.75)],
    }


def test_steps_come_in_ascending_order(tmp_path) -> None:
    write(tmp_path, {"density/generator": [(20, 0.5), (10, 0.25), (20, 0.75)]})
    assert read_run(tmp_path) == {"density/generator": [(10, 0.25), (20, 0.75)]}


def test_an_empty_file_next_to_others_does_no_harm(tmp_path) -> None:
    write(tmp_path, {"density/generator": [(1, 0.5)]})
    (tmp_path / "events.out.tfevents.9999999999.host.1.0").touch()
    assert read_run(tmp_path) == {"density/generator": [(1, 0.5)]}


def test_a_truncated_file_is_read_to_its_last_whole_record_with_a_warning(tmp_path) -> None:
    write(tmp_path, {"density/generator": [(1, 0.5), (2, 0.25), (3, 0.125)]})
    (file,) = tmp_path.glob("events*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.warns(UserWarning, match=rf"the last \d+ bytes of {file} cannot be read"):
        assert read_run(tmp_path) == {"density/generator": [(1, 0.5), (2, 0.25)]}


def test_a_damaged_file_gives_no_other_values(tmp_path) -> None:
    points = [(step, step / 8) for step in range(20)]
    write(tmp_path, {"density/generator": points})
    (file,) = tmp_path.glob("events*")
    whole, rng = file.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged, bit = bytearray(whole), rng.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        read = []
        with pytest.warns(UserWarning, match=r"the last \d+ bytes of .* cannot be read"), suppress(ValueError):
            read = read_run(tmp_path)["density/generator"]
        assert read == points[: len(read)]


def test_the_only_run_below_a_folder_is_found(tmp_path) -> None:
    write(tmp_path / "lightning_logs" / "version_3", {"density/generator": [(1, 0.5)]})
    (tmp_path / "lightning_logs" / "version_4").mkdir()
    assert read_run(tmp_path) == {"density/generator": [(1, 0.5)]}


def test_a_run_with_others_below_it_is_itself_meant(tmp_path) -> None:
    write(tmp_path, {"density/generator": [(1, 0.5)]})
    write(tmp_path / "hparams", {"density/generator": [(1, 0.25)]})
    assert read_run(tmp_path) == {"density/generator": [(1, 0.5)]}


def test_of_several_runs_none_is_chosen(tmp_path) -> None:
    for version in ("version_0", "version_1"):
        write(tmp_path / version, {"density/generator": [(1, 0.5)]})
    with pytest.raises(ValueError, match="holds 2 runs; name one: ") as refused:
        read_run(tmp_path)
    assert str(refused.value).endswith(f"{tmp_path / 'version_0'}, {tmp_path / 'version_1'}.")


def test_a_folder_without_a_run_is_rejected(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'missing'}. Name the folder of a run"):
        read_run(tmp_path / "missing")
    with pytest.raises(
        FileNotFoundError, match=f"neither {tmp_path} nor a folder below it holds the logs of a run: event files"
    ):
        read_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'file'}"):
        read_run(tmp_path / "file")


@pytest.mark.parametrize(
    ("scalars", "found"), [({"hp_metric": [(0, -1.0)], "loss": [(1, 1.0)]}, "are hp_metric, loss"), ({}, "no scalars")]
)
def test_a_run_of_something_else_is_rejected(scalars: dict, found: str, tmp_path) -> None:
    write(tmp_path, scalars)
    with pytest.raises(ValueError, match="hold nothing that this package logs") as refused:
        read_run(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert found in str(refused.value)


def test_a_run_that_ended_before_it_logged_is_named_as_such(tmp_path) -> None:
    write(tmp_path, {"hp_metric": [(0, -1.0)], "generator_updates": [(8, 8.0)]})
    with pytest.raises(ValueError, match="the run ended after 8 generator updates, before the first"):
        read_run(tmp_path)


CSV = """balance/ratio,density/generator,epoch,loss,step
,0.5,,,10
0.25,0.5,,,20
,,0,1.5,30
nan,0.25,,,20
"""


def test_a_csv_run_is_read(tmp_path) -> None:
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text(CSV)
    series = read_run(tmp_path)
    assert list(series) == ["density/generator", "balance/ratio", "loss"]
    assert series["density/generator"] == [(10, 0.5), (20, 0.25)]
    assert series["loss"] == [(30, 1.5)]
    ((step, value),) = series["balance/ratio"]
    assert step == 20
    assert math.isnan(value)


def test_an_incomplete_last_line_of_a_csv_run_is_left_out(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text(CSV + ",0.125")  # would be 0.125 of step None, or cut digits
    with pytest.warns(UserWarning, match="the last line of .*metrics.csv is incomplete"):
        assert read_run(tmp_path)["density/generator"] == [(10, 0.5), (20, 0.25)]


@pytest.mark.parametrize("row", ["0.5,,,,ten\n", "much,,,,40\n"])
def test_a_damaged_csv_run_is_rejected(row: str, tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text(CSV + row)
    with pytest.raises(ValueError, match=r"metrics.csv: a row with step=(ten|40) has balance/ratio='(0.5|much)'"):
        read_run(tmp_path)


def test_event_files_come_before_a_csv_file(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text(CSV)
    write(tmp_path, {"density/generator": [(1, 0.75)]})
    assert read_run(tmp_path) == {"density/generator": [(1, 0.75)]}


def test_runs_below_a_folder_are_found_in_natural_order(tmp_path) -> None:
    files = {"v_10": "metrics.csv", "v_9": "results.json", "d_0.3": "metrics.csv", "d_0.05": "events.out.tfevents.1"}
    for name, file in files.items():
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / file).touch()
        (tmp_path / name / "below" / "metrics.csv").touch()  # belongs to the run
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == [tmp_path / name for name in ("d_0.05", "d_0.3", "v_9", "v_10")]
    assert find_runs(tmp_path / "v_9") == [tmp_path / "v_9"]


def test_series_are_sorted_by_pair() -> None:
    points = [(1, 0.5)]
    names = ["balance/ratio", "a.generator/balance/ratio", "b/layer_density/b.0.weight", "b/flops/training_ratio"]
    others = ["loss/generator", "frechet_distance/cnn", "balance/alpha", "decision/grow", "density/generator_target"]
    assert by_pair(dict.fromkeys(names + others, points) | {"density/generator": []}) == {
        "": {"balance/ratio": points},
        "a.generator": {"balance/ratio": points},
        "b": {"layer_density/b.0.weight": points, "flops/training_ratio": points},
    }


def test_metrics_come_in_their_order() -> None:
    names = ["recall/cnn", "frechet_distance_raw/cnn", "kernel_distance/cnn", "frechet_distance/cnn"]
    metrics = of_samples({name: [(0, 1.0)] for name in names} | {"precision/cnn": [], "accuracy/cnn": [(0, 1.0)]})
    assert list(metrics) == ["frechet_distance_raw/cnn", "frechet_distance/cnn", "kernel_distance/cnn", "recall/cnn"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("balance/ratio", "networks "),
        ("a/coverage/generator", "networks a"),
        ("precision_raw/cnn", "samples cnn"),
        ("loss/generator", None),
        ("a/loss/density/generator", None),
    ],
)
def test_names_identify_their_source(name: str, expected: str | None) -> None:
    assert find_source(name) == expected
