"""A figure of several runs: sample quality over training operations."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lightning_ddst.report.plots import MEANINGS, plot_style
from lightning_ddst.report.results import QualityResults, RunResults
from lightning_ddst.utils.cache import atomic_write

SUFFIXES = (".png", ".svg")

_GRAY = "#808080"  # legible on white and on black
_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "legend.fontsize": 10,
    "grid.color": _GRAY,
    "grid.alpha": 0.3,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GRAY),
}
# Okabe and Ito's colors that stand out from white and from black.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_MEASURED = 0.9
"""Share of a run's updates after which its samples must have been measured, so that both belong together."""
_MARKER = 5.0  # points from the middle of a marker to its edge
_PLACES = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))  # of a name, from its point
_GAP = 6.0  # points between names side by side
_PANEL = 4.2  # inches, at 100 pixels per inch


def tradeoff(runs: Mapping[str, RunResults]) -> Figure:
    """Draws the last value of every metric over the training operations, one point for each run.

    Runs that went on for long after their last measurement are left out, such as interrupted ones.

    Args:
        runs: Results by the run's name.

    Returns:
        A figure with axes for each metric and kind of features, a color and a marker for each method. Operations are
        relative to dense training if all runs are of the same length and networks, or if absolute numbers are unknown.

    Raises:
        ValueError: If no run has one pair of networks, training operations and a metric.
    """
    counted = {name: run for name, run in runs.items() if len(run.pairs) == 1 and run.pair.flops is not None}
    panels: dict[tuple[str, str], dict[str, QualityResults]] = {}
    for name, run in counted.items():
        for each in sorted(run.quality, key=lambda quality: quality.weights, reverse=True):  # "average" last
            update, value = each.values[-1]
            if isfinite(value) and update >= _MEASURED * run.pair.updates:
                panels.setdefault((each.metric, each.features), {})[name] = each
    if not panels:
        raise ValueError("there is nothing to draw: no run has training FLOPs and a metric of SampleQuality.")
    operations, label = _operations(counted)
    methods = list(dict.fromkeys(str(run.pair.method) for run in counted.values()))
    with plot_style(), rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.6 + _PANEL * len(panels)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        headings: list[tuple[Axes, Text, Legend]] = []
        for ax, ((metric, features), measured) in zip(axes, panels.items(), strict=True):
            points = {name: (operations[name], each.values[-1][1]) for name, each in measured.items()}
            for place, method in enumerate(methods):
                of_method = sorted(xy for name, xy in points.items() if str(counted[name].pair.method) == method)
                if not of_method:
                    continue
                xs, ys = [x for x, _ in of_method], [y for _, y in of_method]
                color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
                ax.plot(xs, ys, color=color, marker=marker, markersize=8, linewidth=1, label=method, clip_on=False)
            _reference_line(ax, list(measured.values()))
            title = ax.set_title(f"{metric.replace('_', ' ').capitalize()} after training")
            ax.set_ylabel(f"{features} ({MEANINGS.get(metric, '')})")
            ax.set_xlabel(label)
            if label.endswith("dense training"):
                ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
            ax.margins(x=0.1, y=0.12)
            ax.set_xlim(left=0)
            if MEANINGS.get(metric) == "lower is better":
                _logarithmic(ax, [y for _, y in points.values()])
            legend = ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, borderaxespad=0.1)
            headings.append((ax, title, legend))
        figure.draw_without_rendering()
        for ax, title, legend in headings:
            box = legend.get_window_extent()
            if title.get_window_extent().overlaps(box):
                ax.set_title(title.get_text(), pad=box.height * 72 / figure.dpi + 6)  # above the legend
        figure.draw_without_rendering()  # places of labels depend on the layout
        for ax, measured in zip(axes, panels.values(), strict=True):
            _label(ax, {name: (operations[name], each.values[-1][1]) for name, each in measured.items()})
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure with a transparent background, atomically.

    Args:
        figure: The figure.
        path: A path that ends in one of `SUFFIXES`.

    Raises:
        OSError: If the file cannot be written.
    """
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if path.suffix == ".svg" else {}
    with plot_style(), rc_context(_STYLE), atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=200, transparent=True, metadata=metadata)


def _operations(runs: Mapping[str, RunResults]) -> tuple[dict[str, float], str]:
    flops = {name: run.pair.flops for name, run in runs.items()}
    dense = {each.dense for each in flops.values() if each is not None}
    absolute = {name: each.training for name, each in flops.items() if each is not None and each.training is not None}
    known = [size for size in dense if size is not None]
    if len(absolute) == len(flops) and max(known) > 1.01 * min(known):
        return {name: float(value) for name, value in absolute.items()}, "training FLOPs"
    return {
        name: each.ratio for name, each in flops.items() if each is not None
    }, "training FLOPs relative to dense training"


def _reference_line(ax: Axes, measured: Sequence[QualityResults]) -> None:
    """Draws the distance between two halves of the real images, unless all runs are far from it."""
    halves = next((each.real_halves for each in measured if each.real_halves is not None), None)
    if halves is not None and min(each.values[-1][1] for each in measured) < 10 * halves:
        ax.axhline(halves, color=_GRAY, linestyle=(0, (4, 2)), linewidth=1.2, label="two halves of the real images")


def _logarithmic(ax: Axes, values: Sequence[float]) -> None:
    """Makes the y-axis logarithmic if values differ by a factor of more than 4."""
    if min(values) <= 0 or max(values) < 4 * min(values):
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _label(ax: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each name next to its point, where it covers no marker and no other name."""
    scale = 72 / ax.figure.dpi  # points per pixel
    pixels = {name: ax.transData.transform(xy) for name, xy in points.items()}
    taken = [_box(x * scale, y * scale, 2 * _MARKER, 2 * _MARKER) for x, y in pixels.values()]
    left, bottom, right, top = (float(value) * scale for value in ax.bbox.extents)
    for name, (x, y) in pixels.items():
        probe = ax.text(0, 0, name)
        size = probe.get_window_extent()
        probe.remove()
        width, height = size.width * scale, size.height * scale
        places = [
            (across * (width / 2 + _MARKER + distance), up * (height / 2 + _MARKER + distance))
            for distance in (3, 16, 30, 44)
            for across, up in _PLACES
        ]
        boxes = [_box(x * scale + across, y * scale + up, width + _GAP, height) for across, up in places]
        free = [
            place
            for place, box in enumerate(boxes)
            if box[0] > left and box[1] > bottom and box[2] < right and box[3] < top
            if not any(_overlap(box, other) for other in taken)
        ]
        best = free[0] if free else 0
        taken.append(boxes[best])
        line = {"arrowstyle": "-", "color": _GRAY, "linewidth": 0.8} if best >= len(_PLACES) else None
        how: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "arrowprops": line}
        ax.annotate(name, points[name], places[best], annotation_clip=False, **how)


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
