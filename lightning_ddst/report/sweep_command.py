"""The command ``lightning-ddst sweep``: one run of ``fit`` for each of several densities, then their comparison."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from types import FrameType
from typing import Any

import yaml

from lightning_ddst.methods import METHODS
from lightning_ddst.report.compare import as_text, make_rows
from lightning_ddst.report.compare_command import draw
from lightning_ddst.report.results import RunResults, read_results
from lightning_ddst.report.runs import find_runs
from lightning_ddst.utils.cache import atomic_write, check_writable, digest, first_line
from lightning_ddst.utils.command_line import OneLineParser
from lightning_ddst.utils.config_arguments import prepare_arguments
from lightning_ddst.utils.configurations import option_values, read_yaml
from lightning_ddst.utils.validation import check_count, check_density

_OWN = (
    "--sparsity.generator_density",
    "--sparsity.method.generator_density",
    "--sparsity.method.init_args.generator_density",
    "--trainer.default_root_dir",
    "--trainer.logger.save_dir",
    "--trainer.logger.init_args.save_dir",
    "--ckpt_path",
)
"""Arguments of ``fit`` that the sweep gives."""


class SweepError(Exception):
    """A run of a sweep ended without results."""


def sweep(args: Sequence[str]) -> None:
    """Runs ``fit`` at several densities of the generator, and prints the comparison of the runs.

    A run that is finished is skipped, one that was interrupted or failed resumes from its last checkpoint. The process
    ends with status 1 if a run failed, and with 130 or 143 if it was interrupted.

    Args:
        args: The command's arguments after ``sweep``; those of ``fit`` are passed on.
    """
    parser = OneLineParser(
        prog="lightning-ddst sweep",
        usage="lightning-ddst sweep --densities D,D,... [--jobs N] [--folder FOLDER] [arguments of fit]",
        description="Runs `lightning-ddst fit` at several densities of the generator, and compares the runs. Run it "
        "again to resume: finished runs are skipped.",
        epilog="All other arguments are those of `lightning-ddst fit`, such as --config or --sparsity.method.",
    )
    parser.add_argument("--densities", help="the generator's densities, such as 0.05,0.1,0.3")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument("--folder", type=Path, default=Path("sweep"), help="folder of all runs (default: sweep)")
    own, of_fit = _split_arguments(args)
    given = parser.parse_args(own)
    if given.densities is None:
        parser.error("--densities must be given, such as --densities 0.05,0.1,0.3.")
    try:
        densities = _parse(given.densities)
        check_count("--jobs", given.jobs)
        for arg in of_fit:
            if (name := arg.partition("=")[0]) in _OWN:
                raise ValueError(f"{name}: a sweep sets it itself; choose --densities and --folder.")
        if dict(option_values(of_fit)).get("--trainer.logger") in ("false", "False"):
            raise ValueError("--trainer.logger=false: a sweep compares the runs by their logs.")
        check_writable(given.folder)
        _check_arguments(given.folder, of_fit)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    started = _Runs(given.folder, of_fit, given.jobs, _find_density_option(of_fit))
    failed = _run_all(started, densities)
    found = {f"density_{density:g}": _latest(density_folder(given.folder, density)) for density in densities}
    runs = {name: results for name, (_, results) in found.items() if results is not None}
    if runs:
        print(f"\n{as_text(make_rows(runs))}")
        try:
            draw(runs, given.folder / "comparison.svg")
            print(f"\n{given.folder / 'comparison.svg'}")
        except (OSError, ValueError) as error:  # nothing was measured, for example
            print(f"lightning-ddst sweep: no picture: {first_line(error)}", file=sys.stderr)
    if failed:
        sys.exit(1 if started.signal is None else 128 + started.signal)


def _split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments into the sweep's own, and those of ``fit``."""
    own: list[str] = []
    of_fit: list[str] = []
    waiting = False  # for the value of an argument of the sweep
    for arg in args:
        name, equals, _ = arg.partition("=")
        is_own = waiting or name in ("--densities", "--jobs", "--folder", "--help", "-h")
        (own if is_own else of_fit).append(arg)
        waiting = is_own and not waiting and not equals
    return own, of_fit


def _parse(densities: str) -> list[float]:
    try:
        values = [float(part) for part in densities.split(",")]
    except ValueError:
        raise ValueError(f"--densities={densities} must be numbers in (0, 1], such as 0.05,0.1,0.3.") from None
    for value in values:
        check_density("--densities", value)
    if len({f"{value:g}" for value in values}) < len(values):
        raise ValueError(f"--densities={densities} must be different numbers.")
    return values


def density_folder(folder: Path, density: float) -> Path:
    """Returns the folder of a density's runs in the folder of a sweep."""
    return folder / f"density_{density:g}"


def _check_arguments(folder: Path, of_fit: Sequence[str]) -> None:
    """Checks that a folder's earlier runs had the same arguments, and configurations of the same contents."""
    configs = [value for option, value in option_values(of_fit) if option in ("--config", "-c")]
    contents = {config: digest(Path(config).read_bytes()) for config in configs if Path(config).is_file()}
    own = {"arguments": list(of_fit), "configurations": contents}
    path = folder / "sweep.json"
    if path.is_file() and _holds_runs(folder):  # else the arguments were wrong, and are now corrected
        known = json.loads(path.read_text(encoding="utf-8"))
        if known != own:
            same = known.get("arguments") == own["arguments"]
            arguments = " ".join(known.get("arguments", []))
            reason = "a configuration has changed" if same else f"its arguments are {arguments or 'none'}"
            raise ValueError(f"--folder={folder} holds runs of another sweep: {reason}. Choose another folder.")
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")


def _holds_runs(folder: Path) -> bool:
    with suppress(FileNotFoundError):
        return bool(find_runs(folder))
    return False


def _latest(folder: Path) -> tuple[Path | None, RunResults | None]:
    """Returns the latest run in a density's folder and its results; None where there are none."""
    try:
        runs = find_runs(folder)
    except FileNotFoundError:
        return None, None
    latest = max(runs, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()))
    try:
        return latest, read_results(latest)
    except (OSError, ValueError):
        return latest, None


def _find_density_option(of_fit: Sequence[str]) -> str:
    """Returns the argument of ``fit`` that sets the density: a method that is an object has its own."""
    method: Any = "ddst"
    for option, value in option_values(prepare_arguments(["fit", *of_fit], run=True)):
        if option in ("--config", "-c"):
            sparsity = (read_yaml(Path(value)) or {}).get("sparsity")
            method = sparsity.get("method", method) if isinstance(sparsity, dict) else method
        elif option == "--sparsity":
            sparsity = yaml.safe_load(value)
            method = sparsity.get("method", method) if isinstance(sparsity, dict) else method
        elif option.startswith("--sparsity.method"):
            method = value if option == "--sparsity.method" else None  # arguments of an object
    named = isinstance(method, str) and method in METHODS
    return "--sparsity.generator_density" if named else "--sparsity.method.generator_density"


# ---- running -------------------------------------------------------------------------------------------


@dataclass
class _Runs:
    """Processes of ``fit``, at most `jobs` at a time."""

    folder: Path
    of_fit: Sequence[str]
    jobs: int
    density_option: str
    processes: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    lock: AbstractContextManager[Any] = field(default_factory=RLock)  # a second signal may arrive during `stop`
    signal: int | None = None

    def run(self, density: float) -> str:
        """Runs ``fit`` at a density.

        Returns:
            The outcome in words.

        Raises:
            SweepError: If the run fails or is interrupted.
        """
        folder = density_folder(self.folder, density)
        _, results = _latest(folder)
        if results is not None and results.status == "finished":
            return "is finished already"
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
        log, start = folder / "log.txt", time.monotonic()
        with log.open("ab") as output:
            status = self._finish(self._start(density, checkpoint, output))
        if self.signal is not None:
            raise SweepError("interrupted; the same command resumes it.")
        _, results = _latest(folder)
        if status == 0 and results is None:
            raise SweepError(f"failed: no results in {folder}: the run needs a logger, and one without a save_dir.")
        if status < 0:
            raise SweepError(f"failed: killed by {signal.Signals(-status).name} (see {log})")
        if status or results is None or results.status != "finished":
            raise SweepError(f"failed: {_last_line(log)} (status {status}; see {log})")
        return f"{'resumed and ' if checkpoint else ''}finished after {time.monotonic() - start:,.0f} s"

    def _start(self, density: float, checkpoint: Path | None, output: Any) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "lightning_ddst", "fit", "--trainer.enable_progress_bar=false", *self.of_fit]
        command += [f"{self.density_option}={density!r}"]
        command += [f"--trainer.default_root_dir={density_folder(self.folder, density)}"]
        command += [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
        environment = dict(os.environ)
        if self.jobs > 1:  # else every process would use all cores
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        with self.lock:
            if self.signal is not None:
                raise SweepError("not started.")
            # In its own session, so that an interruption reaches it once, from here.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            self.processes.add(process)
        return process

    def _finish(self, process: "subprocess.Popen[bytes]") -> int:
        status = process.wait()
        with self.lock:
            self.processes.discard(process)
        return status

    def stop(self, number: int, frame: FrameType | None = None) -> None:
        """Passes a signal on to all running processes, and starts no other."""
        with self.lock:
            self.signal = number
            for process in self.processes:
                process.send_signal(number)


def _run_all(runs: _Runs, densities: Sequence[float]) -> list[float]:
    """Runs all densities.

    Returns:
        The densities whose runs failed or were interrupted.
    """
    handlers = {number: signal.signal(number, runs.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    failed = []
    with ThreadPoolExecutor(runs.jobs) as executor:
        futures = {executor.submit(runs.run, density): density for density in densities}
        for future in as_completed(futures):
            density = futures[future]
            try:
                print(f"density {density:g}: {future.result()}", flush=True)
            except (SweepError, OSError) as error:  # the other runs go on
                failed.append(density)
                print(f"density {density:g}: {first_line(error)}", file=sys.stderr, flush=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return failed


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
