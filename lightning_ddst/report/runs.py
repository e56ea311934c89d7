"""Logged series of a run: the names that figures use, and the scalars in the files of TensorBoard or CSVLogger."""

import csv
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Points: TypeAlias = Sequence[tuple[int, float]]
"""Pairs of generator updates and a value."""
Series: TypeAlias = Mapping[str, Points]
"""Points by their logged name."""

METRICS = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall")
"""Metrics of `SampleQuality`, logged as ``<metric>/<features>`` and ``<metric>_raw/<features>``."""

_EVENTS = "events.out.tfevents.*"
_METRICS_CSV = "metrics.csv"
RESULTS_FILE = "results.json"
_FRAME = 16
"""Bytes of length and checksums around each record in an event file."""
_OF_A_PAIR = re.compile(
    r"(?:(?P<pair>[^/]+)/)?(?P<name>balance/(?:ratio|real_sign)|control/(?:signal|lower|upper)"
    r"|(?:density|coverage|overlap)/(?:generator|discriminator)|layer_density/.+|flops/training_ratio)"
)
_OF_SAMPLES = re.compile(rf"(?:{'|'.join(METRICS)})(?:_raw)?/.+")


def find_source(name: str) -> str | None:
    """Returns an identifier of a scalar's source, equal for scalars logged together; None if no figure shows it."""
    if found := _OF_A_PAIR.fullmatch(name):
        return f"networks {found['pair'] or ''}"
    return f"samples {name.partition('/')[2]}" if _OF_SAMPLES.fullmatch(name) else None


def by_pair(series: Series) -> dict[str, dict[str, Points]]:
    """Returns the series to draw of every pair of networks.

    Args:
        series: All logged series.

    Returns:
        The series of every pair, none of them empty, without their prefix. The keys are the prefixes, the generators'
        names; "" if there is only one pair.
    """
    pairs: dict[str, dict[str, Points]] = {}
    for name, points in series.items():
        if (found := _OF_A_PAIR.fullmatch(name)) and points:
            pairs.setdefault(found["pair"] or "", {})[found["name"]] = points
    return pairs


def of_samples(series: Series) -> dict[str, Points]:
    """Returns the series of sample quality to draw, ordered by metric; none of them is empty."""
    named = {name: points for name, points in series.items() if points and _OF_SAMPLES.fullmatch(name)}
    metrics = [name.partition("/")[0].removesuffix("_raw") for name in named]
    order = sorted(zip(metrics, named, strict=True), key=lambda each: METRICS.index(each[0]))
    return {name: named[name] for _, name in order}


def read_run(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Reads every scalar of a run from its TensorBoard event files, or else from CSVLogger's ``metrics.csv``.

    A resumed run has several event files; if they hold the same step, the value written last counts.

    Args:
        folder: The folder with the files, or a folder above a single one.

    Returns:
        Pairs of generator updates, ascending, and values by name, in order of first appearance; columns of a CSV file
        are in alphabetical order.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no logs.
        ValueError: If several folders below it hold logs, if the CSV file is damaged, or if this package logged none of
            the scalars.
    """
    place = find_run(folder, _EVENTS, _METRICS_CSV)
    series = _read_events(place) if any(place.glob(_EVENTS)) else _read_csv(place / _METRICS_CSV)
    if all(find_source(name) is None for name in series):
        if updates := series.get("generator_updates"):
            raise ValueError(
                f"the logs in {place} hold no values: the run ended after {max(updates):,} generator updates, before "
                "the first ones were logged. Trainer(log_every_n_steps=...) logs more often."
            )
        found = f"there are {', '.join(series)}" if series else "there are no scalars at all"
        raise ValueError(
            f"the logs in {place} hold nothing that this package logs, such as density/generator or "
            f"balance/ratio; {found}. Name the folder of a run with a DynamicSparsityCallback."
        )
    return {name: sorted(points.items()) for name, points in series.items()}


def find_runs(folder: str | Path, *files: str) -> list[Path]:
    """Finds the folders of runs.

    Args:
        folder: A run's folder, or a folder above several.
        files: Patterns of the files that make a folder one of a run; by default results and logs.

    Returns:
        The folder itself if it holds such files, else the highest ones below it that do, in natural order.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in it.
    """
    folder = Path(folder)
    files = files or (RESULTS_FILE, _EVENTS, _METRICS_CSV)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}. Name the folder of a run, such as lightning_logs/version_0, "
            "which holds its logs."
        )
    if any(any(folder.glob(file)) for file in files):
        return [folder]
    found = {path.parent for file in files for path in folder.rglob(file)}
    highest = [path for path in found if not found & {*path.parents}]
    if not highest:
        raise FileNotFoundError(
            f"neither {folder} nor a folder below it holds the logs of a run: event files ({_EVENTS}) of Lightning's "
            f"TensorBoardLogger, or {_METRICS_CSV} of its CSVLogger."
        )
    return sorted(highest, key=lambda path: [_natural(part) for part in path.parts])


def _natural(name: str) -> list[tuple[float, str]]:
    """Returns a key that sorts numbers in names by value: version_2 before version_10, density_0.05 before 0.1."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(part), "") if place % 2 else (-1.0, part) for place, part in enumerate(parts)]


def find_run(folder: str | Path, *files: str) -> Path:
    """Finds the folder of a single run: the given one, or the only one below it.

    Args:
        folder: The folder.
        files: As for `find_runs`.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in it.
        ValueError: If there are several runs below it.
    """
    found = find_runs(folder, *files)
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} runs; name one: {', '.join(map(str, found))}.")
    return found[0]


def _read_csv(path: Path) -> dict[str, dict[int, float]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        warnings.warn(
            f"the last line of {path} is incomplete: its process was killed while writing. It is left out.",
            stacklevel=3,
        )
        lines.pop()
    series: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(lines):
        for name, value in row.items():
            if not value or name in ("step", "epoch"):
                continue
            try:
                series.setdefault(name, {})[int(row["step"])] = float(value)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: a row with step={row.get('step')} has {name}={value!r}.") from error
    return series


def _read_events(folder: Path) -> dict[str, dict[int, float]]:
    # Imported here: training reads no event files.
    from tensorboard.backend.event_processing import event_accumulator

    for path in folder.glob(_EVENTS):
        if unread := _count_unread(path):
            warnings.warn(
                f"the last {unread} bytes of {path} cannot be read: its process was killed while writing, or the file "
                "is damaged. What it logged from there on is missing.",
                stacklevel=3,
            )
    accumulators = [
        event_accumulator.EventAccumulator(str(path), {"scalars": 0, "images": 1}, purge_orphaned_data=False).Reload()
        for path in folder.glob(_EVENTS)
    ]
    # Names of files from the same second end in a counter.
    accumulators.sort(key=lambda accumulator: (_first_time(accumulator), accumulator.path))
    series: dict[str, dict[int, float]] = {}
    for accumulator in accumulators:
        for name in accumulator.Tags()["scalars"]:
            series.setdefault(name, {}).update({event.step: event.value for event in accumulator.Scalars(name)})
    return series


def _count_unread(path: Path) -> int:
    """Returns the number of bytes from the first damaged record on, where TensorBoard stops reading."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    with path.open("rb") as file:
        size = file.seek(0, 2)  # before reading, since a run may go on writing
    return max(0, size - sum(len(record) + _FRAME for record in RawEventFileLoader(str(path)).Load()))


def _first_time(accumulator: Any) -> float:
    try:
        return float(accumulator.FirstEventTimestamp())
    except ValueError:  # an empty file
        return 0.0
