"""The command ``lightning-ddst compare``: a table and a picture of several runs."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_ddst.report.compare import FORMATS, collect_runs, make_rows, short_names
from lightning_ddst.report.results import RunResults
from lightning_ddst.utils.command_line import OneLineParser


def compare(args: Sequence[str]) -> str:
    """Prints a table of several runs, and draws their sample quality over training operations.

    Args:
        args: The command's arguments after ``compare``.

    Returns:
        The table. An invalid argument ends the process with an error message.
    """
    parser = OneLineParser(
        prog="lightning-ddst compare",
        description="Prints a table of several runs: densities, BR, training FLOPs, sample quality.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of runs, such as lightning_logs/version_0, or folders above runs, such as lightning_logs",
    )
    parser.add_argument("--format", choices=list(FORMATS), default="text", help="form of the table (default: text)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw quality over operations into a .svg or .png file"
    )
    given = parser.parse_args(list(args))
    try:
        found = collect_runs(given.runs, lambda line: print(f"lightning-ddst compare: {line}", file=sys.stderr))
        runs = dict(zip(short_names(list(found)), found.values(), strict=True))
        if given.plot is not None:
            draw(runs, given.plot)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    table = FORMATS[given.format](make_rows(runs))
    print(table)
    return table


def draw(runs: Mapping[str, RunResults], path: Path) -> None:
    """Writes a figure of sample quality over training operations.

    Args:
        runs: Results by the run's name.
        path: The file, ``.svg`` or ``.png``.

    Raises:
        ValueError: For another suffix, or if there is nothing to draw.
        OSError: If the file cannot be written.
    """
    from lightning_ddst.report import tradeoff  # imported here: tables need no Matplotlib

    if path.suffix not in tradeoff.SUFFIXES:
        raise ValueError(f"--plot {path} must end in {' or '.join(tradeoff.SUFFIXES)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    tradeoff.save(tradeoff.tradeoff(runs), path)
