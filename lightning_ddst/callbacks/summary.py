"""A short table of a run's results."""

import os
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_ddst.attached.summary import align, result_rows
from lightning_ddst.callbacks._support.results import is_interruption, run_folder
from lightning_ddst.callbacks.dynamic_sparsity import DynamicSparsityCallback
from lightning_ddst.callbacks.quality import SampleQuality
from lightning_ddst.report.results import RunResults, is_comparable, read_results
from lightning_ddst.utils.logging import tensorboards

_CONFIGS = Path(__file__).parents[1] / "configs"


class RunSummary(Callback):
    """A callback that prints densities, balance, operations and sample quality when fitting ends or is interrupted.

    Args:
        reference: A Frechet distance to compare with; or the folder of a run, such as a dense baseline's, whose last
            distance is printed if the two runs differ in nothing but sparsity (`lightning_ddst.runs.is_comparable`);
            or the name of a run that comes with the package, "digits_dense".
        reference_name: Its name in the table.

    Raises:
        ValueError: If `reference` is a folder without the results of one run.
    """

    def __init__(self, reference: float | str | Path | None = None, reference_name: str = "reference") -> None:
        self._reference = _read(reference) if isinstance(reference, str | Path) else reference
        self._reference_name = reference_name

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table."""
        self._print(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Prints the table of an interrupted run."""
        if is_interruption(exception) and trainer.state.fn == "fit":
            self._print(trainer)

    @rank_zero_only
    def _print(self, trainer: Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        rows: list[tuple[str, ...]] = [
            row for c in callbacks if isinstance(c, DynamicSparsityCallback) for row in result_rows(c)
        ]
        results = next((c.results(trainer) for c in callbacks if isinstance(c, DynamicSparsityCallback)), None)
        rows += [row for c in callbacks if isinstance(c, SampleQuality) for row in self._quality(c, results)]
        if (folder := run_folder(trainer)) is not None:
            folder = _shorten(folder)
            rows.append(("logs", folder))
            if tensorboards(trainer):
                rows.append(("to look at them", f"tensorboard --logdir {folder}"))
        if rows:
            print("\n" + "\n".join(align(rows)))

    def _quality(self, callback: SampleQuality, results: RunResults | None) -> list[tuple[str, str]]:
        rows = []
        for metric, history in callback.history.items():
            rows.append((f"{_title(metric)} ({callback.name})", ""))
            ends = dict.fromkeys((history[0], history[-1]))
            rows += [(f"  after {updates:,} generator updates", f"{value:.4g}") for updates, value in ends]
            if metric == "frechet_distance" and (value := self._compared(callback, results)) is not None:
                rows.append((f"  {self._reference_name}", f"{value:.4g}"))
            if metric.startswith("frechet_distance") and callback.real_halves is not None:
                rows.append(("  between two halves of the real images", f"{callback.real_halves:.4g}"))
        return rows

    def _compared(self, callback: SampleQuality, results: RunResults | None) -> float | None:
        """Returns the reference's distance; None if it was measured in other training."""
        if not isinstance(self._reference, RunResults):
            return self._reference
        if results is None or not is_comparable(results, self._reference):
            return None
        if results.pair.method == self._reference.pair.method:
            return None
        return self._reference.last("frechet_distance", callback.name)


def _read(reference: str | Path) -> RunResults:
    packaged = _CONFIGS / f"{reference}.json"
    try:
        return read_results(packaged if packaged.is_file() else reference)
    except (OSError, ValueError) as error:
        raise ValueError(f"reference={str(reference)!r}: {error}") from error


def _title(metric: str) -> str:
    """Returns a metric's title, such as "Frechet distance" or "Precision, raw weights"."""
    title = metric.removesuffix("_raw").replace("_", " ").capitalize()
    return f"{title}, raw weights" if metric.endswith("_raw") else title


def _shorten(folder: str) -> str:
    """Returns a path below the working directory relative to it; other paths and URLs as they are."""
    working = os.path.join(os.getcwd(), "")
    return folder.removeprefix(working)
