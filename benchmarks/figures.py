"""Figures of the result pages, from what is in benchmarks/results: transparent, legible on white and on black."""

from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean

from comparisons import (
    Comparison,
    Row,
    distance,
    flops,
    geometric_mean,
    mean_density,
    of,
    of_run,
    of_widths,
    repeated_densities,
    settled,
)
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from rows import rows
from studies import (
    BAND,
    CIFAR_SMALL,
    CIFAR_SMALL_RUNS,
    CLAIMS,
    FASHION,
    METHODS,
    SCALED_RUNS,
    SIZES,
    WIDE,
    WIDE_CLAIMED,
    WIDE_RUNS,
)

from lightning_ddst.report import plots

GRAY = "#787878"
"""Text and axes: contrast above 4 on white and on the dark pages' background."""
# Okabe and Ito's colors, which color-blind readers can distinguish; shapes distinguish kinds of methods.
_LOOKS = {
    "dense": (GRAY, "*"),
    "DDST relaxed": ("#0072B2", "o"),
    "DDST strict": ("#56B4E9", "o"),
    "DDST auto": ("#7A5FC7", "o"),
    "ramp": ("#009E73", "^"),
    "ramp to 0.5": ("#009E73", "v"),
    "RigL, D explores at a fixed density": ("#C9A400", "P"),
    "RigL, strong D": ("#D55E00", "s"),
    "RigL, strong D, twice its learning rate": ("#D55E00", "D"),
    "RigL, balanced D": ("#E69F00", "s"),
    "SET, strong D": ("#CC79A7", "s"),
    "SET, balanced D": ("#CC79A7", "D"),
    "static, strong D": ("0.6", "s"),
    "static, balanced D": ("0.6", "D"),
}
_DARK = 0.3
_SIZES = {"dense": 260}
"""Areas of mean values' markers; a star looks smaller than other shapes of the same area."""
_BALANCE = ("RigL, balanced D", "RigL, strong D", "ramp", "DDST relaxed")


def for_both_modes(figure: Figure) -> Figure:
    """Makes a figure legible on light and dark pages: no background, and gray text, axes and dark lines."""
    figure.patch.set_alpha(0)
    for ax in figure.axes:
        ax.patch.set_alpha(0)
        ax.tick_params(which="both", color=GRAY, labelcolor=GRAY)
        for spine in ax.spines.values():
            spine.set_color(GRAY)
        ax.grid(color=GRAY, alpha=0.25) if any(line.get_visible() for line in ax.get_xgridlines()) else None
    for text in figure.findobj(Text):
        text.set_color(GRAY)
    for line in figure.findobj(Line2D):
        if max(to_rgb(line.get_color())) < _DARK:
            line.set_color(GRAY)
    return figure


def _log_scale(ax: Axes) -> None:
    """Sets a logarithmic axis of distances, with few ticks in plain numbers."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high > 4 * low else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0))
    )
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _points(ax: Axes, run: str, cell: Sequence[Row]) -> None:
    """Draws every seed small, and the geometric mean large."""
    color, marker = _LOOKS[run]
    x, y = [flops(row) for row in cell], [distance(row) for row in cell]
    ax.scatter(x, y, 14, color, marker, alpha=0.6, linewidths=0)
    ax.scatter(sum(x) / len(x), geometric_mean(y), _SIZES.get(run, 90), color, marker, zorder=3)


def _key(runs: Sequence[str]) -> list[Line2D]:
    """Returns legend entries for methods."""
    return [
        Line2D(
            [], [], linestyle="", color=_LOOKS[run][0], marker=_LOOKS[run][1], label=run, ms=12 if run == "dense" else 8
        )
        for run in runs
    ]


def pareto(found: Sequence[Row]) -> Figure:
    """Draws quality over training FLOPs, cell by cell: every seed, and the geometric mean."""
    return _everywhere(found, FASHION, METHODS)


def wide_all(found: Sequence[Row]) -> Figure:
    """Draws the same of the wide networks."""
    return _everywhere(found, WIDE, WIDE_RUNS)


def _everywhere(found: Sequence[Row], settings: Iterable[str], runs: Iterable[str]) -> Figure:
    """Draws every cell of a study on a scale of its own."""
    places = [(setting, density) for setting in settings for density in repeated_densities(found, setting)]
    return _panels(found, places, runs, height=2.9, one_scale=False)


def wide(found: Sequence[Row]) -> Figure:
    """Draws the claim's cells of the wide networks on one scale."""
    return _panels(found, [(next(iter(WIDE)), density) for density in WIDE_CLAIMED], WIDE_RUNS, 3.3, one_scale=True)


def cifar10(found: Sequence[Row]) -> Figure:
    """Draws the same of the narrow SNGAN on CIFAR-10."""
    places = [(CIFAR_SMALL, density) for density in repeated_densities(found, CIFAR_SMALL)]
    return _panels(found, places, CIFAR_SMALL_RUNS, 3.3, one_scale=True)


def widths(found: Sequence[Row]) -> Figure:
    """Draws quality and BR over the size of the networks, for generators at 5 and 10 %."""
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for (top, bottom), density in zip(axes.T, (0.05, 0.1), strict=True):
        bottom.axhspan(*BAND, color=GRAY, alpha=0.25, linewidth=0)
        for run in SCALED_RUNS:
            color, marker = _LOOKS[run]
            cells = {width: of(found, f"width {width}", run, density) for width in SIZES}
            trained = [width for width, cell in cells.items() if cell]
            for ax, value in ((top, distance), (bottom, lambda row: fmean(settled(row)))):
                each = [(width, value(row)) for width in trained for row in cells[width]]
                ax.scatter(*zip(*each, strict=True), 14, color, marker, alpha=0.6, linewidths=0)
                means = [geometric_mean(map(value, cells[width])) for width in trained]
                ax.plot(trained, means, color=color, marker=marker, ms=8)
        top.set_title(f"generator at {density:.0%}")
        _log_scale(top)
        bottom.set_xscale("log")
        bottom.set_xticks(list(SIZES), [_active(found, width, density) for width in SIZES])
        bottom.xaxis.set_minor_formatter(NullFormatter())
        bottom.tick_params(axis="x", which="minor", length=0)
        bottom.set_xlabel("width, active weights of G and of D")
        bottom.set_xlim(min(SIZES) / 1.3, max(SIZES) * 1.3)
    axes[0, 0].set_ylabel("Frechet distance (log), lower is better")
    axes[1, 0].set_ylabel("BR after 500 updates")
    figure.legend(handles=_key(SCALED_RUNS), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _active(found: Sequence[Row], width: int, density: float) -> str:
    """Returns a width, and the active weights of a generator and of DDST auto's discriminator."""
    generator, discriminator = SIZES[width]
    cell = of(found, f"width {width}", "DDST auto", density)
    active = f"{discriminator * fmean(map(mean_density, cell)):,.0f}" if cell else "?"
    return f"{width}\n{generator * density:,.0f}\n{active}"


def _panels(
    found: Sequence[Row], places: Sequence[tuple[str, float]], runs: Iterable[str], height: float, one_scale: bool
) -> Figure:
    """Draws quality over training FLOPs, two panels of a height in inches next to each other."""
    columns = 2
    lines = ceil(len(places) / columns)
    figure = Figure(figsize=(8, height * lines + 1.0), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=one_scale, squeeze=False)
    shown: list[str] = []
    for ax, (setting, density) in zip(axes.flat, places, strict=False):
        for run in ("dense", *runs):
            if cell := of(found, setting, run, 1.0 if run == "dense" else density):
                _points(ax, run, cell)
                shown += [run] * (run not in shown)
        _log_scale(ax)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xlim(0, 1.05)
        ax.set_title(f"{setting}, generator at {density:.0%}")
    for ax in axes.flat[len(places) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("training FLOPs relative to dense")
    figure.supylabel("Frechet distance (log), lower is better", fontsize=10)
    figure.legend(handles=_key(shown), loc="outside lower center", ncols=3, frameon=False)
    return figure


def overall(found: Sequence[Row]) -> Figure:
    """Draws quality and operations of methods relative to the ramp's, over all cells and seeds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    ramps = of_run(found, "ramp")
    for run in CLAIMS:
        comparison = Comparison(of_run(found, run), ramps)
        if comparison.interval is None or comparison.cells < 2:
            continue
        color, marker = _LOOKS[run]
        low, high = comparison.interval
        error = [[comparison.ratio - low], [high - comparison.ratio]]
        ax.errorbar(
            comparison.ratio_of(flops),
            comparison.ratio,
            error,
            color=color,
            marker=marker,
            ms=9,
            label=f"{run} ({comparison.pairs})",
        )
    ax.axhline(1, color=GRAY, alpha=0.5, zorder=0)
    ax.axvline(1, color=GRAY, alpha=0.5, zorder=0)
    _log_scale(ax)
    ax.set_title("Relative to the ramp, over all cells and seeds")
    ax.set_ylabel("distance over the ramp's (log), 95 %")
    ax.set_xlabel("training FLOPs over the ramp's")
    ax.legend(title="run (pairs)", loc="upper left", bbox_to_anchor=(1, 1), frameon=False, alignment="left")
    return figure


def balance(found: Sequence[Row]) -> Figure:
    """Draws BR and the discriminator's density in the first seed's runs, with all images and the generator at 10 %."""
    setting = next(iter(FASHION))
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    top.axhspan(*BAND, color=GRAY, alpha=0.25, linewidth=0, label="DDST's band")
    for run in _BALANCE:
        cell = of(found, setting, run, 0.1)
        if not cell:
            continue
        color, _ = _LOOKS[run]
        label = f"{run} (distance {distance(cell[0]):.1f})"
        top.plot(*zip(*cell[0]["balance_ratio"], strict=True), color=color, label=label)
        bottom.plot(*zip(*cell[0]["discriminator_density"], strict=True), color=color, label=run)
    top.set_title("Balance ratio (BR)")
    top.set_ylim(bottom=0)
    top.set_ylabel("BR over 100 updates")
    bottom.set_title("The discriminator's density")
    bottom.set_ylim(0, 1.05)
    bottom.set_ylabel("density")
    bottom.set_xlabel("generator updates")
    top.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def write(folder: Path) -> None:
    """Writes them as SVG."""
    folder.mkdir(exist_ok=True)
    found = rows("fashion")
    drawn = (
        ("overall", overall, found),
        ("pareto", pareto, found),
        ("balance", balance, found),
        ("wide", wide, rows("wide")),
        ("wide_all", wide_all, rows("wide")),
        ("widths", widths, of_widths()),
        ("cifar10", cifar10, rows("cifar10_small")),
    )
    for name, draw, of_study in drawn:
        with plots.plot_style():
            (folder / f"{name}.svg").write_bytes(plots.rendered(for_both_modes(draw(of_study)), "svg"))
