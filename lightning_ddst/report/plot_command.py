"""The command ``lightning-ddst plot``: writes the figures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lightning_ddst.report.runs import read_run
from lightning_ddst.utils import cache
from lightning_ddst.utils.command_line import OneLineParser


def plot(args: Sequence[str]) -> list[Path]:
    """Writes the figures of a run, and prints their paths.

    Args:
        args: The command's arguments after ``plot``.

    Returns:
        The paths of the files. An invalid argument ends the process with an error message.
    """
    from lightning_ddst.report import plots  # imported here: training works without Matplotlib

    formats = get_args(plots.Format)
    parser = OneLineParser(
        prog="lightning-ddst plot", description="Draws what a run logged for TensorBoard or with CSVLogger."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, such as lightning_logs/version_0")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where figures go (default: RUN/plots)")
    parser.add_argument("--formats", nargs="+", choices=formats, default=list(formats), help="kinds of files")
    given = parser.parse_args(list(args))
    try:
        series = read_run(given.run)
        folder: Path = given.output or given.run / "plots"
        _check(folder)
        paths = []
        for name, figure in plots.figures(series).items():
            for form in given.formats:
                path = folder / f"{name.replace('/', '-')}.{form}"
                with cache.atomic_write(path) as temporary:
                    temporary.write_bytes(plots.rendered(figure, form))
                print(path)
                paths.append(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return paths


def _check(folder: Path) -> None:
    try:
        cache.check_writable(folder)
    except OSError as error:
        raise OSError(f"figures cannot be written to {folder}: {error}. Choose another folder, --output.") from error
