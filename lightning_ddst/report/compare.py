"""Tables of several runs."""

import csv
import glob
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from os.path import abspath, commonpath
from pathlib import Path
from typing import Any, TypeAlias

from lightning_ddst.report.results import RunResults, read_results
from lightning_ddst.report.runs import find_runs
from lightning_ddst.utils.cache import first_line

Row: TypeAlias = Mapping[str, Any]
"""Values of one run by column; None where they are unknown."""

_SAME_WHERE_EQUAL = ("status", "method", "seed", "updates", "planned_updates")
_NO_COLUMN = ("generator_density", "discriminator_density", "verbose")
"""Settings without a column of their own: densities are shown as they were reached, and `verbose` changes no result."""


def collect_runs(places: Sequence[str | Path], report: Callable[[str], object]) -> dict[Path, RunResults]:
    """Reads all runs in given places.

    Args:
        places: Folders of runs, folders above runs, files ``results.json``, and patterns of such paths. Of the runs
            below a folder, those that another one of them resumed are left out.
        report: Called with one line for every place without a run, and every run that cannot be read; they are left
            out.

    Returns:
        Results by folder, in the order of the places.

    Raises:
        FileNotFoundError: If a place does not exist.
        ValueError: If no run can be read.
    """
    runs: dict[Path, RunResults] = {}
    for place in places:
        for path in _expanded(place):
            try:
                folders = [path] if path.is_file() else find_runs(path)
            except FileNotFoundError as error:
                if not path.exists():
                    raise
                report(f"{path} is left out: {first_line(error)}")
                continue
            found: dict[Path, RunResults] = {}
            for folder in folders:
                try:
                    found[folder.parent if folder.is_file() else folder] = read_results(folder)
                except (OSError, ValueError) as error:
                    report(f"{folder} is left out: {first_line(error)}")
            resumed: set[Path] = set()
            for folder, each in found.items():
                own = Path(abspath(folder))
                if each.resumed_from and own not in (above := Path(abspath(each.resumed_from)).parents):
                    resumed.update(above)
            runs |= {folder: each for folder, each in found.items() if Path(abspath(folder)) not in resumed}
    if not runs:
        raise ValueError(f"no run in {', '.join(map(str, places))} can be read.")
    return runs


def _expanded(place: str | Path) -> list[Path]:
    if Path(place).exists():
        return [Path(place)]
    return [Path(path) for path in sorted(glob.glob(str(place), recursive=True))] or [Path(place)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Returns names that tell folders apart: their paths without what they have in common.

    Args:
        folders: Different folders.

    Returns:
        Paths below the common folder, without "lightning_logs", and without the version where it is not needed.
    """
    paths = [Path(abspath(folder)) for folder in folders]
    if len(paths) == 1:
        return [paths[0].name]
    relative = [path.relative_to(commonpath(paths)) for path in paths]
    names = [Path(*(part for part in path.parts if part != "lightning_logs")) for path in relative]
    if len({*names}) < len(names) or not all(name.name for name in names):
        names = relative
    without = [name.parent if re.fullmatch(r"version_\d+", name.name) else name for name in names]
    shorter = [
        short if short.name and without.count(short) == 1 else name for name, short in zip(names, without, strict=True)
    ]
    return [str(name) for name in shorter]


def make_rows(runs: Mapping[str, RunResults]) -> list[Row]:
    """Returns a row for every pair of networks of every run.

    Args:
        runs: Results by the run's name.

    Returns:
        Rows with the same columns: run, status, method, seed, updates, planned_updates, the settings that differ
        between runs, generator_density and discriminator_density at the end, balance_ratio, flops_ratio, the last
        value of every metric, such as ``frechet_distance/<features>``, and measured_updates, the generator updates
        before these values.
    """
    pairs = [
        (f"{name}: {pair_name}" if pair_name else name, run, pair)
        for name, run in runs.items()
        for pair_name, pair in run.pairs.items()
    ]
    names = dict.fromkeys(name for _, _, pair in pairs for name in pair.settings if name not in _NO_COLUMN)
    settings = [name for name in names if len({repr(pair.settings.get(name)) for _, _, pair in pairs}) > 1]
    metrics = dict.fromkeys(name for _, run, _ in pairs for name in _last_values(run))
    return [
        {
            "run": name,
            "status": run.status,
            "method": pair.method,
            "seed": run.seed,
            "updates": pair.updates,
            "planned_updates": pair.planned_updates,
            **{setting: pair.settings.get(setting) for setting in settings},
            "generator_density": pair.networks["generator"].final_density,
            "discriminator_density": pair.networks["discriminator"].final_density,
            "balance_ratio": pair.balance_ratio,
            "flops_ratio": None if pair.flops is None else pair.flops.ratio,
            **{metric: _last_values(run).get(metric) for metric in metrics},
            "measured_updates": min((each.values[-1][0] for each in run.quality), default=None),
        }
        for name, run, pair in pairs
    ]


def _last_values(run: RunResults) -> dict[str, float]:
    """Returns the last value of every metric by its logged name."""
    return {
        f"{each.metric}{'_raw' if each.weights == 'raw' else ''}/{each.features}": each.values[-1][1]
        for each in run.quality
    }


# ---- formats -------------------------------------------------------------------------------------------


def as_text(rows: Sequence[Row]) -> str:
    """Returns rows as a table for the terminal; what is equal in all rows is in a line below it."""
    columns, same = _columns(rows)
    cells = [list(columns), *([_cell(row, column) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_justified(line, widths) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], *([""] if same else []), *same])


def as_markdown(rows: Sequence[Row]) -> str:
    """Returns rows as a Markdown table."""
    columns, same = _columns(rows)
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[_cell(row, column) for column in columns] for row in rows]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, *([""] if same else []), *same])


def as_csv(rows: Sequence[Row]) -> str:
    """Returns rows as CSV with all digits; unknown values are empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().rstrip("\n")


def as_json(rows: Sequence[Row]) -> str:
    """Returns rows as a JSON list of objects; unknown values, and numbers that are not finite, are null."""
    plain = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in rows
    ]
    return json.dumps(plain, indent=1)


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "text": as_text,
    "md": as_markdown,
    "csv": as_csv,
    "json": as_json,
}
"""Functions from rows to a table, by the name of the format."""


def _columns(rows: Sequence[Row]) -> tuple[dict[str, None], list[str]]:
    """Returns the columns to show, and a line of what is equal in several rows, or unknown in all."""
    shown = dict.fromkeys(name for name in rows[0] if any(row[name] is not None for row in rows))
    shown.pop("planned_updates", None)
    if all(row["measured_updates"] in (None, row["updates"]) for row in rows):
        shown.pop("measured_updates", None)
    if len(rows) == 1:
        return shown, []
    equal = {
        name: _cell(rows[0], name)
        for name in _SAME_WHERE_EQUAL
        if name in shown and len({_cell(row, name) for row in rows}) == 1
    }
    for name in equal:
        del shown[name]
    return shown, [f"All runs: {', '.join(f'{name} {value}' for name, value in equal.items())}"] if equal else []


def _cell(row: Row, column: str) -> str:
    value = row[column]
    if value is None:
        return "-"
    if column == "updates" and row["planned_updates"] not in (None, value):
        return f"{value:,} of {row['planned_updates']:,}"
    if column in ("updates", "measured_updates"):
        return f"{value:,}"
    if column == "flops_ratio":
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " to ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _justified(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Returns a line whose first cell is flush left and whose others are flush right."""
    first, *others = (
        cell.rjust(width) if place else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
