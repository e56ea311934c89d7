"""Representations of a sparse run: a line, a summary, a figure."""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_ddst.attached.readings import RunReadings
from lightning_ddst.attached.summary import Summary, summarize
from lightning_ddst.utils.series import RecordedSeries

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunDisplay(RunReadings):
    """The representations of a sparse run before, during and after it."""

    _given: Mapping[str, Any]  # the arguments that differ from their defaults
    _series: RecordedSeries

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"

    def _repr_html_(self) -> str:
        """Returns the arguments and the summary as HTML, for notebooks."""
        return f"<code>{escape(repr(self))}</code><br>{self.summary()._repr_html_()}"

    def summary(self) -> Summary:
        """Summarizes the run as it is now: networks, masked weights, densities, plan, results so far.

        Returns:
            An object that ``print`` shows as a table of text, and a notebook as HTML.
        """
        return summarize(self, self._training)

    def plot(self) -> "Figure":
        """Draws the control signal (the balance ratio by default) with its bounds, and both densities.

        The figure shows what this process has logged so far; of a run that was resumed, the part since then.
        ``lightning-ddst plot`` draws whole runs from their logs.

        Returns:
            A Matplotlib figure: ``callback.plot().savefig("balance.png")``.

        Raises:
            RuntimeError: If nothing was logged yet.
        """
        from lightning_ddst.report import plots  # imported here: training works without Matplotlib

        figure = plots.balance(self._series.points)
        if figure is None:
            raise RuntimeError("plot(): nothing was logged yet; values come with the first logged generator update.")
        return figure
