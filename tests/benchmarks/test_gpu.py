"""The session on a GPU: what is measured in the time that is left."""

import gpu
import pytest
import rows
from gpu import Measurement, choose


def nothing():
    pass


def test_measurements_are_made_in_order_as_far_as_they_fit():
    waiting = [Measurement("long", 50, nothing), Measurement("short", 10, nothing)]
    assert choose(waiting, 60).name == "long"
    assert choose(waiting, 40).name == "short"
    assert choose(waiting, 5) is None


def test_an_optional_one_leaves_time_for_those_after_it():
    waiting = [Measurement("optional", 50, nothing, optional=True), Measurement("needed", 10, nothing)]
    assert choose(waiting, 60).name == "optional"
    assert choose(waiting, 59).name == "needed"


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setenv("COMMIT", "abc")
    return tmp_path


def test_a_failure_does_not_stop_the_others_and_only_it_is_repeated(results, monkeypatch, capsys):
    made = []

    def fails():
        made.append("fails")
        raise RuntimeError("no memory")

    parts = [Measurement("fails", 1, fails), Measurement("works", 1, lambda: made.append("works"))]
    monkeypatch.setattr(gpu, "measurements", lambda *_: parts)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--minutes", "1"])
    gpu.main()
    assert made == ["fails", "works"]
    assert {row["what"]: row["failed"] for row in rows.rows("gpu")} == {"fails": "RuntimeError: no memory", "works": ""}
    gpu.main()
    assert made == ["fails", "works", "fails"]
    monkeypatch.setenv("COMMIT", "def")
    gpu.main()
    assert made[3:] == ["fails", "works"]


def test_the_rehearsal_makes_every_measurement():
    rehearsed, real = (list(gpu.measurements({}, rehearse)) for rehearse in (True, False))
    assert len({each.name for each in real}) == len(real) == 1 + 2 * 2 * 2 * 2 + 3 + 3
    assert len(rehearsed) == len(real) - 2  # mask updates of 1 million weights alone
    assert [each.optional for each in real].count(True) == 8
