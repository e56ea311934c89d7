"""A short table of a run's results."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_ddst.attached.summary import align, result_rows
from lightning_ddst.callbacks.dynamic_sparsity import DynamicSparsityCallback
from lightning_ddst.callbacks.quality import SampleQuality
from lightning_ddst.utils.lightning_packages import is_a
from lightning_ddst.utils.logging import tensorboards


class RunSummary(Callback):
    """A callback that prints densities, balance, operations and sample quality when fitting ends or is interrupted.

    Args:
        reference: A Frechet distance to compare with, such as the dense baseline's.
        reference_name: Its name in the table.
    """

    def __init__(self, reference: float | None = None, reference_name: str = "reference") -> None:
        self._reference = reference
        self._reference_name = reference_name

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table."""
        self._print(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Prints the table of an interrupted run."""
        interrupted = isinstance(exception, KeyboardInterrupt) or is_a(exception, "SIGTERMException")
        if interrupted and trainer.state.fn == "fit":
            self._print(trainer)

    @rank_zero_only
    def _print(self, trainer: Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        rows: list[tuple[str, ...]] = [
            row for c in callbacks if isinstance(c, DynamicSparsityCallback) for row in result_rows(c)
        ]
        rows += [row for c in callbacks if isinstance(c, SampleQuality) for row in self._quality(c)]
        if trainer.logger is not None and trainer.log_dir is not None:
            rows.append(("logs", trainer.log_dir))
            if tensorboards(trainer):
                rows.append(("to look at them", f"tensorboard --logdir {trainer.log_dir}"))
        if rows:
            print("\n" + "\n".join(align(rows)))

    def _quality(self, callback: SampleQuality) -> list[tuple[str, str]]:
        rows = []
        for metric, history in callback.history.items():
            rows.append((f"{_title(metric)} ({callback.name})", ""))
            ends = dict.fromkeys((history[0], history[-1]))
            rows += [(f"  after {updates:,} generator updates", f"{value:.4g}") for updates, value in ends]
            if metric == "frechet_distance" and self._reference is not None:
                rows.append((f"  {self._reference_name}", f"{self._reference:.4g}"))
            if metric.startswith("frechet_distance") and callback.real_halves is not None:
                rows.append(("  between two halves of the real images", f"{callback.real_halves:.4g}"))
        return rows


def _title(metric: str) -> str:
    """Returns a metric's title, such as "Frechet distance" or "Precision, raw weights"."""
    title = metric.removesuffix("_raw").replace("_", " ").capitalize()
    return f"{title}, raw weights" if metric.endswith("_raw") else title
