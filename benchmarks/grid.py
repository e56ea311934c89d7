"""Trains what a study asks for, and keeps a row of each run in results/<study>.jsonl.

    python benchmarks/grid.py fashion --data FOLDER [--jobs 2] [--minutes 60] [--work benchmark_runs]

A run is a call of `lightning-ddst fit` with the row's command, on one thread, several at once with --jobs. Runs that
have a row are skipped; one that was interrupted goes on from its checkpoint. Rows are ranked: what matters most is
trained first, so the study can be stopped at any time and finished later.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from rows import HERE, add, origin, rows
from studies import STUDIES, Cell

from lightning_ddst.report.runs import Points, read_run

SERIES = {
    "frechet_distance": "distance",
    "flops/training_ratio": "flops",
    "flops/measuring_ratio": "measuring",
    "density/discriminator": "discriminator_density",
    "balance/ratio": "balance_ratio",
    "balance/alpha": "alpha",
    "balance/beta": "beta",
}
"""Names in a row of the logged series: pairs of generator updates and a value."""


def key(row: dict[str, Any]) -> tuple[str, str, float, int]:
    """Returns the key of a row's cell."""
    return row["setting"], row["run"], row["density"], row["seed"]


def train(cell: Cell, work: Path) -> dict[str, Any]:
    """Trains one GAN in a process of its own, or goes on with it, and reads what it logged.

    Raises:
        RuntimeError: If it fails; the reason is in its folder's log.txt.
    """
    folder = Path("runs") / "".join(c if c.isalnum() or c in ".-" else "_" for c in "-".join(map(str, cell.key)))
    (work / folder).mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).with_name("lightning-ddst")), *shlex.split(cell.command)[1:]]
    command += ["--trainer.logger.init_args.save_dir", str(folder)]
    checkpoints = sorted((work / folder).glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if checkpoints:
        command += ["--ckpt_path", str(checkpoints[-1].relative_to(work))]
    # One thread a run, and benchmarks/variants.py to be found.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    with (work / folder / "log.txt").open("a") as log:
        finished = subprocess.run(command, cwd=work, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if finished.returncode:
        raise RuntimeError(f"ended with code {finished.returncode}: {work / folder / 'log.txt'}")
    return {
        **dict(zip(("setting", "run", "density", "seed"), cell.key, strict=True)),
        "command": cell.command,
        **origin(),
        "seconds": round(time.perf_counter() - start),
        **kept(read_run(work / folder)),
    }


def kept(logged: dict[str, Points]) -> dict[str, list[tuple[int, float]]]:
    """Returns the series that a row keeps, to five digits."""
    found = {}
    for prefix, name in SERIES.items():
        for logged_as, points in logged.items():
            if logged_as == prefix or logged_as.startswith(f"{prefix}/"):
                found[name] = [(update, float(f"{value:.5g}")) for update, value in points]
    return found


def main() -> None:
    """Trains what is missing, side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder that holds the images")
    parser.add_argument("--runs", nargs="+", help="only those whose name is one of these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no run is begun")
    parser.add_argument("--work", type=Path, default=Path("benchmark_runs"), help="for logs and checkpoints")
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    for link, target in (("data", options.data), ("benchmarks", HERE)):
        if not (options.work / link).is_symlink():
            (options.work / link).symlink_to(target.resolve(), target_is_directory=True)
    cells = [cell for cell in STUDIES[options.study]() if not options.runs or cell.run in options.runs]
    there = {key(row) for row in rows(options.study)}
    missing = [cell for cell in cells if cell.key not in there]
    print(f"{options.study}: {len(cells) - len(missing)} of {len(cells)} runs are done", flush=True)
    begun = time.monotonic()
    stopped, done = Event(), 0

    def one(cell: Cell) -> None:
        nonlocal done
        if stopped.is_set() or time.monotonic() - begun > 60 * options.minutes:
            return
        try:
            row = train(cell, options.work)
        except (RuntimeError, OSError, ValueError) as error:
            if not stopped.is_set():
                print(f"{cell.key} failed: {error}", flush=True)
            return
        add(options.study, row)
        done += 1
        left = (time.monotonic() - begun) / done * (len(missing) - done) / 3600
        print(
            f"{len(cells) - len(missing) + done}/{len(cells)} {cell.key}: distance {row['distance'][-1][1]:.2f}, "
            f"training FLOPs {row['flops'][-1][1]:.0%}; {left:.1f} hours left",
            flush=True,
        )

    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            list(pool.map(one, missing))
        except KeyboardInterrupt:
            stopped.set()  # the runs were interrupted with this process, and save themselves
            print("Interrupted; what was begun goes on from its checkpoint next time.", flush=True)


if __name__ == "__main__":
    main()
