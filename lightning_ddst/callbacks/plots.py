"""Figures of a run in its loggers."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ddst.callbacks._support.last_fit import LastFit
from lightning_ddst.report.runs import find_source
from lightning_ddst.utils.logging import generator_updates, log_image, shows_images
from lightning_ddst.utils.series import RecordedSeries
from lightning_ddst.utils.states import COUNT, NUMBER, check_state, each, named
from lightning_ddst.utils.validation import check_count


class SparsityPlots(Callback):
    """A callback that logs the figures of ``lightning-ddst plot`` to TensorBoard after validations.

    Weights & Biases and MLflow get them, too; for a CSVLogger they are files in its folder. Their names are
    ``plots/<figure>``. They are drawn once more at the end of training if there are new updates.
    Checkpoints hold the plotted series since the run's first update, so a resumed run draws complete figures. Each
    series keeps at most 2,000 points; longer ones are thinned out evenly.

    Args:
        every_n_validations: Number of validations between drawings; drawing takes seconds.

    Raises:
        ValueError: If `every_n_validations` is not a positive integer.
    """

    def __init__(self, every_n_validations: int = 1) -> None:
        check_count("every_n_validations", every_n_validations)
        self._every = every_n_validations
        self._validations = 0
        self._series = RecordedSeries(find_source)
        self._drawn: int | None = None
        self._last_fit = LastFit()

    def record_scalars(self, values: Mapping[str, float], updates: int) -> None:
        """Records logged values.

        Args:
            values: Values by name.
            updates: Generator updates so far.
        """
        self._series.record(values, updates)

    # ---- drawing ---------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets another module's run."""
        if self._last_fit.starts(pl_module, stage):
            self._series, self._validations, self._drawn = RecordedSeries(find_source), 0, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier run if a new one starts."""
        if not generator_updates(trainer):
            before = {name: [point for point in p if point[0] == 0] for name, p in self._series.points.items()}
            self._series = RecordedSeries(find_source, before)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws after every `every_n_validations`-th validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validations += 1
            if self._validations % self._every == 0:
                self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws if there are new updates."""
        if self._drawn != generator_updates(trainer):
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not shows_images(trainer):
            return
        from lightning_ddst.report import plots  # imported here: training works without Matplotlib

        self._drawn = generator_updates(trainer)
        for name, figure in plots.figures(self._series.points).items():
            log_image(trainer, f"plots/{name}", plots.pixels(figure), self._drawn)

    # ---- saving ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the series logged so far."""
        return {
            "series": {name: list(points) for name, points in self._series.points.items()},
            "validations": self._validations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: For another form of state.
        """
        check_state(self.state_key, state_dict, {"series": named(each((COUNT, NUMBER))), "validations": COUNT})
        if not self._last_fit.restores():
            return
        saved = {name: [(update, value) for update, value in p] for name, p in state_dict["series"].items()}
        self._series = RecordedSeries(find_source, saved)
        self._validations = state_dict["validations"]
