"""The results page's figures, from what is in benchmarks/results."""

from collections.abc import Sequence
from pathlib import Path

from comparisons import Comparison, Row, distance, flops, geometric_mean, of, of_run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from rows import rows
from studies import BAND, CLAIMS, FASHION, METHODS

from lightning_ddst.report import plots

# Okabe and Ito's colours, which the colour-blind tell apart; shapes tell kinds of runs apart.
_LOOKS = {
    "dense": ("0.5", "*"),
    "DDST relaxed": ("#000000", "o"),
    "DDST strict": ("#56B4E9", "o"),
    "DDST auto": ("#0072B2", "o"),
    "ramp": ("#009E73", "^"),
    "ramp to 0.5": ("#009E73", "v"),
    "RigL, D explores at a fixed density": ("#F0E442", "s"),
    "RigL, strong D": ("#D55E00", "s"),
    "RigL, strong D, twice its learning rate": ("#D55E00", "D"),
    "RigL, balanced D": ("#E69F00", "s"),
    "SET, strong D": ("#CC79A7", "s"),
    "SET, balanced D": ("#CC79A7", "D"),
    "static, strong D": ("0.7", "s"),
    "static, balanced D": ("0.7", "D"),
}
_BALANCE = ("RigL, balanced D", "RigL, strong D", "ramp", "DDST relaxed")
_LEAST_SEEDS = 2


def _log_scale(ax: Axes) -> None:
    """Distances on a logarithmic axis, in plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(ScalarFormatter())


def pareto(found: Sequence[Row]) -> Figure:
    """Quality over training FLOPs: every seed, and the geometric mean of a kind of runs that has several."""
    places = [
        (setting, density)
        for setting in FASHION
        for density in sorted({row["density"] for row in found if row["setting"] == setting and row["density"] < 1})
        if sum(len(of(found, setting, run, density)) >= _LEAST_SEEDS for run in METHODS) > 1
    ]
    figure = Figure(figsize=(9, 3.4 * len(places) + 0.4), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(len(places), squeeze=False)[:, 0] if places else []
    for ax, (setting, density) in zip(axes, places, strict=True):
        for run in ("dense", *METHODS):
            cell = of(found, setting, run, 1.0 if run == "dense" else density)
            if not cell:
                continue
            color, marker = _LOOKS[run]
            x, y = [flops(row) for row in cell], [distance(row) for row in cell]
            ax.scatter(x, y, 14, color, marker, alpha=0.6)
            label = f"{run} ({len(cell)})"
            ax.scatter(sum(x) / len(x), geometric_mean(y), 90, color, marker, label=label, edgecolors="white")
        _log_scale(ax)
        ax.tick_params("y", which="minor", labelsize=8)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xlim(0, 1.05)
        ax.set_title(f"{setting}, generator at {density:.0%}")
        ax.set_ylabel("Frechet distance (log)")
        ax.set_xlabel("training FLOPs beside dense training")
        ax.legend(title="run (seeds)", loc="upper left", bbox_to_anchor=(1, 1), frameon=False, alignment="left")
    return figure


def overall(found: Sequence[Row]) -> Figure:
    """Quality and operations of kinds of runs beside the ramp's, over all cells and seeds."""
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
    ax.axhline(1, color="0.8", zorder=0)
    ax.axvline(1, color="0.8", zorder=0)
    _log_scale(ax)
    ax.set_title("Beside the ramp, over all cells and seeds")
    ax.set_ylabel("distance over the ramp's (log), 95 %")
    ax.set_xlabel("training FLOPs over the ramp's")
    ax.legend(title="run (pairs)", loc="upper left", bbox_to_anchor=(1, 1), frameon=False, alignment="left")
    return figure


def balance(found: Sequence[Row]) -> Figure:
    """BR and the discriminator's density over the first seed's runs, with all images and the generator at 10 %."""
    setting = next(iter(FASHION))
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    top.axhspan(*BAND, color="0.85", label="DDST's band")
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
    for name, draw in (("overall", overall), ("pareto", pareto), ("balance", balance)):
        with plots.plot_style():
            (folder / f"{name}.svg").write_bytes(plots.rendered(draw(found), "svg"))
