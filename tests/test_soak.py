"""20,000 updates with random kills, compared with 20,000 without: pytest -m long tests/test_soak.py."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

UPDATES = 20_300
KILLS = 12


def start(folder):
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("soak.py")
    with (folder / "printed.txt").open("a") as printed:
        return subprocess.Popen([sys.executable, script, folder, str(UPDATES)], stdout=printed, stderr=printed)


def growth(folder):
    """MiB an update that a process took on from its 500th update on, at the most; and updates made."""
    slopes, made = [], 0
    for file in folder.glob("memory-*.txt"):
        lines = [tuple(map(float, line.split())) for line in file.read_text().splitlines()]
        made += int(lines[-1][0])
        late = [line for line in lines if line[0] >= 500]
        if len(late) > 10:
            slopes.append((late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0]))
    return max(slopes), made


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_long_run_survives_random_kills(tmp_path):
    whole = start(tmp_path / "whole")
    rng = random.Random(0)
    kills = 0
    folder = tmp_path / "killed"
    process = start(folder)
    while process.poll() is None:
        time.sleep(rng.uniform(15, 40))
        if kills < KILLS and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            process = start(folder)
        elif kills == KILLS:
            process.wait()
    assert process.returncode == 0, (folder / "printed.txt").read_text()[-3000:]
    assert whole.wait() == 0, (tmp_path / "whole" / "printed.txt").read_text()[-3000:]

    expected, ended = (torch.load(each / "end.pt", weights_only=True) for each in (tmp_path / "whole", folder))
    slopes = [growth(each) for each in (tmp_path / "whole", folder)]
    print(f"{kills} kills; MiB an update and updates made: {slopes}; {len(expected['decisions'])} decisions")
    assert expected["updates"] == ended["updates"] == UPDATES
    assert kills >= 5
    for part in ("weights", "masks"):
        for name, value in expected[part].items():
            assert torch.equal(value, ended[part][name]), name
    assert expected["decisions"] == ended["decisions"]
    assert max(slope for slope, _ in slopes) < 10 / UPDATES  # 10 MiB over the whole run
