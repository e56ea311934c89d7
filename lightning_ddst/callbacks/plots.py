"""Figures of a run in TensorBoard."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ddst.callbacks._support.last_fit import LastFit
from lightning_ddst.report.runs import find_source
from lightning_ddst.utils.logging import generator_updates, tensorboards
from lightning_ddst.utils.states import COUNT, NUMBER, check_state, each, named
from lightning_ddst.utils.validation import check_count

_MOST_POINTS = 2000


class SparsityPlots(Callback):
    """A callback that logs the figures of ``lightning-ddst plot`` to TensorBoard after validations.

    Their names are ``plots/<figure>``. They are drawn once more at the end of training if there are new updates.
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
        self._series: dict[str, list[tuple[int, float]]] = {}
        self._drawn: int | None = None
        self._last_fit = LastFit()

    def record_scalars(self, values: Mapping[str, float], updates: int) -> None:
        """Records logged values.

        Args:
            values: Values by name.
            updates: Generator updates so far.
        """
        for name, value in values.items():
            if find_source(name) is not None:
                points = self._series.setdefault(name, [])
                if points and points[-1][0] == updates:
                    points.pop()
                points.append((updates, float(value)))
                if len(points) > _MOST_POINTS:
                    self._thin_out(find_source(name))

    def _thin_out(self, what: str | None) -> None:
        """Reduces series that are logged together to about half the allowed points, at the same updates."""
        together = {name: points for name, points in self._series.items() if find_source(name) == what}
        updates = sorted({update for points in together.values() for update, _ in points})
        width = (updates[-1] - updates[0]) / (_MOST_POINTS // 2)
        last_of_each = {int((update - updates[0]) / width): update for update in updates}
        kept = {updates[0], *last_of_each.values()}
        for name, points in together.items():
            self._series[name] = [point for point in points if point[0] in kept]

    # ---- drawing ---------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets another module's run."""
        if self._last_fit.starts(pl_module, stage):
            self._series, self._validations, self._drawn = {}, 0, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier run if a new one starts."""
        if not generator_updates(trainer):
            self._series = {name: [p for p in points if p[0] == 0] for name, points in self._series.items()}

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
        writers = tensorboards(trainer) if trainer.is_global_zero else []
        if not writers:
            return
        from lightning_ddst.report import plots  # imported here: training works without Matplotlib

        self._drawn = generator_updates(trainer)
        for name, figure in plots.figures(self._series).items():
            for writer in writers:
                writer.add_image(f"plots/{name}", plots.pixels(figure), self._drawn, dataformats="HWC")

    # ---- saving ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the series logged so far."""
        return {
            "series": {name: list(points) for name, points in self._series.items()},
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
        self._series = {name: [(update, value) for update, value in p] for name, p in state_dict["series"].items()}
        self._validations = state_dict["validations"]
