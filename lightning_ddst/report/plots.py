"""Figures of a run's logged series: balance, densities of layers, exploration, sample quality, operations.

Every figure is about 900 pixels wide. This module does not use pyplot, and changes no global settings.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from math import ceil
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import numpy as np
from matplotlib import rc_context, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from PIL import Image

from lightning_ddst.report.runs import METRICS, Points, Series, by_pair, of_samples

Array: TypeAlias = NDArray[np.float64]
Looks: TypeAlias = dict[str, Any]
Format = Literal["png", "svg"]
P = ParamSpec("P")
R = TypeVar("R")

_UPDATES = "generator updates"
_WIDTH = 9.0  # inches, at 100 pixels per inch
_STYLE: Looks = {
    "figure.dpi": 100,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.fontsize": 9,
    "text.parse_math": False,  # names of layers may hold dollar signs
    "svg.fonttype": "none",  # keeps text as text
    "svg.hashsalt": "lightning_ddst",  # makes files of equal figures equal
}
# Okabe and Ito's colors, which color-blind readers can distinguish.
_COLORS = {"generator": "#0072B2", "discriminator": "#D55E00"}
_SIGNAL, _BAND, _BEYOND, _QUIET = "#1A1A1A", "#009E73", "#CC79A7", "0.4"
_ROLES = ("generator", "discriminator")
# Known control signals: label, and meaning of a high and of a low value for the discriminator.
_SIGNALS = {
    "balance/ratio": ("balance ratio (BR)", ("too weak", "too strong")),
    "balance/real_sign": ("mean sign of D(real)", ("too strong", "too weak")),
}
MEANINGS = {
    "frechet_distance": "lower is better",
    "kernel_distance": "lower is better",
    "inception_score": "higher is better",
    "precision": "higher is better",
    "recall": "higher is better",
}
# Colors follow the square root of density; otherwise the layers of a sparse network would look the same.
_COLOR_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
_LONGEST_NAME = 32
_MOST_NAMED_ROWS = 48


@contextmanager
def plot_style() -> Iterator[None]:
    """Draws in the package's style inside the context, regardless of the user's style."""
    with rc_context(), style.context(["default", _STYLE]):
        yield


def _in_style(function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with plot_style():
            return function(*args, **kwargs)

    return styled


# ---- all of them ---------------------------------------------------------------------------------------


def figures(series: Series) -> dict[str, Figure]:
    """Draws every figure whose series were logged.

    Args:
        series: Logged series by name; unknown names are ignored.

    Returns:
        Figures by name: "balance", "layer_densities", "exploration" and "flops", prefixed by the name of the pair's
        generator if there are several pairs ("first/balance"), and "quality".
    """
    drawn: dict[str, Figure | None] = {}
    for pair, own in by_pair(series).items():
        for draw in (balance, layer_densities, exploration, flops):
            drawn["/".join(filter(None, (pair, draw.__name__)))] = draw(own, pair)
    drawn["quality"] = quality(series)
    return {name: figure for name, figure in drawn.items() if figure is not None}


@_in_style
def rendered(figure: Figure, form: Format) -> bytes:
    """Renders a figure to a file's contents, always the same for the same figure.

    Args:
        figure: The figure.
        form: "png" or "svg"; in an SVG, text stays text and heat maps are images.
    """
    buffer = io.BytesIO()
    if form == "png":
        Image.fromarray(pixels(figure)).save(buffer, "png", dpi=(100, 100))
    else:
        figure.savefig(buffer, format=form, dpi=200, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


@_in_style
def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Renders a figure to an RGB image, uint8 ``(height, width, 3)``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ---- one by one ----------------------------------------------------------------------------------------


@_in_style
def balance(series: Series, pair: str = "") -> Figure | None:
    """Draws the control signal with its bounds, and the densities.

    Args:
        series: One pair's series.
        pair: Its name, for the title.

    Returns:
        A figure whose signal has gaps where it was undecided, and triangles where it is outside the axes. Series that
        were not logged have no axes. None without signal and densities.
    """
    name, label, meanings = _signal(series)
    densities = {role: series[f"density/{role}"] for role in reversed(_ROLES) if series.get(f"density/{role}")}
    rows = [3.0] * bool(name) + [2.0] * bool(densities)
    if not rows:
        return None
    figure, axes = _figure(1.0 + 0.85 * sum(rows), rows, pair)
    if name:
        ax = axes[0]
        ax.set_title("Balance")
        ax.set_ylabel(label)
        _draw_signal(ax, series, name, label, meanings)
        _legend(ax)
    if densities:
        ax = axes[-1]
        ax.set_title("Density")
        for role, points in densities.items():
            width = 2.0 if role == "discriminator" else 1.0
            _line(ax, points, color=_COLORS[role], label=role, linewidth=width, drawstyle="steps-post")
        ax.set_ylabel("active weights (share)")
        ax.set_ylim(0, 1.08 * max(_most(points) for points in densities.values()))
        _legend(ax)
    _updates_below(axes, [*densities.values(), *([series[name]] if name else [])])
    return figure


@_in_style
def layer_densities(series: Series, pair: str = "") -> Figure | None:
    """Draws the density of every layer over generator updates: a heat map for each network.

    Args:
        series: One pair's series.
        pair: Its name, for the title.

    Returns:
        A figure with one row per layer in the order of the network, columns from one change to the next, and every
        layer's last density next to its row. None without layers, and if every density is always 1.
    """
    layers = {
        name.removeprefix("layer_density/"): points for name, points in series.items() if name.startswith("layer_")
    }
    if all(value == 1 for points in layers.values() for _, value in points):
        return None
    networks = _networks(layers)
    heights = [max(4, min(len(rows), _MOST_NAMED_ROWS)) for rows in networks.values()]
    height = 0.9 + 0.45 * len(networks) + 0.19 * sum(heights)
    figure, axes = _figure(height, [float(rows) for rows in heights], pair)
    steps = sorted({step for points in layers.values() for step, _ in points})
    edges = np.array([*steps, steps[-1] + (int(np.median(np.diff(steps))) if len(steps) > 1 else 1)], dtype=float)
    for ax, (title, rows) in zip(axes, networks.items(), strict=True):
        grid = _aligned(rows.values(), steps)
        changes = _changes(grid)
        mesh = ax.pcolormesh(
            edges[[*changes, -1]],
            np.arange(len(rows) + 1),
            grid[:, changes],
            norm=PowerNorm(0.5, 0, 1),
            cmap="viridis",
            rasterized=True,
        )
        ax.set_title(f"Density of layers, {title}")
        ax.set_facecolor("0.85")
        ax.grid(False)
        ax.invert_yaxis()
        every = ceil(len(rows) / _MOST_NAMED_ROWS)
        ax.set_yticks(np.arange(0, len(rows), every) + 0.5, list(rows)[::every], fontsize=9)
        ax.tick_params("y", length=0)
        margin: Looks = {"transform": ax.get_yaxis_transform(), "fontsize": 8, "color": _QUIET}
        for row in range(0, len(rows), every):
            known = grid[row][np.isfinite(grid[row])]
            if known.size:
                ax.text(1.008, row + 0.5, _density(known[-1]), va="center", **margin)
        ax.text(1.008, -0.1, "last", va="bottom", **margin)
    bar = figure.colorbar(mesh, ax=list(axes), label="density", aspect=6 * height, pad=0.01, ticks=_COLOR_TICKS)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _updates_below(axes, layers.values(), last=float(edges[-1]))
    return figure


@_in_style
def exploration(series: Series, pair: str = "") -> Figure | None:
    """Draws the share of weights that were ever active, and the overlap of masks before and after changes.

    Args:
        series: One pair's series.
        pair: Its name, for the title.

    Returns:
        A figure; None without logged coverage.
    """
    coverages = {role: series[f"coverage/{role}"] for role in _ROLES if series.get(f"coverage/{role}")}
    overlaps = {role: series[f"overlap/{role}"] for role in _ROLES if series.get(f"overlap/{role}")}
    if not coverages:
        return None
    figure, axes = _figure(5.2 if overlaps else 3.4, [3.0, 2.0][: 1 + bool(overlaps)], pair)
    axes[0].set_title("Exploration")
    for role, points in coverages.items():
        _line(axes[0], points, color=_COLORS[role], label=f"{role}, ever active", drawstyle="steps-post")
        if density := series.get(f"density/{role}"):
            how: Looks = {"linestyle": (0, (4, 2)), "linewidth": 1.0, "drawstyle": "steps-post"}
            _line(axes[0], density, color=_COLORS[role], label="active", **how)
    axes[0].set_ylabel("weights (share)")
    axes[0].set_ylim(0, 1.04)
    _legend(axes[0])
    if overlaps:
        axes[1].set_title("Overlap of masks before and after their last change")
        for role, points in overlaps.items():
            _line(axes[1], points, color=_COLORS[role], label=role, drawstyle="steps-post")
        lowest = min(_least(points) for points in overlaps.values())
        axes[1].set_ylim(max(-0.02, lowest - 0.1 * (1.02 - lowest)), 1.02)
        axes[1].set_ylabel("both / either")
        _legend(axes[1])
    _updates_below(axes, [*coverages.values(), *overlaps.values()])
    return figure


@_in_style
def quality(series: Series) -> Figure | None:
    """Draws every logged metric of the samples, with small axes for each metric and kind of features.

    Args:
        series: All logged series.

    Returns:
        A figure with the averaged weights as solid and the generator's own weights as dashed lines. Axes are
        logarithmic if values fall to less than a tenth. None if nothing was measured.
    """
    panels: dict[tuple[str, str], dict[str, Points]] = {}
    for name, points in of_samples(series).items():
        metric, _, features = name.partition("/")
        weights = "raw" if metric.endswith("_raw") else "average"
        panels.setdefault((metric.removesuffix("_raw"), features), {})[weights] = points
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = ceil(len(panels) / columns)
    figure = _empty(0.5 + 2.4 * rows)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(len(panels))]
    figure.supxlabel(_UPDATES, fontsize=10)
    order = sorted(panels, key=lambda panel: METRICS.index(panel[0]))
    for ax, (metric, features) in zip(axes, order, strict=True):
        lines = panels[metric, features]
        both = len(lines) > 1
        for weights, points in lines.items():
            raw = weights == "raw"
            label = "raw weights" if raw else "averaged weights"
            how: Looks = {"linestyle": (0, (3, 1.5)), "color": _QUIET} if raw else {"color": _COLORS["generator"]}
            _line(ax, points, label=label if both else None, marker=".", clip_on=False, **how)
        title = metric.replace("_", " ").capitalize() + (", raw weights" if list(lines) == ["raw"] else "")
        ax.set_title(f"{title}: {_last(lines.get('average') or lines['raw']):.4g}")
        ax.set_ylabel(f"{_short(features)}\n({MEANINGS[metric]})")
        _logarithmic_where_wide(ax, lines.values())
        if both:
            ax.legend(loc="best", frameon=False)
    _updates_below(axes, [points for lines in panels.values() for points in lines.values()], named=False)
    return figure


@_in_style
def flops(series: Series, pair: str = "") -> Figure | None:
    """Draws the training operations so far, relative to those of dense training.

    Args:
        series: One pair's series.
        pair: Its name, for the title.

    Returns:
        A figure; None if they were not logged.
    """
    points = series.get("flops/training_ratio")
    if not points:
        return None
    figure, axes = _figure(2.9, [1.0], pair)
    axes[0].set_title("Training FLOPs so far")
    _line(axes[0], points, color=_SIGNAL, label=f"this run, {_last(points):.1%}", linewidth=2.0)
    axes[0].axhline(1, color=_QUIET, linewidth=1, linestyle=(0, (4, 2)), label="dense training")
    axes[0].set_ylim(0, 1.08 * max(1.0, _most(points)))
    axes[0].set_ylabel("relative to dense")
    _legend(axes[0])
    _updates_below(axes, [points])
    return figure


# ---- the signal ----------------------------------------------------------------------------------------


def _signal(series: Series) -> tuple[str, str, tuple[str, str] | None]:
    """Returns the name of the control signal's series ("" if there is none), its label, and its meanings."""
    controlling = dict(series.get("control/signal", ()))
    for name, (label, meanings) in _SIGNALS.items():
        values = dict(series.get(name, ()))
        if controlling and values and all(values.get(step) == value for step, value in controlling.items()):
            return name, label, meanings if "control/lower" in series else None
    if controlling:
        return "control/signal", "control signal", None
    if series.get("balance/ratio") and "control/lower" not in series:  # measured, but no method resizes by it
        return "balance/ratio", _SIGNALS["balance/ratio"][0], None
    return "", "", None


def _draw_signal(ax: Axes, series: Series, name: str, label: str, meanings: tuple[str, str] | None) -> None:
    points = series[name]
    lower, upper = (_arrays(series.get(f"control/{bound}", ())) for bound in ("lower", "upper"))
    values = _arrays(points)[1]
    if lower[0].size and lower[0].size == upper[0].size:
        low, high = lower[1][-1], upper[1][-1]
        moving = len(set(lower[1])) > 1  # with bounds "auto"
        band = f"band, {low:.2g} to {high:.2g} at the end" if moving else f"band, {low:g} to {high:g}"
        bounds: Looks = {"color": _BAND, "alpha": 0.25, "linewidth": 0, "label": band}
        ax.fill_between(lower[0], lower[1], upper[1], step="post", **bounds)
        values = np.concatenate([values, lower[1], upper[1]])
        if meanings:
            margin: Looks = {"transform": ax.transAxes, "fontsize": 8, "color": _QUIET}
            ax.text(1.008, 1, f"D {meanings[0]}", va="top", **margin)
            ax.text(1.008, 0, f"D {meanings[1]}", va="bottom", **margin)
    bottom, top = _robust_limits(values, lower[1], upper[1])
    ax.set_ylim(bottom, top)
    _line(ax, points, series.get("density/discriminator", ()), color=_SIGNAL, label=label, linewidth=1.2)
    steps, values = _arrays(points)
    steps, values = steps[~np.isnan(values)], values[~np.isnan(values)]
    for beyond, marker, height, far in (
        (values > top, "^", 0.985, f"up to {np.max(values, initial=0):.3g}"),
        (values < bottom, "v", 0.015, f"down to {np.min(values, initial=0):.3g}"),
    ):
        if beyond.any():
            place: Looks = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 5}
            looks: Looks = {"linestyle": "none", "marker": marker, "markersize": 5, "color": _BEYOND}
            ax.plot(steps[beyond], np.full(int(beyond.sum()), height), label=far, **looks, **place)


def _robust_limits(values: Array, *included: Array) -> tuple[float, float]:
    """Returns limits of an axis that ignore a few spikes."""
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    core = np.concatenate([np.quantile(values, (0.05, 0.95)), *included])
    least, most = core.min(), core.max()
    room = 1.5 * (most - least)
    least, most = max(values.min(), least - room), min(values.max(), most + room)
    margin = 0.06 * (most - least) or 0.1 * abs(most) or 0.1
    return float(least - margin), float(most + margin)


# ---- layers --------------------------------------------------------------------------------------------


def _networks(layers: Series) -> dict[str, dict[str, Points]]:
    """Returns the layers of each network by title, under short names; the generator's were logged first."""
    paths = [name.split(".") for name in layers]
    shared = _shared(paths)
    groups: dict[str, dict[str, Points]] = {}
    for name, points in layers.items():
        parts = name.split(".")
        groups.setdefault(".".join(parts[: shared + 1]), {})[".".join(parts[shared + 1 :])] = points
    if len(groups) != len(_ROLES):  # only one network's layers
        groups = {"all layers": dict(layers)}
        return {title: _renamed(rows) for title, rows in groups.items()}
    titles = [role if role == name else f"{role} ({name})" for role, name in zip(_ROLES, groups, strict=True)]
    return {title: _renamed(rows) for title, rows in zip(titles, groups.values(), strict=True)}


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """Returns the number of leading parts that all paths share, without their last parts."""
    shortest = min(len(path) for path in paths) - 1
    return next((place for place in range(shortest) if len({path[place] for path in paths}) > 1), shortest)


def _renamed(rows: dict[str, Points]) -> dict[str, Points]:
    """Renames layers: removes common endings of weights' names, and shortens long names."""
    names = [re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$|_orig$", r"\1\2", name) for name in rows]
    bare = [re.sub(r"(^|\.)weight$", "", name) or name for name in names]
    if len(set(bare)) == len(bare):
        names = bare
    if len(names) > 1 and max(map(len, names)) > _LONGEST_NAME:
        paths = [name.split(".") for name in names]
        shared = _shared(paths)
        names = [".".join(path[shared:]) for path in paths]
    names = [_short(name) for name in names]
    if len(set(names)) < len(names):
        names = [f"{place} {name}" for place, name in enumerate(names)]
    return dict(zip(names, rows.values(), strict=True))


def _short(name: str) -> str:
    """Shortens a name to at most `_LONGEST_NAME` characters: its beginning and its end."""
    if len(name) <= _LONGEST_NAME:
        return name
    head = _LONGEST_NAME // 3
    return f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[head + 1 - _LONGEST_NAME :]}"


def _aligned(rows: Iterable[Points], steps: Sequence[int]) -> Array:
    """Returns values ``(rows, steps)``, NaN where a row has no value at a step."""
    places = {step: place for place, step in enumerate(steps)}
    grid = np.full((len(tuple(rows)), len(steps)), np.nan)
    for row, points in zip(grid, rows, strict=True):
        for step, value in points:
            row[places[step]] = value
    return grid


def _changes(grid: Array) -> list[int]:
    """Returns the first column and those that differ from the one before."""
    known = np.nan_to_num(grid, nan=-1.0)
    return [0, *(np.flatnonzero((known[:, 1:] != known[:, :-1]).any(0)) + 1).tolist()]


def _density(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


# ---- parts of every figure -----------------------------------------------------------------------------


def _empty(height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(height: float, rows: Sequence[float], pair: str) -> tuple[Figure, list[Axes]]:
    """Returns a figure, `height` inches high, with stacked axes that share the x-axis, and a pair's name as title."""
    figure = _empty(height + (0.3 if pair else 0))
    if pair:
        figure.suptitle(pair, x=0.01, ha="left", fontsize=11)
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)
    return figure, list(axes[:, 0])


def _arrays(points: Points) -> tuple[Array, Array]:
    """Returns updates, ascending, and values."""
    ordered = sorted(dict(points).items())
    return np.array([step for step, _ in ordered], dtype=float), np.array([value for _, value in ordered], dtype=float)


def _line(ax: Axes, points: Points, others: Points = (), **looks: Any) -> None:
    """Draws a line with gaps at NaN, and at points of `others` that it lacks.

    Points without a neighbor get a marker, because a line would not show them.
    """
    values = dict(points)
    steps = sorted(values.keys() | dict(others).keys() if values else set())
    y = np.array([values.get(step, np.nan) for step in steps], dtype=float)
    known = np.pad(np.isfinite(y), 1)
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])
    if alone.size and "marker" not in looks:
        looks |= {"marker": "o", "markersize": 3, "markevery": list(alone)}
    ax.plot(np.array(steps, dtype=float), y, **({"linewidth": 1.5} | looks))


def _last(points: Points) -> float:
    return float(_arrays(points)[1][-1])


def _most(points: Points) -> float:
    values = _arrays(points)[1]
    return float(np.max(values[np.isfinite(values)], initial=0.0)) or 1.0


def _least(points: Points) -> float:
    values = _arrays(points)[1]
    return float(np.min(values[np.isfinite(values)], initial=1.0))


def _logarithmic_where_wide(ax: Axes, lines: Iterable[Points]) -> None:
    values = np.concatenate([_arrays(points)[1] for points in lines])
    values = values[np.isfinite(values)]
    if not values.size or values.min() <= 0 or values.max() < 10 * values.min():
        return
    ax.set_yscale("log")
    decades = np.log10(values.max() / values.min())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _legend(ax: Axes) -> None:
    """Draws the legend above the axes, right of the title."""
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=4,
        frameon=False,
        borderaxespad=0.1,
        borderpad=0.2,
        handlelength=1.6,
        columnspacing=1.4,
    )


def _updates_below(
    axes: Sequence[Axes], lines: Iterable[Points], last: float | None = None, named: bool = True
) -> None:
    """Sets the x-axis to generator updates, from 0 to the last point."""
    final = max((float(step) for points in lines for step, _ in points), default=0.0) if last is None else last
    for ax in axes:
        ax.set_xlim(0, final or 1)
        ax.xaxis.set_major_locator(MaxNLocator(8 if named else 5, integer=True, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if named:
        axes[-1].set_xlabel(_UPDATES)
